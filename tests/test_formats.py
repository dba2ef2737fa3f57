"""Model folders: which are opened by Transformers and which as our own, what a folder says of its ends of text, shapes
that no flag makes, and who may read the files."""
import json
import os
import shutil
import sys

import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling,
                          LlamaConfig, LlamaForCausalLM, pipeline)

import fineweb
import train_gpt2
from conftest import SMALL, log_lines, refused, run
from test_model import randomise, relative
from train_gpt2 import GPT, GPTConfig

SHAPE = dict(n_layer=2, n_head=4, n_embd=32, block_size=48, vocab_size=257)
LLAMA = dict(rope=True, rmsnorm=True, swiglu=True)
LLAMA_SHAPE = dict(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                   max_position_embeddings=48, bos_token_id=256, eos_token_id=256)
IDX = torch.arange(2 * 48).view(2, 48)


def make_llama(**options):
    torch.manual_seed(0)
    return randomise(LlamaForCausalLM(LlamaConfig(**{**LLAMA_SHAPE, **options})))


def edit(path, **changes):
    """Changes keys of a JSON file; ... takes one out."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def edit_weights(folder, change):
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def same_logits(ours, theirs):
    return relative(ours.eval()(IDX), theirs.float().eval()(IDX).logits) < 1e-4


# -----------------------------------------------------------------------------
# whose folder it is

@pytest.mark.parametrize("form", [{}, LLAMA, dict(rope=True)], ids=["gpt2", "llama", "own"])
@pytest.mark.parametrize("tokenizer", ["byte", None])
def test_our_folders_need_no_transformers(form, tokenizer, tmp_path, monkeypatch):
    model = randomise(GPT(GPTConfig(**SHAPE, **form)))
    model.save_pretrained(tmp_path, tokenizer and fineweb.get_tokenizer(tokenizer))
    monkeypatch.setitem(sys.modules, "transformers", None)  # to import it is an error now
    opened = GPT.from_pretrained(tmp_path)
    assert opened.config == model.config and torch.equal(opened.eval()(IDX), model.eval()(IDX))
    if tokenizer:
        out, _ = run("train_gpt2.py", "sample", "--checkpoint", tmp_path, "--prompt", "to be", "--max_new_tokens", 4)
        assert out.startswith("to be")


def test_a_run_goes_on_without_transformers(tmp_path, small_shards, monkeypatch):
    flags = [*SMALL, "--data", small_shards, "--out_dir", tmp_path / "log", "--max_steps"]
    run("train_gpt2.py", *flags, 3, "--checkpoint_every", 3)
    monkeypatch.setitem(sys.modules, "transformers", None)
    run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log", "--max_steps", 5)
    assert [line["step"] for line in log_lines(tmp_path / "log", "train")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("form", [{}, LLAMA], ids=["gpt2", "llama"])
def test_a_folder_of_ours_that_transformers_saved_again(form, tmp_path):
    """In half precision and parts, without tokenizer files; then with a vocabulary that has grown."""
    randomise(GPT(GPTConfig(**SHAPE, **form))).save_pretrained(tmp_path / "ours", fineweb.get_tokenizer("byte"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    model, tokenizer = train_gpt2.open_model(tmp_path / "again")
    assert same_logits(model, theirs) and tokenizer.name == "byte"
    words = AutoTokenizer.from_pretrained(tmp_path / "ours")
    words.add_tokens(["<user>", "<bot>"])
    theirs.resize_token_embeddings(len(words))
    for part in (theirs, words):
        part.save_pretrained(tmp_path / "grown")
    model, tokenizer = train_gpt2.open_model(tmp_path / "grown")
    assert same_logits(model, theirs) and tokenizer.encode("<bot>a") == [258, 97]


# -----------------------------------------------------------------------------
# models of others

@pytest.mark.parametrize("kind", ["bin", "float16", "bfloat16"])
def test_files_of_every_kind(kind, tmp_path):
    theirs = make_llama()
    if kind == "bin":
        theirs.config.save_pretrained(tmp_path)
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        theirs.to(getattr(torch, kind)).save_pretrained(tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert same_logits(GPT.from_pretrained(tmp_path), theirs)


def test_a_head_that_is_not_the_one_said_to_be_tied(tmp_path):
    """It is what its weights are, as in Transformers; and so it is saved."""
    theirs = make_llama()
    theirs.save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs/config.json", tie_word_embeddings=True)
    ours = GPT.from_pretrained(tmp_path / "theirs")
    assert not ours.config.tied and same_logits(ours, theirs)
    assert same_logits(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"))
    ours.save_pretrained(tmp_path / "ours")
    assert same_logits(GPT.from_pretrained(tmp_path / "ours"), AutoModelForCausalLM.from_pretrained(tmp_path / "ours"))


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    """The hub's cache has one model in safetensors and one in a .bin, without a network."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    theirs = make_llama()
    for name in ("new", "old"):
        folder = tmp_path / f"models--someone--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("0" * 40)
        theirs.save_pretrained(folder / "snapshots" / ("0" * 40))
    torch.save(theirs.state_dict(), folder / "snapshots" / ("0" * 40) / "pytorch_model.bin")
    (folder / "snapshots" / ("0" * 40) / "model.safetensors").unlink()
    for name in ("new", "old"):
        assert same_logits(GPT.from_pretrained(f"someone/{name}"), theirs)
    assert "someone/none: no such folder, and the Hugging Face hub gave no such model" in refused(
        "train_gpt2.py", "sample", "--checkpoint", "someone/none")


