"""A run that is killed, moved, starved of disk or poisoned ends as if nothing had happened, or says what did. Kills are
triggered by what the log or the folder shows, never by the clock."""
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fineweb
import hellaswag
import train_gpt2
from conftest import ROOT, SIGNALS, SMALL, free_port, log_lines, losses, refused, run, run_ranks, spawn, wait_for
from test_hellaswag import make_examples
from train_gpt2 import GPT, World

# Dropout on, several shards and epochs (224 windows, 16 a step), checkpoints between evaluations.
LONG = [*SMALL, "--max_steps", 40, "--dropout", 0.1, "--checkpoint_every", 7, "--eval_every", 10, "--sample_every", 20]


def result(out_dir):
    """What must be equal bit for bit: the last weights, and the log but for its clock."""
    lines = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    for line in lines:
        for key in ("seconds", "training_seconds", "total_seconds", "tokens_per_second", "peak_memory_gb", "run_id", "out_dir",
                    "resume", "resume_from", "compile", "data", "chosen", "forked_from"):
            line.pop(key, None)
    return (Path(out_dir) / "latest/model.safetensors").read_bytes(), sorted(map(json.dumps, lines))


def steps_logged(out_dir):
    path = Path(out_dir) / "log.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def kill(process):
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, small_shards):
    out_dir = tmp_path_factory.mktemp("uninterrupted") / "log"
    run("train_gpt2.py", *LONG, "--data", small_shards, "--out_dir", out_dir)
    return out_dir


def test_ten_sigkills_in_a_row(uninterrupted, small_shards, tmp_path):
    """At random steps and in the middle of saves; the run that is left equals the one that was never killed."""
    out_dir, chance = tmp_path / "log", random.Random(0)
    command = ["train_gpt2.py", *LONG, "--data", small_shards, "--out_dir", out_dir, "--resume"]
    kills, resumed = 0, 0
    for i in range(10):
        for left in out_dir.glob(".tmp_step_*"):  # by the last kill: not to be taken for this process's
            shutil.rmtree(left)
        process = spawn(*command, step_seconds=0.02)
        wait_for(lambda: f"logged and saved in {out_dir}" in process.output()[0], process)  # the log is this process's
        goal = steps_logged(out_dir) + 7 + chance.randrange(1, 5)  # past a checkpoint
        wait_for(lambda: (list(out_dir.glob(".tmp_step_*")) if i % 2 else steps_logged(out_dir) >= goal) or
                 process.poll() is not None, process)
        if i % 2:
            time.sleep(0.02 * chance.random())  # a save takes as long
        kills += process.poll() is None
        kill(process)
        resumed += "resumed from" in process.output()[0]
        if i == 4:  # a checkpoint that the crash tore, whatever the file system did
            before, newest = sorted(out_dir.glob("step_*"))[-2:]
            (newest / "train_state.pt").write_bytes((newest / "train_state.pt").read_bytes()[:1000])
        if i == 5:
            assert f"not resumed from {newest.name}" in process.output()[0] and before.name in process.output()[0]
    run(*command)
    assert result(out_dir) == result(uninterrupted) and kills >= 8 and resumed >= 8


def log_has_step(out_dir, step):
    path = Path(out_dir) / "log.jsonl"
    return path.exists() and f'"train", "step": {step},' in path.read_text()


def test_a_finished_run_resumed_is_finished(uninterrupted, small_shards, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "log", symlinks=True)
    before = result(tmp_path / "log")
    run("train_gpt2.py", "--out_dir", tmp_path / "log", "--resume", "--device", "cpu")
    assert result(tmp_path / "log") == before


def test_compiled_run_compiles_once_and_resumes_bit_for_bit(small_shards, tmp_path, monkeypatch):
    """Nothing is compiled after the first evaluation, by HellaSwag and samples neither."""
    from torch._dynamo.utils import counters
    graphs, train_step, score = [], train_gpt2.Run.train_step, train_gpt2.score_hellaswag

    def counted_step(run):
        line = train_step(run)
        graphs.append((run.step, counters["stats"]["unique_graphs"]))
        return line

    def counted_score(*args):
        result = score(*args)
        graphs.append(("hellaswag", counters["stats"]["unique_graphs"]))
        return result
    monkeypatch.setattr(train_gpt2.Run, "train_step", counted_step)
    monkeypatch.setattr(train_gpt2, "score_hellaswag", counted_score)
    (tmp_path / "hellaswag.jsonl").write_text("".join(json.dumps(example) + "\n" for example in make_examples(6)))
    flags = [*[f for f in LONG if f != "--no_compile"], "--compile", "--n_layer", 2, "--max_steps", 7, "--checkpoint_every", 4,
             "--keep_checkpoints", 0, "--eval_every", 2, "--sample_every", 2, "--hellaswag_every", 3,
             "--hellaswag_data", tmp_path / "hellaswag.jsonl", "--data", small_shards]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    counters.clear()  # of other tests
    run("train_gpt2.py", *flags, "--out_dir", tmp_path / "whole", env=cache)
    counts = dict(graphs)
    assert counts[1] > 1 and [step for step, _ in graphs].count("hellaswag") == 3
    assert len({count for step, count in graphs if step in (3, 4, 5, 6, 7, "hellaswag")}) == 1, graphs
    process = spawn("train_gpt2.py", *flags, "--out_dir", tmp_path / "log", env=cache)
    wait_for(lambda: log_has_step(tmp_path / "log", 5), process)
    kill(process)
    out, _ = spawn("train_gpt2.py", *flags, "--out_dir", tmp_path / "log", "--resume", env=cache).finish()
    assert "at step 4" in out and ", compiled" in out
    assert result(tmp_path / "log") == result(tmp_path / "whole")


