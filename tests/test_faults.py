"""A run that is killed, moved, starved of disk or poisoned ends as if nothing had happened, or says what did. Kills are
triggered by what the log or the folder shows, never by the clock."""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fineweb
import train_gpt2
from train_gpt2 import GPT, GPTConfig, TrainConfig, World
from conftest import ROOT, SMALL, log_lines, losses, refused, run, shell, start
from test_hellaswag import make_examples

# Dropout on, several shards and epochs (224 windows, 16 a step), checkpoints between evaluations.
LONG = [*SMALL, "--max_steps", 40, "--dropout", 0.1, "--checkpoint_every", 7, "--eval_every", 10, "--sample_every", 20]


def result(out_dir):
    """What must be equal bit for bit: the last weights, and the log but for its clock."""
    lines = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    for line in lines:
        for key in ("seconds", "tokens_per_second", "run_id", "out_dir", "resume", "compile", "data"):
            line.pop(key, None)
    return (Path(out_dir) / "latest/model.safetensors").read_bytes(), sorted(map(json.dumps, lines))


def wait_for(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline, "nothing happened"
        time.sleep(0.001)


def steps_logged(out_dir):
    path = Path(out_dir) / "log.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def kill(process):
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, small_shards):
    out_dir = tmp_path_factory.mktemp("uninterrupted") / "log"
    run("train_gpt2.py", *LONG, "--data", small_shards, "--out_dir", out_dir)
    return out_dir


