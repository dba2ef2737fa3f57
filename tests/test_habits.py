"""What users do with runs: data that moved, folders that are named as models, models with special tokens of their own,
tokenizers of other people, hints. Each through the command line, with the right value."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

import fineweb
import train_gpt2
from conftest import ROOT, SMALL, log_lines, losses, refused, run, save_llama2_tokenizer, spawn, wait_for
from train_gpt2 import GPT, sample_token

WORDS = ["to", "be", "or", "not", "that", "is", "the", "question", "a", "king", "and", "of"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer folder of a few words, and a text in them."""
    folder = tmp_path_factory.mktemp("words")
    save_llama2_tokenizer(folder / "tokenizer", WORDS)
    order = np.random.default_rng(0).integers(len(WORDS), size=6000)
    (folder / "text.txt").write_text(" ".join(WORDS[i] for i in order))
    return folder


# -----------------------------------------------------------------------------
# data that moved, and data that changed

@pytest.mark.parametrize("kind", ["shards", "text"])
def test_moved_data_is_accepted_and_other_data_refused(kind, small_shards, text_file, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    if kind == "shards":
        shutil.copytree(small_shards, here)
    else:
        shutil.copy(text_file, here)
    flags = ["--preset", "tiny", *SMALL, "--checkpoint_every", 3, "--out_dir", tmp_path / "log"]
    run("train_gpt2.py", *flags, "--data", here)
    expected = losses(tmp_path / "log")
    shutil.rmtree(tmp_path / "log" / "step_000006")
    os.rename(here, there)
    resume = ["--resume", "--out_dir", tmp_path / "log"]
    error = refused("train_gpt2.py", *resume)
    assert str(here) in error and "--data" in error and "moved" in error
    run("train_gpt2.py", *resume, "--data", there)
    assert losses(tmp_path / "log") == expected
    run("train_gpt2.py", *resume)  # the newest checkpoint knows the new place
    change(there)
    before = (tmp_path / "log" / "log.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "log" / "step_000006")
    error = refused("train_gpt2.py", *resume, "--data", there)
    assert str(there) in error and "has other data" in error
    assert (tmp_path / "log" / "log.jsonl").read_bytes() == before


def change(path):
    """One token in the middle of a text, the last one of a shard: no length tells."""
    if path.is_dir():
        shard = path / "edufineweb_train_000002.npy"
        tokens = np.load(shard)
        tokens[-1] ^= 1
        np.save(shard, tokens)
    else:
        text = path.read_text()
        path.write_text(text[:20_000] + ("x" if text[20_000] != "x" else "y") + text[20_001:])


# -----------------------------------------------------------------------------
# models of others

def test_a_folder_named_gpt2_goes_before_the_name(words, tmp_path):
    size = fineweb.get_tokenizer(str(words / "tokenizer")).vocab_size
    config = LlamaConfig(vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                         max_position_embeddings=32, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "gpt2")
    for file in (words / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "gpt2")
    out, _ = run("train_gpt2.py", "--preset", "tiny", "--init_from", "gpt2", "--data", words / "text.txt", "--max_steps", 2,
                 "--total_batch_size", 64, "--eval_tokens", 64, "--sample_every", 0, "--optimizer", "adamw", cwd=tmp_path)
    assert "gpt2, fine-tuned" in out and f"{size * 16 * 2 + 16 * 16 * 4 + 3 * 16 * 32 + 3 * 16:,} parameters" in out
    out, _ = run("train_gpt2.py", "sample", "--checkpoint", "gpt2", "--prompt", "to be", "--max_new_tokens", 5, cwd=tmp_path)
    assert out.startswith("to be") and set(out.replace("<unk>", " ").split()) <= set(WORDS)


def test_special_tokens_and_generation_config_survive(words, tmp_path):
    size = fineweb.get_tokenizer(str(words / "tokenizer")).vocab_size
    config = LlamaConfig(vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                         max_position_embeddings=32, bos_token_id=3, eos_token_id=[1, 4], pad_token_id=2)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=3, eos_token_id=[1, 4], pad_token_id=2, temperature=0.6,
                                               do_sample=True, top_p=0.9)
    model.save_pretrained(tmp_path / "llama")
    for file in (words / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "llama")
    flags = ["--preset", "tiny", "--init_from", tmp_path / "llama", "--data", words / "text.txt", "--max_steps", 2,
             "--total_batch_size", 64, "--eval_tokens", 64, "--sample_every", 0, "--optimizer", "adamw"]
    run("train_gpt2.py", *flags, "--out_dir", tmp_path / "log")
    run("train_gpt2.py", "--resume", "--max_steps", 3, "--out_dir", tmp_path / "log")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "log" / "latest")
    for part in (tuned.config, tuned.generation_config):
        assert (part.bos_token_id, part.eos_token_id, part.pad_token_id) == (3, [1, 4], 2)
    assert (tuned.generation_config.temperature, tuned.generation_config.top_p) == (0.6, 0.9)
    assert not GPT.from_pretrained(tmp_path / "log" / "latest").config.zero_init