def test_a_resumed_run_is_deterministic_if_it_was(small_shards, tmp_path, monkeypatch):
    asked, validate = [], train_gpt2.validate

    def watched(*args):
        asked.append(torch.are_deterministic_algorithms_enabled())
        return validate(*args)
    monkeypatch.setattr(train_gpt2, "validate", watched)
    flags = ["--checkpoint_every", 6, "--data", small_shards, "--out_dir", tmp_path / "log"]
    run("train_gpt2.py", *SMALL, *flags, "--deterministic")
    run("train_gpt2.py", "--resume", "--max_steps", 7, "--out_dir", tmp_path / "log")
    assert len(asked) == 4 and all(asked)


def resume_copy(run_dir, step, out_dir):
    """What a run killed after this step's checkpoint would have left, had it logged on."""
    shutil.copytree(run_dir / f"step_{step:06d}", out_dir / f"step_{step:06d}")
    shutil.copy(run_dir / "log.jsonl", out_dir / "log.jsonl")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_says_how_to_go_on(number, uninterrupted, small_shards, tmp_path):
    process = spawn("train_gpt2.py", *LONG, "--data", small_shards, "--out_dir", tmp_path / "log", step_seconds=0.03)
    wait_for(lambda: steps_logged(tmp_path / "log") >= 3, process)
    process.send_signal(number)
    out, _ = process.finish(expect=-number if number == signal.SIGINT else 0)  # a shell's loop must end by a Ctrl-C too
    step = len(losses(tmp_path / "log"))
    assert "the same command with --resume" in out and (tmp_path / f"log/step_{step:06d}").is_dir() and step < 40
    run("train_gpt2.py", *LONG, "--data", small_shards, "--out_dir", tmp_path / "log", "--resume")
    assert result(tmp_path / "log")[0] == result(uninterrupted)[0]


def test_a_second_signal_stops_at_once(monkeypatch):
    """The first one is noted; the second one does what it would have done without us. In this process but for its end."""
    ends = []
    monkeypatch.setattr(train_gpt2.os, "kill", lambda pid, number: ends.append((pid, number, signal.getsignal(number))))
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
        stop = train_gpt2.StopRequest()
        assert stop.number == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT and ends == []
        signal.raise_signal(signal.SIGTERM)  # of another kind: systems that stop a program send several
        assert ends == []
        signal.raise_signal(signal.SIGINT)
        assert ends == [(os.getpid(), signal.SIGINT, signal.SIG_DFL)]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_second_signal_ends_a_run_in_the_middle_of_a_step(small_shards, tmp_path):
    """A real one: a step of many tokens, the second signal sent once the first was taken."""
    process = spawn("train_gpt2.py", *LONG, "--data", small_shards, "--out_dir", tmp_path / "log", "--total_batch_size", 2**25,
                    "--batch_size", 1)
    wait_for(lambda: "run     " in process.output()[0], process)
    time.sleep(0.5)  # into the step, whose million micro-steps outlast the test
    process.send_signal(signal.SIGINT)
    wait_for(lambda: not pending(process.pid, signal.SIGINT), process)  # else the kernel may make one of two
    time.sleep(0.5)
    assert process.poll() is None and steps_logged(tmp_path / "log") == 0
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert process.returncode == -signal.SIGINT


def pending(pid, number):
    """Whether a signal was sent to the process and not taken yet."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, small_shards):
    """30 steps on the comparable recipe, in one process."""
    out_dir = tmp_path_factory.mktemp("one") / "log"
    run("train_gpt2.py", *SMALL, "--max_steps", 30, "--checkpoint_every", 10, "--keep_checkpoints", 0, "--eval_tokens", 1500,
        "--data", small_shards, "--out_dir", out_dir)
    return out_dir


def close(a, b):
    for kind in ("train", "val"):
        x, y = ([line["loss"] for line in log_lines(d, kind)] for d in (a, b))
        assert len(x) == len(y) and x == pytest.approx(y, abs=1e-5)


def test_two_processes_equal_one(one_process, small_shards, tmp_path):
    run_ranks(2, "train_gpt2.py", *SMALL, "--max_steps", 30, "--batch_size", 2, "--eval_tokens", 1500, "--data", small_shards,
              "--out_dir", tmp_path / "log")
    close(tmp_path / "log", one_process)


def test_a_signal_to_one_rank_stops_all_and_says_how_to_go_on(one_process, small_shards, tmp_path):
    """Under the true torchrun."""
    process = spawn("train_gpt2.py", *SMALL, "--max_steps", 30, "--eval_tokens", 1500, "--batch_size", 1, "--data", small_shards,
                    "--out_dir", tmp_path / "log", torchrun=2, step_seconds=0.05)
    wait_for(lambda: steps_logged(tmp_path / "log") >= 3, process)
    os.kill(sorted(workers_of(process.pid))[-1], signal.SIGTERM)
    out, _ = process.finish()
    step = len(losses(tmp_path / "log"))
    assert (tmp_path / f"log/step_{step:06d}").is_dir() and step < 30
    assert "the same command with --resume" in out
    spawn("train_gpt2.py", "--out_dir", tmp_path / "log", "--resume", torchrun=2).finish()
    close(tmp_path / "log", one_process)


def test_a_closed_terminal_stops_torchruns_ranks_well(one_process, small_shards, tmp_path):
    """SIGHUP reaches the launcher and all of its processes."""
    process = spawn("train_gpt2.py", *SMALL, "--max_steps", 30, "--eval_tokens", 1500, "--batch_size", 1, "--data", small_shards,
                    "--out_dir", tmp_path / "log", torchrun=2, step_seconds=0.05)
    wait_for(lambda: steps_logged(tmp_path / "log") >= 3, process)
    for pid in (*workers_of(process.pid), process.pid):
        os.kill(pid, signal.SIGHUP)
    process.finish(expect=None)
    step = len(losses(tmp_path / "log"))
    assert (tmp_path / f"log/step_{step:06d}/train_state.pt").exists() and step < 30
    run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log", "--device", "cpu")
    close(tmp_path / "log", one_process)


def workers_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_resumes_on_another_world_size(one_process, small_shards, tmp_path):
    resume_copy(one_process, 10, tmp_path / "log")
    out, _ = run_ranks(2, "train_gpt2.py", "--resume", "--out_dir", tmp_path / "log", "--device", "cpu")
    assert "at step 10" in out
    close(tmp_path / "log", one_process)


def test_four_ranks_resume_bit_for_bit(small_shards, tmp_path):
    """From three ranks on the order of a sum matters; it must not depend on when DDP made its buckets."""
    flags = [*SMALL, "--batch_size", 1, "--data", small_shards, "--checkpoint_every", 3, "--keep_checkpoints", 0]
    run_ranks(4, "train_gpt2.py", *flags, "--out_dir", tmp_path / "whole")
    resume_copy(tmp_path / "whole", 3, tmp_path / "log")
    run_ranks(4, "train_gpt2.py", "--resume", "--out_dir", tmp_path / "log", "--device", "cpu")
    assert result(tmp_path / "log")[0] == result(tmp_path / "whole")[0]


def test_eight_ranks_and_then_three(small_shards, tmp_path):
    """More ranks than a laptop has cores give one process's losses, and go on with a number that divides nothing they had."""
    flags = [*SMALL, "--total_batch_size", 768, "--batch_size", 1, "--data", small_shards, "--checkpoint_every", 3, "--keep_checkpoints", 0]
    run("train_gpt2.py", *flags, "--out_dir", tmp_path / "one")
    run_ranks(8, "train_gpt2.py", *flags, "--out_dir", tmp_path / "eight")
    close(tmp_path / "eight", tmp_path / "one")
    resume_copy(tmp_path / "eight", 3, tmp_path / "three")  # what eight ranks that were killed then would have left
    out, _ = run_ranks(3, "train_gpt2.py", "--resume", "--batch_size", 4, "--out_dir", tmp_path / "three", "--device", "cpu")
    assert "at step 3" in out and "3 x cpu" in out
    close(tmp_path / "three", tmp_path / "one")


