"""Bits per byte, time budgets, and the last lines of a run."""
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F

import fineweb
import train_gpt2
from conftest import SMALL, log_lines, run, run_ranks, save_llama2_tokenizer
from train_gpt2 import GPT, ScheduleFlags

TEXT = "Ein Bär in 東京, naïve café — 🙂 don't\n\n  say:\tit's  2,000 € "


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_token_bytes_are_those_of_the_text(name):
    tokenizer = fineweb.get_tokenizer(name)
    lengths = tokenizer.token_bytes()
    assert len(lengths) == tokenizer.vocab_size and lengths[tokenizer.eot] == 0
    ids = tokenizer.encode(TEXT)
    assert lengths[ids].sum() == len(TEXT.encode())
    assert all(lengths[i] == len(tokenizer.decode([i]).encode()) for i in ids if "\ufffd" not in tokenizer.decode([i]))


@pytest.mark.parametrize("kind", ["byte-level", "SentencePiece's"])
def test_token_bytes_of_a_model_folder(kind, tmp_path):
    if kind == "byte-level":
        fineweb.get_tokenizer("gpt2").save_pretrained(tmp_path)
        text = TEXT
    else:
        save_llama2_tokenizer(tmp_path, ["der", "Bär", "東京"])
        text = "der Bär 東京 der"
    tokenizer = fineweb.get_tokenizer(str(tmp_path))
    lengths, ids = tokenizer.token_bytes(), tokenizer.encode(text)
    assert lengths[tokenizer.eot] == 0 and tokenizer.decode(ids) == text
    assert lengths[ids].sum() == len(text.encode()) + (kind != "byte-level")  # it puts a space before a text


