"""A machine that has other things to do: how the threads of a run wait for one another."""
import os

import pytest

from conftest import log_lines, spawn, wait_for


@pytest.mark.parametrize("script,env,count", [
    ("train_gpt2.py", {}, "2000"),
    ("hellaswag.py", {}, "2000"),
    ("train_gpt2.py", {"GOMP_SPINCOUNT": "7"}, "7"),
    ("hellaswag.py", {"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
], ids=["train", "hellaswag", "the user's count", "the user's policy"])
def test_the_wait_that_openmp_took(script, env, count, monkeypatch):
    """As the library itself says when it is loaded."""
    monkeypatch.delenv("OMP_WAIT_POLICY")  # the tests' own
    _, says = spawn(script, "--help", env={"OMP_DISPLAY_ENV": "VERBOSE", **env}).finish()
    assert f"GOMP_SPINCOUNT = '{count}'" in says


def seconds_of_steps(threads, out_dir):
    """CPU time of three steps, all threads on one core."""
    flags = ["--preset", "tiny", "--n_layer", 1, "--device", "cpu", "--dtype", "float32", "--max_steps", 1000,
             "--eval_every", 0, "--sample_every", 0, "--checkpoint_every", 0, "--quiet"]
    process = spawn("train_gpt2.py", *flags, "--out_dir", out_dir, env={"OMP_NUM_THREADS": threads})

    def used():
        fields = open(f"/proc/{process.pid}/stat").read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def steps():
        return len(log_lines(out_dir, "train")) if (out_dir / "log.jsonl").exists() else 0
    try:
        wait_for(steps, process)
        for thread in os.listdir(f"/proc/{process.pid}/task"):
            os.sched_setaffinity(int(thread), {min(os.sched_getaffinity(0))})
        begun = steps()
        wait_for(lambda: steps() > begun, process)  # the rest of the step at hand
        first, before = steps(), used()
        wait_for(lambda: steps() >= first + 3, process)
        return (used() - before) / (steps() - first)
    finally:
        process.kill()
        process.wait()


def test_threads_that_lack_cores_take_little_more_time(tmp_path, monkeypatch):
    """By CPU time, which is the same on a busy machine: two threads on one core take 2 to 3 times as much as one, and 9 to
    11 times where the one that waits keeps the core from the one that works."""
    monkeypatch.delenv("OMP_WAIT_POLICY")
    one, two = (seconds_of_steps(str(threads), tmp_path / str(threads)) for threads in (1, 2))
    assert two < 5 * one, (one, two)