DAMAGED = {
    "lacking": (lambda weights: weights.pop("model.norm.weight"), "lack weights, such as model.norm.weight"),
    "misshapen": (lambda weights: weights.update({"lm_head.weight": torch.zeros(200, 32)}),
                  "lm_head.weight has shape [200, 32], by config.json [257, 32]"),
    "left over": (lambda weights: weights.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32)}),
                  "should not hold model.layers.2.mlp.up_proj.weight")}


@pytest.mark.parametrize("kind", DAMAGED)
def test_wrong_weights_of_others_are_named(kind, tmp_path):
    """Transformers makes up what is missing or misshapen, and leaves out the rest."""
    change, says = DAMAGED[kind]
    make_llama().save_pretrained(tmp_path)
    edit_weights(tmp_path, change)
    assert says in refused("train_gpt2.py", "sample", "--checkpoint", tmp_path)


def test_a_torn_file_of_others_is_one_line(tmp_path):
    make_llama().save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-5])
    assert f"{tmp_path}: Transformers cannot open it" in refused("train_gpt2.py", "sample", "--checkpoint", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refused("train_gpt2.py", "sample", "--checkpoint", tmp_path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 1000, 3000, 20_000, -1])
def test_torn_weights_of_ours_are_named(size, tmp_path):
    GPT(GPTConfig(**SHAPE)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path}: not a whole safetensors file" in refused("train_gpt2.py", "sample", "--checkpoint", tmp_path)
    path.unlink()
    assert f"{path}: not there" in refused("train_gpt2.py", "sample", "--checkpoint", tmp_path)


# -----------------------------------------------------------------------------
# ends of text

ENDS = {  # what the two files say, ... where a key is missing; what ends a text; what config.json says when it is saved
    "null": (dict(eos_token_id=None), None, [], None),
    "null, and bos and pad": (dict(eos_token_id=None, bos_token_id=None, pad_token_id=0), None, [], None),
    "null in both": (dict(eos_token_id=None), dict(eos_token_id=None), [], None),
    "null in generation_config": (dict(eos_token_id=7), dict(eos_token_id=None), [], 7),
    "only in generation_config": (dict(eos_token_id=None), dict(eos_token_id=9), [9], None),
    "missing": (dict(eos_token_id=...), None, [2], 2),  # Llama's own
    "missing in generation_config": (dict(eos_token_id=7), dict(temperature=0.6), [7], 7),
    "a list": (dict(eos_token_id=[7, 9]), None, [7, 9], [7, 9]),
    "an empty list": (dict(eos_token_id=[]), None, [], []),
    "pad is the end": (dict(eos_token_id=7, pad_token_id=7), None, [7], 7),
    "both": (dict(eos_token_id=7), dict(eos_token_id=[9, 11]), [9, 11], 7),
}