def test_muon_resumes_and_agrees_between_worlds(small_shards, tmp_path):
    flags = [*SMALL, "--optimizer", "muon", "--rope", "--rmsnorm", "--swiglu", "--qk_norm", "--no_bias", "--data", small_shards,
             "--checkpoint_every", 3, "--keep_checkpoints", 0]
    run("train_gpt2.py", *flags, "--out_dir", tmp_path / "whole")
    state = torch.load(tmp_path / "whole/step_000003/train_state.pt", weights_only=True)
    assert state["optimizers"][1]["param_groups"][0]["momentum"] == pytest.approx(0.95)  # the third update of six
    resume_copy(tmp_path / "whole", 3, tmp_path / "log")
    run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log", "--device", "cpu")
    assert result(tmp_path / "log")[0] == result(tmp_path / "whole")[0]
    run_ranks(2, "train_gpt2.py", *flags, "--out_dir", tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


def test_two_nodes_on_loopback(one_process, small_shards, tmp_path):
    where = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}",
             "--rdzv_id", "test", "--local_addr", "127.0.0.1"]
    nodes = [spawn("train_gpt2.py", *SMALL, "--max_steps", 30, "--eval_tokens", 1500, "--data", small_shards,
                   "--out_dir", tmp_path / "log", torchrun=where) for _ in range(2)]
    for node in nodes:
        node.finish()
    close(tmp_path / "log", one_process)


def test_torchrun_restarts_from_the_last_checkpoint(one_process, small_shards, tmp_path):
    """A worker is killed; the job, which was started with --resume, comes back by itself."""
    process = spawn("train_gpt2.py", *SMALL, "--max_steps", 30, "--checkpoint_every", 5, "--eval_tokens", 1500, "--batch_size", 1,
                    "--data", small_shards, "--out_dir", tmp_path / "log", "--resume", env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
                    torchrun=["--standalone", "--nproc_per_node", 2, "--max_restarts", 2, "--monitor_interval", 0.1],
                    step_seconds=0.05)
    wait_for(lambda: log_has_step(tmp_path / "log", 12), process)
    os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
    out, err = process.finish()
    assert "nothing to resume" in out and "resumed from" in out, out + err
    close(tmp_path / "log", one_process)


def test_resume_begins_where_there_is_nothing_and_begins_again_where_there_is_only_a_log(one_process, small_shards, tmp_path):
    out, _ = run("train_gpt2.py", *SMALL, "--max_steps", 30, "--eval_tokens", 1500, "--data", small_shards, "--out_dir", tmp_path / "log",
                 "--resume")
    assert f"nothing to resume in {tmp_path / 'log'}: a new run" in out
    before = (tmp_path / "log/log.jsonl").read_text()
    line = refused("train_gpt2.py", "--out_dir", tmp_path / "log", "--resume", "--n_layer", 3)
    assert "--n_layer 3" in line and (tmp_path / "log/log.jsonl").read_text() == before
    line = refused("train_gpt2.py", "--out_dir", tmp_path / "log", "--resume")  # the flags of the default run
    assert "without a good checkpoint" in line and (tmp_path / "log/log.jsonl").read_text() == before
    out, _ = run("train_gpt2.py", *SMALL, "--data", small_shards, "--out_dir", tmp_path / "log", "--resume", "--max_steps", 28)
    assert "no good checkpoint" in out and "begins anew" in out
    assert (tmp_path / "log/log.jsonl.old").read_text() == before
    assert losses(tmp_path / "log")[:1] == losses(one_process)[:1] and len(losses(tmp_path / "log")) == 28
    config = log_lines(tmp_path / "log", "config")[0]
    assert (config["n_layer"], config["lr"], config["data"], config["max_steps"]) == (2, 1e-3, str(small_shards), 28)


