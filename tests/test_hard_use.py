"""What hard use of a training run meets: torn files of every size, signals at every moment, clocks that jump, folders that
move, logs that others wrote into. Each fault stands for its kind."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

import fineweb
import train_gpt2
from conftest import ROOT, SIGNALS, SMALL, log_lines, losses, refused, run, run_ranks, spawn, wait_for
from test_hellaswag import make_examples

FLAGS = [*SMALL, "--data", ROOT / "input.txt", "--tokenizer", "byte", "--preset", "tiny"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Six steps with a checkpoint at the third and the last."""
    out_dir = tmp_path_factory.mktemp("finished") / "log"
    run("train_gpt2.py", *FLAGS, "--checkpoint_every", 3, "--keep_checkpoints", 0, "--out_dir", out_dir)
    return out_dir


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "log", symlinks=True))


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


# -----------------------------------------------------------------------------
# torn files

@pytest.mark.parametrize("file", ["train_state.pt", "model.safetensors", "config.json"])
def test_a_torn_file_of_any_size_is_stepped_over(file, copy):
    """Through the function that chooses, over many sizes, and through the command line at the ends of what torch says."""
    path = copy / "step_000006" / file
    content = path.read_bytes()
    setup = train_gpt2.SetupFlags(out_dir=str(copy), resume=True)
    sizes = {len(content) * i // 25 for i in range(25)} | {0, 1, 1000, 4096, 4097, 20000, 69583, len(content) - 2}
    for size in sorted(size for size in sizes if size < len(content)):
        path.write_bytes(content[:size])
        assert train_gpt2.choose_checkpoint(setup, train_gpt2.World()).folder.name == "step_000003", size
    for size in (4097, len(content) // 2):
        path.write_bytes(content[:min(size, len(content) - 2)])
        assert file in refused("train_gpt2.py", "eval", "--checkpoint", copy / "step_000006", "--device", "cpu")
    out, _ = run("train_gpt2.py", "--resume", "--out_dir", copy, "--device", "cpu")
    assert "not resumed from step_000006" in out and file in out and "at step 3" in out
    assert weights(copy / "latest") == weights(copy / "best") and (copy / "latest").resolve().name == "step_000006"


# -----------------------------------------------------------------------------
# signals

MOMENTS = ["validate", "score_hellaswag", "stream_text", "read_windows"]


def interrupt(monkeypatch, moment, number=signal.SIGTERM, rank=0, step=3):
    """The signal comes to this rank when the run evaluates after this step: as the function is entered, or for
    read_windows in the second batch of the validation. Returns what counts the batches after it."""
    batches, state = [], {"step": 0}
    train_step = train_gpt2.Run.train_step

    def counted_step(run):
        line = train_step(run)
        state["step"] = run.step
        return line

    def send():
        if state["step"] == step and int(os.environ.get("RANK", 0)) == rank:
            state["step"] = -1
            os.kill(os.getpid(), number)
    owner, name = (train_gpt2.Corpus if moment == "read_windows" else train_gpt2), moment
    known = getattr(owner, name)

    def interrupted(*args):
        if moment != "read_windows":
            send()
        elif "(val)" in args[0].name:
            batches.append(len(args[1]))
            if len(batches) % 5 == 2:
                send()
        return known(*args)
    monkeypatch.setattr(train_gpt2.Run, "train_step", counted_step)
    monkeypatch.setattr(owner, name, interrupted)
    return batches


def evaluated(tmp_path):
    (tmp_path / "hellaswag.jsonl").write_text("".join(json.dumps(example) + "\n" for example in make_examples(8)))
    return ["--hellaswag_data", tmp_path / "hellaswag.jsonl", "--hellaswag_every", 3, "--sample_every", 3, "--eval_every", 3,
            "--checkpoint_every", 0, "--batch_size", 1, "--eval_tokens", 1024]


def without_clock(out_dir):
    lines = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    clock = ("seconds", "training_seconds", "total_seconds", "tokens_per_second", "peak_memory_gb", "run_id", "out_dir", "resume")
    return sorted(json.dumps({name: value for name, value in line.items() if name not in clock}) for line in lines)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_an_evaluation_and_saves_the_step_at_hand(moment, tmp_path, monkeypatch):
    flags = [*FLAGS, *evaluated(tmp_path), "--checkpoint_every", 6]
    run("train_gpt2.py", *flags, "--out_dir", tmp_path / "whole")
    batches = interrupt(monkeypatch, moment)
    out, _ = run("train_gpt2.py", *flags, "--out_dir", tmp_path / "log")
    assert "stopped by a signal at step 3;" in out and len(losses(tmp_path / "log")) == 3
    assert [path.name for path in (tmp_path / "log").glob("step_*")] == ["step_000003"]
    assert moment != "read_windows" or len(batches) == 2  # of 32
    kinds = {"validate": "val", "score_hellaswag": "hellaswag", "stream_text": "sample", "read_windows": "val"}
    assert log_lines(tmp_path / "log", kinds[moment]) == log_lines(tmp_path / "log", "done") == []
    monkeypatch.undo()
    run("train_gpt2.py", *flags, "--resume", "--out_dir", tmp_path / "log")
    assert without_clock(tmp_path / "log") == without_clock(tmp_path / "whole")
    assert weights(tmp_path / "log/latest") == weights(tmp_path / "whole/latest")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_to_one_rank_ends_the_evaluation_of_all(moment, tmp_path, monkeypatch):
    interrupt(monkeypatch, moment, rank=1)
    flags = [*FLAGS, *evaluated(tmp_path), "--out_dir", tmp_path / "log"]
    out, _ = run_ranks(2, "train_gpt2.py", *flags)
    assert "stopped by a signal at step 3;" in out and (tmp_path / "log/step_000003/train_state.pt").exists()
    assert len(losses(tmp_path / "log")) == 3


def test_a_signal_in_the_last_step_leaves_the_end_to_the_resumed_run(tmp_path, monkeypatch):
    """And `done` never takes an older validation for the end's."""
    flags = [*FLAGS, "--max_steps", 7, "--eval_every", 3, "--out_dir", tmp_path / "log"]
    train_step = train_gpt2.Run.train_step

    def last_step(run):
        line = train_step(run)
        run.stopped = run.step == 7  # as the step's all-reduce finds it
        return line
    monkeypatch.setattr(train_gpt2.Run, "train_step", last_step)
    out, _ = run("train_gpt2.py", *flags)
    assert "stopped by a signal at step 7;" in out and "---" not in out and log_lines(tmp_path / "log", "done") == []
    monkeypatch.undo()
    run("train_gpt2.py", *flags, "--resume")
    done, vals = log_lines(tmp_path / "log", "done")[0], log_lines(tmp_path / "log", "val")
    assert [line["step"] for line in vals] == [3, 6, 7] and (done["val_loss"], done["val_bpb"]) == (vals[-1]["loss"], vals[-1]["bpb"])
    run("train_gpt2.py", "--resume", "--max_steps", 8, "--eval_every", 0, "--checkpoint_every", 1, "--out_dir", tmp_path / "log")
    done = log_lines(tmp_path / "log", "done")[0]
    assert (done["val_loss"], done["val_bpb"]) == (None, None) and done["best_val_loss"] == min(line["loss"] for line in vals)


def test_a_repeated_sigxcpu_does_not_end_the_step(monkeypatch):
    """The kernel sends it every second from the soft limit on."""
    ends = []
    monkeypatch.setattr(train_gpt2.os, "kill", lambda pid, number: ends.append(number))
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGCONT)}
    try:
        stop = train_gpt2.StopRequest()
        for _ in range(3):
            signal.raise_signal(signal.SIGXCPU)
        assert stop.number == signal.SIGXCPU and ends == []
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_cpu_limit_saves(tmp_path):
    """A real one: the kernel's signal."""
    import resource
    process = spawn("train_gpt2.py", *FLAGS, "--max_steps", 10**6, "--eval_every", 0, "--out_dir", tmp_path / "log")
    wait_for(lambda: (tmp_path / "log/log.jsonl").exists() and len(losses(tmp_path / "log")) > 2, process)
    resource.prlimit(process.pid, resource.RLIMIT_CPU, (1, resource.RLIM_INFINITY))
    out, _ = process.finish()
    assert "stopped by a signal" in out and (tmp_path / f"log/step_{len(losses(tmp_path / 'log')):06d}").is_dir()