def test_ten_sigkills_in_a_row(uninterrupted, small_shards, tmp_path):
    """At random steps and in the middle of saves; the run that is left equals the one that was never killed."""
    out_dir, chance = tmp_path / "log", random.Random(0)
    command = ["train_gpt2.py", *LONG, "--data", small_shards, "--out_dir", out_dir, "--resume"]
    for i in range(10):
        process = start(*command)
        kept = 7 * (steps_logged(out_dir) // 7)  # steps that the newest checkpoint may have kept
        if i % 2:
            wait_for(lambda: list(out_dir.glob(".tmp_step_*")) or process.poll() is not None, process)
        else:
            goal = kept + chance.randrange(1, 5)
            wait_for(lambda: log_has_step(out_dir, goal), process)
        kill(process)
        if i == 4:  # a checkpoint that the crash tore, whatever the file system did
            for folder in sorted(out_dir.glob("step_*"))[-1:]:
                (folder / "train_state.pt").write_bytes((folder / "train_state.pt").read_bytes()[:1000])
    run(*command)
    assert result(out_dir) == result(uninterrupted)


def log_has_step(out_dir, step):
    path = Path(out_dir) / "log.jsonl"
    return path.exists() and f'"train", "step": {step},' in path.read_text()


def test_a_finished_run_resumed_is_finished(uninterrupted, small_shards, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "log", symlinks=True)
    before = result(tmp_path / "log")
    run("train_gpt2.py", "--out_dir", tmp_path / "log", "--resume", "--device", "cpu")
    assert result(tmp_path / "log") == before


COUNTING = """
import sys; sys.path.insert(0, {root!r})
import fineweb, train_gpt2
from torch._dynamo.utils import counters
def counted(method):
    def call(run):
        result = method(run)
        print("graphs", run.step, counters["stats"]["unique_graphs"], flush=True)
        return result
    return call
train_gpt2.Run.train_step = counted(train_gpt2.Run.train_step)
train_gpt2.Run.evaluate = counted(train_gpt2.Run.evaluate)
fineweb.run_cli(train_gpt2.main)
"""


def test_compiled_run_compiles_once_and_resumes_bit_for_bit(small_shards, tmp_path):
    """Nothing is compiled after the first evaluation, by HellaSwag and samples neither."""
    (tmp_path / "driver.py").write_text(COUNTING.format(root=str(ROOT)))
    (tmp_path / "hellaswag.jsonl").write_text("".join(json.dumps(example) + "\n" for example in make_examples(6)))
    flags = [*[f for f in LONG if f != "--no-compile"], "--compile", "--n_layer", 2, "--max_steps", 7, "--checkpoint_every", 4,
             "--keep_checkpoints", 0, "--eval_every", 2, "--sample_every", 2, "--hellaswag_every", 3,
             "--hellaswag_data", tmp_path / "hellaswag.jsonl", "--data", small_shards]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    out, _ = run(tmp_path / "driver.py", *flags, "--out_dir", tmp_path / "whole", env=cache)
    graphs = [tuple(map(int, line.split()[1:])) for line in out.splitlines() if line.startswith("graphs")]
    assert graphs[1][1] > 0 and len({count for step, count in graphs if step == 1}) == 1
    assert len({count for step, count in graphs if step > 2}) == 1 and graphs[-1] == (7, graphs[4][1]), graphs
    process = start("train_gpt2.py", *flags, "--out_dir", tmp_path / "log", env=cache)
    wait_for(lambda: log_has_step(tmp_path / "log", 5), process)
    kill(process)
    out, _ = run("train_gpt2.py", *flags, "--out_dir", tmp_path / "log", "--resume", env=cache)
    assert "at step 4" in out and ", compiled" in out
    assert result(tmp_path / "log") == result(tmp_path / "whole")


def test_a_resumed_run_is_deterministic_if_it_was(small_shards, tmp_path):
    (tmp_path / "driver.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import fineweb, torch, train_gpt2\n"
                                        "fineweb.run_cli(train_gpt2.main); print(torch.are_deterministic_algorithms_enabled())\n")
    flags = ["--checkpoint_every", 6, "--data", small_shards, "--out_dir", tmp_path / "log"]
    assert run(tmp_path / "driver.py", *SMALL, *flags, "--deterministic")[0].endswith("True\n")
    assert run(tmp_path / "driver.py", "--resume", "--max_steps", 7, "--out_dir", tmp_path / "log")[0].endswith("True\n")


def resume_copy(run_dir, step, out_dir):
    """What a run killed after this step's checkpoint would have left, had it logged on."""
    shutil.copytree(run_dir / f"step_{step:06d}", out_dir / f"step_{step:06d}")
    shutil.copy(run_dir / "log.jsonl", out_dir / "log.jsonl")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, uninterrupted, small_shards, tmp_path):
    process = start("train_gpt2.py", *LONG, "--data", small_shards, "--out_dir", tmp_path / "log")
    wait_for(lambda: steps_logged(tmp_path / "log") >= 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    last = out.strip().splitlines()[-1].strip()
    step = len(losses(tmp_path / "log"))
    assert last.endswith("--resume") and (tmp_path / f"log/step_{step:06d}").is_dir() and step < 40
    shell(last)
    assert result(tmp_path / "log")[0] == result(uninterrupted)[0]


def test_a_second_signal_stops_at_once(small_shards, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import fineweb, train_gpt2\n"
                      "slow = train_gpt2.Run.train_step\n"
                      "def step(run):\n    print('in a step', flush=True)\n"
                      "    while not run.stop.at:\n        time.sleep(0.01)\n"
                      "    print('asked to stop', flush=True); time.sleep(600)\n"
                      "train_gpt2.Run.train_step = step\n"
                      "fineweb.run_cli(train_gpt2.main)\n")
    process = start(driver, *LONG, "--data", small_shards, "--out_dir", tmp_path / "log")
    wait_for(lambda: "in a step" in process.output()[0], process)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "asked to stop" in process.output()[0], process)  # else the kernel may make one of two
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT


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
    run("train_gpt2.py", *SMALL, "--max_steps", 30, "--batch_size", 2, "--eval_tokens", 1500, "--data", small_shards,
        "--out_dir", tmp_path / "log", torchrun=2)
    close(tmp_path / "log", one_process)