def test_any_end_of_text_ends_a_sample():
    torch.manual_seed(0)
    model = GPT(train_gpt2.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=5, eot=1))
    model.end_ids = [1, 4]
    rows = model.generate(torch.zeros(8, 1, dtype=torch.int64), 60, generator=torch.Generator().manual_seed(1))
    for row in rows.tolist():
        ends = [i for i, token in enumerate(row) if token in (1, 4)]
        assert ends and set(row[ends[0] + 1:]) <= {1, row[ends[0]]}


# -----------------------------------------------------------------------------
# tokenizers of others

def test_trains_from_scratch_with_a_tokenizer_folder(words, tmp_path):
    data, folder = words / "text.txt", tmp_path / "tokenizer"
    shutil.copytree(words / "tokenizer", folder)
    out, _ = run("train_gpt2.py", "--preset", "tiny", *SMALL, "--tokenizer", folder, "--data", data, "--checkpoint_every", 3,
                 "--out_dir", tmp_path / "log")
    size = fineweb.get_tokenizer(str(folder)).vocab_size
    first = log_lines(tmp_path / "log", "train")[0]["loss"]
    assert abs(first - np.log(size)) < 0.1 and f"{5400 // 32 * 32:,} tokens to train on" in out
    shutil.rmtree(folder)  # the checkpoint has the files
    shutil.rmtree(tmp_path / "log" / "step_000006")
    run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log")
    out, _ = run("train_gpt2.py", "sample", "--checkpoint", tmp_path / "log" / "latest", "--prompt", "to be",
                 "--max_new_tokens", 9)
    assert out.startswith("to be") and set(out.replace("<unk>", " ").split()) <= set(WORDS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "log" / "latest")
    assert model.config.vocab_size == size and model.config.eos_token_id == 1


def test_a_tokenizer_of_too_many_ids_is_refused(tmp_path):
    save_llama2_tokenizer(tmp_path / "big", [f"w{i}" for i in range(66_000)])
    (tmp_path / "text.txt").write_text("w1 w2 " * 1000)
    error = refused("train_gpt2.py", "--tokenizer", tmp_path / "big", "--data", tmp_path / "text.txt", "--preset", "tiny",
                    "--out_dir", tmp_path / "log")
    assert "66003" in error and "65536" in error and str(tmp_path / "big") in error


# -----------------------------------------------------------------------------
# hints

