"""The pieces of `benchmark.py gpu` as far as a CPU goes: in tiny sizes they run to their end and say something."""
import argparse
import contextlib
import json
import multiprocessing
import subprocess
import sys

import pytest
import torch

import benchmark
from benchmarks import gpu, shared, speed
from conftest import ROOT

SHAPE = dict(n_layer=1, n_head=2, n_embd=32, block_size=32)
TINY = argparse.Namespace(
    device="cpu", dtype="bfloat16", steps=1, bf16_stream=True, compiled=False, batch_size=2, gpu_batch=2, shape=SHAPE,
    modern_shape=SHAPE | dict(rope=True, qk_norm=True), lengths=(9, 10), windows=(4,), characters=200_000, examples=8,
    long=64, run_steps=4, card_gib=0,
    run_flags=SHAPE | dict(total_batch_size=256, batch_size=4, eval_tokens=64, compile=False, dtype="float32"))


def no_tables(args):
    return []


def run_piece(piece, path):
    path.write_text(json.dumps(gpu.PIECES[piece](TINY)))


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 6])
def test_a_piece_runs_to_its_end(piece, small_shards, tmp_path, monkeypatch):
    def measured(function, **arguments):
        return shared.measured(function, arguments)

    def run(command, **how):  # not this test's own runner in it
        return subprocess.CompletedProcess(command, 0, stdout="9 skipped")

    @contextlib.contextmanager
    def shards(args):
        (tmp_path / "shards").symlink_to(small_shards)
        yield tmp_path

    monkeypatch.setattr(gpu, "isolated", measured)
    monkeypatch.setattr(shared, "isolated", measured)  # for attempted
    monkeypatch.setattr(speed, "limit", no_tables)  # is of one size
    monkeypatch.setattr(gpu, "TEXT_FOLDERS", [ROOT / "tests"])
    if piece == 1:
        monkeypatch.setattr(gpu.subprocess, "run", run)
    if piece == 6:
        monkeypatch.setattr(gpu, "machine_shards", shards)
    process = multiprocessing.get_context("fork").Process(target=run_piece, args=(piece, tmp_path / "tables.json"))
    process.start()  # apart: it leaves switches and signal handlers behind
    process.join(120)
    process.kill()
    tables = json.loads((tmp_path / "tables.json").read_text())
    assert process.exitcode == 0 and tables and all(found["rows"] for found in tables)
    if piece == 6:
        assert tables[1]["rows"] == [{"bytes of the model": "the same"}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_is_one_line():
    command = [sys.executable, ROOT / "tests/benchmark.py", "gpu", "--piece", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: gpu needs a GPU") and done.stderr.count("\n") == 1
    assert not done.stdout


def test_what_is_measured_in_turns_gives_medians_and_says_what_failed(monkeypatch):
    speeds, turns = iter([1.0, 9.0, 2.0]), []

    def quick():
        turns.append("quick")
        return {"speed": next(speeds), "mfu": None}

    def broken():
        turns.append("broken")

    monkeypatch.setattr(shared, "ROUNDS", 3)
    assert shared.in_turns({"quick": quick, "broken": broken}) == {"quick": {"speed": 2.0, "mfu": None}, "broken": None}
    assert turns == ["quick", "broken"] * 3


def test_all_writes_each_part_with_its_command_and_keeps_the_others(tmp_path, monkeypatch):
    def part(args):
        return [shared.table(f"steps {args.steps}", [{"name": "x", "value": 1.5}])]

    def broken(args):
        raise OSError("no such machine")

    path, commands = tmp_path / "RESULTS.md", dict.fromkeys(benchmark.COMMANDS, part)
    monkeypatch.setattr(benchmark, "COMMANDS", commands)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "all", "--write", str(path), "--steps", "3"])
    benchmark.main()
    text = path.read_text()
    names = [name for name in commands if name not in benchmark.NOT_IN_ALL]
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == names
    for name in names:
        assert f"`python tests/benchmark.py {name} --steps 3`" in text
    assert text.count("| x | 1.5 |") == len(names) and text.count(torch.__version__) == len(names)
    monkeypatch.setitem(commands, "limit", broken)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "limit", "gpu", "--write", str(path)])
    benchmark.main()
    again = path.read_text()
    assert again.count("no such machine") == 1 and "`python tests/benchmark.py gpu` (" in again
    assert again.count("| x | 1.5 |") == len(names) and again.index("## limit") < again.index("## tokens") < again.index("## gpu")