def test_a_suspended_run_does_not_count_the_time(tmp_path):
    flags = [*FLAGS, "--max_steps", 10**6, "--eval_every", 0, "--max_minutes", 0.1, "--out_dir", tmp_path / "log"]
    process = spawn("train_gpt2.py", *flags)
    wait_for(lambda: (tmp_path / "log/log.jsonl").exists() and len(losses(tmp_path / "log")) > 5, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)  # longer than the budget of six seconds
    process.send_signal(signal.SIGCONT)
    out, _ = process.finish()
    lines, done = log_lines(tmp_path / "log", "train"), log_lines(tmp_path / "log", "done")[0]
    suspended = [line["step"] for line in lines[1:] if "suspended" in line]
    assert len(suspended) == 1 and suspended[0] < lines[-1]["step"] and "do not count" in out
    counted = [line["seconds"] for line in lines[1:] if "suspended" not in line]
    assert done["training_seconds"] == pytest.approx(sum(counted)) and 6 <= sum(counted) < 8
    assert done["tokens_per_second"] == pytest.approx(512 * len(counted) / sum(counted))


# -----------------------------------------------------------------------------
# two starts in one folder

def test_a_refused_start_touches_nothing(copy, monkeypatch):
    """Trackers are opened after the lock: TensorBoard's would hide steps of the run that lives, W&B's would join it."""
    def init(**about):
        raise AssertionError("a tracker was opened")
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", init)
    lock = fineweb.lock_folder(copy)
    (copy / ".tmp_step_000009").mkdir()  # the save that is going on
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    for flags in (["--resume"], [*FLAGS], ["--resume_from", copy / "step_000003"]):
        line = refused("train_gpt2.py", *flags, "--tensorboard", "--wandb", "p", "--out_dir", copy)
        assert "is writing into it" in line
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    os.close(lock)