def test_at_no_moment_of_a_new_beginning_is_there_no_log(one_process, small_shards, tmp_path, monkeypatch):
    """Killed where the new one is about to take its name, it leaves that of the run whose flags the next start compares."""
    (tmp_path / "log").mkdir()
    before = shutil.copy(one_process / "log.jsonl", tmp_path / "log/log.jsonl").read_bytes()
    replace = os.replace

    def killed(source, target):
        if str(source).endswith("/.log.jsonl.tmp"):
            raise OSError(5, "killed")
        replace(source, target)
    monkeypatch.setattr(os, "replace", killed)
    flags = [*SMALL, "--max_steps", 30, "--data", small_shards, "--out_dir", tmp_path / "log", "--resume", "--eval_tokens", 1500]
    assert "log.jsonl: killed" in refused("train_gpt2.py", *flags)
    assert all((tmp_path / "log" / name).read_bytes() == before for name in ("log.jsonl", "log.jsonl.old"))


def broken_copy(one_process, tmp_path, file, damage):
    out_dir = tmp_path / "log"
    shutil.copytree(one_process, out_dir, symlinks=True)
    damage(out_dir / "step_000030" / file)
    return out_dir


@pytest.mark.parametrize("file", ["train_state.pt", "model.safetensors"])
@pytest.mark.parametrize("size", [0, 1000])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(file, size, one_process, tmp_path):
    out_dir = broken_copy(one_process, tmp_path, file, lambda path: path.write_bytes(path.read_bytes()[:size]))
    out, _ = run("train_gpt2.py", "--resume", "--out_dir", out_dir, "--device", "cpu")
    assert "not resumed from step_000030" in out and file in out and "at step 20" in out
    assert result(out_dir)[0] == result(one_process)[0]


@pytest.mark.parametrize("cause", ["another version's", "all torn"])
def test_checkpoints_that_do_not_open_are_not_written_over(cause, one_process, tmp_path):
    """Nobody watches a job that a cluster starts again, from a wrong checkout perhaps: a run of days is in these files."""
    shutil.copytree(one_process, tmp_path / "log", symlinks=True)
    for path in (tmp_path / "log").glob("step_*/train_state.pt"):
        if cause == "all torn":
            path.write_bytes(path.read_bytes()[:1000])
        else:
            state = torch.load(path)
            torch.save(state | {"config": state["config"] | {"relu2": False}}, path)
    before = {path: path.read_bytes() for path in (tmp_path / "log").glob("*/*")}
    out, err = run("train_gpt2.py", *SMALL, "--out_dir", tmp_path / "log", "--resume", "--device", "cpu", expect=2)
    assert err.count("\n") == 1 and "none of the checkpoints opens, step_000010: " in err and ("relu2" in err) == (cause != "all torn")
    assert out.count("not resumed from step_0000") == 3
    assert before == {path: path.read_bytes() for path in (tmp_path / "log").glob("*/*")}


def test_a_run_is_resumed_by_its_own_command_as_often_as_it_ends(small_shards, tmp_path):
    """With flags that are not in a model's file, too."""
    flags = [*SMALL, "--zero_init", "--checkpoint_every", 2, "--data", small_shards, "--out_dir", tmp_path, "--resume"]
    for steps in (2, 4, 6):
        out, _ = run("train_gpt2.py", *flags, "--max_steps", steps)
    assert "at step 4" in out
    assert len(losses(tmp_path)) == 6 and {line["zero_init"] for line in log_lines(tmp_path, "config")} == {True}


def test_a_disk_that_fails_to_read_is_no_damage(one_process, tmp_path, monkeypatch):
    """Nothing begins anew, and nothing is deleted, when good checkpoints could not be read."""
    shutil.copytree(one_process, tmp_path / "log", symlinks=True)
    before = sorted(path.name for path in (tmp_path / "log").iterdir())

    def fail(path, **how):
        raise OSError(5, "Input/output error", str(path))
    monkeypatch.setattr(torch, "load", fail)
    line = refused("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log", "--device", "cpu")
    assert "train_state.pt: Input/output error" in line
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == before


def auto_dtype(small_shards, out_dir, *flags, ranks=1):
    """A small run with --dtype auto, or what `flags` add. Returns its summary's dtype and what was said of the chip."""
    flags = [*SMALL, "--checkpoint_every", 1, "--dtype", "auto", "--data", small_shards, "--out_dir", out_dir, *flags]
    out, _ = run_ranks(ranks, "train_gpt2.py", *flags) if ranks > 1 else run("train_gpt2.py", *flags)
    return re.search(r" x cpu, (\w+)", out)[1], re.findall(r"note    (.*on this chip)", out)


def test_a_resumed_run_keeps_the_dtype_that_auto_took(small_shards, tmp_path, chip):
    chip(2.0, 1.0, bf16=True)
    said = ["bfloat16: 2.0 times as fast as float32 on this chip"]
    assert auto_dtype(small_shards, tmp_path / "log", "--max_steps", 3) == ("bfloat16", said)
    for seconds in ((1.0, 2.0), (2.0, 1.0)):
        chip(*seconds, bf16=True)
        out, _ = run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log", "--max_steps", 4)
        assert " x cpu, bfloat16" in out
    out, _ = run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log", "--dtype", "float32", "--max_steps", 5)
    assert " x cpu, float32" in out and len(losses(tmp_path / "log")) == 5