def bits_per_byte(folder, tokenizer, text):
    """Of the run's validation text, one window after the other, in float64, the bytes by decoding."""
    model = GPT.from_pretrained(folder).double().eval()
    ids = tokenizer.encode(text)
    ids = torch.tensor(ids[len(ids) * 9 // 10:])
    T = model.config.block_size
    nats, num_bytes = 0.0, 0
    for start in range(0, (len(ids) - 1) // T * T, T):
        x, y = ids[start:start + T], ids[start + 1:start + T + 1]
        nats += F.cross_entropy(model(x[None])[0], y, reduction="sum").item()
        num_bytes += len(tokenizer.decode(y.tolist()).encode())
    return nats / math.log(2) / num_bytes


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_bits_per_byte_of_one_text_in_two_vocabularies(name, text_file, tmp_path):
    flags = [*SMALL, "--data", text_file, "--tokenizer", name, "--eval_tokens", 10**6, "--checkpoint_every", 6]
    out, _ = run("train_gpt2.py", *flags, "--out_dir", tmp_path / "one")
    run_ranks(2, "train_gpt2.py", *flags, "--batch_size", 2, "--out_dir", tmp_path / "two")
    one, two = (log_lines(tmp_path / folder, "val")[-1]["bpb"] for folder in ("one", "two"))
    expected = bits_per_byte(tmp_path / "one/latest", fineweb.get_tokenizer(name), text_file.read_text())
    assert one == pytest.approx(expected, rel=1e-5) and two == pytest.approx(one, rel=1e-5)
    assert f"{one:.4f} bits per byte" in out
    said, _ = run("train_gpt2.py", "eval", "--checkpoint", tmp_path / "one/latest")
    assert float(re.search(r"([\d.]+) bits per byte", said)[1]) == pytest.approx(one, rel=2e-3)


def test_a_run_ends_with_its_figures(small_shards, tmp_path):
    flags = ["--data", small_shards, "--checkpoint_every", 3, "--eval_every", 2, "--out_dir", tmp_path]
    out, _ = run("train_gpt2.py", *SMALL, *flags)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    done, vals = lines[-1], log_lines(tmp_path, "val")
    assert done["kind"] == "done" and done["step"] == 6 and done["tokens"] == 6 * 512
    assert done["val_loss"] == vals[-1]["loss"] and done["val_bpb"] == vals[-1]["bpb"]
    assert done["best_val_loss"] == min(line["loss"] for line in vals)
    assert done["best_val_bpb"] == min(line["bpb"] for line in vals)
    assert done["training_seconds"] == pytest.approx(sum(line["seconds"] for line in log_lines(tmp_path, "train")[1:]))
    assert done["tokens_per_second"] == pytest.approx(5 * 512 / done["training_seconds"])
    assert done["total_seconds"] > done["training_seconds"] and done["mfu"] is None
    assert done["peak_memory_gb"] > 0.1 and done["parameters"] == GPT.from_pretrained(tmp_path / "latest").num_parameters()
    block = dict(line.split(": ", 1) for line in out.split("---\n")[1].splitlines() if ": " in line)
    assert float(block["val_bpb"]) == pytest.approx(done["val_bpb"], rel=1e-5)
    assert set(block) >= done.keys() - {"kind", "step", "mfu"} and "mfu" not in block  # that of a CPU is not known
    run("train_gpt2.py", "--resume", "--out_dir", tmp_path, "--max_steps", 8)
    lines = log_lines(tmp_path, "done")
    assert len(lines) == 1 and lines[0]["step"] == 8  # that of the first end went, as its evaluation did


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass at each look, so that a test of time takes none and is the same on any machine."""
    now = [0.0]

    def look():
        now[0] += 1.0
        return now[0]
    monkeypatch.setattr(train_gpt2.time, "monotonic", look)
    return now


def test_a_time_budget_ends_the_run_and_its_schedule(small_shards, tmp_path, clock):
    flags = [*SMALL, "--data", small_shards, "--max_minutes", 1, "--warmup_steps", 3, "--schedule", "wsd", "--min_lr", 0,
             "--checkpoint_every", 5, "--eval_every", 5, "--keep_checkpoints", 0, "--out_dir", tmp_path / "log"]
    at = flags.index("--max_steps")
    del flags[at:at + 2]
    out, _ = run("train_gpt2.py", *flags)
    train = log_lines(tmp_path / "log", "train")
    passed = [sum(line["seconds"] for line in train[1:i]) for i in range(len(train))]  # before each step
    assert "1 minutes of training, logged" in out and passed[-1] <= 60 <= passed[-1] + train[-1]["seconds"]
    for line, seconds in list(zip(train, passed))[3:]:
        assert line["lr"] == pytest.approx(1e-3 * min(1, (1 - seconds / 60) / 0.4), abs=1e-4)
    assert train[2]["lr"] == 1e-3 and train[-1]["lr"] < 1.5e-4
    done = log_lines(tmp_path / "log", "done")[0]
    assert done["step"] == len(train) == log_lines(tmp_path / "log", "val")[-1]["step"]
    assert (tmp_path / f"log/step_{len(train):06d}").is_dir()

    half = tmp_path / "half"  # what a run killed after its fifth step would have left
    (tmp_path / "log/step_000005").rename(tmp_path / "step_000005")
    half.mkdir()
    (tmp_path / "step_000005").rename(half / "step_000005")
    (half / "log.jsonl").write_text((tmp_path / "log/log.jsonl").read_text())
    run("train_gpt2.py", "--resume", "--out_dir", half)
    resumed = log_lines(half, "train")
    spent = sum(line["seconds"] for i, line in enumerate(resumed) if i not in (0, 5))  # a process's first counts for none
    assert spent - resumed[-1]["seconds"] <= 60 <= spent and log_lines(half, "done")


def test_the_last_rate_of_a_time_budget_is_that_of_a_run_by_steps():
    for schedule in ("cosine", "wsd"):
        by_steps = ScheduleFlags(lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=1000, schedule=schedule)
        by_time = ScheduleFlags(lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=10**9, max_minutes=10, schedule=schedule)
        for step in (500, 900, 999):
            a = train_gpt2.learning_rate(step, by_steps)
            assert train_gpt2.learning_rate(step, by_time, time_share=step / 1000) == pytest.approx(a, abs=0.01)
        assert train_gpt2.learning_rate(5, by_time, time_share=0.05) == 0.6  # warm-up is over with a tenth of the time
        assert train_gpt2.learning_rate(1000, by_time, time_share=1.01) == 0.1


def test_ranks_agree_on_the_time(small_shards, tmp_path, monkeypatch):
    """By rank 0's clock, however wrong another's is."""
    look = train_gpt2.time.monotonic
    started = look()

    def monotonic():
        return started + (look() - started) * (100 if train_gpt2.os.environ.get("RANK") == "1" else 1)
    monkeypatch.setattr(train_gpt2.time, "monotonic", monotonic)
    seen = tmp_path / "rates"

    def learning_rate(step, schedule, time_share, known=train_gpt2.learning_rate):
        with open(f"{seen}{train_gpt2.os.environ['RANK']}", "a") as f:
            print(step, time_share, known(step, schedule, time_share), file=f)
        return known(step, schedule, time_share)
    monkeypatch.setattr(train_gpt2, "learning_rate", learning_rate)
    run_ranks(2, "train_gpt2.py", *SMALL, "--max_steps", 10**6, "--max_minutes", 0.05, "--batch_size", 4,
              "--data", small_shards, "--out_dir", tmp_path / "log")
    rates = [(tmp_path / f"rates{rank}").read_text() for rank in range(2)]
    assert rates[0] == rates[1] and rates[0].count("\n") == log_lines(tmp_path / "log", "done")[0]["step"] > 3


def test_plots_bits_per_byte(small_shards, tmp_path):
    run("train_gpt2.py", *SMALL, "--data", small_shards, "--out_dir", tmp_path / "log")
    run("train_gpt2.py", "plot", "--out_dir", tmp_path / "log", "--y", "bpb", "--output", tmp_path / "bpb.png")
    assert (tmp_path / "bpb.png").stat().st_size > 5000
