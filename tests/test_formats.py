"""Model folders: which are opened by Transformers and which as our own, what a folder says of its ends of text, shapes
that no flag makes, and who may read the files."""
import json
import os
import shutil
import sys

import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, GPT2Config, GPT2LMHeadModel,
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