def test_a_given_dtype_wins(small_shards, tmp_path, chip):
    chip(2.0, 1.0, bf16=True)
    assert auto_dtype(small_shards, tmp_path / "log", "--max_steps", 1, "--dtype", "float32") == ("float32", [])


def test_rank_0_picks_the_dtype_of_all(small_shards, tmp_path, chip, monkeypatch):
    chip(1.0, 1.7, bf16=True)
    picked = hellaswag.pick_dtype
    made = train_gpt2.Run.train_step

    def pick_dtype(*args):
        assert os.environ["RANK"] == "0", "another rank asked its clock"
        return picked(*args)

    def train_step(run):
        (tmp_path / f"rank{run.world.rank}").write_text(str(run.dtype))
        return made(run)
    monkeypatch.setattr(hellaswag, "pick_dtype", pick_dtype)
    monkeypatch.setattr(train_gpt2.Run, "train_step", train_step)
    assert auto_dtype(small_shards, tmp_path / "log", "--batch_size", 4, ranks=2)[0] == "float32"
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == 2 * ["torch.float32"]


def test_resumes_in_another_dtype(one_process, tmp_path):
    """Into float16, whose gradient scaler has no state yet, and out of it."""
    resume_copy(one_process, 10, tmp_path / "log")
    for dtype, steps in (("float16", 12), ("float32", 14)):
        out, _ = run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log", "--dtype", dtype, "--max_steps", steps)
        assert f"1 x cpu, {dtype}" in out and len(losses(tmp_path / "log")) == steps


def test_a_run_that_could_not_compile_still_wants_to(small_shards, tmp_path, monkeypatch):
    def broken(function, **how):
        raise RuntimeError("no C++ compiler")
    monkeypatch.setattr(torch, "compile", broken)
    flags = [flag for flag in SMALL if flag != "--no_compile"]
    out, _ = run("train_gpt2.py", *flags, "--data", small_shards, "--checkpoint_every", 6, "--out_dir", tmp_path / "log")
    assert "not compiled" in out and "no C++ compiler" in out
    assert torch.load(tmp_path / "log/latest/train_state.pt", weights_only=True)["config"]["compile"] is True


def test_a_checkpoint_with_an_unknown_flag_is_named(one_process, tmp_path):
    out_dir = tmp_path / "log"
    shutil.copytree(one_process / "step_000010", out_dir / "step_000010")
    state = torch.load(out_dir / "step_000010/train_state.pt", weights_only=True)
    torch.save({**state, "config": {**state["config"], "relu2": True}}, out_dir / "step_000010/train_state.pt")
    line = refused("train_gpt2.py", "--resume_from", out_dir / "step_000010", "--out_dir", tmp_path / "other")
    assert "relu2 = True: this script has no such flag" in line


def test_nothing_is_unpickled(one_process, tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    out_dir = broken_copy(one_process, tmp_path, "train_state.pt", lambda path: path.write_bytes(pickle.dumps(Bomb())))
    out, _ = run("train_gpt2.py", "--resume", "--out_dir", out_dir, "--device", "cpu")
    assert "not resumed from step_000030" in out and not (tmp_path / "exploded").exists()


def test_resume_refuses_what_it_cannot_change(one_process, small_shards, tmp_path):
    shutil.copytree(one_process, tmp_path / "log", symlinks=True)
    resume = ["train_gpt2.py", "--out_dir", tmp_path / "log", "--device", "cpu", "--resume"]
    for flags in (["--n_layer", 3], ["--data", ROOT / "input.txt"], ["--total_batch_size", 1024], ["--seed", 1], ["--optimizer", "muon"],
                  ["--weight_decay", 0.5]):
        assert f"{flags[0]} {flags[1]}: the run in" in refused(*resume, *flags)
    run(*resume, "--n_layer", 2, "--data", small_shards, "--max_steps", 32, "--lr", 1e-4, "--batch_size", 4, "--eval_every", 16)
    assert len(losses(tmp_path / "log")) == 32 and log_lines(tmp_path / "log", "train")[-1]["lr"] < 1.1e-4


def test_an_out_dir_with_a_run_is_refused(one_process, small_shards):
    line = refused("train_gpt2.py", *SMALL, "--data", small_shards, "--out_dir", one_process)
    assert "--resume" in line and "--out_dir" in line


def test_resume_from_a_named_checkpoint(one_process, tmp_path):
    run("train_gpt2.py", "--resume_from", one_process / "step_000010", "--out_dir", tmp_path / "other", "--device", "cpu")
    assert result(tmp_path / "other")[0] == result(one_process)[0]
    line = refused("train_gpt2.py", "--resume_from", one_process / "step_000010", "--device", "cpu")
    assert "step_000030" in line and "--out_dir" in line
    out, _ = run("train_gpt2.py", "--resume_from", one_process / "step_000010", "--resume", "--out_dir", tmp_path / "other")
    assert "resumed from" in out and "step_000030" in out  # a job that is started again: the newest of its own


def test_another_runs_checkpoint_is_kept_at_once_and_not_mixed_into_a_third_run(one_process, small_shards, tmp_path):
    """What out_dir holds is enough to resume, also before the first checkpoint of its own."""
    flags = ["--resume_from", one_process / "step_000010", "--out_dir", tmp_path / "other", "--device", "cpu"]
    run("train_gpt2.py", *flags, "--max_steps", 12, "--checkpoint_every", 0)
    assert (tmp_path / "other/step_000010").is_dir()
    out, _ = run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "other")
    assert "at step 10" in out and losses(tmp_path / "other")[0] == losses(one_process)[10]
    run("train_gpt2.py", *SMALL, "--max_steps", 2, "--data", small_shards, "--out_dir", tmp_path / "third")
    before = (tmp_path / "third/log.jsonl").read_text()
    assert "already holds a run" in refused("train_gpt2.py", *flags, "--out_dir", tmp_path / "third")
    assert (tmp_path / "third/log.jsonl").read_text() == before


