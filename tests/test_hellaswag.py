"""hellaswag.py against an independent scorer: one row at a time, fp32, full logits, straight from the two definitions."""

import copy
import dataclasses
import functools
import json
import math
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import fineweb
import hellaswag
from conftest import ROOT, refused, run, save_llama2_tokenizer
from train_gpt2 import GPT, GPTConfig

WORDS = ("the a man woman boy dog is are was then and with into over across holding shows throws water paint snow "
         "wooden kitchen camera crowd ball rope bicycle hair slowly carefully quickly together again begins continues "
         "starts talking demonstrating how to clean cut place your of in on it he she they while behind café naïve 東京 "
         "2.5 don't dog's self-made (optional) e.g. 100% ...").split()


def sentence(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def make_examples(n, seed=0):
    """Varied examples in the authors' format: ActivityNet and WikiHow style, short and long, endings of any length."""
    rng, examples = random.Random(seed), []
    for i in range(n):
        if i % 3:  # ActivityNet: a sentence, then the subject of the next one
            ctx_a = sentence(rng, *rng.choice([(1, 3), (8, 25), (30, 60)])).capitalize() + "."
            ctx_b = rng.choice(["he", "the man", "she", "people in the crowd", ""])
            label, endings = "Cleaning windows", [sentence(rng, *rng.choice([(1, 1), (4, 12), (10, 30)])) + "." for _ in range(4)]
        else:      # WikiHow: marks in brackets, two-sentence endings
            ctx_a = (f"[header] How to {sentence(rng, 3, 8)} [title] {sentence(rng, 4, 9).capitalize()}. [step] "
                     f"{sentence(rng, 8, 40).capitalize()}.")
            ctx_b = rng.choice(["", "", "you"])
            label = "Finance and Business"
            endings = [rng.choice(["", "[substeps] "]) + sentence(rng, 5, 20).capitalize() + rng.choice([".", ". [title] "])
                       + sentence(rng, 3, 20) for _ in range(4)]
        if i == 7:
            ctx_a = sentence(rng, 150, 150)   # alone longer than the tests' models read
        if i == 8:
            endings[2] = sentence(rng, 180, 180)
        if i == 9:
            ctx_a, ctx_b, endings = "Fits", "", [sentence(rng, 60, 60), sentence(rng, 140, 140), "x", sentence(rng, 80, 80)]
        if i == 10:
            ctx_a, ctx_b = ctx_a + " [step]", ""   # cleaned: a context that ends with a space
        if i == 11:
            endings[1] = endings[0]                # a tie, of two wrong endings: rounding may decide it
        if i == 12:
            endings = ["[substeps]", "off.", "s the", "[title] on."]
        ctx = f"{ctx_a} {ctx_b}" if ctx_b else ctx_a
        examples.append({"ind": i, "activity_label": label, "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": ctx, "split": "val",
                         "split_type": "indomain", "label": rng.randrange(4), "endings": endings, "source_id": f"x~{i}"})
        if i == 11:
            examples[-1]["label"] = 3
    return examples


def reference_cleanup(text):
    text = text.strip().replace(" [title]", ". ")
    while (match := re.search(r"\[[^\]\n]*\]", text)):
        text = text[:match.start()] + text[match.end():]
    return re.sub(" {2}", " ", text)


def reference_scores(logits_of, example, encode, style, block_size):
    """Four summed losses and the four that acc_norm compares, of one example; logits_of: (1, T) -> (1, T, V)."""
    sums, normed = [], []
    for ending in example["endings"]:
        if style == "completion":
            context, continuation = encode(example["ctx"]), encode(" " + ending)
        else:
            query = reference_cleanup(example["activity_label"] + ": " + example["ctx_a"] + " " + example["ctx_b"].capitalize())
            choice = reference_cleanup(ending)
            pair = query.rstrip(), query[len(query.rstrip()):] + " " + choice
            context = encode(pair[0])
            continuation = encode(pair[0] + pair[1])[len(context):]
        row = (context + continuation)[-(block_size + 1):]
        scored = min(len(continuation), block_size)
        logits = logits_of(torch.tensor([row[:-1]]))[0].float()
        losses = F.cross_entropy(logits, torch.tensor(row[1:]), reduction="none")[-scored:]
        sums.append(losses.double().sum().item())
        normed.append(sums[-1] / (scored if style == "completion" else len(choice) or 1e-300))
    return sums, normed


def randomize(model, std):
    """Larger weights than at initialisation, so that the endings' losses differ as a trained model's do."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=std)
    return model.eval()


@functools.cache
def build(kind):
    import transformers as hf

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 vocab_size=VOCAB, max_position_embeddings=128, bos_token_id=0, eos_token_id=0)
    gpt2_sizes = dict(n_layer=2, n_head=4, n_embd=64, vocab_size=VOCAB)
    config = {
        "gpt2": hf.GPT2Config(**gpt2_sizes, n_positions=128, bos_token_id=0, eos_token_id=0),
        "llama": hf.LlamaConfig(**sizes),
        "mistral": hf.MistralConfig(**sizes, sliding_window=24),
        "bloom": hf.BloomConfig(n_layer=2, n_head=4, hidden_size=64, vocab_size=VOCAB, max_position_embeddings=128),
        "granite": hf.GraniteConfig(**sizes, logits_scaling=0.5),
        "neo": hf.GPTNeoConfig(hidden_size=64, num_layers=2, num_heads=4, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0,
                               attention_types=[[["global", "local"], 1]], window_size=24, max_position_embeddings=128),
        "mixed": hf.Qwen3Config(**sizes, head_dim=16, use_sliding_window=True, sliding_window=24, max_window_layers=1),
        "ours": GPTConfig(**gpt2_sizes, block_size=128),
        "ours-window": GPTConfig(**gpt2_sizes, block_size=128, window=24),
    }[kind]
    if kind.startswith("ours"):
        return randomize(GPT(config), 0.1)
    return randomize(hf.AutoModelForCausalLM.from_config(config), 0.1)


EXAMPLES = make_examples(120)
VOCAB = 2003  # GPT-2's tokens folded into fewer ids: the tests' models stay small
KINDS = ["gpt2", "llama", "mistral", "ours", "ours-window"]
SCALED = ["granite"]  # does something to its logits
UNSHARED = ["bloom", "mixed", "neo"]  # whose attention is not a matter of positions and one mask: scored row by row


@functools.cache
def gpt2_tokenizer():
    return fineweb.get_tokenizer("gpt2")


def encode(text):
    return [i % VOCAB for i in gpt2_tokenizer().encode(text)]


@functools.cache
def reference(kind, style):
    """Summed and normed losses of EXAMPLES: two (n, 4) arrays."""
    model = build(kind)
    logits_of = model if hasattr(model, "hidden_states") else lambda idx: model(idx, use_cache=False).logits
    with torch.no_grad():
        scores = [reference_scores(logits_of, example, encode, style, 128) for example in EXAMPLES]
    return np.array([s for s, _ in scores]), np.array([m for _, m in scores])


@torch.no_grad()
def make_items(model, style, examples=EXAMPLES, encode=encode):
    packed = hellaswag.is_ours(model) or hellaswag.reads_packed_rows(model, examples, encode, torch.device("cpu"))
    block_size, _ = hellaswag.model_limits(model)
    return [hellaswag.make_item(example, encode, style, block_size, packed) for example in examples]


def are_packed(items):
    return any(len(item.rows) == 1 for item in items)


@torch.no_grad()
def our_scores(model, items):
    """Summed and normed losses of items of EXAMPLES: two (n, 4) arrays."""
    sums, normed = np.empty((len(items), 4)), np.empty((len(items), 4))
    for start in range(0, len(items), 16):
        batch = items[start:start + 16]
        rows = [item.example["ind"] for item in batch]
        sums[rows] = hellaswag.score_batch(model, batch, torch.device("cpu"))
        with np.errstate(divide="ignore"):  # an ending of no characters
            normed[rows] = sums[rows] / np.array([item.lengths for item in batch])
    return sums, normed


def expected_result(kind, style):
    """What evaluate must return, apart from ties within 1e-4 (which EXAMPLES do not decide)."""
    labels = np.array([example["label"] for example in EXAMPLES])
    acc, acc_norm = [float((losses.argmin(1) == labels).mean()) for losses in reference(kind, style)]
    return {"acc": acc, "acc_norm": acc_norm, "n": len(EXAMPLES)}


def check_predictions(kind, style):
    items = make_items(build(kind), style)
    assert are_packed(items) == (kind not in UNSHARED)
    for ours, expected in zip(our_scores(build(kind), items), reference(kind, style)):
        finite = np.isfinite(ours)
        assert (expected[~finite] > 1e200).all()  # an ending of no characters can never win
        np.testing.assert_allclose(ours[finite], expected[finite], rtol=2e-5, atol=1e-4)
        best = np.sort(expected, axis=1)
        clear = best[:, 1] - best[:, 0] > 1e-4
        assert clear.sum() > 110
        assert (ours.argmin(1) == expected.argmin(1))[clear].all()
    assert len(set(expected.argmin(1))) == 4  # the models do choose


# scope="module": the tests of one model follow one another, so that a process makes its references once
@pytest.mark.parametrize("style", hellaswag.STYLES)
@pytest.mark.parametrize("kind", KINDS, scope="module")
def test_predictions_are_the_references(kind, style):
    check_predictions(kind, style)


@pytest.mark.parametrize("kind", SCALED + UNSHARED)
def test_predictions_of_models_that_differ(kind):
    check_predictions(kind, "completion")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "ours"], scope="module")
def test_evaluate(kind):
    model = build(kind)
    results = {style: expected_result(kind, style) for style in hellaswag.STYLES}
    model.train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    for style, expected in results.items():
        # the compiled model is scored through the raw one; with its wrapper on, every shape would compile anew
        for scored in (model, torch.compile(model)):
            result = hellaswag.evaluate(scored, EXAMPLES, encode, style)
            assert {name: result[name] for name in expected} == pytest.approx(expected)
            p = result["acc"]
            assert result["acc_stderr"] == pytest.approx(np.std([1.0] * round(120 * p) + [0.0] * round(120 * (1 - p)), ddof=1)
                                                         / math.sqrt(120))
        long = [any(len(encode(example["ctx"])) + len(encode(" " + ending)) > 129 for ending in example["endings"])
                for example in EXAMPLES]
        if style == "completion":
            assert result["truncated"] == sum(long) >= 3
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "ours"], scope="module")
def test_bfloat16_is_within_a_point(kind):
    examples = make_examples(400, seed=5)
    model = build(kind)
    exact = hellaswag.evaluate(model, examples, encode)
    half = copy.deepcopy(model).bfloat16()
    assert are_packed(make_items(half, "completion", examples))
    rounded = hellaswag.evaluate(half, examples, encode)
    for name in ("acc", "acc_norm"):
        assert rounded[name] == pytest.approx(exact[name], abs=0.01)


def evaluate_as_rank(rank, world_size, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    results = {kind: {style: hellaswag.evaluate(build(kind), EXAMPLES, encode, style) for style in hellaswag.STYLES}
               for kind in ("gpt2", "llama", "ours")}
    results["one example"] = hellaswag.evaluate(build("ours"), EXAMPLES[:1], encode)
    with open(f"{folder}/{rank}.json", "w") as f:
        json.dump(results, f)
    dist.destroy_process_group()


def test_two_ranks_count_as_one(tmp_path):
    mp.start_processes(evaluate_as_rank, (2, str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for kind in ("gpt2", "llama", "ours"):
        for style in hellaswag.STYLES:
            assert first[kind][style] == hellaswag.evaluate(build(kind), EXAMPLES, encode, style)
            assert first[kind][style]["acc_norm"] == pytest.approx(expected_result(kind, style)["acc_norm"])
    assert first["one example"] == hellaswag.evaluate(build("ours"), EXAMPLES[:1], encode)  # the other rank has none


def test_a_packed_row():
    """The picture in hellaswag.py, with letters for tokens."""
    context, endings = [ord("T"), ord("m")], [list(b"rh."), list(b"sas."), list(b"s."), list(b"it.")]
    ids, positions, segments, targets, indices = hellaswag.pack(context, endings)
    assert bytes(ids.tolist()) == b"Tm" + b"rh" + b"sas" + b"s" + b"it"
    assert positions.tolist() == [0, 1, 2, 3, 2, 3, 4, 2, 2, 3]
    assert segments.tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 4, 4]
    assert bytes(targets.tolist()) == b"rh." + b"sas." + b"s." + b"it."
    assert indices.tolist() == [1, 2, 3, 1, 4, 5, 6, 1, 7, 1, 8, 9]
    for window in (0, 2):
        mask = hellaswag.visibility_mask(positions[None], segments[None], window)
        seen = [bytes(ids[row].tolist()) for row in mask[0, 0]]
        assert seen == ([b"T", b"Tm", b"Tmr", b"Tmrh", b"Tms", b"Tmsa", b"Tmsas", b"Tms", b"Tmi", b"Tmit"] if not window else
                        [b"T", b"Tm", b"mr", b"rh", b"ms", b"sa", b"as", b"ms", b"mi", b"it"])


def test_an_ending_of_no_tokens_scores_nothing():
    for packed in (True, False):
        example = {**EXAMPLES[0], "ctx": "a", "endings": ["", "b", "c", "d"]}
        item = hellaswag.make_item(example, lambda text: list(text.strip().encode()), "completion", 128, packed)
        with torch.no_grad():
            losses = hellaswag.score_batch(build("ours"), [item], torch.device("cpu"))[0]
        assert losses[0] == 0 and (losses[1:] > 0).all()


def test_the_context_runs_once_and_nothing_is_padded_much():
    """Counts the tokens that go through the model, and the positions that go through its head."""
    class Counting(GPT):
        def hidden_states(self, idx, *args):
            self.read += idx.numel()
            return super().hidden_states(idx, *args)

        def logits(self, h):
            self.scored += h.numel() // h.shape[-1]
            return super().logits(h)

    model = copy.deepcopy(build("ours"))
    model.__class__, model.read, model.scored = Counting, 0, 0
    examples = [example for example in make_examples(300, seed=2) if len(encode(example["ctx"])) < 60][:100]
    hellaswag.evaluate(model, examples, encode)
    contexts = sum(len(encode(example["ctx"])) for example in examples)
    endings = sum(min(128, len(encode(" " + ending))) for example in examples for ending in example["endings"])
    assert model.scored == endings  # the head sees nothing else
    least = contexts + endings - 4 * len(examples)
    assert least <= model.read < 1.25 * least


# -----------------------------------------------------------------------------
# data

def test_the_hubs_format_and_the_limit(tmp_path, monkeypatch):
    import datasets

    rows = [dict(example, label=str(example["label"])) for example in EXAMPLES]
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or datasets.Dataset.from_list(rows))
    path = tmp_path / "val.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    assert hellaswag.load_examples() == hellaswag.load_examples(str(path))
    assert hellaswag.load_examples(limit=3) == hellaswag.load_examples(str(path), limit=3) == hellaswag.load_examples()[:3]
    assert asked[0] == (("Rowan/hellaswag",), {"split": "validation"})
    datasets.Dataset.from_list(rows).to_json(str(tmp_path / "hub.jsonl"))  # what the error below says to do
    assert hellaswag.load_examples(str(tmp_path / "hub.jsonl")) == hellaswag.load_examples()
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no\nnetwork")))
    with pytest.raises(fineweb.UserError, match="HellaSwag was not downloaded .*local file.*to_json"):
        hellaswag.load_examples()


BAD = {  # a field, what stands there (...: nothing), what is said of it
    "no label": ("label", ..., "label None"), "label ''": ("label", "", "label ''"), "label 4": ("label", 4, "label 4"),
    "label True": ("label", True, "label True"), "three endings": ("endings", list("abc"), "not four 'endings'"),
    "empty ending": ("endings", ["a", "b", " ", "d"], "an ending is empty"),
    "number": ("endings", [5, "b", "c", "d"], "an ending is empty or not text"), "no ctx": ("ctx", ..., "no text in 'ctx'"),
    "empty ctx": ("ctx", "", "'ctx' or an ending is empty"), "ctx_b": ("ctx_b", None, "no text in 'ctx_b'")}
BAD_LINES = {"not JSON": b'{"ctx": "a', "not UTF-8": b'{"ctx": "\xff"}', "no object": b"[]"}


@pytest.mark.parametrize("kind", [*BAD, *BAD_LINES])
def test_malformed_examples_name_the_line(kind, tmp_path):
    line, problem = BAD_LINES.get(kind), ""
    if kind in BAD:
        name, value, problem = BAD[kind]
        fields = {**EXAMPLES[0], name: value}
        line = json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(EXAMPLES[1]).encode() + b"\n" + line + b"\n")
    with pytest.raises(fineweb.UserError, match=r"bad\.jsonl, line 2: ") as caught:
        hellaswag.load_examples(str(path))
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_blank_lines_are_skipped_and_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "val.jsonl"
    path.write_text("\n".join(["", json.dumps(EXAMPLES[0]), " ", json.dumps(EXAMPLES[1]), "not read"]))
    assert hellaswag.load_examples(str(path), limit=2) == EXAMPLES[:2]
    path.write_text("\n")
    with pytest.raises(fineweb.UserError, match=r"val\.jsonl: no examples in it"):
        hellaswag.load_examples(str(path))


def test_cleaning_is_the_harness_own():
    """Worked by hand from lm-evaluation-harness's definition."""
    example = {"ctx": "x", "ctx_a": "[header] How to swim [title] Go in. [step] Breathe.", "ctx_b": "the Man",
               "activity_label": "Sports", "endings": ["[substeps] Dive  in. [title] Rest. ", "b", "c", "d"]}
    spelled = fineweb.get_tokenizer("byte").encode
    context, endings, lengths = hellaswag.render(example, spelled, "harness")
    assert bytes(context).decode() == "Sports: How to swim. Go in. Breathe. The man"
    assert bytes(endings[0]).decode() == "  Dive in.. Rest." and lengths[0] == len(" Dive in.. Rest.")
    context, endings, lengths = hellaswag.render(example, spelled, "completion")
    assert bytes(context).decode() == "x" and bytes(endings[1]).decode() == " b" and lengths[1] == 2


def test_endings_follow_their_context_by_one_space(tmp_path):
    """Also where the tokenizer puts a space before any text by itself: the tokens are those of the whole text."""
    save_llama2_tokenizer(tmp_path, ["the", "man", "runs", "home"])
    example = {"ctx": "the man", "endings": ["runs home", "runs", "home", "the man runs"]}
    for name in (str(tmp_path), "gpt2", "byte"):
        encode = fineweb.get_tokenizer(name).encode
        context, endings, _ = hellaswag.render(example, encode, "completion")
        for ids, ending in zip(endings, example["endings"]):
            assert context + ids == encode("the man " + ending)


# -----------------------------------------------------------------------------
# the command

def save_folder(kind, folder):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokenizer = fineweb.get_tokenizer("byte")
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=256, vocab_size=257,
                                           bos_token_id=256, eos_token_id=256))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=257,
                                             num_attention_heads=2, max_position_embeddings=256, bos_token_id=256,
                                             eos_token_id=256))
    randomize(model, 0.2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("kind, style", [("gpt2", "completion"), ("llama", "harness")])
def test_command_line(kind, style, tmp_path):
    model, tokenizer = save_folder(kind, tmp_path / "model")
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES[:30]))
    out, err = run("hellaswag.py", "--model", tmp_path / "model", "--data", tmp_path / "val.jsonl", "--style", style,
                   "--limit", 20, "--dtype", "float32", "--device", "cpu")
    result = json.loads(out.splitlines()[-1])
    assert list(result) == ["model", "style", "dtype", "n", "acc", "acc_norm", "acc_stderr", "acc_norm_stderr",
                            "truncated", "examples_per_second"]
    assert "acc_norm" in err and "20/20" in err  # the progress bar's running accuracy
    with torch.no_grad():
        scores = [reference_scores(lambda idx: model(idx).logits, example, tokenizer.encode, style, 256)
                  for example in EXAMPLES[:20]]
    for name, k in (("acc", 0), ("acc_norm", 1)):
        right = [int(np.argmin(s[k])) == example["label"] for s, example in zip(scores, EXAMPLES)]
        assert result[name] == pytest.approx(np.mean(right))
    assert result["n"] == 20 and result["truncated"] > 0 and result["style"] == style