def test_the_checkpoint_is_chosen_under_the_lock(copy, tmp_path, monkeypatch):
    """Another run ends, and saves, while this one starts."""
    (copy / "step_000006").rename(tmp_path / "later")
    lock_folder = fineweb.lock_folder

    def slow_lock(folder):
        (tmp_path / "later").rename(copy / "step_000006")
        return lock_folder(folder)
    monkeypatch.setattr(fineweb, "lock_folder", slow_lock)
    out, _ = run("train_gpt2.py", "--resume", "--max_steps", 8, "--out_dir", copy, "--device", "cpu")
    assert "at step 6" in out and [line["step"] for line in log_lines(copy, "train")] == list(range(1, 9))


def test_unfinished_saves_are_removed(copy):
    for step in (4, 5, 17):
        shutil.copytree(copy / "step_000003", copy / f".tmp_step_{step:06d}")
    run("train_gpt2.py", "--resume", "--out_dir", copy, "--device", "cpu")
    assert not list(copy.glob(".tmp*"))
    shutil.copytree(copy / "step_000003", copy / ".tmp_step_000004")
    refused("train_gpt2.py", *FLAGS, "--out_dir", copy)  # a start is enough
    assert not list(copy.glob(".tmp*"))


# -----------------------------------------------------------------------------
# the log