@pytest.mark.parametrize("name, content, says", [
    ("utf16.txt", "To be, or not to be\n".encode("utf-16") * 50, "iconv -f utf-16"),
    ("utf16le.txt", "To be, or not to be\n".encode("utf-16-le") * 50, "iconv -f utf-16le"),
    ("utf16be.txt", "To be, or not to be\n".encode("utf-16-be") * 50, "iconv -f utf-16be"),
    ("latin.txt", "caf\u00e9\n".encode("latin1") * 50, "iconv -f latin1"),
    ("text.txt.gz", b"\x1f\x8b" + bytes(100), "fineweb.py --files"),
    ("part.parquet", b"PAR1" + bytes(100), "fineweb.py --files"),
    ("rows.jsonl", b'{"text": "To be"}\n' * 50, "fineweb.py --files"),
    ("train.bin", bytes(5000), "--data ."),
    ("edufineweb_train_000001.npy", bytes(5000), "--data ."),
])
def test_a_file_that_is_no_text_is_told_its_remedy(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    error = refused("train_gpt2.py", "--data", name, "--preset", "tiny", cwd=tmp_path)
    assert name in error and says in error.replace("UTF-16", "utf-16")
    assert not (tmp_path / "log" / "log.jsonl").exists()


def test_a_folder_of_texts_is_told_its_remedy(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("To be")
    error = refused("train_gpt2.py", "--data", "books", "--preset", "tiny", cwd=tmp_path)
    assert "fineweb.py --files books --out" in error


# -----------------------------------------------------------------------------
# small ones

@pytest.mark.parametrize("place", ["/proc/log", "file", "file/log"])
def test_an_out_dir_that_cannot_be_written_is_told_before_the_work(place, small_shards, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(train_gpt2, "new_model", None)  # is not reached
    error = refused("train_gpt2.py", "--preset", "tiny", *SMALL, "--data", small_shards, "--out_dir", place, cwd=tmp_path)
    assert place in error and "--out_dir" in error


@pytest.mark.parametrize("output, says", [("no/such/loss.png", "no/such"), ("loss.xyz", "xyz")])
def test_plot_into_no_folder_or_an_unknown_kind(output, says, small_shards, tmp_path):
    run("train_gpt2.py", "--preset", "tiny", *SMALL, "--data", small_shards, "--out_dir", tmp_path / "log")
    error = refused("train_gpt2.py", "plot", "--out_dir", tmp_path / "log", "--output", output, cwd=tmp_path)
    assert says in error and "--output" in error


def test_a_folder_of_a_model_is_no_checkpoint(small_shards, tmp_path):
    GPT(train_gpt2.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8)).save_pretrained(tmp_path / "model")
    error = refused("train_gpt2.py", "--resume_from", tmp_path / "model", "--out_dir", tmp_path / "log")
    assert "--init_from" in error and "train_state.pt" in error


@pytest.mark.parametrize("temperature", [1e-40, 1e-50, 1e-9])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0], [-5.0, -6.0, -4.0]])
    assert sample_token(logits, temperature, 0, None).tolist() == [[1], [2]]


def test_ctrl_c_while_a_text_is_read(tmp_path):
    line = "What's in a name? That which we call a rose, by any other name would smell as sweet.\n"
    (tmp_path / "big.txt").write_text(line * 3_000_000)
    process = spawn("train_gpt2.py", "--data", tmp_path / "big.txt", "--tokenizer", "gpt2", "--preset", "tiny",
                    "--out_dir", tmp_path / "log")
    handlers = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "_tiktoken" in handlers.read_text(), process)  # then it reads or tokenizes
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    before = sum(os.times()[2:4])  # CPU time of the children that have ended
    _, errors = process.finish(expect=None)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in errors
    assert sum(os.times()[2:4]) - before < 40  # its start and a second of reading; the whole text takes minutes
    assert not list((tmp_path / "log").glob("step_*"))


def test_a_sample_decodes_few_ids_at_a_time(monkeypatch):
    model = GPT(train_gpt2.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=512))
    tokenizer, sizes = fineweb.get_tokenizer("gpt2"), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: sizes.append(len(ids)) or decode(ids))
    flags = train_gpt2.SampleFlags(prompt="Les \u00e9l\u00e8ves 日本語", max_new_tokens=300)
    text = "".join(train_gpt2.stream_text(model, tokenizer, flags, torch.Generator().manual_seed(0)))
    ids = tokenizer.encode(flags.prompt)
    rows = model.generate(torch.tensor([ids]), 300, flags.temperature, flags.top_k, torch.Generator().manual_seed(0))
    assert flags.prompt + text == decode(rows[0].tolist()) and max(sizes[1:]) < 50


# -----------------------------------------------------------------------------
# the run's own ways: its environment, its terminal, its checkpoints

TEXT = ["--data", ROOT / "input.txt", "--tokenizer", "byte", *SMALL]