def test_a_signal_to_one_rank_stops_all_and_says_how_to_go_on(one_process, small_shards, tmp_path):
    (tmp_path / "driver.py").write_text(f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); import fineweb, train_gpt2\n"
                                        "step = train_gpt2.Run.train_step\n"
                                        "def slow(run):\n"
                                        f"    open({str(tmp_path)!r} + f'/{{run.world.rank}}.pid', 'w').write(str(os.getpid()))\n"
                                        "    time.sleep(0.3)\n    return step(run)\n"
                                        "train_gpt2.Run.train_step = slow\n"
                                        "fineweb.run_cli(train_gpt2.main)\n")
    process = start(tmp_path / "driver.py", *SMALL, "--max_steps", 30, "--eval_tokens", 1500, "--data", small_shards,
                    "--out_dir", tmp_path / "log", torchrun=2)
    wait_for(lambda: steps_logged(tmp_path / "log") >= 3, process)
    os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    step = len(losses(tmp_path / "log"))
    assert (tmp_path / f"log/step_{step:06d}").is_dir() and step < 30
    last = out.strip().splitlines()[-1].split()
    assert last[:3] == ["torchrun", "--standalone", "--nproc_per_node=2"] and os.path.samefile(last[3], ROOT / "train_gpt2.py")
    assert last[4:] == ["--out_dir", str(tmp_path / "log"), "--resume"]
    run("train_gpt2.py", *last[4:], "--device", "cpu", torchrun=last[1:3])
    close(tmp_path / "log", one_process)


def test_resumes_on_another_world_size(one_process, small_shards, tmp_path):
    resume_copy(one_process, 10, tmp_path / "log")
    out, _ = run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log", "--device", "cpu", torchrun=2)
    assert "at step 10" in out
    close(tmp_path / "log", one_process)


def test_muon_resumes_and_agrees_between_worlds(small_shards, tmp_path):
    flags = [*SMALL, "--optimizer", "muon", "--rope", "--rmsnorm", "--swiglu", "--qk_norm", "--no-bias", "--data", small_shards,
             "--checkpoint_every", 3, "--keep_checkpoints", 0, "--momentum_warmup_steps", 10]
    run("train_gpt2.py", *flags, "--out_dir", tmp_path / "whole")
    state = torch.load(tmp_path / "whole/step_000003/train_state.pt", weights_only=True)
    assert state["optimizers"][1]["param_groups"][0]["momentum"] == pytest.approx(0.87)  # of the third update
    resume_copy(tmp_path / "whole", 3, tmp_path / "log")
    run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log", "--device", "cpu")
    assert result(tmp_path / "log")[0] == result(tmp_path / "whole")[0]
    run("train_gpt2.py", *flags, "--out_dir", tmp_path / "two", torchrun=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


def test_two_nodes_on_loopback(one_process, small_shards, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}",
             "--rdzv_id", "test", "--local_addr", "127.0.0.1"]
    nodes = [start("train_gpt2.py", *SMALL, "--max_steps", 30, "--eval_tokens", 1500, "--data", small_shards,
                   "--out_dir", tmp_path / "log", torchrun=where) for _ in range(2)]
    for node in nodes:
        out, err = node.communicate(timeout=120)
        assert node.returncode == 0, err
    close(tmp_path / "log", one_process)


def test_torchrun_restarts_from_the_last_checkpoint(one_process, small_shards, tmp_path):
    """A worker is killed; the job comes back by itself, and nobody says --resume. Typed as a user does: nothing is
    forked here."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "2",
               "--monitor_interval", "0.1", str(ROOT / "train_gpt2.py"),
               *map(str, [*SMALL, "--max_steps", 30, "--checkpoint_every", 5, "--eval_tokens", 1500, "--data", small_shards,
                          "--out_dir", tmp_path / "log"])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: log_has_step(tmp_path / "log", 12), process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "resumed from" in out, out + err
    close(tmp_path / "log", one_process)


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
    run("train_gpt2.py", "--resume", one_process / "step_000010", "--out_dir", tmp_path / "other", "--device", "cpu")
    assert result(tmp_path / "other")[0] == result(one_process)[0]
    line = refused("train_gpt2.py", "--resume", one_process / "step_000010", "--device", "cpu")
    assert "step_000030" in line and "--out_dir" in line


POISON = """
import os, sys; sys.path.insert(0, {root!r})
import fineweb, train_gpt2
honest = train_gpt2.Loader.next_batch
def poisoned(loader):
    step = loader.position // 16
    run = poisoned.run
    if run is not None:
        bias = run.model.norm_f.bias
        hurt = {when} and os.environ.get("RANK", "0") == str({rank})
        run.model.norm_f.eps = float("nan") if hurt else 1e-5
    return honest(loader)