@pytest.mark.parametrize("model_type, parts", [
    ("gpt2", {}),
    ("llama", dict(rope=True, rmsnorm=True, swiglu=True)),
    ("mistral", dict(rope=True, rmsnorm=True, swiglu=True, bias=False, window=24)),
    ("qwen3", dict(rope=True, rmsnorm=True, swiglu=True, bias=False, qk_norm=True, window=24))])
def test_a_checkpoint_is_scored_as_our_own_model(model_type, parts, tmp_path):
    model = randomize(GPT(GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=256, vocab_size=257, **parts)), 0.1)
    tokenizer = fineweb.get_tokenizer("byte")
    assert model.save_pretrained(str(tmp_path), tokenizer) == model_type
    for style in hellaswag.STYLES:
        opened, encode = hellaswag.open_model(str(tmp_path), style)
        items = make_items(opened, style, EXAMPLES[:24], encode)
        assert are_packed(items)
        expected = our_scores(model, make_items(model, style, EXAMPLES[:24], tokenizer.encode))
        for scores, ours in zip(our_scores(opened, items), expected):
            np.testing.assert_allclose(scores, ours, rtol=1e-4)


def test_a_checkpoint_of_our_own_type_is_for_eval(tmp_path):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=257, rope=True))
    assert model.save_pretrained(str(tmp_path / "model")) == "train_gpt2"
    (tmp_path / "val.jsonl").write_text(json.dumps(EXAMPLES[0]) + "\n")
    line = refused("hellaswag.py", "--model", tmp_path / "model", "--data", tmp_path / "val.jsonl")
    assert f"python train_gpt2.py eval --checkpoint {tmp_path / 'model'}" in line


