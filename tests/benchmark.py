"""
What the README and tests/RESULTS.md state, measured on the machine at hand: the baseline and the new code in one run.

$ python tests/benchmark.py all --write tests/RESULTS.md        # all of it; an hour on two CPU cores
$ python tests/benchmark.py ladder heads --write tests/RESULTS.md   # these parts again, the others stay
$ python tests/benchmark.py limit                               # what this machine's matmuls, attention and copies allow
$ python tests/benchmark.py ladder --memory_limit_gb 16         # from 2019's script to this one, step by step, as on a 16 GB card
$ python tests/benchmark.py heads                               # ways to compute the loss of 50,304 columns
$ python tests/benchmark.py default                             # `python train_gpt2.py`, from start to exit
$ python tests/benchmark.py killed                              # a run that is killed and resumed against one that is not
$ python tests/benchmark.py simulated                           # a GPU's memory and kernels, on a pretended one
$ python tests/benchmark.py loader                              # how long a step waits for its input
$ python tests/benchmark.py tokenize                            # fineweb.py, on a short and a long run
$ python tests/benchmark.py architecture                        # the modern parts, at T = 1024 and 8192
$ python tests/benchmark.py hellaswag                           # hellaswag.py
$ python tests/benchmark.py tokens                              # how many tokens less the modern recipe needs
$ python tests/benchmark.py recipe                              # every change of it; an hour, and not in `all`
$ python tests/benchmark.py ablation                            # the parts on little data and on much; not in `all`
$ python tests/benchmark.py gpu                                 # what one GPU makes of it, in six pieces; not in `all`
$ python tests/benchmark.py gpu --piece 2                       # one of them, each under ten minutes: 1 attention and
                                                                # tests/test_cuda.py, 2 a step of gpt2, 3 of modern,
                                                                # 4 the ladder in 16 GB, 5 runs on the machine's own
                                                                # text, 6 memory, resuming and T=8192

Tables are Markdown; --json FILE keeps the rows too. Each row runs in a process of its own, so that its peak memory is
its own. Timings are medians over steps; on a machine that others share, compare within one run only.
"""

import argparse
import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fineweb  # noqa: E402
import hellaswag  # noqa: E402
import train_gpt2  # noqa: E402
from train_gpt2 import GPT, GPTConfig, RecipeFlags, autocast, make_optimizers  # noqa: E402

GPT2 = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024)
ROUNDS = 3  # of what is measured in turns


def isolated(function, **arguments):
    """The dict that function(**arguments) returns from a process of its own, with that process's peak memory; None
    where it ran out of memory."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, function, arguments).result()


def attempted(function, **arguments):
    """The same, and None where it fails otherwise, so that the other rows are still measured."""
    try:
        return isolated(function, **arguments)
    except Exception as error:  # not in this torch, not to be compiled, ...
        print(f"{function.__name__} {arguments}: {fineweb.one_line(error)}", file=sys.stderr)


def measured(function, arguments):
    limit, device = arguments.pop("memory_limit_gb", 0), arguments.get("device", "cpu")
    if limit and device.startswith("cuda"):
        torch.cuda.set_per_process_memory_fraction(limit * 2**30 / torch.cuda.get_device_properties(device).total_memory)
    before = peak_memory(device)
    try:
        result = function(**arguments)
    except torch.OutOfMemoryError:
        return None
    return result | {"peak_gb": round((peak_memory(device) - (0 if device.startswith("cuda") else before)) / 2**30, 2)}


def peak_memory(device):
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # a process begins with the ru_maxrss of the one that started it
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds_of(function, device, repeats=5, warm=True):
    """The median time of a call, after one to warm up."""
    times = []
    for _ in range(repeats + warm):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm:])


def in_turns(cases):
    """cases: {name: function without arguments that returns a dict of numbers}. Returns {name: dict of their medians} over
    rounds, in each of which every case has its turn: a shared machine's speed drifts."""
    found = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, case in cases.items():
            found[name].append(case())
            print(name, found[name][-1], file=sys.stderr, flush=True)
    return {name: medians([row for row in rows if row]) for name, rows in found.items()}


def medians(rows):
    """Of rows with the same keys; None for no row."""
    if rows:
        return {key: value and statistics.median(row[key] for row in rows) for key, value in rows[0].items()}


def table(title, rows):
    """Prints rows (dicts) in Markdown; a row that lacks keys of the longest, for it failed, has no figures there."""
    rows = [{name: row.get(name) for name in max(rows, key=len)} for row in rows]
    shown = [{k: f"{v:,.4g}" if isinstance(v, float) and abs(v) < 1000 else f"{v:,.0f}" if isinstance(v, (int, float)) else
              "–" if v is None else str(v) for k, v in row.items()} for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in shown)]
    text = "\n".join([f"\n**{title}**\n", *("| " + " | ".join(line) + " |" for line in lines)])
    print(text + "\n", flush=True)
    return {"title": title, "rows": rows, "markdown": text}


def train(**flags):
    """A run of train_gpt2.py. True stands for --flag, False for --no_flag; None leaves it out. Returns the log's lines."""
    argv = []
    for name, value in flags.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            argv += [f"--{name}", str(value)]
    with contextlib.redirect_stdout(sys.stderr):  # the tables alone go to stdout
        train_gpt2.train(argv)
    return train_gpt2.read_log(Path(flags["out_dir"], "log.jsonl"))