@pytest.mark.parametrize("case", ENDS)
def test_ends_of_text_are_read_and_written_as_they_are(case, tmp_path):
    keys, generation, ends, written = ENDS[case]
    make_llama().save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs/config.json", **keys)
    path = tmp_path / "theirs/generation_config.json"
    path.write_text(json.dumps(generation)) if generation else path.unlink()
    opened = GPT.from_pretrained(tmp_path / "theirs")
    opened.save_pretrained(tmp_path / "ours")
    for model in (opened, GPT.from_pretrained(tmp_path / "ours")):
        assert model.end_ids == ends
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.config.eos_token_id == written
    for name in {"bos_token_id", "pad_token_id"} & keys.keys():
        assert getattr(again.config, name) == keys[name]


def test_a_model_without_an_end_writes_on(tmp_path):
    """It says the vocabulary's last token, which ends a text where nothing is said of it, and "a" by turns."""
    theirs = make_llama()
    with torch.no_grad():
        for layer in theirs.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        theirs.lm_head.weight.zero_()
        theirs.lm_head.weight[[97, 256]] = theirs.model.embed_tokens.weight[[256, 97]]
    theirs.config.eos_token_id = theirs.generation_config.eos_token_id = None
    theirs.save_pretrained(tmp_path / "theirs")
    GPT.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    expected = theirs.generate(torch.tensor([[97]]), attention_mask=torch.ones(1, 1), max_new_tokens=6, do_sample=False)
    assert expected.tolist() == [[97, 256, 97, 256, 97, 256, 97]]
    for name in ("theirs", "ours"):
        assert torch.equal(GPT.from_pretrained(tmp_path / name).generate(torch.tensor([[97]]), 6, temperature=0), expected)


# -----------------------------------------------------------------------------
# shapes that no flag makes

@pytest.mark.parametrize("shape, model_type", [
    (dict(n_head=3, head_dim=8), "train_gpt2"), (dict(head_dim=16), "train_gpt2"), (dict(n_hidden=50), "gpt2"),
    (dict(tied=False), "gpt2"), (dict(eot=3), "gpt2"), (dict(norm_eps=1e-3), "gpt2"), (dict(n_kv_head=2), "train_gpt2"),
    (dict(LLAMA, n_head=3, head_dim=8), "train_gpt2"), (dict(LLAMA, head_dim=10), "llama"),
    (dict(LLAMA, bias=False, window=5, n_head=3, head_dim=8), "mistral"),
    (dict(LLAMA, bias=False, qk_norm=True, n_head=5, head_dim=6), "qwen3"),
    (dict(LLAMA, rope_theta=500.0, tied=False, norm_eps=1e-3, n_hidden=50, eot=3, n_kv_head=1), "llama"),
    (dict(LLAMA, bias=False, window=60, tied=False, rope_theta=500.0), "mistral"),
    (dict(LLAMA, bias=False, window=1, qk_norm=True, tied=False, norm_eps=1e-3, eot=0), "qwen3"),
], ids=str)
def test_shapes_that_no_flag_makes(shape, model_type, tmp_path):
    """Each is saved so that Transformers opens it with equal logits, or as our own type."""
    torch.manual_seed(0)
    model = randomise(GPT(GPTConfig(**{**SHAPE, **shape})))
    assert model.save_pretrained(tmp_path) == model_type
    assert GPT.from_pretrained(tmp_path).config == model.config
    if model_type != "train_gpt2":
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert theirs.config.model_type == model_type and same_logits(model, theirs)


