"""hellaswag.py against an independent scorer: one row at a time, fp32, full logits, straight from the two definitions."""

import copy
import functools
import json
import math
import random
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import fineweb
import hellaswag
from conftest import refused, run, save_llama2_tokenizer
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
            endings[1] = endings[0]                # a tie: the first counts
        if i == 12:
            endings = ["[substeps]", "off.", "s the", "[title] on."]
        ctx = f"{ctx_a} {ctx_b}" if ctx_b else ctx_a
        examples.append({"ind": i, "activity_label": label, "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": ctx, "split": "val",
                         "split_type": "indomain", "label": rng.randrange(4), "endings": endings, "source_id": f"x~{i}"})
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
    import transformers as hf  # each model's code is loaded when it is named

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 vocab_size=VOCAB, max_position_embeddings=128, bos_token_id=0, eos_token_id=0)
    own = dict(n_layer=2, n_head=4, n_embd=64, block_size=128, vocab_size=VOCAB)
    model = {
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_head=4, n_embd=64, n_positions=128, vocab_size=VOCAB)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**sizes, sliding_window=24)),
        "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(n_layer=2, n_head=4, hidden_size=64, vocab_size=VOCAB,
                                                            max_position_embeddings=128)),
        "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**sizes, logits_scaling=0.5)),
        "neo": lambda: hf.GPTNeoForCausalLM(hf.GPTNeoConfig(hidden_size=64, num_layers=2, num_heads=4, vocab_size=VOCAB,
                                                            attention_types=[[["global", "local"], 1]], window_size=24,
                                                            max_position_embeddings=128)),
        "mixed": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes, head_dim=16, use_sliding_window=True, sliding_window=24,
                                                            max_window_layers=1)),
        "ours": lambda: GPT(GPTConfig(**own)),
        "ours-window": lambda: GPT(GPTConfig(**own, window=24)),
    }[kind]()
    return randomize(model, 0.1)


EXAMPLES = make_examples(120)
VOCAB = 2003  # GPT-2's tokens folded into fewer ids: the tests' models stay small
KINDS = ["gpt2", "llama", "mistral", "ours", "ours-window"]
SCALED = ["granite"]  # does something to its logits
UNSHARED = ["bloom", "mixed", "neo"]  # whose attention is not a matter of positions and one mask: scored row by row


@functools.cache
def encode():
    tokenizer = fineweb.get_tokenizer("gpt2")
    return lambda text: [i % VOCAB for i in tokenizer.encode(text)]


@functools.cache
def reference(kind, style):
    """Summed and normed losses of EXAMPLES: two (n, 4) arrays."""
    model = build(kind)
    logits_of = model if hasattr(model, "hidden_states") else lambda idx: model(idx, use_cache=False).logits
    with torch.no_grad():
        scores = [reference_scores(logits_of, example, encode(), style, 128) for example in EXAMPLES]
    return np.array([s for s, _ in scores]), np.array([m for _, m in scores])


@torch.no_grad()
def takes_branches(model, style, examples=EXAMPLES):
    items = [hellaswag.prepare(i, example, encode(), style, 128) for i, example in enumerate(examples)]
    return hellaswag.takes_branches(model, items, torch.device("cpu"))


def our_scores(model, style, examples=EXAMPLES):
    sums, normed = np.empty((len(examples), 4)), np.empty((len(examples), 4))
    with torch.no_grad():
        for indices, losses, means, _ in hellaswag.score(model, examples, encode(), style, torch.device("cpu")):
            sums[indices], normed[indices] = losses, means
    return sums, normed


def expected_result(kind, style):
    """What evaluate must return, apart from ties within 1e-4 (which EXAMPLES do not decide)."""
    labels = np.array([example["label"] for example in EXAMPLES])
    acc, acc_norm = [float((losses.argmin(1) == labels).mean()) for losses in reference(kind, style)]
    return {"acc": acc, "acc_norm": acc_norm, "n": len(EXAMPLES)}


def check_predictions(kind, style):
    assert takes_branches(build(kind), style) == (kind not in UNSHARED)
    for ours, expected in zip(our_scores(build(kind), style), reference(kind, style)):
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
    model.train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    for style in hellaswag.STYLES:
        expected = expected_result(kind, style)
        # the compiled model is scored through the raw one; with its wrapper on, every shape would compile anew
        for scored in (model, torch.compile(model)):
            result = hellaswag.evaluate(scored, EXAMPLES, encode(), style)
            assert {name: result[name] for name in expected} == pytest.approx(expected)
            p = result["acc"]
            assert result["acc_stderr"] == pytest.approx(np.std([1.0] * round(120 * p) + [0.0] * round(120 * (1 - p)), ddof=1)
                                                         / math.sqrt(120))
        long = [any(len(encode()(example["ctx"])) + len(encode()(" " + ending)) > 129 for ending in example["endings"])
                for example in EXAMPLES]
        if style == "completion":
            assert result["truncated"] == sum(long) >= 3
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "ours"], scope="module")
def test_bfloat16_is_within_a_point(kind):
    examples = make_examples(400, seed=5)
    model = build(kind)
    exact = hellaswag.evaluate(model, examples, encode())
    half = copy.deepcopy(model).bfloat16()
    assert takes_branches(half, "completion", examples)
    rounded = hellaswag.evaluate(half, examples, encode())
    for name in ("acc", "acc_norm"):
        assert rounded[name] == pytest.approx(exact[name], abs=0.01)