@pytest.mark.parametrize("every", [2, 4])
def test_a_longer_run_keeps_all_lines_of_the_first_end(every, tmp_path):
    """Those of its last step were written since it was the last; now they are kept, or made again where they are due."""
    run("train_gpt2.py", *FLAGS, *evaluated(tmp_path), "--hellaswag_every", 4, "--sample_every", 4, "--eval_every", 4,
        "--checkpoint_every", 6, "--out_dir", tmp_path / "log")
    before = {kind: log_lines(tmp_path / "log", kind) for kind in ("val", "hellaswag", "sample")}
    assert all([line["step"] for line in lines] == [4, 6] for lines in before.values())
    run("train_gpt2.py", "--resume", "--max_steps", 9, "--out_dir", tmp_path / "log", "--eval_every", every, "--sample_every", every,
        "--hellaswag_every", every)
    for kind, lines in before.items():
        after = log_lines(tmp_path / "log", kind)
        assert after[:2] == lines and [line["step"] for line in after] == [4, 6, 8, 9], kind


FOREIGN = ["7", "null", "[1]", '"val"', "{}", '{"kind": 3, "step": 2}', '{"kind": "val", "step": "2", "loss": 1.0}',
           '{"kind": "train", "step": null, "loss": 1.0}', '{"kind": "val", "step": 2, "loss": "low"}', '{"kind": "val", "loss": 1.0}',
           '{"kind": "val", "step": 2, "loss": [1]}', '{"kind": "train", "step": 2.5, "loss": 1}', '{"kind": "config", "step": "a"}',
           '{"kind": "hellaswag", "step": true, "acc_norm": 1.0}', '{"step": 3, "loss": 1.0}', "", "{", "\0\0\0", "caf\u00e9"]


def test_lines_that_are_not_ours_are_left_out(finished, tmp_path):
    pytest.importorskip("matplotlib")
    lines = (finished / "log.jsonl").read_text().splitlines()
    for i, foreign in enumerate([*FOREIGN, "\n".join(FOREIGN)]):
        copy = Path(shutil.copytree(finished, tmp_path / f"log{i}", symlinks=True))
        (copy / "log.jsonl").write_text("\n".join([foreign, *lines[:4], foreign, *lines[4:], foreign]) + "\n")
        if i > len(FOREIGN) - 2:
            run("train_gpt2.py", "plot", "--out_dir", copy, "--output", tmp_path / "loss.png")
            run("train_gpt2.py", "--resume", "--max_steps", 8, "--out_dir", copy, "--device", "cpu")
            assert [line["step"] for line in log_lines(copy, "train")] == list(range(1, 9)) and log_lines(copy, "config")
        else:
            assert [json.dumps(line) for line in train_gpt2.read_log(copy / "log.jsonl")] == lines, foreign


def test_a_long_log_takes_no_memory(finished, tmp_path, monkeypatch):
    """And only rank 0 reads it."""
    setup = train_gpt2.SetupFlags(out_dir=str(tmp_path))
    lines = (finished / "log.jsonl").read_text().splitlines()
    (tmp_path / "log.jsonl").write_text("\n".join([lines[0], *(20_000 * [lines[1]])]) + "\n")
    config = train_gpt2.TrainConfig(setup=setup)
    run = train_gpt2.SimpleNamespace(config=config, step=10, world=train_gpt2.World(), hellaswag_examples=None, notes=[],
                                     is_due=lambda every: False)
    monkeypatch.setattr(train_gpt2, "describe_run", lambda run: {"kind": "config", "step": 10})
    tracemalloc.start()
    train_gpt2.RunLog(run).opened.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6 and (tmp_path / "log.jsonl").read_text().count('"train"') == 20_000
    run.world.rank = 1
    monkeypatch.setattr(train_gpt2, "read_log", None)
    train_gpt2.RunLog(run).write("val", 3, loss=1.0)


