"""tests/plain_gpt2.py, the plain twin, gives train_gpt2.py's numbers: one process, two ranks, other micro-batches, a
resumed run. And the sizes of both, which keep them readable."""
import ast
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import plain_gpt2
import train_gpt2
from conftest import ROOT, log_lines, run, run_ranks

TWIN = ROOT / "tests" / "plain_gpt2.py"
STEPS = 30
QUIET = "--sample_every 0 --hellaswag_every 0 --no_compile --dtype float32 --device cpu --quiet".split()


@pytest.fixture(scope="module", autouse=True)
def muon_in_float32():
    """Muon computes in bfloat16, where the same sums in another order differ by a hundredth: in float32 it is held to
    the digits that the rest is held to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Of a text's bytes: so few that 30 steps go through them twice, of lengths that no window divides."""
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.fromfile(ROOT / "input.txt", dtype=np.uint8).astype(np.uint16)
    tokens[::97] = 256
    cuts = {"val_000000": 3001, "val_000001": 1555, "train_000002": 2500, "train_000003": 2111, "train_000004": 2900}
    start = 0
    for name, size in cuts.items():
        np.save(folder / f"text_{name}.npy", tokens[start:start + size])
        start += size
    (folder / "manifest.json").write_text('{"tokenizer": "byte", "vocab_size": 257}')
    return folder


def settings_of(preset, shards):
    """The twin's settings for the test: tiny takes input.txt, in steps of a sixth, which is a sixth of the time."""
    settings = replace(plain_gpt2.PRESETS[preset], max_steps=STEPS)
    if preset == "tiny":
        return replace(settings, total_batch_size=512, batch_size=2, eval_tokens=4010)
    return replace(settings, data=str(shards))


def flags_of(preset, shards):
    """The same for train_gpt2.py: a preset of its own, and flags for what the small one has of another size."""
    settings = asdict(settings_of(preset, shards))
    name = preset.removeprefix("small-")
    base = asdict(plain_gpt2.PRESETS[name])
    flags = ["--preset", name, "--data", ROOT / settings["data"]]
    for field, value in settings.items():
        if value != base[field] and field not in ("data", "vocab_size", "modern", "batch_size"):
            flags += [f"--{field}", value]
    return flags


@pytest.fixture(scope="module")
def twin(shards):
    """A function: preset -> the twin's log, and its validation loss."""
    results = {}

    def result(preset):
        if preset not in results:
            results[preset] = plain_gpt2.train(settings_of(preset, shards))
        return results[preset]
    return result


@pytest.fixture(scope="module")
def in_one_process(shards, tmp_path_factory):
    """A function: preset -> the folder of train_gpt2.py's run, with a checkpoint half-way."""
    folders = {}

    def folder(preset):
        if preset not in folders:
            folders[preset] = tmp_path_factory.mktemp(preset) / "log"
            run("train_gpt2.py", *flags_of(preset, shards), *QUIET, "--eval_every", STEPS, "--checkpoint_every", STEPS // 2,
                "--out_dir", folders[preset])
        return folders[preset]
    return folder


def check_log(out_dir, expected, val_loss, first_step=1):
    log = log_lines(out_dir, "train")
    assert [line["step"] for line in log] == list(range(first_step, STEPS + 1))
    for line, twin_line in zip(log, expected[first_step - 1:]):
        for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-4), ("lr", 1e-9)):
            assert line[name] == pytest.approx(twin_line[name], rel=0, abs=tolerance), (name, line["step"])
    assert [line["loss"] for line in log_lines(out_dir, "val")] == [pytest.approx(val_loss, rel=0, abs=1e-4)]


@pytest.mark.parametrize("preset", ["tiny", "small-gpt2", "small-modern"])
class TestTheTwinGivesTheNumbers:
    def test_of_one_process(self, preset, twin, in_one_process):
        check_log(in_one_process(preset), *twin(preset))

    def test_of_a_resumed_run(self, preset, twin, in_one_process, tmp_path):
        checkpoint = in_one_process(preset) / f"step_{STEPS // 2:06d}"
        run("train_gpt2.py", "--resume_from", checkpoint, "--quiet", "--out_dir", tmp_path / "log")
        check_log(tmp_path / "log", *twin(preset), first_step=STEPS // 2 + 1)

    def test_of_two_ranks_and_other_micro_batches(self, preset, twin, shards, tmp_path):
        run_ranks(2, "train_gpt2.py", *flags_of(preset, shards), *QUIET, "--batch_size", 1, "--eval_every", STEPS,
                  "--checkpoint_every", 0, "--out_dir", tmp_path / "log")
        check_log(tmp_path / "log", *twin(preset))