def run_rank(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    results = {kind: {style: hellaswag.evaluate(build(kind), EXAMPLES, encode(), style) for style in hellaswag.STYLES}
               for kind in ("gpt2", "llama", "ours")}
    results["one example"] = hellaswag.evaluate(build("ours"), EXAMPLES[:1], encode())
    with open(f"{folder}/{rank}.json", "w") as f:
        json.dump(results, f)
    dist.destroy_process_group()


def test_two_ranks_count_as_one(tmp_path):
    mp.start_processes(run_rank, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for kind in ("gpt2", "llama", "ours"):
        for style in hellaswag.STYLES:
            assert first[kind][style] == hellaswag.evaluate(build(kind), EXAMPLES, encode(), style)
            assert first[kind][style]["acc_norm"] == pytest.approx(expected_result(kind, style)["acc_norm"])
    assert first["one example"] == hellaswag.evaluate(build("ours"), EXAMPLES[:1], encode())  # the other rank has none


def test_the_context_runs_once_and_nothing_is_padded_much():
    """Counts the tokens that go through the model, and the positions that go through its head."""
    class Counting(type(build("ours"))):
        def hidden_states(self, idx, cache=None):
            self.read += idx.numel()
            return super().hidden_states(idx, cache)

        def logits(self, h):
            self.scored += h.numel() // h.shape[-1]
            return super().logits(h)

    model = copy.deepcopy(build("ours"))
    model.__class__, model.read, model.scored = Counting, 0, 0
    examples = [example for example in make_examples(300, seed=2) if len(encode()(example["ctx"])) < 60][:100]
    hellaswag.evaluate(model, examples, encode())
    contexts = sum(len(encode()(example["ctx"])) for example in examples)
    endings = sum(min(128, len(encode()(" " + ending))) for example in examples for ending in example["endings"])
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


BAD = {"no label": lambda e: e.pop("label"), "label ''": lambda e: e.update(label=""), "label 4": lambda e: e.update(label=4),
       "label True": lambda e: e.update(label=True), "three endings": lambda e: e["endings"].pop(),
       "empty ending": lambda e: e["endings"].__setitem__(2, " "), "number": lambda e: e["endings"].__setitem__(0, 5),
       "no ctx": lambda e: e.pop("ctx"), "empty ctx": lambda e: e.update(ctx=""), "ctx_b": lambda e: e.update(ctx_b=None)}


@pytest.mark.parametrize("line", [*BAD, "not JSON", "not UTF-8", "no object"])
def test_malformed_examples_name_the_line(line, tmp_path):
    example = copy.deepcopy(EXAMPLES[0])
    if line in BAD:
        BAD[line](example)
    text = {"not JSON": b'{"ctx": "a', "not UTF-8": b'{"ctx": "\xff"}', "no object": b"[]"}.get(line, json.dumps(example).encode())
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(EXAMPLES[1]).encode() + b"\n" + text + b"\n")
    with pytest.raises(fineweb.UserError, match=r"bad\.jsonl, line 2: ") as caught:
        hellaswag.load_examples(str(path))
    assert "\n" not in str(caught.value)


def test_cleaning_is_the_harness_own():
    """Worked by hand from lm-evaluation-harness's definition."""
    example = {"ctx": "x", "ctx_a": "[header] How to swim [title] Go in. [step] Breathe.", "ctx_b": "the Man",
               "activity_label": "Sports", "endings": ["[substeps] Dive  in. [title] Rest. ", "b", "c", "d"]}
    spelled = lambda text: list(text.encode())
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
    assert list(result) == ["model", "style", "n", "acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "truncated",
                            "examples_per_second"]
    assert "acc_norm" in err  # the progress bar's running accuracy
    with torch.no_grad():
        scores = [reference_scores(lambda idx: model(idx).logits, example, tokenizer.encode, style, 256)
                  for example in EXAMPLES[:20]]
    for name, k in (("acc", 0), ("acc_norm", 1)):
        right = [int(np.argmin(s[k])) == example["label"] for s, example in zip(scores, EXAMPLES)]
        assert result[name] == pytest.approx(np.mean(right))
    assert result["n"] == 20 and result["truncated"] > 0 and result["style"] == style


def test_wrong_input_is_one_line(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    (tmp_path / "bad.jsonl").write_text("{}\n")
    (tmp_path / "val.jsonl").write_text(json.dumps(EXAMPLES[0]) + "\n")
    for flags, expected in ((["--model", folder, "--data", tmp_path / "val.jsonl"], "no config.json"),
                            (["--data", tmp_path / "bad.jsonl"], "bad.jsonl, line 1"),
                            (["--data", tmp_path / "none.jsonl"], "none.jsonl: No such file")):
        assert expected in refused("hellaswag.py", *flags)