# -----------------------------------------------------------------------------
# what others do with a checkpoint

@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
@pytest.mark.parametrize("tokenizer", ["byte", "folder"])
def test_the_umask_says_who_reads_a_checkpoint(umask, mode, tokenizer, text_file, tmp_path):
    if tokenizer == "folder":
        fineweb.get_tokenizer("byte").save_pretrained(tmp_path / "tokenizer")
        tokenizer = tmp_path / "tokenizer"
    before = os.umask(umask)
    try:
        run("train_gpt2.py", *SMALL, "--max_steps", 1, "--checkpoint_every", 1, "--data", text_file, "--tokenizer", tokenizer,
            "--out_dir", tmp_path / "log", "--tensorboard")
    finally:
        os.umask(before)
    paths = [tmp_path / "log", *(tmp_path / "log").rglob("*")]
    files = {path.name: oct(path.stat().st_mode & 0o777) for path in paths if path.is_file()}
    assert {"config.json", "model.safetensors", "train_state.pt", "tokenizer.json", "log.jsonl"} < files.keys()
    assert set(files.values()) == {oct(mode)}, files
    assert {oct(path.stat().st_mode & 0o777) for path in paths if path.is_dir()} == {oct(0o777 & ~umask)}


@pytest.mark.parametrize("form", [{}, LLAMA], ids=["gpt2", "llama"])
def test_batches_are_padded(form, tmp_path):
    """In a pipeline, by the tokenizer, and by the collator, which leaves the pad token out of the labels."""
    torch.manual_seed(0)
    model = randomise(GPT(GPTConfig(**SHAPE, **form)))
    model.save_pretrained(tmp_path, fineweb.get_tokenizer("byte"))
    texts = ["ROMEO:", "But soft, what light", "O"]
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    how = dict(max_new_tokens=12, do_sample=False)
    assert write(texts, batch_size=3, **how) == [write(text, **how) for text in texts]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (3, 20) and batch["attention_mask"].sum(dim=1).tolist() == [6, 20, 1]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([tokenizer(text) for text in texts])
    assert torch.equal(batch["labels"] != -100, batch["attention_mask"] == 1)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs(input_ids=torch.tensor([[256, 5, 6]]), labels=torch.tensor([[256, 5, 6]])).loss.backward()
    assert theirs.get_input_embeddings().weight.grad[256].any()  # end-of-text is trained: config.json names no pad


def test_a_runs_folder_is_its_newest_checkpoint(text_file, tmp_path):
    run("train_gpt2.py", *SMALL, "--max_steps", 4, "--checkpoint_every", 2, "--data", text_file, "--tokenizer", "byte",
        "--out_dir", tmp_path / "log")
    shutil.rmtree(tmp_path / "log/best", ignore_errors=True)
    loss = log_lines(tmp_path / "log", "val")[-1]["loss"]
    for folder in (tmp_path / "log", tmp_path / "log/step_000004"):
        texts = run("train_gpt2.py", "sample", "--checkpoint", folder, "--max_new_tokens", 5)
        assert texts == run("train_gpt2.py", "sample", "--checkpoint", tmp_path / "log/step_000004", "--max_new_tokens", 5)
        out, _ = run("train_gpt2.py", "eval", "--checkpoint", folder, "--device", "cpu")  # the run's data and its tokens
        assert f"{text_file}: validation loss" in out and abs(float(out.split("loss ")[1].split()[0]) - loss) < 5e-3
    out, _ = run("train_gpt2.py", *SMALL[10:], "--init_from", tmp_path / "log", "--data", text_file, "--max_steps", 1,
                 "--total_batch_size", 512, "--out_dir", tmp_path / "tuned")
    assert f"{tmp_path / 'log'}, fine-tuned" in out
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}: no model is here" in refused("train_gpt2.py", "sample", "--checkpoint", tmp_path / "empty")