def test_the_config_line_says_what_was_chosen_and_a_resumed_run_what_it_changed(copy):
    first = log_lines(copy, "config")
    assert len(first) == 1 and first[0]["step"] == 0 and first[0]["device"] == "cpu" and first[0]["batch_size"] == "auto"
    chosen = first[0]["chosen"]
    assert (chosen["device"], chosen["dtype"], chosen["batch_size"], chosen["micro_steps"], chosen["world_size"]) == ("cpu", "float32", 16, 1, 1)
    assert chosen["chip"] and chosen["torch"] and chosen["script_sha256"] == fineweb.sha256_of(ROOT / "train_gpt2.py")
    run("train_gpt2.py", "--resume", "--max_steps", 7, "--out_dir", copy)
    run("train_gpt2.py", "--resume", "--out_dir", copy)  # nothing is new in this
    run("train_gpt2.py", "--resume", "--max_steps", 9, "--batch_size", 4, "--out_dir", copy)
    lines = log_lines(copy, "config")
    assert [(line["step"], line["max_steps"], line["chosen"]["micro_steps"]) for line in lines] == [(0, 6, 1), (6, 7, 1), (7, 9, 4)]
    assert len({line["run_id"] for line in lines}) == 1


def test_a_fork_is_a_run_of_its_own(copy, tmp_path):
    out_dir = tmp_path / "fork"
    run("train_gpt2.py", "--resume_from", copy / "step_000003", "--out_dir", out_dir, "--lr", 1e-4, "--device", "cpu")
    old, new = log_lines(copy, "config")[0], log_lines(out_dir, "config")[0]
    assert new["run_id"] != old["run_id"] and new["forked_from"] == str((copy / "step_000003").resolve()) and old["forked_from"] is None
    run("train_gpt2.py", "--resume", "--max_steps", 8, "--out_dir", out_dir)
    assert {line["run_id"] for line in log_lines(out_dir, "config")} == {new["run_id"]}
    assert {line["forked_from"] for line in log_lines(out_dir, "config")} == {new["forked_from"]}
    run("train_gpt2.py", "--resume_from", copy / "step_000006", "--max_steps", 8)  # in its own folder it is the same run
    assert {line["run_id"] for line in log_lines(copy, "config")} == {old["run_id"]}


def test_a_runs_folder_stands_for_its_newest_checkpoint(copy, tmp_path):
    out, _ = run("train_gpt2.py", "--resume_from", copy, "--max_steps", 8, "--out_dir", tmp_path / "fork", "--device", "cpu")
    assert "step_000006 at step 6" in out
    out, _ = run("train_gpt2.py", "--resume_from", copy, "--max_steps", 8, "--device", "cpu")
    assert "at step 6" in out and len(losses(copy)) == 8
    run("train_gpt2.py", "sample", "--checkpoint", copy, "--max_new_tokens", 2, "--device", "cpu")
    run("train_gpt2.py", "eval", "--checkpoint", copy, "--eval_tokens", 512, "--device", "cpu")
    out, _ = run("train_gpt2.py", *FLAGS[len(SMALL):], "--init_from", copy, "--max_steps", 1, "--total_batch_size", 64, "--eval_every", 0,
                 "--sample_every", 0, "--device", "cpu", "--dtype", "float32", "--out_dir", tmp_path / "tuned")
    assert f"{copy}, fine-tuned" in out


# -----------------------------------------------------------------------------
# clocks and places

@pytest.mark.parametrize("jump", [-86400, -3600, -60, 60, 3600, 86400])
def test_a_wall_clock_that_is_set_changes_nothing(jump, tmp_path, monkeypatch):
    look, looks = time.time, []

    def wall_clock():
        looks.append(0)
        return look() + (jump if len(looks) > 3 else 0)
    monkeypatch.setattr(time, "time", wall_clock)
    run("train_gpt2.py", *FLAGS, "--max_minutes", 50, "--eval_every", 0, "--out_dir", tmp_path / "log")
    lines, done = log_lines(tmp_path / "log", "train"), log_lines(tmp_path / "log", "done")[0]
    assert len(lines) == 6 and all(0 < line["seconds"] < 30 for line in lines)
    assert 0 < done["training_seconds"] < done["total_seconds"] <= time.monotonic() - train_gpt2.STARTED