def test_train_gpt2_is_never_imported(tmp_path, monkeypatch):
    save_folder("gpt2", tmp_path / "model")
    (tmp_path / "val.jsonl").write_text(json.dumps(EXAMPLES[0]) + "\n")
    monkeypatch.setitem(sys.modules, "train_gpt2", None)  # to import it is an error now
    monkeypatch.delitem(sys.modules, "hellaswag")         # so that it is imported once more
    out, _ = run("hellaswag.py", "--model", tmp_path / "model", "--data", tmp_path / "val.jsonl", "--device", "cpu")
    assert json.loads(out.splitlines()[-1])["n"] == 1


@pytest.mark.parametrize("has_links", [True, False])
def test_a_runs_folder_is_its_newest_checkpoint(has_links, tmp_path):
    for step in ("step_000002", "step_000010"):
        save_folder("gpt2", tmp_path / "log" / step)
    if has_links:
        (tmp_path / "log/latest").symlink_to("step_000010")
    else:
        (tmp_path / "log/latest").write_text("step_000010")
    (tmp_path / "log/step_000002/config.json").write_text("{")  # not opened
    (tmp_path / "val.jsonl").write_text(json.dumps(EXAMPLES[0]) + "\n")
    for model in ("log", "log/", "log/latest", tmp_path / "log", "log/step_000010"):
        out, _ = run("hellaswag.py", "--model", model, "--data", "val.jsonl", "--device", "cpu", cwd=tmp_path)
        assert json.loads(out.splitlines()[-1])["model"] == str(model)