poisoned.run = None
train_gpt2.Loader.next_batch = poisoned
made = train_gpt2.Run.__init__
def init(run, *args):
    made(run, *args)
    poisoned.run = run
train_gpt2.Run.__init__ = init
fineweb.run_cli(train_gpt2.main)
"""


def test_a_nan_on_one_rank_skips_the_update_on_all(small_shards, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(POISON.format(root=str(ROOT), when="step in (3, 4)", rank=1))
    out, _ = run(driver, *SMALL, "--data", small_shards, "--batch_size", 8, "--out_dir", tmp_path / "log", torchrun=2)
    lines = log_lines(tmp_path / "log", "train")
    assert [bool(line.get("skipped")) for line in lines] == [False] * 3 + [True] * 2 + [False]
    assert lines[3]["loss"] is None and lines[5]["loss"] > 0 and "not finite" in out


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bad_gradient_of_one_optimizer_skips_both(dtype, bad, small_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    flags = [*SMALL, "--optimizer", "muon", "--dtype", dtype, "--data", small_shards, "--out_dir", tmp_path / "log"]
    run = train_gpt2.Run(fineweb.parse_flags(list(map(str, flags)), GPTConfig, TrainConfig, prog="", description=""), World("cpu"))
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == "float16")
    run.train_step()
    before = [p.clone() for p in run.model.parameters()]
    hook = run.model.wte.weight.register_hook(lambda grad: grad * bad)  # AdamW's, not Muon's
    assert run.train_step()[0]["skipped"] and all(map(torch.equal, before, run.model.parameters()))
    hook.remove()
    line, _ = run.train_step()
    assert "skipped" not in line and not any(map(torch.equal, before, run.model.parameters()))
    run.log.close()


def test_ten_nans_in_a_row_end_the_run(small_shards, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(POISON.format(root=str(ROOT), when="step >= 5", rank=0))
    out, err = run(driver, *SMALL, "--max_steps", 40, "--checkpoint_every", 4, "--data", small_shards, "--out_dir", tmp_path / "log", expect=1)
    assert "10 steps in a row" in err and "step_000012" in err and "Traceback" not in err
    assert len(losses(tmp_path / "log")) == 15


def test_any_ranks_error_ends_all_with_its_message(small_shards, tmp_path):
    """Only rank 1 finds its part of the data damaged, in the middle of the run."""
    folder = tmp_path / "shards"
    shutil.copytree(small_shards, folder)
    driver = tmp_path / "driver.py"
    driver.write_text(POISON.format(root=str(ROOT), when="False", rank=0).replace(
        "    return honest(loader)", "    if step == 3 and os.environ['RANK'] == '1':\n        raise fineweb.UserError('shard 7 is damaged')\n    return honest(loader)"))
    out, err = run(driver, *SMALL, "--data", folder, "--out_dir", tmp_path / "log", torchrun=2, expect=None)
    assert err.count("error: shard 7 is damaged") == 1 and "Traceback (most recent call last):\n  File \"%s" % ROOT not in err


def test_eval_leaves_hellaswag_out_on_all_ranks(one_process, tmp_path):
    (tmp_path / "driver.py").write_text(f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import fineweb, hellaswag, train_gpt2\n"
                                        "def load(path):\n"
                                        "    if os.environ['RANK'] == '1':\n        raise fineweb.UserError('no network')\n"
                                        "    return [{}]\n"
                                        "hellaswag.load_examples = load\n"
                                        "fineweb.run_cli(train_gpt2.main)\n")
    out, _ = run(tmp_path / "driver.py", "eval", "--checkpoint", one_process / "latest", "--device", "cpu", torchrun=2)
    assert "HellaSwag is left out: another process could not read it" in out


def test_bad_flags_under_torchrun_are_said_once(tmp_path):
    _, err = run("train_gpt2.py", "--max_stepz", 3, torchrun=2, expect=None)
    assert err.count("--max_stepz") == 1
    _, err = run("train_gpt2.py", "--data", "nowhere", "--device", "cpu", "--out_dir", tmp_path / "log", torchrun=2, expect=None)
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
    line = refused("train_gpt2.py", *SMALL, "--max_steps", 20, "--eval_tokens", 3000, "--data", tmp_path / "shards", "--out_dir", tmp_path / "log")
    assert f"edufineweb_{split}.npy" in line and says in line


def test_out_of_memory_is_known_by_its_kind_or_its_words():
    errors = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory (MPS allocated: 20 GB)"),
              RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
    assert all(map(train_gpt2.is_out_of_memory, errors))
    assert not train_gpt2.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_out_of_memory_names_the_batch_that_fits(small_shards, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch, fineweb, train_gpt2\n"
                      "forward = train_gpt2.GPT.forward\n"
                      "def small(self, idx, targets=None):\n"
                      "    if idx.size(0) > 5:\n        raise torch.OutOfMemoryError('CUDA out of memory')\n"
                      "    return forward(self, idx, targets)\n"
                      "train_gpt2.GPT.forward = small\n"
                      "fineweb.run_cli(train_gpt2.main)\n")
    flags = [*SMALL, "--eval_every", 0, "--data", small_shards]
    line = refused(driver, *flags, "--batch_size", 16, "--out_dir", tmp_path / "log", code=1)
    assert "out of memory with --batch_size 16; 4 fits: add --batch_size 4" in line
    run(driver, *flags, "--batch_size", 4, "--out_dir", tmp_path / "fits")


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
    assert "step_000004 could not be written" in out and "newest complete checkpoint is" in out and "free some space" in out
    assert "Traceback" not in err and len(losses(tiny_disk / "log")) == 6  # the run itself went on
    kept = sorted(p.name for p in (tiny_disk / "log").glob("step_*"))
    assert kept == ["step_000002"] and not list((tiny_disk / "log").glob(".tmp_step*"))
    run("train_gpt2.py", "--resume", tiny_disk / "log/step_000002", "--out_dir", tmp_path / "log", "--device", "cpu")


def test_the_checkpoint_just_written_is_kept_beside_a_damaged_newer_one(tmp_path):
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=64))
    for step in (100, 200, 1_000_000, 130):
        train_gpt2.save_checkpoint(tmp_path, step, model, None, {"model": {}}, keep=1 if step == 130 else 0)
    assert [p.name for p in train_gpt2.list_checkpoints(tmp_path)] == ["step_000130", "step_000200", "step_1000000"]
    assert os.readlink(tmp_path / "latest") == "step_000130"


def test_torchruns_restart_does_not_resume_a_run_that_was_refused(one_process, small_shards):
    before = (one_process / "log.jsonl").read_text()
    _, err = run("train_gpt2.py", *SMALL, "--max_steps", 40, "--data", small_shards, "--out_dir", one_process, expect=1,
                 torchrun=["--standalone", "--nproc_per_node", 1, "--max_restarts", 1, "--monitor_interval", 0.1])
    assert err.count("already holds a run") == 2 and (one_process / "log.jsonl").read_text() == before, err


def test_keep_checkpoints(small_shards, tmp_path):
    run("train_gpt2.py", *SMALL, "--data", small_shards, "--checkpoint_every", 1, "--keep_checkpoints", 2, "--out_dir", tmp_path)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000005", "step_000006"]
    assert os.readlink(tmp_path / "latest") == "step_000006"