def test_total_and_training_seconds_count_the_whole_run(copy):
    before = log_lines(copy, "done")[0]
    run("train_gpt2.py", "--resume", "--max_steps", 8, "--out_dir", copy, "--device", "cpu")
    after = log_lines(copy, "done")[0]
    assert after["training_seconds"] > before["training_seconds"] and after["total_seconds"] > after["training_seconds"]
    state = train_gpt2.load_state(copy / "step_000006")[0]
    assert 0 < state["total_seconds"] <= before["total_seconds"] < after["total_seconds"]


def test_a_run_follows_its_folder(tmp_path):
    flags = [*FLAGS, "--max_steps", 10**6, "--checkpoint_every", 50, "--keep_checkpoints", 0, "--eval_every", 0]
    process = spawn("train_gpt2.py", *flags, "--out_dir", tmp_path / "log")
    wait_for(lambda: (tmp_path / "log/step_000050").is_dir(), process)
    (tmp_path / "log").rename(tmp_path / "elsewhere")
    step = len(losses(tmp_path / "elsewhere"))
    wait_for(lambda: (tmp_path / f"elsewhere/step_{step // 50 * 50 + 100:06d}").is_dir(), process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.finish()
    assert f"the run goes on in {(tmp_path / 'elsewhere').resolve()}" in out and not (tmp_path / "log").exists()
    steps = len(losses(tmp_path / "elsewhere"))
    assert (tmp_path / f"elsewhere/step_{steps:06d}").is_dir() and log_lines(tmp_path / "elsewhere", "config")
    run("train_gpt2.py", "--resume", "--max_steps", steps + 2, "--out_dir", tmp_path / "elsewhere")
    assert len(losses(tmp_path / "elsewhere")) == steps + 2


def test_a_run_whose_folder_was_deleted_leaves_the_name_to_others(finished, tmp_path):
    """It goes on beside it, and can be resumed there; what has the name now is not its own."""
    flags = [*FLAGS, "--max_steps", 10**6, "--checkpoint_every", 50, "--keep_checkpoints", 0, "--eval_every", 0]
    process = spawn("train_gpt2.py", *flags, "--out_dir", tmp_path / "log", step_seconds=0.02)
    # The save has ended: what is made here in the middle of one would get its last links.
    wait_for(lambda: (tmp_path / "log/log.jsonl").exists() and len(losses(tmp_path / "log")) > 50, process)
    while (tmp_path / "log").exists():  # the run writes into it meanwhile
        shutil.rmtree(tmp_path / "log", ignore_errors=True)
    shutil.copytree(finished, tmp_path / "log", symlinks=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "log").rglob("*")}
    wait_for(lambda: list(tmp_path.glob("log_*/step_*")), process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.finish()
    (place,) = tmp_path.glob("log_*")
    assert f"was deleted: the run goes on in {place}" in out and (place / "latest/train_state.pt").exists()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "log").rglob("*")} == before
    step = log_lines(place, "train")[-1]["step"]
    out, _ = run("train_gpt2.py", "--resume", "--max_steps", step + 2, "--out_dir", place)
    assert f"at step {step}\n" in out and log_lines(place, "train")[-1]["step"] == step + 2


def test_what_else_lies_in_the_folder_stops_no_save(tmp_path):
    """A link to nowhere, as old checkpoints that were deleted leave them, and a pipe that nobody reads."""
    (tmp_path / "log").mkdir()
    (tmp_path / "log/notes").symlink_to("/nowhere")
    os.mkfifo(tmp_path / "log/pipe")
    out, _ = run("train_gpt2.py", *FLAGS, "--checkpoint_every", 1, "--keep_checkpoints", 1, "--out_dir", tmp_path / "log")
    assert "warning" not in out and (tmp_path / "log/latest").resolve().name == "step_000006"
    assert len(list((tmp_path / "log").glob("step_*"))) <= 2  # the newest and the best