def test_python_that_does_not_look_beside_the_script(tmp_path):
    """`python -I`, and PYTHONSAFEPATH=1 as some clusters set it."""
    for flags, env in ((["-I"], {}), ([], {"PYTHONSAFEPATH": "1"})):
        done = subprocess.run([sys.executable, *flags, ROOT / "hellaswag.py", "--limit", "-1"], cwd=tmp_path,
                              env={**os.environ, **env}, capture_output=True, text=True)
        assert done.stderr.strip() == "error: --limit -1: 0 means all, else a number of examples", done.stderr


def test_flags():
    out, _ = run("hellaswag.py", "--help")
    for field in dataclasses.fields(hellaswag.Flags):
        assert f"--{field.name}" in out
    assert "only so many of the first examples" in out and "completion,harness" in out
    _, err = run("hellaswag.py", "--style", "both", expect=2)
    assert "completion" in err and "harness" in err
    assert "--limit -1: 0 means all" in refused("hellaswag.py", "--limit", -1)


def test_wrong_input_is_one_line(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    (tmp_path / "bad.jsonl").write_text("{}\n")
    (tmp_path / "val.jsonl").write_text(json.dumps(EXAMPLES[0]) + "\n")
    for flags, expected in ((["--model", folder, "--data", tmp_path / "val.jsonl"], "no config.json"),
                            (["--data", tmp_path / "bad.jsonl"], "bad.jsonl, line 1"),
                            (["--data", tmp_path / "none.jsonl"], "none.jsonl: No such file")):
        assert expected in refused("hellaswag.py", *flags)


# -----------------------------------------------------------------------------
# device and dtype

@pytest.fixture
def without_torchrun(monkeypatch):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_each_process_of_torchrun_has_its_own_device(without_torchrun, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hellaswag.pick_device("cuda:5") == "cuda:5"
    assert hellaswag.pick_device("cuda") == hellaswag.pick_device("auto") == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert hellaswag.pick_device("cuda") == hellaswag.pick_device("auto") == "cuda:3"
    assert hellaswag.pick_device("cpu") == "cpu"
    with pytest.raises(fineweb.UserError, match="--device cuda:1: .*one device each with --device cuda"):
        hellaswag.pick_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # fewer than processes
    for name in ("cuda", "auto"):
        with pytest.raises(fineweb.UserError, match="--device cuda:3: this machine has 2 CUDA devices; .*--device cpu"):
            hellaswag.pick_device(name)


def test_a_device_that_is_not_here_is_refused(without_torchrun, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert hellaswag.pick_device("auto") == hellaswag.pick_device("cpu") == "cpu"
    for name, problem in [("cuda", "--device cuda:0: this machine has 0 CUDA devices"),
                          ("cuda:1", "--device cuda:1: this machine has 0 CUDA devices"),
                          ("mps", "--device mps: not available here"),
                          ("gpu", "--device gpu: not one of auto, cpu, cuda, cuda:N, mps"),
                          ("cuda:", "--device cuda:: not one of")]:
        assert problem in refused("hellaswag.py", "--device", name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert hellaswag.pick_device("auto") == hellaswag.pick_device("mps") == "mps"


MATMUL = (8, 16, 32)


def test_auto_is_the_faster_dtype_of_a_cpu(chip):
    def pick():
        return hellaswag.pick_dtype("auto", "cpu", MATMUL, without_bfloat16=torch.float16)
    for name in ("amx_bf16", "avx512_bf16", "bf16"):
        chip(2.5, 1.0, **{name: True})
        assert pick() == (torch.bfloat16, "bfloat16: 2.5 times as fast as float32 on this chip")
        chip(1.0, 1.7, **{name: True})
        assert pick() == (torch.float32, "float32: 1.7 times as fast as bfloat16 on this chip")
    chip(1.09, 1.0, bf16=True)  # its rounding is not worth so little
    assert pick()[0] == torch.float32
    chip(1.11, 1.0, bf16=True)
    assert pick()[0] == torch.bfloat16
    chip(None, None, avx2=True, bf16=False)  # is not even timed
    assert pick() == (torch.float32, "")


def test_auto_on_gpus_and_given_dtypes(monkeypatch, chip):
    def supported(native):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)

    supported(True)
    assert hellaswag.pick_dtype("auto", "cuda", MATMUL, without_bfloat16=torch.float16)[0] == torch.bfloat16
    supported(False)
    assert hellaswag.pick_dtype("auto", "cuda", MATMUL, without_bfloat16=torch.float16)[0] == torch.float16
    assert hellaswag.pick_dtype("auto", "cuda", MATMUL)[0] == torch.float32
    assert hellaswag.pick_dtype("auto", "mps", MATMUL, without_bfloat16=torch.float16)[0] == torch.float32
    chip(None, None, bf16=True)  # what is given is not timed
    for name in ("bfloat16", "float16", "float32"):
        for device_type in ("cpu", "cuda", "mps"):
            assert hellaswag.pick_dtype(name, device_type, MATMUL) == (getattr(torch, name), "")


@pytest.mark.parametrize("seconds, tries", [(0.0001, 800), (0.01, 8), (0.04, 3), (10, 3)])
def test_timing_the_chip_takes_a_moment_only(seconds, tries, monkeypatch):
    """By a clock that only the matmul moves: 0.08 s, or three matmuls where they take longer."""
    now = [0.0]

    def linear(x, weight, known=F.linear):
        now[0] += seconds if len(now) % 2 else 2 * seconds  # as a busy machine takes longer now and then
        now.append(known(x, weight).dtype)
    monkeypatch.setattr(hellaswag.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(hellaswag.F, "linear", linear)
    for dtype in (torch.float32, torch.bfloat16):
        now[:] = [0.0]
        assert hellaswag.matmul_seconds(dtype, 8, 16, 32) == pytest.approx(seconds)
        assert set(now[1:]) == {dtype} and len(now) - 1 <= tries