def poison(monkeypatch, steps, rank=0):
    """The gradients of these steps (the first is 0) are nan on this rank."""
    train_step = train_gpt2.Run.train_step

    def poisoned(run):
        hurt = run.step in steps and run.world.rank == rank
        run.model.ln_f.eps = float("nan") if hurt else 1e-5
        return train_step(run)
    monkeypatch.setattr(train_gpt2.Run, "train_step", poisoned)


def test_a_nan_on_one_rank_skips_the_update_on_all(small_shards, tmp_path, monkeypatch):
    poison(monkeypatch, (3, 4), rank=1)
    out, _ = run_ranks(2, "train_gpt2.py", *SMALL, "--data", small_shards, "--batch_size", 8, "--out_dir", tmp_path / "log")
    lines = log_lines(tmp_path / "log", "train")
    assert [bool(line.get("skipped")) for line in lines] == [False] * 3 + [True] * 2 + [False]
    assert lines[3]["loss"] is None and lines[5]["loss"] > 0 and "not finite" in out


@pytest.fixture
def signals():
    """The handlers as they were, after a test that makes a run in this process."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bad_gradient_of_one_optimizer_skips_both(dtype, bad, small_shards, tmp_path, signals):
    flags = [*SMALL, "--optimizer", "muon", "--dtype", dtype, "--data", small_shards, "--out_dir", tmp_path / "log"]
    run = train_gpt2.Run([str(flag) for flag in flags], World())
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == "float16")
    run.train_step()
    before = [p.clone() for p in run.model.parameters()]
    hook = run.model.wte.weight.register_hook(lambda grad: grad * bad)  # AdamW's, not Muon's
    assert run.train_step()["skipped"] and all(map(torch.equal, before, run.model.parameters()))
    hook.remove()
    line = run.train_step()
    assert "skipped" not in line and not any(map(torch.equal, before, run.model.parameters()))
    run.log.opened.close()


def test_ten_nans_in_a_row_end_the_run(small_shards, tmp_path, monkeypatch):
    poison(monkeypatch, range(5, 40))
    line = refused("train_gpt2.py", *SMALL, "--max_steps", 40, "--checkpoint_every", 4, "--data", small_shards, "--out_dir", tmp_path / "log",
                   "--quiet", code=1)
    assert "10 steps in a row" in line and "step_000012" in line
    assert len(losses(tmp_path / "log")) == 15


def test_any_ranks_error_ends_all_with_its_message(small_shards, tmp_path, monkeypatch):
    """Only rank 1 finds its part of the data damaged, in the middle of the run."""
    read_windows = train_gpt2.Corpus.read_windows
    calls = []

    def damaged(corpus, pairs):
        calls.append(pairs)
        if len(calls) == 4 and os.environ.get("RANK") == "1":
            raise fineweb.UserError("shard 7 is damaged")
        return read_windows(corpus, pairs)
    monkeypatch.setattr(train_gpt2.Corpus, "read_windows", damaged)
    out, err = run_ranks(2, "train_gpt2.py", *SMALL, "--data", small_shards, "--out_dir", tmp_path / "log", "--quiet", expect=2)
    assert err.count("error: shard 7 is damaged") == 1 and "Traceback" not in err


def test_hellaswag_is_read_by_rank_0_for_all(one_process, tmp_path, monkeypatch):
    """And left out on all where rank 0 cannot."""
    def load(path):
        assert os.environ["RANK"] == "0"
        if path is None:
            raise fineweb.UserError("no network")
        return make_examples(7)
    monkeypatch.setattr(train_gpt2.hellaswag, "load_examples", load)
    flags = ["eval", "--checkpoint", one_process / "latest", "--device", "cpu"]
    out, _ = run_ranks(2, "train_gpt2.py", *flags)
    assert out.count("HellaSwag is left out: no network") == 1
    out, _ = run_ranks(2, "train_gpt2.py", *flags, "--hellaswag_data", "given.jsonl")
    assert "of 7" in out


def test_bad_flags_under_torchrun_are_said_once(tmp_path):
    _, err = run_ranks(2, "train_gpt2.py", "--max_stepz", 3, expect=2)
    assert err.count("--max_stepz") == 1
    _, err = run_ranks(2, "train_gpt2.py", "--data", "nowhere", "--device", "cpu", "--out_dir", tmp_path / "log", expect=2)
    assert err.count("error: --data nowhere") == 1
    _, err = spawn("train_gpt2.py", "--data", "nowhere", "--out_dir", tmp_path / "log", torchrun=2).finish(expect=None)
    assert err.count("error: --data nowhere") == 1


def spoil(path, change):
    tokens = np.load(path)
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif change == "empty":
        path.write_bytes(b"")
    elif change == "dtype":
        np.save(path, tokens.astype(np.int32))
    elif change == "ids":
        tokens[1234] = 60000
        np.save(path, tokens)


@pytest.mark.parametrize("change,says", [("truncated", "truncated"), ("empty", "truncated"), ("dtype", "int32"), ("ids", "token 60000 at offset 1234")])
@pytest.mark.parametrize("split", ["train_000001", "val_000000"])
def test_a_bad_shard_is_one_line_through_the_command_line(split, change, says, small_shards, tmp_path):
    shutil.copytree(small_shards, tmp_path / "shards")
    spoil(tmp_path / f"shards/edufineweb_{split}.npy", change)
    line = refused("train_gpt2.py", *SMALL, "--max_steps", 20, "--eval_tokens", 3000, "--data", tmp_path / "shards", "--out_dir", tmp_path / "log",
                   "--quiet")
    assert f"edufineweb_{split}.npy" in line and says in line


def test_out_of_memory_is_known_by_its_kind_or_its_words():
    errors = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory (MPS allocated: 20 GB)"),
              RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
    assert all(map(train_gpt2.is_out_of_memory, errors))
    assert not train_gpt2.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_out_of_memory_names_the_next_smaller_batch(small_shards, tmp_path, monkeypatch):
    forward = GPT.forward

    def small(self, idx, targets=None):
        if idx.size(0) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, idx, targets)
    monkeypatch.setattr(GPT, "forward", small)
    flags = [*SMALL, "--eval_every", 0, "--data", small_shards, "--quiet"]
    line = refused("train_gpt2.py", *flags, "--batch_size", 16, "--out_dir", tmp_path / "log", code=1)
    assert "out of memory with --batch_size 16; add --batch_size 8" in line
    line = refused("train_gpt2.py", *flags, "--resume", "--batch_size", 8, "--out_dir", tmp_path / "log", code=1)
    assert "out of memory with --batch_size 8; add --batch_size 4" in line
    run("train_gpt2.py", *flags, "--resume", "--batch_size", 4, "--out_dir", tmp_path / "log")
    monkeypatch.setattr(GPT, "forward", lambda *args: small(*args[:1], torch.zeros(6)))
    line = refused("train_gpt2.py", *flags, "--batch_size", 1, "--out_dir", tmp_path / "one", code=1)
    assert "out of memory with --batch_size 1; a smaller --block_size or model is needed" in line


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)])


def test_a_full_disk_keeps_the_old_checkpoints_and_says_so(tiny_disk, small_shards, tmp_path):
    flags = [*SMALL, "--n_layer", 4, "--n_embd", 64, "--data", small_shards, "--checkpoint_every", 2, "--keep_checkpoints", 0]
    out, err = run("train_gpt2.py", *flags, "--out_dir", tiny_disk / "log", expect=1)
    assert "step_000004 could not be written" in out and "the last good checkpoint is" in out and "free some space" in out
    assert "Traceback" not in err and len(losses(tiny_disk / "log")) == 6  # the run itself went on
    kept = sorted(p.name for p in (tiny_disk / "log").glob("step_*"))
    assert kept == ["step_000002"] and not list((tiny_disk / "log").glob(".tmp_step*"))
    run("train_gpt2.py", "--resume_from", tiny_disk / "log/step_000002", "--out_dir", tmp_path / "log", "--device", "cpu")


def fill(disk):
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))


@pytest.mark.parametrize("tracker", ["none", "tensorboard"])
def test_a_full_disk_ends_no_run_and_loses_no_line_of_its_log(tracker, tiny_disk, small_shards):
    flags = []
    if tracker == "tensorboard":
        pytest.importorskip("tensorboard")
        flags = ["--tensorboard"]
    process = spawn("train_gpt2.py", *SMALL, "--data", small_shards, "--out_dir", tiny_disk / "log", "--max_steps", 10**6,
                    "--eval_every", 0, "--checkpoint_every", 0, *flags)
    wait_for(lambda: log_has_step(tiny_disk / "log", 5), process)
    fill(tiny_disk)
    wait_for(lambda: "log.jsonl: lines wait (" in process.output()[0], process)
    in_vain = (tiny_disk / "log/log.jsonl").stat().st_size
    time.sleep(0.5)  # some more steps, in vain as well
    assert (tiny_disk / "log/log.jsonl").stat().st_size == in_vain
    (tiny_disk / "filler").unlink()
    wait_for(lambda: (tiny_disk / "log/log.jsonl").stat().st_size > in_vain, process)
    steps = steps_logged(tiny_disk / "log")
    wait_for(lambda: steps_logged(tiny_disk / "log") > steps + 5, process)
    process.terminate()
    out, _ = process.finish()
    assert out.count("training goes on") == 1 and "the same command with --resume goes on" in out
    steps = [line["step"] for line in log_lines(tiny_disk / "log", "train")]
    assert steps == list(range(1, len(steps) + 1)) and (tiny_disk / f"log/step_{steps[-1]:06d}").is_dir()


def test_lines_that_found_no_space_to_the_end_are_told(tiny_disk, small_shards, monkeypatch):
    train_step = train_gpt2.Run.train_step

    def full(run):
        if run.step == 3:
            fill(tiny_disk)
        return train_step(run)
    monkeypatch.setattr(train_gpt2.Run, "train_step", full)
    out, err = run("train_gpt2.py", *SMALL, "--data", small_shards, "--out_dir", tiny_disk / "log", "--max_steps", 200, expect=1)
    lost = int(re.search(r"log.jsonl: its last lines could not be written, (\d+) of them\n", err)[1])
    kept = len((tiny_disk / "log/log.jsonl").read_text().splitlines())
    assert 1 + 200 + 67 + 1 <= lost + kept <= 1 + 200 + 67 + 2 and lost > 100  # one of them may be torn in two
    assert out.count("training goes on") == 1 and "parameters:" in out


@pytest.mark.parametrize("kind", ["resumed", "begun anew"])
def test_a_start_on_a_full_disk_is_one_line(kind, tiny_disk, small_shards):
    flags = ["--data", small_shards, "--out_dir", tiny_disk / "log", "--resume"]
    run("train_gpt2.py", *SMALL, *flags, "--max_steps", 4, "--checkpoint_every", 4 if kind == "resumed" else 0)
    before = (tiny_disk / "log/log.jsonl").read_bytes()
    fill(tiny_disk)
    line = refused("train_gpt2.py", *SMALL, *flags, "--max_steps", 6)
    assert line == f"error: {tiny_disk / 'log/log.jsonl'}{'.old' if kind == 'begun anew' else ''}: No space left on device"
    assert (tiny_disk / "log/log.jsonl").read_bytes() == before


def test_the_checkpoint_just_written_is_kept_beside_a_damaged_newer_one(small_shards, tmp_path, signals):
    flags = [*SMALL, "--data", small_shards, "--out_dir", tmp_path]
    run = train_gpt2.Run([str(flag) for flag in flags], World())
    for run.step, keep in ((100, 0), (200, 0), (1_000_000, 0), (130, 1)):
        run.config.evaluation.keep_checkpoints = keep
        run.save()
    assert [path.name for path in train_gpt2.list_checkpoints(tmp_path).values()] == ["step_000130", "step_000200", "step_1000000"]
    assert os.readlink(tmp_path / "latest") == "step_000130"


@pytest.mark.parametrize("kind", ["a folder", "no links"])
def test_latest_where_it_is_no_link(kind, small_shards, tmp_path, monkeypatch):
    """As a copied run has it, or a file system without links: checkpoints count, and every reader finds the newest."""
    def no_links(self, target):
        raise PermissionError(1, "Operation not permitted", str(self))
    flags = [*SMALL, "--data", small_shards, "--checkpoint_every", 2, "--out_dir", tmp_path / "log"]
    if kind == "no links":
        monkeypatch.setattr(Path, "symlink_to", no_links)
    run("train_gpt2.py", *flags, "--max_steps", 2)
    if kind == "a folder":
        (tmp_path / "log/latest").unlink()
        shutil.copytree(tmp_path / "log/step_000002", tmp_path / "log/latest")
    out, _ = run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log", "--max_steps", 4)
    assert "warning" not in out and losses(tmp_path / "log")[3]
    latest = tmp_path / "log/latest"
    assert latest.is_symlink() == (kind == "a folder") and hellaswag.follow(latest).name == "step_000004"
    for command in (["sample", "--max_new_tokens", 3], ["eval"]):
        run("train_gpt2.py", *command, "--checkpoint", latest)
    out, _ = run("train_gpt2.py", "--resume_from", latest, "--max_steps", 5)
    assert "at step 4" in out and len(losses(tmp_path / "log")) == 5


def test_the_best_checkpoint_is_kept(small_shards, tmp_path, monkeypatch):
    """Of a run whose validation loss is least at step 4, and which is resumed after that."""
    validate, steps = train_gpt2.validate, iter([2, 4, 6, 8, 8, 10])  # that of the resumed step is made again

    def overfits(*args):
        validate(*args)
        return 2 + abs(next(steps) - 4) / 10, 1.0
    monkeypatch.setattr(train_gpt2, "validate", overfits)
    flags = [*SMALL, "--data", small_shards, "--eval_every", 2, "--checkpoint_every", 2, "--out_dir", tmp_path]
    run("train_gpt2.py", *flags, "--max_steps", 8)
    run("train_gpt2.py", "--resume", "--out_dir", tmp_path, "--max_steps", 10)
    kept = [path.name for path in train_gpt2.list_checkpoints(tmp_path).values()]
    assert kept == ["step_000004", "step_000008", "step_000010"]
    assert os.readlink(tmp_path / "best") == "step_000004" and os.readlink(tmp_path / "latest") == "step_000010"
    monkeypatch.undo()
    run("train_gpt2.py", "sample", "--checkpoint", tmp_path / "best", "--max_new_tokens", 2)
    out, _ = run("train_gpt2.py", "--resume_from", tmp_path / "best", "--out_dir", tmp_path / "branch", "--max_steps", 5)
    assert "at step 4" in out


def test_two_runs_in_one_folder(small_shards, tmp_path):
    """The second is refused, also with --resume, and the first goes on; a lock of a killed run does not stay."""
    flags = [*LONG, "--data", small_shards, "--out_dir", tmp_path / "log"]
    first = spawn("train_gpt2.py", *flags, "--max_steps", 10**6)
    wait_for(lambda: steps_logged(tmp_path / "log") >= 6, first)
    said = refused("train_gpt2.py", *flags, "--resume")
    assert f"{tmp_path / 'log'}: process {first.pid} is writing into it" in said
    before = steps_logged(tmp_path / "log")
    wait_for(lambda: steps_logged(tmp_path / "log") > before + 3, first)
    kill(first)
    assert [line["step"] for line in log_lines(tmp_path / "log", "train")] == list(range(1, steps_logged(tmp_path / "log") + 1))
    run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log", "--max_steps", steps_logged(tmp_path / "log") + 1)


def test_printed_commands_are_quoted(small_shards, tmp_path):
    out, _ = run("train_gpt2.py", *SMALL, "--checkpoint_every", 6, "--data", small_shards, "--out_dir", tmp_path / "my log $1")
    words = shlex.split(out.strip().splitlines()[-1])
    assert words[words.index("--checkpoint") + 1] == str(tmp_path / "my log $1") + "/latest"


def test_a_terminal_that_is_not_utf8(text_file, tmp_path):
    flags = [*SMALL, "--data", text_file, "--tokenizer", "byte", "--sample_every", 3, "--max_steps", 3, "--out_dir", tmp_path / "log"]
    out, err = spawn("train_gpt2.py", *flags, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}).finish()
    assert "sample:" in out and "?" in out and "Traceback" not in err


def test_keep_checkpoints(small_shards, tmp_path):
    run("train_gpt2.py", *SMALL, "--data", small_shards, "--checkpoint_every", 1, "--keep_checkpoints", 2, "--out_dir", tmp_path)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000005", "step_000006"]
    assert os.readlink(tmp_path / "latest") == "step_000006"