def test_another_validation_text_is_other_data(copy, tmp_path):
    text = (ROOT / "input.txt").read_text()
    cut = len(text) * 95 // 100
    (tmp_path / "other.txt").write_text(text[:cut] + text[cut:].upper())
    said = refused("train_gpt2.py", "--resume", "--max_steps", 8, "--data", tmp_path / "other.txt", "--out_dir", copy)
    assert "has other data, by its tokens" in said
    (tmp_path / "same.txt").write_text(text)
    run("train_gpt2.py", "--resume", "--max_steps", 8, "--data", tmp_path / "same.txt", "--out_dir", copy)


def test_a_finished_run_goes_on_for_some_minutes(copy):
    out, _ = run("train_gpt2.py", "--resume", "--max_minutes", 0.05, "--eval_every", 0, "--out_dir", copy)
    assert "0.05 minutes of training, logged" in out and len(losses(copy)) > 6
    assert log_lines(copy, "done")[-1]["training_seconds"] >= 3


def test_a_loss_of_zero_is_the_best(tmp_path):
    log = train_gpt2.RunLog.__new__(train_gpt2.RunLog)
    log.vals = {3: {"loss": 0.1, "bpb": 0.2}, 6: {"loss": 0.0, "bpb": 0.0}, 9: {"loss": None, "bpb": None}}
    assert (log.best("loss"), log.best("bpb"), log.best_step([3, 6, 9]), log.best_step([9])) == (0.0, 0.0, 6, None)


@pytest.mark.parametrize("env", [{"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "two"}])
def test_a_rank_without_torchrun_is_one_line(env, tmp_path):
    assert "start them by torchrun" in refused("train_gpt2.py", *FLAGS, "--out_dir", tmp_path / "log", env=env)


def test_the_summary_names_the_parts_that_are_on(tmp_path):
    out, _ = run("train_gpt2.py", *FLAGS, "--no_qk_norm", "--max_steps", 1, "--out_dir", tmp_path / "log")
    assert "parameters, rope rmsnorm swiglu (--preset" in out
    none = ["--no_rope", "--no_rmsnorm", "--no_swiglu", "--no_qk_norm", "--bias", "--max_steps", 1]
    out, _ = run("train_gpt2.py", *FLAGS, *none, "--out_dir", tmp_path / "gpt2")
    assert "parameters, no rope, rmsnorm, swiglu, qk_norm (--preset" in out


@pytest.mark.parametrize("isolated", [["-I"], []])
@pytest.mark.parametrize("script", ["train_gpt2.py", "fineweb.py", "hellaswag.py"])
def test_scripts_find_each_other(isolated, script, tmp_path):
    """Where Python does not look beside a script, by its flag or by the environment."""
    done = subprocess.run([sys.executable, *isolated, ROOT / script, "--help"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert done.returncode == 0 and "--device" in done.stdout + "--device" * (script == "fineweb.py"), done.stderr


def test_an_unwritable_terminal_ends_no_run(tmp_path):
    """A full disk behind a job's log file, for either stream."""
    command = [sys.executable, ROOT / "train_gpt2.py", *map(str, FLAGS), "--checkpoint_every", "6"]
    for i, streams in enumerate(({"stderr": "/dev/full"}, {"stdout": "/dev/full"}, {"stdout": "/dev/full", "stderr": "/dev/full"})):
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(open(path, "w")) for name, path in streams.items()}
            done = subprocess.run([*command, "--out_dir", tmp_path / f"log{i}"], **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **files})
        assert done.returncode == ("stdout" in streams), done  # what stdout should have held is missed: said, but no work lost
        assert (tmp_path / f"log{i}/step_000006/train_state.pt").exists() and log_lines(tmp_path / f"log{i}", "done")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "train_gpt2.py", "sample", "--checkpoint", tmp_path / "log0/latest", "--max_new_tokens", "3"],
                              stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