def test_a_world_size_without_a_rank_is_no_world(tmp_path):
    """Left over in the environment it would halve every loss and leave out half of the data."""
    for name, env in (("one", {}), ("two", {"WORLD_SIZE": "2"})):
        run("train_gpt2.py", *TEXT, "--max_steps", 2, "--out_dir", tmp_path / name, env=env)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert log_lines(tmp_path / "one", "val")[-1]["loss"] == log_lines(tmp_path / "two", "val")[-1]["loss"]


def test_ctrl_c_that_ends_the_reader_too_saves(tmp_path):
    """As in `python train_gpt2.py 2>&1 | tee log.txt`: tee is gone before the step is over."""
    command = [sys.executable, "train_gpt2.py", *map(str, TEXT), "--max_steps", "100000", "--eval_every", "0",
               "--out_dir", str(tmp_path / "log")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (tmp_path / "log/log.jsonl").exists() or len(losses(tmp_path / "log")) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.stdout.close()
    time.sleep(11)  # the bar is written every ten seconds where it is no terminal
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.wait(timeout=600)
    step = len(losses(tmp_path / "log"))
    assert (tmp_path / f"log/step_{step:06d}/train_state.pt").exists()


@pytest.mark.parametrize("copied", [False, True])
def test_the_best_checkpoint_stays_the_best(copied, tmp_path):
    """In a longer run that is worse: when its own step's validation is not made again, and in a folder that was copied
    with its links followed."""
    flags = ["--max_steps", 25, "--eval_every", 10, "--checkpoint_every", 10]
    run("train_gpt2.py", *TEXT, *flags, "--out_dir", tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "log", symlinks=not copied)
    best = min(log_lines(tmp_path / "log", "val"), key=lambda line: line["loss"])
    weights = (tmp_path / f"log/step_{best['step']:06d}/model.safetensors").read_bytes()
    assert best["step"] == 25
    run("train_gpt2.py", "--resume", "--max_steps", 60, "--lr", 50, "--min_lr", 50, "--out_dir", tmp_path / "log")
    assert (tmp_path / "log/best/model.safetensors").read_bytes() == weights
    assert (tmp_path / "log/step_000025").is_dir() and log_lines(tmp_path / "log", "done")[-1]["best_val_loss"] == best["loss"]


def test_resumed_from_a_copy_of_a_checkpoint_in_its_own_folder(tmp_path):
    """The run's folder gets the checkpoint under its own name, and `latest`."""
    run("train_gpt2.py", *TEXT, "--checkpoint_every", 6, "--out_dir", tmp_path / "log")
    (tmp_path / "log/step_000006").rename(tmp_path / "log/keep")
    (tmp_path / "log/latest").unlink()
    run("train_gpt2.py", "--resume_from", tmp_path / "log/keep", "--max_steps", 8, "--eval_every", 2)
    assert (tmp_path / "log/step_000006").is_dir() and (tmp_path / "log/latest").resolve().name == "step_000008"


@pytest.mark.parametrize("content", [None, "", "[]", '{"model_type": '])
def test_a_torn_config_is_stepped_over(content, tmp_path):
    run("train_gpt2.py", *TEXT, "--checkpoint_every", 3, "--keep_checkpoints", 0, "--out_dir", tmp_path / "log")
    path = tmp_path / "log/step_000006/config.json"
    path.unlink() if content is None else path.write_text(content)
    refused("train_gpt2.py", "sample", "--checkpoint", tmp_path / "log/step_000006")
    out, _ = run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log")
    assert "not resumed from step_000006" in out and "step_000003 at step 3" in out


def test_the_ends_of_a_generation_config(tmp_path):
    """They go before those of config.json, as in Transformers."""
    config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                         max_position_embeddings=32, eos_token_id=3)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[5, 7])
    model.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).end_ids == [5, 7]


def test_a_broken_model_ends_by_its_gradients_not_by_its_sample():
    logits = torch.tensor([[torch.nan, 1.0, torch.inf]])
    assert sample_token(logits, 0.8, 2, torch.Generator().manual_seed(0)).shape == (1, 1)