def chip(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"

# -----------------------------------------------------------------------------
# training speed: the limit, the ladder, the heads, the loader

def limits(device, dtype, batch_size):
    """Seconds that the matmuls and the attention of one micro-step of GPT-2 124M take, each alone, and copy bandwidth."""
    if device == "cpu":
        train_gpt2.keep_freed_memory()  # else the results' page faults are in it
    dtype = getattr(torch, dtype)
    N, C, V, T = batch_size * 1024, 768, 50304, 1024
    seconds, flops = {}, 0
    for name, inside, outside, count in (("attention in", C, 3 * C, 12), ("attention out", C, C, 12), ("mlp in", C, 4 * C, 12),
                                         ("mlp out", 4 * C, C, 12), ("head", C, V, 1)):
        x, w = torch.randn(N, inside, device=device, dtype=dtype), torch.randn(outside, inside, device=device, dtype=dtype)
        g = torch.randn(N, outside, device=device, dtype=dtype)
        seconds[name] = count * sum(seconds_of(f, device, 3) for f in (lambda: x @ w.T, lambda: g @ w, lambda: g.T @ x))
        flops += count * 6 * N * inside * outside
        del x, w, g
    q, k, v = (torch.randn(batch_size, 12, T, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    ones = torch.ones_like(q)
    matmul_seconds = sum(seconds.values())
    seconds["SDPA"] = 12 * seconds_of(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(ones), device, 3)
    big = torch.zeros(2**26, device=device)  # 256 MB
    out = torch.empty_like(big)
    return {"matmul_tflops": flops / matmul_seconds / 1e12, "copy_gb_s": 2 * big.numel() * 4 / seconds_of(lambda: out.copy_(big), device) / 1e9,
            "matmul_s": matmul_seconds, "sdpa_s": seconds["SDPA"], "tokens_per_second": N / sum(seconds.values())}


def limit(args):
    """In both dtypes where --dtype auto has timed both."""
    found = in_turns({dtype: partial(isolated, limits, device=args.device, dtype=dtype, batch_size=args.batch_size)
                      for dtype in args.dtypes})
    rows = [{"dtype": dtype, "auto takes": "this" if dtype == args.dtype else "", **row} for dtype, row in found.items()]
    for row in rows:
        del row["peak_gb"]
    return [table(f"The machine's own limit for GPT-2 124M, B={args.batch_size}, T=1024: matmuls and attention alone", rows)]


def materialised_attention(q, k, v, dropout):
    """With the (T, T) matrix in memory, as before flash attention."""
    T = q.size(2)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    return [scores.masked_fill(~causal, -torch.inf).softmax(dim=-1) @ v]


def plain_loss(x, weight, targets, vocab_size, chunks, need_grad):
    """All the logits, then the cross-entropy."""
    logits = x @ weight.T.to(x.dtype)
    return F.cross_entropy(logits[:, :vocab_size].float(), targets, ignore_index=-1, reduction="sum")


def checkpointed_loss(x, weight, targets, vocab_size, chunks, need_grad):
    """Chunk by chunk, each computed again for its backward pass."""
    from torch.utils.checkpoint import checkpoint
    return sum(checkpoint(plain_loss, xc, weight, tc, vocab_size, 1, need_grad, use_reentrant=False)
               for xc, tc in zip(x.chunk(chunks), targets.chunk(chunks)))


def training_step(device, batch_size, accumulation=1, dtype="float32", tf32=True, compiled=False, attention="sdpa", padded=True,
                  optimizer="fused", head="chunked", recompute=True, bf16_stream=False, tuned=False, keep_memory=False, shape=GPT2):
    """A model and its training step on random tokens, with parts exchanged for those of older scripts. optimizer: fused, loop,
    muon, or muon one by one."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if keep_memory:
        train_gpt2.keep_freed_memory()
    if attention == "materialised":
        train_gpt2.full_attention = materialised_attention
    torch.backends.cuda.enable_cudnn_sdp(attention != "without cuDNN" and not shape.get("window"))
    torch._functorch.config.enable_autograd_cache = attention == "sdpa"  # its keys do not tell the kernels that are allowed
    if not padded:
        GPTConfig.padded_vocab_size = property(lambda config: config.vocab_size)
    if optimizer == "muon one by one":
        train_gpt2.BatchedMuon = torch.optim.Muon
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape)).to(device)
    if bf16_stream:
        model.drop.register_forward_hook(to_compute_dtype)
    if compiled:
        from torch._inductor import config as inductor
        inductor.coordinate_descent_tuning = tuned
        model.compile_blocks(recompute)
    if head == "plain":
        model.loss_sum = torch.compile(plain_loss, dynamic=False) if compiled else plain_loss
    recipe = RecipeFlags(optimizer="muon" if optimizer.startswith("muon") else "adamw")
    optimizers = make_optimizers(model, recipe, device.split(":")[0])
    if optimizer == "loop":
        groups = [{key: group[key] for key in ("params", "weight_decay")} for o in optimizers for group in o.param_groups]
        optimizers = [torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), foreach=False, fused=False)]
    batches = torch.randint(0, 50257, (accumulation, 2, batch_size, shape["block_size"]), device=device)

    def step():
        for x, y in batches:
            with autocast(device.split(":")[0], getattr(torch, dtype)):
                loss = model(x, y)
            (loss / accumulation).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
    return model, step


def to_compute_dtype(module, args, output):
    """A hook after the embedding: the residual stream stays in the dtype that it begins with."""
    return output.to(train_gpt2.compute_dtype(output))


def training_speed(device, batch_size, accumulation=1, steps=3, warm_steps=0, **parts):
    """parts: see training_step. warm_steps: after the first; a CPU's memory is all touched only after some."""
    model, step = training_step(device, batch_size, accumulation, **parts)
    synchronize(device)
    started = time.perf_counter()
    step()
    first = time.perf_counter() - started
    for _ in range(warm_steps):
        step()
    seconds = seconds_of(step, device, steps, warm=False)
    tokens = accumulation * batch_size * model.config.block_size
    flops = train_gpt2.peak_flops(device.split(":")[0])
    return {"tokens_per_second": tokens / seconds, "ms": 1000 * seconds, "start_s": first - seconds,
            "mfu": tokens / seconds * train_gpt2.flops_per_token(model) / flops if flops else None}


def ladder(args):
    """The steps in the order in which build-nanogpt takes them, then what comes after."""
    cuda, native = args.device.startswith("cuda"), args.dtype
    state = dict(dtype="float32", tf32=False, compiled=False, attention="materialised", padded=False, optimizer="loop", head="plain",
                 recompute=False)
    rungs = [("2019: fp32, eager, materialised attention, 50,257 columns, AdamW in a loop", {}),
             *([("+ TF32", dict(tf32=True))] if cuda else []),
             *([(f"+ {native}", dict(dtype=native))] if native != "float32" else []),
             ("+ torch.compile", dict(compiled=True)), ("+ flash attention (SDPA)", dict(attention="sdpa")),
             ("+ 50,304 columns", dict(padded=True)), ("+ fused AdamW", dict(optimizer="fused")), ("+ chunked head", dict(head="chunked")),
             ("+ norms and GELUs recomputed", dict(recompute=True)),
             *([] if cuda else [("+ freed memory used again", dict(keep_memory=True))])]
    peer = dict(dtype=native if cuda else "bfloat16", attention="sdpa", padded=True, head="plain",
                optimizer="fused" if cuda else "loop", compiled=cuda, recompute=False)
    common = dict(device=args.device, accumulation=args.accumulation, steps=args.steps, memory_limit_gb=args.memory_limit_gb,
                  warm_steps=0 if cuda else 2)
    rows = []

    def measure(name, batch_size, parts):
        row = isolated(training_speed, batch_size=batch_size, **common, **parts)
        if row:
            first = rows[0]["tokens_per_second"] if rows else row["tokens_per_second"]
            rows.append({"step": name, "batch": batch_size, **row, "times the first": row["tokens_per_second"] / first})
            print(rows[-1], file=sys.stderr, flush=True)
        return row

    batch = args.batch_size
    while not measure(rungs[0][0], batch, state):  # the baseline's batch is the largest that fits
        batch //= 2
    for name, change in rungs[1:]:
        state |= change
        if name != rungs[-1][0]:
            measure(name, batch, state)
    larger = batch
    while cuda and larger < 64 and measure(f"+ batch {2 * larger}", 2 * larger, state):
        larger *= 2
    cases = {f"{rungs[-1][0]}: this script": partial(isolated, training_speed, batch_size=batch, **common, **state),
             f"build-nanogpt's script as shipped, {peer['dtype']}: its parts in this harness": partial(
                 isolated, training_speed, batch_size=batch, **common, **peer)}
    cases |= {f"bound, {dtype}: matmuls and attention alone": partial(isolated, limits, device=args.device, dtype=dtype, batch_size=batch)
              for dtype in args.dtypes}
    found = in_turns(cases)
    ours, theirs, *bounds = found.values()
    bound = max(row["tokens_per_second"] for row in bounds)
    for name, row in found.items():
        told = dict.fromkeys(ours) if row in bounds else row
        rows.append({"step": name, "batch": batch, **told, "tokens_per_second": row["tokens_per_second"],
                     "times the first": row["tokens_per_second"] / rows[0]["tokens_per_second"]})
    compared = {"dtype": native, "share of the bound": f"{ours['tokens_per_second'] / bound:.0%}",
                "times build-nanogpt's speed": ours["tokens_per_second"] / theirs["tokens_per_second"],
                "share of its memory": ours["peak_gb"] / theirs["peak_gb"]}
    return [table(f"GPT-2 124M, T=1024, {args.accumulation} micro-step(s) a step; from this script on medians of {ROUNDS} rounds in turns",
                  rows), table("This script", [compared])]


def head_speed(device, dtype, batch_size, head, compiled):
    N, V = batch_size * 1024, 50257
    torch.manual_seed(0)
    x = torch.randn(N, 768, device=device, requires_grad=True)
    weight = (torch.randn(50304, 768, device=device) * 0.02).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)
    if head == "gradient in the forward pass":
        model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8))
        if compiled:
            model.compile_blocks()  # the loss too
        function = model.loss_sum
    elif head == "F.linear_cross_entropy":
        def function(x, weight, targets, vocab_size, chunks, need_grad):
            return F.linear_cross_entropy(x, weight[:vocab_size].to(x.dtype), targets, reduction="sum")
    else:
        function = {"plain": plain_loss, "checkpointed chunks": checkpointed_loss}[head]
    if compiled and head != "gradient in the forward pass":
        function = torch.compile(function, dynamic=False)

    def step():
        x.grad = weight.grad = None
        with autocast(device.split(":")[0], getattr(torch, dtype)):
            loss = function(x.to(getattr(torch, dtype)), weight, targets, V, max(1, N * 50304 // 2**26), True)
        loss.backward()
    return {"ms": 1000 * seconds_of(step, device, 2)}


def heads(args):
    names = ("plain", "checkpointed chunks", "gradient in the forward pass", "F.linear_cross_entropy")
    common = dict(device=args.device, dtype=args.dtype, batch_size=args.batch_size)
    found = in_turns({(head, compiled): partial(attempted, head_speed, head=head, compiled=compiled, **common)
                      for head in names for compiled in (False, True)})
    rows = []
    for head in names:
        row = {"head": head + " (this script)" * (head == names[2])}
        for compiled, how in ((False, "eager"), (True, "compiled")):
            seen = found[head, compiled] or {}
            row |= {f"{how}, ms": seen.get("ms"), f"{how}, GB": seen.get("peak_gb")}
        rows.append(row)
    return [table(f"The head's forward and backward pass, {args.batch_size * 1024:,} tokens, 50,304 columns, {args.dtype}", rows)]


def loader_run(device):
    """Times of the default run's first 40 steps, and of what each of them waits for its batch."""
    waited, training_batches = [], train_gpt2.training_batches

    def timed_batches(*args):
        batches = training_batches(*args)
        while True:
            started = time.perf_counter()
            batch = next(batches)
            waited.append(time.perf_counter() - started)
            yield batch
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(train_gpt2, "training_batches", timed_batches):
        lines = train(preset="tiny", data=ROOT / "input.txt", out_dir=folder, max_steps=40, eval_every=0, sample_every=0,
                      checkpoint_every=0, quiet=True, device=device)
    total = time.perf_counter() - started
    step = statistics.median(line["seconds"] for line in lines if line["kind"] == "train")
    wait = statistics.median(waited)
    return {"step, ms": 1000 * step, "of it waiting for the batch, ms": 1000 * wait, "share": f"{wait / step:.2%}", "whole run, s": total}


def loader(args):
    row = isolated(loader_run, device=args.device)
    return [table("Waiting for input (medians of 40 steps of the default run)", [{k: v for k, v in row.items() if k != "peak_gb"}])]

# -----------------------------------------------------------------------------
# whole runs, as users start them

QUIETLY = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def script(*args):
    return [sys.executable, str(ROOT / "train_gpt2.py"), *map(str, args)]


NANOGPT = """--preset tiny --n_layer 4 --n_head 4 --n_embd 128 --block_size 64 --no_rope --no_rmsnorm --no_swiglu --no_qk_norm
--total_batch_size 768 --optimizer adamw --lr 1e-3 --min_lr 1e-4 --beta2 0.99 --weight_decay 0.1 --schedule cosine --warmup_steps 100
--max_steps 2000 --eval_every 250 --eval_tokens 15360 --checkpoint_every 250 --sample_every 0 --dtype float32""".split()


def timed_run(name, flags, folder):
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run(script("--data", ROOT / "input.txt", "--out_dir", folder, *flags), check=True, **QUIETLY)
    seconds = time.perf_counter() - started
    lines = train_gpt2.read_log(Path(folder, "log.jsonl"))
    losses = [line["loss"] for line in lines if line["kind"] == "val"]
    return {"run": name, "start to exit, s": seconds, "of it in steps, s": lines[-1]["training_seconds"], "steps": lines[-1]["step"],
            "peak memory, GB": lines[-1]["peak_memory_gb"], "validation loss, nats a byte": f"{losses[-1]:.4f}",
            "bits per byte": lines[-1]["val_bpb"], "losses before": ", ".join(f"{loss:.4f}" for loss in losses[-3:-1])}


def default_run(args):
    """Beside it nanoGPT's quickstart for a CPU: its flags in this script, which validates on the same text."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder, "log")
        rows = [timed_run("nanoGPT's quickstart for a CPU: its model and recipe in this script", NANOGPT, here),
                timed_run("`python train_gpt2.py`", [], here)]
        if args.pictures:
            plot = script("plot", "--out_dir", "log", "--output", ROOT / "assets/loss.png")
            subprocess.run(plot, check=True, cwd=folder, **QUIETLY)  # a folder's name is its label
    return [table("The default run, from start to exit", rows[::-1])]


def killed(args):
    """SIGKILL after about half of the steps, then --resume, against a run that nobody kills."""
    flags = ["--preset", "tiny", "--data", ROOT / "input.txt", "--max_steps", 60, "--eval_every", 20, "--checkpoint_every", 10,
             "--sample_every", 0, "--dropout", 0.1, "--quiet", "--dtype", args.dtype]
    with tempfile.TemporaryDirectory() as folder:
        whole, other = Path(folder, "whole"), Path(folder, "killed")
        subprocess.run(script(*flags, "--out_dir", whole), check=True, **QUIETLY)
        process, log = subprocess.Popen(script(*flags, "--out_dir", other), **QUIETLY), other / "log.jsonl"
        while not log.exists() or len(train_gpt2.read_log(log)) < 38:
            time.sleep(0.01)
        process.kill()
        process.wait()
        at = max(line.get("step", 0) for line in train_gpt2.read_log(log))
        subprocess.run(script("--resume", "--out_dir", other), check=True, **QUIETLY)
        kinds = ("train", "val")
        losses = [[(line["step"], line["loss"]) for line in train_gpt2.read_log(path / "log.jsonl") if line["kind"] in kinds]
                  for path in (whole, other)]
    differing = sum(a != b for a, b in zip(*losses)) + abs(len(losses[0]) - len(losses[1]))
    return [table("A run killed by SIGKILL and resumed, with dropout, against the uninterrupted one",
                  [{"steps": 60, "killed after step": at, "losses compared": len(losses[0]), "of them that differ": differing}])]


def simulated(args):
    """What no CPU can show, on a GPU that is pretended: no speed, no numbers, but shapes, memory and kernels."""
    found = pretended("memory", "head", "muon")
    rows = [{"step": f"{name}, B=16, T=1024", "peak, GiB": step["peak_gib"]} for name, step in found["memory"].items()]
    kernels = [{"what": "head, compiled: GB moved for 65,536 tokens", "figure": found["head"]["triton_gb"]},
               {"what": "head: GiB that a chunk holds", "figure": found["head"]["chunk_gib"]},
               {"what": "Muon: kernel launches a step, 60 matrices", "figure": found["muon"]["launches"]}]
    return [table("Memory of a training step on the simulated GPU, bfloat16, not compiled", rows),
            table("Kernels on the simulated GPU", kernels)]


def pretended(*figures):
    """{name: figures} of tests/pretended_cuda.py."""
    command = [sys.executable, str(ROOT / "tests/pretended_cuda.py"), *figures]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

# -----------------------------------------------------------------------------
# the modern parts

ARCHITECTURES = {
    "standard": {}, "+ RoPE": dict(rope=True), "+ GQA (2 of 8 heads)": dict(rope=True, n_kv_head=2),
    "+ sliding window (512)": dict(rope=True, n_kv_head=2, window=512)}


def architecture_run(device, dtype, flags, T, tokens, compiled):
    """4 layers of 256 on input.txt, 8,192 byte tokens a step."""
    flags = dict(rope=False, rmsnorm=False, swiglu=False, qk_norm=False, bias=True) | flags
    with tempfile.TemporaryDirectory() as folder:
        lines = train(preset="tiny", data=ROOT / "input.txt", out_dir=folder, n_layer=4, n_embd=256, n_head=8, block_size=T,
                      total_batch_size=8192, max_steps=tokens // 8192, lr=2e-3, optimizer="adamw", schedule="cosine", warmup_steps=2,
                      eval_every=0, sample_every=0, checkpoint_every=0, quiet=True, device=device, dtype=dtype, compile=compiled, **flags)
    model = GPT(GPTConfig(**{name: lines[0][name] for name in GPTConfig.__dataclass_fields__}))
    cache = model.new_cache()
    with torch.no_grad():
        model.hidden_states(torch.zeros(1, T, dtype=torch.long), cache=cache)
    kept = sum(tensor.numel() * tensor.element_size() for layer in cache for tensor in (layer.k, layer.v))
    return {"KV cache, kB": kept / 1024, "speeds": [line["tokens_per_second"] for line in lines if line["kind"] == "train"][1:]}


def architecture(args):
    """Speed: the median over the steps of two rounds of all models. Perplexity: see below."""
    tables, on_gpu = [], []
    try:
        on_gpu = [step["peak_gib"] for step in pretended("parts")["parts"].values()]
    except (OSError, subprocess.CalledProcessError) as error:  # no compiler, or a PyTorch with CUDA
        print(fineweb.one_line(error), file=sys.stderr)
    for T in (1024, 8192):
        rounds = [{name: isolated(architecture_run, device=args.device, dtype=args.dtype, flags=flags, T=T, tokens=args.tokens,
                                  compiled=args.device.startswith("cuda")) for name, flags in ARCHITECTURES.items()} for _ in range(2)]
        rows = []
        for i, name in enumerate(ARCHITECTURES):
            speed = statistics.median(speed for runs in rounds for speed in runs[name]["speeds"])
            first = rows[0]["tokens_per_second"] if rows else speed
            cache = rounds[0][name]["KV cache, kB"]
            rows.append({"model": name, "tokens_per_second": speed, "speed": f"{speed / first:.2f}x",
                         "training memory, GB": max(runs[name]["peak_gb"] for runs in rounds),
                         "KV cache in float32, kB": cache, "the same a token of context, kB": cache / T})
            if T == 8192 and on_gpu:
                rows[-1]["training memory of GPT-2 124M with these parts, B=2, simulated GPU, GiB"] = on_gpu[i]
        tables.append(table(f"4 layers x 256, 8 heads, T={T}, 8,192 byte tokens a step, {args.dtype}", rows))
    return tables + [perplexities(args)]


def perplexities(args):
    """The same parts in 4 layers x 128 with T=128 and a window of 32, after as many steps as --steps says, one recipe."""
    parts = {name: flags | ({"window": 32} if "window" in flags else {}) | ({"n_kv_head": 1} if "n_kv_head" in flags else {})
             for name, flags in ARCHITECTURES.items()}
    parts = {name.replace("2 of 8", "1 of 4").replace("512", "32"): flags for name, flags in parts.items()}
    parts |= {"+ RMSNorm, SwiGLU, QK-norm, no biases, all heads and tokens": MODERN}
    curves = curves_of({name: (flags, 3e-3, args.steps) for name, flags in parts.items()}, args.seeds)
    rows = []
    for name, runs in curves.items():
        losses = [run[-1][1] for run in runs]
        rows.append({"model": name, "validation loss": spread(losses), "perplexity": math.exp(statistics.mean(losses))})
    return table(f"4 layers x 128, T=128, after {args.steps * 4096:,} byte tokens of input.txt, {args.seeds} seeds "
                 "(mean ± half the range)", rows)

# -----------------------------------------------------------------------------
# fineweb.py

SHARD_SIZE = 5_000_000

# What build-nanogpt's fineweb.py does, written from its description: every document goes alone through Pool.imap, with
# half the cores and chunks of 16, comes back as an array, and is copied into a buffer of one shard.
PEER = """
import multiprocessing, os, sys
import datasets, numpy as np
sys.path.insert(0, ROOT)
import fineweb

encoding = fineweb.get_tokenizer("gpt2").encoding

def tokens_of(document):
    ids = np.array([50256] + encoding.encode_ordinary(document["text"]))
    assert (0 <= ids).all() and (ids < 2**16).all()
    return ids.astype(np.uint16)

if __name__ == "__main__":
    files, out, shard_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    documents = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=out + "/cache")
    buffer, filled, shard = np.empty(shard_size, dtype=np.uint16), 0, 0

    def save():
        np.save(f"{out}/edufineweb_{'train' if shard else 'val'}_{shard:06d}.npy", buffer[:filled])

    with multiprocessing.Pool(max(1, os.cpu_count() // 2)) as pool:
        for ids in pool.imap(tokens_of, documents, chunksize=16):
            while len(ids) > shard_size - filled:
                room = shard_size - filled
                buffer[filled:], filled = ids[:room], shard_size
                save()
                ids, filled, shard = ids[room:], 0, shard + 1
            buffer[filled:filled + len(ids)] = ids
            filled += len(ids)
    save()
"""

# tiktoken alone, one process for each core, the texts already in its memory: no program can do better with it.
BOUND = """
import glob, multiprocessing, os, sys, time
sys.path.insert(0, ROOT)
import fineweb
from pyarrow import parquet

def encode(part):
    encoding, parts = fineweb.get_tokenizer("gpt2").encoding, os.cpu_count()
    texts = [text for path in sorted(glob.glob(sys.argv[1])) for text in parquet.read_table(path, columns=["text"])["text"].to_pylist()]
    barrier.wait()
    begun = time.time()
    tokens = sum(len(encoding.encode_ordinary(text)) + 1 for text in texts[part::parts])
    return tokens, time.time() - begun

def start(shared):
    global barrier
    barrier = shared

if __name__ == "__main__":
    parts = os.cpu_count()
    with multiprocessing.Pool(parts, start, (multiprocessing.Barrier(parts),)) as pool:
        results = pool.map(encode, range(parts), chunksize=1)
    print(sum(tokens for tokens, _ in results), max(seconds for _, seconds in results))
"""


def documents(megabytes, seed=0):
    """English-like documents of a few thousand characters: a Markov chain over the words of the corpus, with one word in
    twenty made up, because real text never runs out of new ones."""
    with open(ROOT / "input.txt", encoding="utf-8") as f:
        words = re.findall(r"\S+\s*", f.read())
    follow = {}
    for word, after in zip(words, words[1:]):
        follow.setdefault(word, []).append(after)
    rng, word, written = random.Random(seed), words[0], 0
    syllables = "ba con de er fi gra ho in ka lum mo nor pri qui re sta tion ur ve wi xa y 1 20 99 ’s é".split()
    while written < megabytes * 1e6:
        text = []
        for _ in range(int(rng.lognormvariate(6.2, 0.8)) + 20):
            word = rng.choice(follow.get(word, words))
            text.append("".join(rng.choices(syllables, k=rng.randrange(2, 5))) + " " if rng.random() < 0.05 else word)
        text = "".join(text)
        written += len(text.encode())
        yield text


def write_files(folder, megabytes, n=4):
    """Parquet files with FineWeb-Edu's columns; returns the bytes of text in them."""
    import pyarrow as pa
    from pyarrow import parquet
    texts = list(documents(megabytes))
    for i in range(n):
        part = texts[i::n]
        k = len(part)
        parquet.write_table(pa.table({
            "text": part, "id": [f"<urn:uuid:{j}>" for j in range(k)], "dump": ["CC-MAIN-2024-10"] * k,
            "url": ["https://example.org"] * k, "file_path": ["s3://x"] * k, "language": ["en"] * k, "language_score": [0.9] * k,
            "token_count": [len(text) // 4 for text in part], "score": [3.0] * k, "int_score": [3] * k}),
            os.path.join(folder, f"{i:03d}.parquet"), row_group_size=1000)
    return sum(len(text.encode()) for text in texts)


def resident(pid):
    """MiB that a process and its descendants hold; pages that they share count once."""
    total = 0
    try:
        with open(f"/proc/{pid}/smaps_rollup") as f:
            total += int(re.search(r"Pss:\s*(\d+)", f.read())[1]) / 1024
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as f:
                total += sum(map(resident, f.read().split()))
    except (OSError, TypeError):  # it has just ended, or this system tells nothing
        pass
    return total


def timed(command):
    """(seconds, peak MiB) of a command and all its processes."""
    begun, peak = time.time(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{command} ended with exit code {process.returncode}")
    return time.time() - begun, round(peak)


def tokenize_rows(megabytes, repeats=2, copies=1):
    """For so many megabytes of text, `copies` times. One row for each method, the best of `repeats` alternating runs:
    method, tokens_per_s, MB_per_s, seconds, peak_rss_mb (all processes together), ratio (to the peer's speed). Raises if
    the tokens differ."""
    import numpy as np
    folder = tempfile.mkdtemp(dir=os.environ.get("BENCH_DIR"))
    try:
        size = write_files(folder, megabytes) * copies
        for path in Path(folder).glob("*.parquet") if copies > 1 else ():
            for i in range(1, copies):
                shutil.copy(path, path.with_stem(f"{path.stem}_{i}"))
        pattern, best, streams = os.path.join(folder, "*.parquet"), {}, {}
        peer, bound = os.path.join(folder, "peer.py"), os.path.join(folder, "bound.py")
        for path, code in ((peer, PEER), (bound, BOUND)):
            with open(path, "w", encoding="utf-8") as f:
                f.write(code.replace("ROOT", repr(str(ROOT))))
        peer_out, our_out = os.path.join(folder, "peer"), os.path.join(folder, "ours")
        commands = {"imap of documents": (peer_out, [sys.executable, peer, pattern, peer_out, str(SHARD_SIZE)]),
                    "fineweb.py": (our_out, [sys.executable, str(ROOT / "fineweb.py"), "--files", pattern, "--out", our_out,
                                             "--shard_size", str(SHARD_SIZE)])}
        for _ in range(repeats):
            for method, (out, command) in commands.items():
                shutil.rmtree(out, ignore_errors=True)
                os.mkdir(out)
                best[method] = min(best.get(method, (1e9, 0)), timed(command))
                paths = fineweb.list_shards(out, "val") + fineweb.list_shards(out, "train")
                streams[method] = np.concatenate([fineweb.read_shard(path) for path in paths])
            printed = subprocess.check_output([sys.executable, bound, pattern], text=True).split()
            best["tiktoken alone, all cores"] = min(best.get("tiktoken alone, all cores", (1e9, None)), (float(printed[1]), None))
        first, second = streams.values()
        if not np.array_equal(first, second) or int(printed[0]) != len(first):
            raise AssertionError("the methods do not give the same tokens")
        return [{"method": method, "tokens_per_s": round(len(first) / seconds), "MB_per_s": round(size / 1e6 / seconds, 1),
                 "seconds": round(seconds, 2), "peak_rss_mb": peak, "ratio": round(best["imap of documents"][0] / seconds, 2)}
                for method, (seconds, peak) in best.items()]
    finally:
        shutil.rmtree(folder)


def tokenize(args):
    short, long = tokenize_rows(args.megabytes), tokenize_rows(args.megabytes, repeats=1, copies=args.copies)
    return [table(f"Tokenizing {megabytes} MB of parquet on {os.cpu_count()} cores, start and end of the processes included", rows)
            for megabytes, rows in ((args.megabytes, short), (args.megabytes * args.copies, long))]

# -----------------------------------------------------------------------------
# hellaswag.py

BLOCKS, HEAD = 85.0e6, 38.6e6  # GPT-2 124M: parameters that multiply every token, and every scored position


def realistic_examples(n, encode, seed=0):
    """n examples with the validation set's shape: contexts of about 25 tokens and endings of about 14, both spread."""
    rng = random.Random(seed)
    words = [word for word in ("the a man woman is are was and with into over across holding water paint snow kitchen "
                               "camera crowd ball rope hair slowly then begins to clean cut place your of in on it he "
                               "she they while behind").split() if len(encode(" " + word)) == 1]

    def text(mean, spread, low, high):
        return " ".join(rng.choice(words) for _ in range(round(min(max(rng.gauss(mean, spread), low), high))))
    examples = []
    for _ in range(n):
        middle = rng.gauss(13, 5)  # the four endings of an example resemble each other in length
        ctx = text(*rng.choice([(14, 6), (36, 12)]), 4, 90)
        examples.append({"ctx": ctx, "ctx_a": ctx, "ctx_b": "", "activity_label": "Cleaning windows",
                         "label": rng.randrange(4), "endings": [text(middle, 4, 2, 45) for _ in range(4)]})
    return examples


@torch.no_grad()
def one_at_a_time(model, examples, encode):
    """build-nanogpt's way: the four rows of an example padded to the longest, fp32, all the logits and their losses.
    -> (seconds, predictions by mean loss, examples)"""
    started, predictions = time.perf_counter(), []
    for example in examples:
        context, endings = encode(example["ctx"]), [encode(" " + ending) for ending in example["endings"]]
        width = len(context) + max(map(len, endings))
        tokens, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width)
        for i, ending in enumerate(endings):
            tokens[i, :len(context) + len(ending)] = torch.tensor(context + ending)
            mask[i, len(context):len(context) + len(ending)] = 1
        logits = model(tokens).logits[:, :-1].contiguous()
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        mask = mask[:, 1:].contiguous()
        predictions.append(int(((losses * mask).sum(1) / mask.sum(1)).argmin()))
    return time.perf_counter() - started, predictions


def matmul_rate(dtype):
    """Multiply-adds this machine does, in FLOP/s: the best of the model's largest products."""
    rates = []
    for rows, inside, outside in ((2048, 768, 3072), (2048, 3072, 768), (512, 768, 50257)):
        a, b = (torch.randn(n, inside, dtype=getattr(torch, dtype)) for n in (rows, outside))
        for _ in range(4):
            started = time.perf_counter()
            F.linear(a, b)
            rates.append(2 * rows * inside * outside / (time.perf_counter() - started))
    return max(rates)


def hellaswag_rows(n=120, compare=40, dtypes=("float32",), rounds=2):
    """-> rows {method, dtype, examples_per_s, ratio}. Ours scores n examples, the one-at-a-time method the first
    `compare` of them, in turns: the speed of a machine that others share drifts. ratio is to the one-at-a-time method.
    A last row for each dtype: the operations that ours cannot do without, at the measured matmul rate."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = fineweb.get_tokenizer("gpt2")
    examples = realistic_examples(n, tokenizer.encode)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    ours, seconds, rates = {}, dict.fromkeys(dtypes, 0.0), {dtype: [] for dtype in dtypes}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for dtype in dtypes:  # as `hellaswag.py --model` opens it
            opened, encode = hellaswag.open_model(folder, "completion")
            ours[dtype] = opened.to(getattr(torch, dtype))
            hellaswag.evaluate(ours[dtype], examples[:4], encode)
    one_at_a_time(model, examples[:2], tokenizer.encode)
    alone, answers = one_at_a_time(model, examples[:compare], tokenizer.encode)
    answered = [example | {"label": answer} for example, answer in zip(examples, answers)]
    agreement = {dtype: hellaswag.evaluate(opened, answered, encode)["acc_norm"] for dtype, opened in ours.items()}
    for _ in range(rounds):
        for dtype in dtypes:
            rates[dtype].append(matmul_rate(dtype))
            started = time.perf_counter()
            hellaswag.evaluate(ours[dtype], examples, encode)
            seconds[dtype] += time.perf_counter() - started
        alone += one_at_a_time(model, examples[:compare], tokenizer.encode)[0]
    base = compare * (rounds + 1) / alone
    speeds = {dtype: n * rounds / seconds[dtype] for dtype in dtypes}
    read = scored = 0
    for example in examples:
        lengths = [len(tokenizer.encode(" " + ending)) for ending in example["endings"]]
        read += len(tokenizer.encode(example["ctx"])) + sum(lengths) - 4  # an ending's last token is never read
        scored += sum(lengths)
    operations = (2 * BLOCKS * read + 2 * HEAD * scored) / n  # of an example
    rows = [{"method": "one at a time, padded", "dtype": "float32", "examples_per_s": base, "ratio": 1.0, "same answers": None}]
    for dtype, speed in speeds.items():
        rows.append({"method": "hellaswag.py", "dtype": dtype, "examples_per_s": speed, "ratio": speed / base,
                     "same answers": f"{agreement[dtype]:.1%} of {compare}"})
    for dtype in dtypes:
        bound = max(rates[dtype]) / operations
        rows.append({"method": "operations that it cannot do without, at this chip's best matmul rate", "dtype": dtype,
                     "examples_per_s": bound, "ratio": bound / base, "same answers": None})
    return rows


def score(args):
    dtypes = dict.fromkeys(["float32", str(hellaswag.pick_dtype("auto", "cpu", (256, 768, 3072))[0])[6:]])
    return [table("HellaSwag, GPT-2 124M's shape untrained, whose near ties bfloat16 may decide otherwise",
                  hellaswag_rows(args.examples, dtypes=tuple(dtypes)))]

# -----------------------------------------------------------------------------
# the recipe

MODERN = dict(rope=True, rmsnorm=True, swiglu=True, qk_norm=True, bias=False)
OLD = dict(rope=False, rmsnorm=False, swiglu=False, qk_norm=False, bias=True, zero_init=False, optimizer="adamw", schedule="cosine",
           momentum_warmup_steps=0)  # and a min_lr of lr / 10
BEST = dict(schedule="wsd", decay_fraction=0.6, min_lr=0.0, optimizer="muon", momentum_warmup_steps=50)
RECIPES = {  # flags, and the learning rates of which the best is taken
    "gpt2": ({}, (1e-3, 3e-3, 6e-3)),
    "modern parts": (MODERN, (1e-3, 3e-3, 6e-3)),
    "zero-initialised projections": (dict(zero_init=True), (1e-3, 3e-3, 6e-3)),
    "wsd, 60% decay, to zero": (dict(schedule="wsd", decay_fraction=0.6, min_lr=0.0), (1e-3, 3e-3, 6e-3)),
    "Muon": (dict(optimizer="muon"), (3e-3, 6e-3, 1.2e-2)),
    "modern": (MODERN | BEST, (3e-3, 6e-3, 1.2e-2)),  # the presets' parts: all but the zero-initialised projections
}
CHANGES = {  # of that recipe, at its best learning rate
    "zero-initialised projections": dict(zero_init=True), "no QK-norm": dict(qk_norm=False),
    "cosine, to a tenth": dict(schedule="cosine", min_lr=None), "40% decay": dict(decay_fraction=0.4),
    "80% decay": dict(decay_fraction=0.8), "momentum 0.95 from the first step": dict(momentum_warmup_steps=0),
    "weight decay 0.01": dict(weight_decay=0.01), "betas 0.8, 0.95": dict(beta1=0.8), "betas 0.9, 0.99": dict(beta2=0.99),
}


def small_run(flags, folder, **given):
    """4 layers x 128, byte tokens, T=128, 4,096 tokens a step, one thread. Returns the lines of its log."""
    torch.set_num_threads(1)
    flags = OLD | flags | given
    if flags.get("min_lr") is None:
        flags["min_lr"] = flags["lr"] / 10  # the preset's is 0
    return train(**dict(preset="tiny", n_layer=4, n_embd=128, n_head=4, block_size=128, total_batch_size=4096, weight_decay=0.1,
                        warmup_steps=given["max_steps"] // 20, sample_every=0, checkpoint_every=0, quiet=True, device="cpu", compile=False,
                        dtype="float32", data=ROOT / "input.txt", out_dir=folder) | flags)


def recipe_run(flags, lr, steps, seed, folder):
    """Returns (million tokens, validation loss) at each fifth of the run."""
    lines = small_run(flags, folder, lr=lr, seed=seed, max_steps=steps, eval_every=max(1, steps // 5), eval_tokens=111520)
    return [(line["step"] * 4096 / 1e6, line["loss"]) for line in lines if line["kind"] == "val"]


def final_loss(run):
    return run.result()[-1][1]


def pool_of_runs():
    return concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))


def curves_of(cases, seeds):
    """cases: {name: (flags, learning rate, steps)}. Returns what `recipe_run` does, {name: [of each seed]}."""
    with tempfile.TemporaryDirectory() as folder, pool_of_runs() as pool:
        runs = {name: [pool.submit(recipe_run, *case, seed, os.path.join(folder, f"{i} {seed}")) for seed in range(1, seeds + 1)]
                for i, (name, case) in enumerate(cases.items())}
        return {name: [run.result() for run in found] for name, found in runs.items()}


def recipe(args):
    """Every change alone and all together, each at its best of three learning rates, over the seeds; then how few of the
    gpt2 recipe's tokens the modern one needs for the same loss, and what changes to it bring."""
    with tempfile.TemporaryDirectory() as folder, pool_of_runs() as pool:
        count = 0

        def start(flags, lr, seed, steps):
            nonlocal count
            count += 1
            return pool.submit(recipe_run, flags, lr, steps, seed, os.path.join(folder, str(count)))

        seeds = list(range(1, args.seeds + 1))
        first = {name: {lr: start(flags, lr, seeds[0], args.steps) for lr in rates} for name, (flags, rates) in RECIPES.items()}
        best = {name: min(runs, key=lambda lr: final_loss(runs[lr])) for name, runs in first.items()}
        others = {name: [start(RECIPES[name][0], best[name], seed, args.steps) for seed in seeds[1:]] for name in RECIPES}
        runs = {name: [first[name][best[name]], *others[name]] for name in RECIPES}
        losses = {name: list(map(final_loss, runs[name])) for name in RECIPES}
        goal, kept, rate = statistics.mean(losses["gpt2"]), RECIPES["modern"][0], best["modern"]
        parts = {share: [start(kept, rate, seed, round(share * args.steps)) for seed in seeds] for share in args.shares}
        changed = {name: [start(kept | change, rate, seed, args.steps) for seed in seeds] for name, change in CHANGES.items()}
        shares, changes = ({key: list(map(final_loss, runs)) for key, runs in group.items()} for group in (parts, changed))
    rows = [{"recipe": name, "best lr": best[name], "losses at the three": ", ".join(f"{final_loss(run):.4f}" for run in first[name].values()),
             "loss": spread(losses[name]), "against gpt2": f"{statistics.mean(losses[name]) - goal:+.4f}"} for name in RECIPES]
    part = [{"tokens": round(share * args.steps) * 4096, "share": f"{share:.0%}", "loss": spread(values),
             "against gpt2 at 100%": f"{statistics.mean(values) - goal:+.4f}"} for share, values in shares.items()]
    change = [{"change": name, "loss": spread(values), "against modern": f"{statistics.mean(values) - statistics.mean(losses['modern']):+.4f}"}
              for name, values in changes.items()]
    if args.pictures:
        draw_recipe({f"{name}, lr {best[name]:g}": runs[name][0].result() for name in RECIPES},
                    {f"modern, in {share:.0%} of the tokens": parts[share][0].result() for share in parts})
    return [table(f"Loss after {args.steps * 4096:,} tokens of input.txt, 4 x 128, {args.seeds} seeds (mean ± half the range)", rows),
            table("modern, on fewer tokens", part), table(f"modern with one change, lr {rate:g}", change)]


def tokens(args):
    """Both recipes at the learning rates that `recipe` found best, and the modern one on 60% of the tokens."""
    shorter = round(0.6 * args.steps)
    cases = {"gpt2": ({}, 3e-3, args.steps), "modern": (MODERN | BEST, 6e-3, args.steps),
             "modern, 60% of the tokens": (MODERN | BEST, 6e-3, shorter)}
    curves = curves_of(cases, args.seeds)
    *whole, (name, runs) = curves.items()
    if args.pictures:
        draw_recipe({name: runs[0] for name, runs in whole}, {name: runs[0]})
    rows = [{"recipe": name, "tokens": steps * 4096, "validation loss": spread([run[-1][1] for run in curves[name]])}
            for name, (_, _, steps) in cases.items()]
    return [table(f"4 layers x 128 on input.txt, {args.seeds} seeds (mean ± half the range)", rows)]


def draw_recipe(curves, shorter):
    """curves, shorter: {name: [(million tokens, validation loss)]}"""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points), "o-", ms=3, label=name)
    for name, points in shorter.items():
        axes.plot(*zip(*points), "o--", ms=3, lw=0.8, label=name)
    axes.axhline(curves[next(iter(curves))][-1][1], ls=":", color="gray")
    axes.set(xlabel="million tokens", ylabel="validation loss, nats a byte", ylim=(None, 3.2))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    (ROOT / "assets").mkdir(exist_ok=True)
    figure.savefig(ROOT / "assets/recipe.png", dpi=150)


ABLATION = {"vanilla": {}, "+ RoPE": dict(rope=True), "+ RMSNorm": dict(rmsnorm=True), "+ SwiGLU": dict(swiglu=True),
            "all three": dict(rope=True, rmsnorm=True, swiglu=True)}


def ablation(args):
    """The modern parts with one recipe (AdamW, cosine to zero, one learning rate): on so little text that they overfit, and on more
    than is read once. Both validate on the same play."""
    text = (ROOT / "input.txt").read_bytes()
    train, val = text[:len(text) * 9 // 10], text[len(text) * 9 // 10:]
    with tempfile.TemporaryDirectory() as folder, pool_of_runs() as pool:
        data = {}
        for name, size in (("little", args.little), ("much", len(train))):
            data[name] = os.path.join(folder, name)
            os.mkdir(data[name])
            fineweb.write_shard(os.path.join(data[name], "train_000000.npy"), torch.frombuffer(bytearray(train[:size]), dtype=torch.uint8))
            fineweb.write_shard(os.path.join(data[name], "val_000000.npy"), torch.frombuffer(bytearray(val), dtype=torch.uint8))
            Path(data[name], "manifest.json").write_text(json.dumps({"tokenizer": "byte"}))
        runs = {(name, part, seed): pool.submit(small_run, flags, os.path.join(folder, f"{name} {part} {seed}"), data=data[name], seed=seed,
                                                lr=3e-3, min_lr=0.0, max_steps=args.steps, eval_every=args.steps // 10, eval_tokens=65536)
                for part, flags in ABLATION.items() for name in data for seed in range(1, args.seeds + 1)}
        runs = {key: run.result() for key, run in runs.items()}
    rows = []
    for part in ABLATION:
        row = {"model": part}
        curves = {name: [[line for line in runs[name, part, seed] if line["kind"] == "val"] for seed in range(1, args.seeds + 1)]
                  for name in data}
        lowest = [min(curve, key=lambda line: line["loss"]) for curve in curves["little"]]
        row["little: lowest"] = spread([line["loss"] for line in lowest])
        row["at step"] = ", ".join(str(line["step"]) for line in lowest)
        row["little: at the end"] = spread([curve[-1]["loss"] for curve in curves["little"]])
        ends = [[line["loss"] for line in runs["little", part, seed] if line["kind"] == "train"][-10:] for seed in range(1, args.seeds + 1)]
        row["its training loss"] = spread([statistics.mean(end) for end in ends])
        row["much: at the end"] = spread([curve[-1]["loss"] for curve in curves["much"]])
        rows.append(row)
    tokens = args.steps * 4096
    return [table(f"Validation loss, 4 x 128, {tokens:,} tokens: {tokens / args.little:.0f} times through {args.little:,} bytes (little), "
                  f"{tokens / len(train):.1f} times through {len(train):,} (much); {args.seeds} seeds", rows)]


def spread(values):
    return f"{statistics.mean(values):.4f} ± {(max(values) - min(values)) / 2:.4f}"

# -----------------------------------------------------------------------------
# a GPU at hand: what a CPU cannot show, in pieces of less than ten minutes

MODERN_GPT2 = GPT2 | dict(rope=True, rmsnorm=True, swiglu=True, qk_norm=True, bias=False)
TEXT_FOLDERS = (ROOT, sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], "/usr/share/doc", "/usr/include")
RUN = dict(quiet=True, sample_every=0, checkpoint_every=0, hellaswag_every=0)  # flags of a run that is only timed


def attention_rows(device, dtype, batch_size, T, lengths, windows):
    """{"speeds": rows, "errors": rows}: what attention takes with and without cuDNN, and how far off its gradients are."""
    speeds, errors, dtype = [], [], getattr(torch, dtype)
    q, k, v = (torch.randn(batch_size, 12, T, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    ones = torch.ones_like(q)

    def forward():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def both():
        forward().backward(ones)

    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        new = [seconds_of_cached_token(device, dtype, length) for length in lengths]
        speeds.append({"cuDNN": "allowed" if cudnn else "off", "forward, ms": 1000 * seconds_of(forward, device),
                       "with backward, ms": 1000 * seconds_of(both, device),
                       "a new length of the cache, ms": 1000 * statistics.median(new)})
        for window in windows:
            for low in (False, True):
                found = " ".join(f"{error:.1e}" for error in window_errors(device, dtype, window, low))
                errors.append({"cuDNN": "allowed" if cudnn else "off", "window": window,
                               "logits": "low" if low else "usual", "relative errors of dq dk dv": found})
    torch.backends.cuda.enable_cudnn_sdp(True)
    return {"speeds": speeds, "errors": errors}


def seconds_of_cached_token(device, dtype, length):
    """The first time that one query meets so many keys."""
    q, k = (torch.randn(1, 12, n, 64, device=device, dtype=dtype) for n in (1, length))
    return seconds_of(partial(F.scaled_dot_product_attention, q, k, k), device, 1, warm=False)


def window_errors(device, dtype, window, low):
    """Of dq, dk and dv against float64, for a block of WindowAttention. low: every row's log-sum-exp is below -88,
    where exp in float32 is 0."""
    torch.manual_seed(0)
    scale = 0.1 if low else 1.0
    q, k = (torch.randn(4, 2, n, 64, device=device, dtype=dtype) * scale for n in (window, 2 * window))
    v = torch.randn_like(k)
    if low:
        q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(64)
    mask = train_gpt2.WindowAttention(window).mask.to(device)
    grads = []
    for dtype in (dtype, torch.float64):
        inputs = [tensor.to(dtype).detach().requires_grad_() for tensor in (q, k, v)]
        F.scaled_dot_product_attention(*inputs, attn_mask=mask).square().sum().backward()
        grads.append([tensor.grad.double() for tensor in inputs])
    return [((a - b).norm() / b.norm()).item() for a, b in zip(*grads)]


def profile(device, steps=3, **parts):
    """{"row": a step's times, "kernels": rows of the longest}."""
    from torch.profiler import ProfilerActivity
    _, step = training_step(device, **parts)
    for _ in range(3):
        step()
    synchronize(device)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        started = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        wall = 1000 * (time.perf_counter() - started) / steps
    events = trace.key_averages()
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in on_gpu if not event.is_user_annotation]
    optimizers = [event for event in events if event not in on_gpu and event.key.startswith("Optimizer.step")]
    optimizer = sum(event.device_time_total for event in optimizers) / 1000 / steps
    kernels.sort(key=device_time, reverse=True)
    busy = sum(map(device_time, kernels)) / 1000 / steps
    return {"row": {"step, ms": wall, "kernels, ms": busy, "idle": f"{1 - busy / wall:.1%}", "optimizer, ms": optimizer,
                    "launches": sum(kernel.count for kernel in kernels) / steps},
            "kernels": [{"kernel": kernel.key[:100].replace("|", " "), "ms": device_time(kernel) / 1000 / steps,
                         "times": kernel.count / steps} for kernel in kernels[:25]]}


def device_time(event):
    return event.self_device_time_total


def step_tables(args, name, cases, **common):
    """The speed of each of the cases, {name: parts}, and a profile of the script's own step; in the largest batch."""
    common |= dict(device=args.device, dtype=args.dtype, compiled=args.compiled)
    batch, rows = args.gpu_batch, []
    while not (first := isolated(training_speed, batch_size=batch, steps=args.steps, **common)):
        batch //= 2
    for case, parts in cases.items():
        row = attempted(training_speed, batch_size=batch, steps=args.steps, **common | parts) if parts else first
        rows.append({"step": case, "batch": batch, **(row or dict.fromkeys(first))})
    tables = [table(f"A step of {name}, {args.dtype}, {chip(args.device)}", rows)]
    seen = attempted(profile, batch_size=batch, **common)
    if seen:
        tables.append(table(f"Where a step of {name} goes", [seen["row"]]))
    if seen and seen["kernels"]:
        tables.append(table(f"The longest kernels of {name}", seen["kernels"]))
    return tables


def run_figures(bf16_stream=False, **flags):
    """A run of train_gpt2.py and what its log says."""
    found, model_to_train = {}, train_gpt2.model_to_train

    def noting(run, notes):
        found["batch"] = run.batch_size
        if bf16_stream:
            run.model.drop.register_forward_hook(to_compute_dtype)
        return model_to_train(run, notes)

    with mock.patch.object(train_gpt2, "model_to_train", noting):
        lines = train(**RUN | flags)
    steps = [line for line in lines if line["kind"] == "train"]
    timed = steps[min(3, len(steps) - 1):]
    vals, scores = ([line for line in lines if line["kind"] == kind] for kind in ("val", "hellaswag"))
    return {**found, "steps": len(steps), "skipped": sum("skipped" in line for line in steps),
            "tokens_per_second": statistics.median(line["tokens_per_second"] for line in timed),
            "mfu": statistics.median(line["mfu"] or 0 for line in timed) or None, "first loss": steps[0]["loss"],
            "last losses": statistics.mean(line["loss"] for line in steps[-5:]), "val loss": vals[-1]["loss"] if vals else None,
            "HellaSwag acc_norm": scores[-1]["acc_norm"] if scores else None}


def machine_text(folder, limit, examples):
    """Writes up to so many characters of this machine's sources and documents as jsonl, and HellaSwag-like examples."""
    found = (path for top in TEXT_FOLDERS for path in Path(top).rglob("*.*"))
    paths = sorted({path for path in found if path.suffix in (".py", ".md", ".rst", ".txt", ".h", ".pyi") and path.is_file()})
    random.Random(0).shuffle(paths)
    size, seen = 0, set()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(Path(folder, f"{i:02d}.jsonl"), "w")) for i in range(8)]
        for path in paths:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if 200 < len(text) < 400_000 and hash(text) not in seen and size < limit:
                files[len(seen) % 8].write(json.dumps({"text": text}) + "\n")
                seen.add(hash(text))
                size += len(text)
    with open(Path(folder, "hellaswag.json"), "w") as f:
        for example in realistic_examples(examples, fineweb.get_tokenizer("gpt2").encode):
            f.write(json.dumps(example) + "\n")


@contextlib.contextmanager
def machine_shards(args):
    """A folder with machine_text, and its shards in shards/."""
    with tempfile.TemporaryDirectory() as folder:
        machine_text(folder, args.characters, args.examples)
        subprocess.run([sys.executable, ROOT / "fineweb.py", "--files", f"{folder}/*.jsonl", "--out", f"{folder}/shards",
                        "--shard_size", str(max(20000, args.characters // 25))], check=True, stdout=sys.stderr)
        yield Path(folder)


def gpu_attention(args):
    found = isolated(attention_rows, device=args.device, dtype=args.dtype, batch_size=args.gpu_batch, T=args.shape["block_size"],
                     lengths=args.lengths, windows=args.windows)
    title = f"Causal attention, {args.dtype}, {chip(args.device)}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    tables = [table(title, found["speeds"]),
              table("Attention in windows, against float64 (trouble: nan; with usual logits also over 3e-2)", found["errors"])]
    command = [sys.executable, "-m", "pytest", "-q", "-rf", str(ROOT / "tests/test_cuda.py")]
    tests = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=480)
    print(tests.stdout[-6000:], file=sys.stderr)
    return tables + [table("tests/test_cuda.py", [{"says": tests.stdout.strip().splitlines()[-1]}])]


def gpu_gpt2(args):
    cases = {"this script": {}, "norms and GELUs kept": dict(recompute=False), "all logits at once": dict(head="plain"),
             "without cuDNN's attention": dict(attention="without cuDNN"), f"residual stream in {args.dtype}": dict(bf16_stream=True)}
    return step_tables(args, "gpt2", cases, shape=args.shape)


def gpu_modern(args):
    cases = {"this script": {}, "Muon, one matrix after the other": dict(optimizer="muon one by one"),
             "kernels tuned by coordinate descent": dict(tuned=True), f"residual stream in {args.dtype}": dict(bf16_stream=True)}
    tables = step_tables(args, "modern", cases, shape=args.modern_shape, optimizer="muon")
    return tables + limit(argparse.Namespace(**vars(args) | {"batch_size": args.gpu_batch}))


def gpu_ladder(args):
    return ladder(argparse.Namespace(**vars(args) | {"memory_limit_gb": args.memory_limit_gb or 16, "steps": min(6, args.steps)}))


def gpu_learning(args):
    """Both presets on the machine's own text: the losses, HellaSwag's code, skipped steps."""
    rows = []
    with machine_shards(args) as folder:
        for preset in ("gpt2", "modern"):
            row = isolated(run_figures, device=args.device, preset=preset, data=folder / "shards", out_dir=folder / preset,
                           bf16_stream=args.bf16_stream, eval_every=args.run_steps // 2, hellaswag_every=args.run_steps,
                           hellaswag_data=folder / "hellaswag.json", max_steps=args.run_steps, max_minutes=3, **args.run_flags)
            rows.append({"preset": preset, **row})
    stream = "bfloat16" if args.bf16_stream else "float32"
    return [table(f"Runs on the machine's own text, residual stream in {stream}, {chip(args.device)}", rows)]


def gpu_limits(args):
    """The automatic batch where 15 GiB are free, a resumed run's bytes, and attention in windows at T=8192."""
    rows = []
    with machine_shards(args) as folder:
        common = dict(device=args.device, data=folder / "shards", eval_every=0, max_minutes=2)
        if args.device.startswith("cuda"):
            ballast = torch.empty(max(0, torch.cuda.mem_get_info()[0] - 15 * 2**30), dtype=torch.uint8, device=args.device)
        for preset in ("gpt2", "modern"):
            row = attempted(run_figures, preset=preset, max_steps=4, out_dir=folder / preset, **common | args.run_flags)
            rows.append({"run": f"{preset}, 15 GiB free", **(row or {})})
        ballast = None  # noqa: F841  gives the memory back
        torch.cuda.empty_cache()
        resumed = dict(preset="modern", deterministic=True, max_steps=8, checkpoint_every=4, **common | args.run_flags)
        resumed |= dict(total_batch_size=16 * args.shape["block_size"], batch_size=8)
        isolated(run_figures, out_dir=folder / "whole", **resumed)
        shutil.copytree(folder / "whole/step_000004", folder / "half/step_000004")
        shutil.copy(folder / "whole/log.jsonl", folder / "half/log.jsonl")
        isolated(run_figures, out_dir=folder / "half", resume=True, **resumed)
        whole, half = ((folder / name / "step_000008/model.safetensors").read_bytes() for name in ("whole", "half"))
        for window in (0, args.long // 16):
            row = attempted(run_figures, preset="gpt2", rope=True, rmsnorm=True, swiglu=True, bias=False, max_steps=8, window=window,
                           out_dir=folder / f"window{window}",
                           **common | args.run_flags | dict(block_size=args.long, total_batch_size=16 * args.long, batch_size=None))
            rows.append({"run": f"T={args.long}, window {window or 'off'}", **(row or {})})
    return [table(f"Runs at the limits, {chip(args.device)}", rows),
            table("Deterministic resume", [{"bytes of the model": "the same" if whole == half else "DIFFERENT"}])]


PIECES = {1: gpu_attention, 2: gpu_gpt2, 3: gpu_modern, 5: gpu_learning, 6: gpu_limits, 4: gpu_ladder}  # by what they tell
GPU_SIZES = dict(shape=GPT2, modern_shape=MODERN_GPT2, gpu_batch=64, compiled=True, lengths=range(100, 140), windows=(16, 32, 96, 128, 512),
                 characters=500_000_000, examples=10042, long=8192, run_steps=100, run_flags=dict(eval_tokens=2097152))


def gpu(args):
    """For any one GPU, with no network. Ends with all tables in one line of JSON, to be sent back."""
    if not torch.cuda.is_available():
        problem = "this PyTorch is a build without it" if torch.version.cuda is None else "PyTorch finds none (see nvidia-smi)"
        print(f"error: gpu needs a GPU with CUDA, and {problem}", file=sys.stderr)
        sys.exit(2)
    args = argparse.Namespace(**vars(args) | GPU_SIZES)
    tables = []
    for number in [args.piece] if args.piece else PIECES:
        started = time.time()
        try:
            tables += PIECES[number](args)
        except Exception as error:  # the other pieces still tell something
            traceback.print_exc()
            tables += [table(f"Piece {number} failed", [{"error": fineweb.one_line(error)}])]
        print(f"piece {number}: {time.time() - started:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps({"chip": chip(args.device), "torch": torch.__version__, "pieces": args.piece or "all", "tables": tables}))
    return tables

# -----------------------------------------------------------------------------
# command line

COMMANDS = {"default": default_run, "killed": killed, "simulated": simulated, "limit": limit, "ladder": ladder, "heads": heads,
            "loader": loader, "tokenize": tokenize, "architecture": architecture, "hellaswag": score,
            "tokens": tokens, "recipe": recipe, "ablation": ablation, "gpu": gpu}
NOT_IN_ALL = ("recipe", "ablation", "gpu")  # long, or for another machine
HEADER = """# Results

Written by `python tests/benchmark.py all --write tests/RESULTS.md`: each part on the machine, and by the command, that stand
below its name. Where others share the machine its speed drifts: compare within one table.
"""


def machine(device):
    """For the line below a part's name."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    sets = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if re.search(rf"\b{name}\b", flags)]
    return f"{chip(device)} ({', '.join(sets) or 'instruction set unknown'}), PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def write_part(path, name, command, device, dtype, seconds, text):
    """Puts a part into the file in place of the one of its name."""
    parts = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", path.read_text() if path.exists() else "", re.M | re.S))
    parts[name] = f"\n`{command}` ({dtype}), {seconds:.0f} s, {machine(device)}\n{text}\n\n"
    order = sorted(parts, key=list(COMMANDS).index)
    path.write_text(HEADER + "".join(f"\n## {name}\n{parts[name].rstrip()}\n" for name in order))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", choices=[*COMMANDS, "all"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: what --dtype auto of train_gpt2.py picks")
    parser.add_argument("--memory_limit_gb", type=float, default=0, help="pretend that the GPU has no more")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-steps a step (ladder)")
    parser.add_argument("--steps", type=int, help="timed steps of each row (ladder: 2, on CUDA 10); optimizer steps (recipe, ablation: 250)")
    parser.add_argument("--tokens", type=int, default=65536, help="trained on by each row, twice (architecture)")
    parser.add_argument("--megabytes", type=int, default=80, help="of text (tokenize)")
    parser.add_argument("--copies", type=int, default=7, help="of that text in the long run (tokenize)")
    parser.add_argument("--examples", type=int, default=200, help="scored (hellaswag)")
    parser.add_argument("--seeds", type=int, default=2, help="of each run (recipe, ablation)")
    parser.add_argument("--little", type=int, default=20000, help="bytes to overfit on (ablation)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6], help="parts of the tokens (recipe)")
    parser.add_argument("--piece", type=int, choices=range(1, 7), help="only this one (gpu)")
    parser.add_argument("--bf16_stream", action="store_true", help="residual stream in bfloat16, in the runs of piece 5 (gpu)")
    parser.add_argument("--write", type=Path, help="put the tables into this Markdown file")
    parser.add_argument("--json", help="write the tables to this file too")
    args = parser.parse_args()
    args.pictures = bool(args.write) and args.write.resolve() == ROOT / "tests/RESULTS.md"  # a trial leaves them alone
    auto, reason = hellaswag.pick_dtype("auto", args.device.split(":")[0], (256, 768, 3072), torch.float16)
    args.dtypes = ["float32", "bfloat16"] if reason and not args.dtype else [args.dtype or str(auto)[6:]]
    args.dtype = args.dtype or str(auto)[6:]
    if args.commands != ["gpu"]:
        print(f"{machine(args.device)}, {args.dtype}", file=sys.stderr)
    tables = []
    given = " ".join(word for word in sys.argv[1:] if word not in COMMANDS and word != "all")
    flags = re.sub(r"--(write|json)[= ]\S+ ?", "", given).strip()
    for name in COMMANDS if "all" in args.commands else args.commands:
        if name in NOT_IN_ALL and name not in args.commands:
            continue
        steps = {"ladder": 10 if args.device.startswith("cuda") else 2, "gpu": 12}.get(name, 250)
        started = time.time()
        try:
            found = COMMANDS[name](argparse.Namespace(**{**vars(args), "steps": args.steps or steps}))
        except Exception as error:
            if not args.write:
                raise
            traceback.print_exc()
            found = [table("failed", [{"error": fineweb.one_line(error)}])]  # the other parts are still measured
        tables += found
        if args.write:
            text = "\n".join(part["markdown"] for part in found)
            command = f"python tests/benchmark.py {name} {flags}".strip()
            write_part(args.write, name, command, args.device, args.dtype, time.time() - started, text)
    if args.json:
        Path(args.json).write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
