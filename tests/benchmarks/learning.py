"""Whole runs, as users start them, and what the modern recipe learns from as many tokens as GPT-2's."""
import concurrent.futures
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.shared import QUIETLY, ROOT, script, spread, table, train, train_gpt2

# -----------------------------------------------------------------------------
# whole runs

NANOGPT = """--preset tiny --n_layer 4 --n_head 4 --n_embd 128 --block_size 64 --no_rope --no_rmsnorm --no_swiglu
--no_qk_norm --total_batch_size 768 --optimizer adamw --lr 1e-3 --min_lr 1e-4 --beta2 0.99 --weight_decay 0.1
--schedule cosine --warmup_steps 100 --max_steps 2000 --eval_every 250 --eval_tokens 15360 --checkpoint_every 250
--sample_every 0 --dtype float32""".split()


def timed_run(name, flags, folder):
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run(script("--data", ROOT / "input.txt", "--out_dir", folder, *flags), check=True, **QUIETLY)
    seconds = time.perf_counter() - started
    lines = list(train_gpt2.read_log(Path(folder, "log.jsonl")))
    done = lines[-1]
    losses = [f"{line['loss']:.4f}" for line in lines if line["kind"] == "val"]
    return {"run": name, "start to exit, s": seconds, "of it in steps, s": done["training_seconds"],
            "steps": done["step"], "peak memory, GB": done["peak_memory_gb"],
            "validation loss, nats a byte": losses[-1], "bits per byte": done["val_bpb"],
            "losses before": ", ".join(losses[-3:-1])}


def default_run(args):
    """Beside it nanoGPT's quickstart for a CPU: its flags in this script, which validates on the same text."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder, "log")
        peer = timed_run("nanoGPT's quickstart for a CPU: its model and recipe in this script", NANOGPT, here)
        ours = timed_run("`python train_gpt2.py`", [], here)
        if args.pictures:
            plot = script("plot", "--out_dir", "log", "--output", ROOT / "assets/loss.png")
            subprocess.run(plot, check=True, cwd=folder, **QUIETLY)  # a folder's name is its label
    return [table("The default run, from start to exit", [ours, peer])]


def killed(args):
    """SIGKILL after about half of the steps, then --resume, against a run that nobody kills."""
    flags = ["--preset", "tiny", "--data", ROOT / "input.txt", "--max_steps", 60, "--eval_every", 20,
             "--checkpoint_every", 10, "--sample_every", 0, "--dropout", 0.1, "--quiet", "--dtype", args.dtype]
    with tempfile.TemporaryDirectory() as folder:
        whole, other = Path(folder, "whole"), Path(folder, "killed")
        subprocess.run(script(*flags, "--out_dir", whole), check=True, **QUIETLY)
        process = subprocess.Popen(script(*flags, "--out_dir", other), **QUIETLY)
        log = other / "log.jsonl"
        while not log.exists() or len(list(train_gpt2.read_log(log))) < 38:
            time.sleep(0.01)
        process.kill()
        process.wait()
        last_step = max(line.get("step", 0) for line in train_gpt2.read_log(log))
        subprocess.run(script("--resume", "--out_dir", other), check=True, **QUIETLY)
        losses = [losses_of(path / "log.jsonl") for path in (whole, other)]
    differing = sum(a != b for a, b in zip(*losses)) + abs(len(losses[0]) - len(losses[1]))
    return [table("A run killed by SIGKILL and resumed, with dropout, against the uninterrupted one",
                  [{"steps": 60, "killed after step": last_step, "losses compared": len(losses[0]),
                    "of them that differ": differing}])]


def losses_of(log):
    """[(step, loss)] of training and validation."""
    return [(line["step"], line["loss"]) for line in train_gpt2.read_log(log) if line["kind"] in ("train", "val")]

# -----------------------------------------------------------------------------
# the recipes

MODERN = dict(rope=True, rmsnorm=True, swiglu=True, qk_norm=True, bias=False)
GPT2S_RECIPE = dict(rope=False, rmsnorm=False, swiglu=False, qk_norm=False, bias=True, optimizer="adamw",
                    schedule="cosine")  # and a min_lr of lr / 10
MODERN_RECIPE = dict(MODERN, optimizer="muon", schedule="wsd", decay_fraction=0.6, min_lr=0.0)


def recipe_run(flags, lr, steps, seed, folder):
    """4 layers x 128, byte tokens of input.txt, T=128, 4,096 tokens a step, one thread. flags: what differs from
    GPT-2's recipe. Returns the validation loss after it."""
    torch.set_num_threads(1)
    flags = dict(GPT2S_RECIPE, min_lr=lr / 10) | flags
    lines = train(preset="tiny", n_layer=4, n_embd=128, n_head=4, block_size=128, total_batch_size=4096,
                  weight_decay=0.1, warmup_steps=steps // 20, sample_every=0, checkpoint_every=0, quiet=True,
                  device="cpu", compile=False, dtype="float32", data=ROOT / "input.txt", out_dir=folder, lr=lr,
                  seed=seed, max_steps=steps, eval_every=steps, eval_tokens=111520, **flags)
    return [line["loss"] for line in lines if line["kind"] == "val"][-1]


def final_losses(cases, seeds):
    """cases: {name: (flags, learning rate, steps)}. Returns {name: [the last validation loss, of each seed]}."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
        runs = {}
        for i, (name, case) in enumerate(cases.items()):
            runs[name] = [pool.submit(recipe_run, *case, seed, os.path.join(folder, f"{i} {seed}"))
                          for seed in range(1, seeds + 1)]
        return {name: [run.result() for run in of_seeds] for name, of_seeds in runs.items()}


def tokens(args):
    """Both recipes at the best of three learning rates each, and the modern one on 60% of the tokens."""
    cases = {"gpt2": ({}, 3e-3, args.steps), "modern": (MODERN_RECIPE, 6e-3, args.steps),
             "modern, 60% of the tokens": (MODERN_RECIPE, 6e-3, round(0.6 * args.steps))}
    losses = final_losses(cases, args.seeds)
    rows = []
    for name, (_, _, steps) in cases.items():
        rows.append({"recipe": name, "tokens": steps * 4096, "validation loss": spread(losses[name])})
    return [table(f"4 layers x 128 on input.txt, {args.seeds} seeds (mean ± half the range)", rows)]
