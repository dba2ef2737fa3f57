"""A GPU at hand: what a CPU cannot show, in pieces of less than ten minutes."""
import argparse
import contextlib
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks import speed
from benchmarks.data import realistic_examples
from benchmarks.shared import (ROOT, attempted, chip, fineweb, isolated, refuse, seconds_of, synchronize, table,
                               train, train_gpt2)
from benchmarks.speed import GPT2, to_compute_dtype, training_speed, training_step

MODERN_GPT2 = dict(GPT2, rope=True, rmsnorm=True, swiglu=True, qk_norm=True, bias=False)
TEXT_FOLDERS = (ROOT, sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], "/usr/share/doc",
                "/usr/include")
RUN = dict(quiet=True, sample_every=0, checkpoint_every=0, hellaswag_every=0)  # flags of a run that is only timed

# -----------------------------------------------------------------------------
# attention

def attention_rows(device, dtype, batch_size, T, lengths, windows):
    """{"speeds": rows, "errors": rows}: what attention takes with and without cuDNN, and how far off its gradients
    are."""
    dtype = getattr(torch, dtype)
    q, k, v = (torch.randn(batch_size, 12, T, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    ones = torch.ones_like(q)

    def forward():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def both():
        forward().backward(ones)

    speeds, errors = [], []
    for cudnn, how in ((True, "allowed"), (False, "off")):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        new = [seconds_of_cached_token(device, dtype, length) for length in lengths]
        speeds.append({"cuDNN": how, "forward, ms": 1000 * seconds_of(forward, device),
                       "with backward, ms": 1000 * seconds_of(both, device),
                       "a new length of the cache, ms": 1000 * statistics.median(new)})
        for window in windows:
            for low in (False, True):
                of_each = " ".join(f"{error:.1e}" for error in window_errors(device, dtype, window, low))
                errors.append({"cuDNN": how, "window": window, "logits": "low" if low else "usual",
                               "relative errors of dq dk dv": of_each})
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
    distance = torch.arange(window, 2 * window)[:, None] - torch.arange(2 * window)  # from query to key
    mask = ((distance >= 0) & (distance < window)).to(device)
    grads = []
    for dtype in (dtype, torch.float64):
        inputs = [tensor.to(dtype).detach().requires_grad_() for tensor in (q, k, v)]
        F.scaled_dot_product_attention(*inputs, attn_mask=mask).square().sum().backward()
        grads.append([tensor.grad.double() for tensor in inputs])
    return [((a - b).norm() / b.norm()).item() for a, b in zip(*grads)]

# -----------------------------------------------------------------------------
# a step, and where its time goes

def profile(device, steps=3, **parts):
    """As `profile_of`, of a `training_step`."""
    _, step = training_step(device, **parts)
    for _ in range(3):
        step()
    return profile_of(step, device, steps)


def profile_of(step, device, steps=3, most=25):
    """{"row": where a warm step's time goes, "kernels": rows of the longest}."""
    from torch.profiler import ProfilerActivity
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
    kernels.sort(key=device_time, reverse=True)
    busy = sum(map(device_time, kernels)) / 1000 / steps
    row = {"step, ms": wall, "kernels, ms": busy, "idle": f"{1 - busy / wall:.1%}",
           "optimizer, ms": sum(event.device_time_total for event in optimizers) / 1000 / steps,
           "launches": sum(kernel.count for kernel in kernels) / steps}
    longest = [{"kernel": kernel.key[:100].replace("|", " "), "ms": device_time(kernel) / 1000 / steps,
                "times": kernel.count / steps} for kernel in kernels[:most]]
    return {"row": row, "kernels": longest}


def device_time(event):
    return event.self_device_time_total


def recomputes(device):
    """Whether the script makes norms and GELUs again in the backward pass, as it does where memory is short."""
    return not (device.startswith("cuda") and torch.cuda.mem_get_info()[1] > 40e9)


def step_tables(args, name, cases, **common):
    """The speed of each of the cases, {name: parts}, and a profile of the script's own step; in the largest batch."""
    common |= dict(device=args.device, dtype=args.dtype, compiled=args.compiled, recompute=recomputes(args.device))
    batch, rows = args.gpu_batch, []
    while not (first := isolated(training_speed, batch_size=batch, steps=args.steps, **common)):
        batch //= 2
    for case, parts in cases.items():
        row = first
        if parts:
            row = attempted(training_speed, batch_size=batch, steps=args.steps, **common | parts)
        rows.append({"step": case, "batch": batch, **(row or dict.fromkeys(first))})
    tables = [table(f"A step of {name}, {args.dtype}, {chip(args.device)}", rows)]
    profiled = attempted(profile, batch_size=batch, **common)
    if profiled:
        tables.append(table(f"Where a step of {name} goes", [profiled["row"]]))
    if profiled and profiled["kernels"]:
        tables.append(table(f"The longest kernels of {name}", profiled["kernels"]))
    return tables

# -----------------------------------------------------------------------------
# runs

@contextlib.contextmanager
def small_card(gib):
    """Makes the GPU look like one of so many GiB, of which one is taken. 0: as it is."""
    if not gib:
        yield
        return
    ratio = gib * 2**30 / torch.cuda.mem_get_info()[1]
    set_fraction = torch.cuda.set_per_process_memory_fraction

    def mem_get_info(device=None):
        return (gib - 1) * 2**30 - torch.cuda.memory_reserved(), gib * 2**30

    def set_small_fraction(fraction, device=None):
        set_fraction(min(fraction, (gib - 1) / gib) * ratio)

    set_small_fraction(1.0)
    with mock.patch.object(torch.cuda, "mem_get_info", mem_get_info), \
            mock.patch.object(torch.cuda, "set_per_process_memory_fraction", set_small_fraction):
        yield


def run_figures(bf16_stream=False, card_gib=0, **flags):
    """A run of train_gpt2.py and what its log says. card_gib: see `small_card`."""
    model_to_train = train_gpt2.model_to_train
    batch = {}

    def noting(run, *rest):
        batch["batch"] = run.batch_size
        if bf16_stream:
            run.model.drop.register_forward_hook(to_compute_dtype)
        return model_to_train(run, *rest)

    with mock.patch.object(train_gpt2, "model_to_train", noting), small_card(card_gib):
        lines = train(**RUN | flags)
    steps, vals, scores = ([line for line in lines if line["kind"] == kind] for kind in ("train", "val", "hellaswag"))
    warm = steps[min(3, len(steps) - 1):]
    return {**batch, "steps": len(steps), "skipped": sum("skipped" in line for line in steps),
            "tokens_per_second": statistics.median(line["tokens_per_second"] for line in warm),
            "mfu": statistics.median(line["mfu"] or 0 for line in warm) or None, "first loss": steps[0]["loss"],
            "last losses": statistics.mean(line["loss"] for line in steps[-5:]),
            "val loss": vals[-1]["loss"] if vals else None,
            "HellaSwag acc_norm": scores[-1]["acc_norm"] if scores else None}


def machine_text(folder, limit, examples):
    """Writes about so many characters of this machine's sources and documents as jsonl, and HellaSwag-like examples."""
    paths = {path for top in TEXT_FOLDERS for path in Path(top).rglob("*.*")
             if path.suffix in (".py", ".md", ".rst", ".txt", ".h", ".pyi")}
    paths = sorted(paths)
    random.Random(0).shuffle(paths)
    size, known = 0, set()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(Path(folder, f"{i:02d}.jsonl"), "w")) for i in range(8)]
        for path in paths:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if 200 < len(text) < 400_000 and hash(text) not in known:
                files[len(known) % 8].write(json.dumps({"text": text}) + "\n")
                known.add(hash(text))
                size += len(text)
            if size > limit:
                break
    with open(Path(folder, "hellaswag.json"), "w") as f:
        for example in realistic_examples(examples, fineweb.get_tokenizer("gpt2").encode):
            f.write(json.dumps(example) + "\n")


def make_machine_shards(folder, characters, examples):
    """machine_text in a folder, and its shards in shards/."""
    machine_text(folder, characters, examples)
    subprocess.run([sys.executable, ROOT / "fineweb.py", "--files", f"{folder}/*.jsonl", "--out", f"{folder}/shards",
                    "--shard_size", str(max(20000, characters // 25))], check=True, stdout=sys.stderr)


@contextlib.contextmanager
def machine_shards(args):
    """A folder as `make_machine_shards` fills it."""
    with tempfile.TemporaryDirectory() as folder:
        make_machine_shards(folder, args.characters, args.examples)
        yield Path(folder)


def resumed_bytes(folder, flags, last_step):
    """Whether a run resumed from its half has the bytes of the whole one, in two folders in `folder`. flags: they save
    at both steps."""
    whole, half = folder / "whole", folder / "half"
    isolated(run_figures, out_dir=whole, **flags)
    middle = f"step_{last_step // 2:06d}"
    shutil.copytree(whole / middle, half / middle)
    shutil.copy(whole / "log.jsonl", half / "log.jsonl")
    isolated(run_figures, out_dir=half, resume=True, **flags)
    one, other = ((path / f"step_{last_step:06d}/model.safetensors").read_bytes() for path in (whole, half))
    return {"bytes of the model": "the same" if one == other else "DIFFERENT"}

# -----------------------------------------------------------------------------
# the six pieces

def gpu_attention(args):
    rows = isolated(attention_rows, device=args.device, dtype=args.dtype, batch_size=args.gpu_batch,
                    T=args.shape["block_size"], lengths=args.lengths, windows=args.windows)
    versions = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    tables = [table(f"Causal attention, {args.dtype}, {chip(args.device)}, {versions}", rows["speeds"]),
              table("Attention in windows, against float64 (trouble: nan; with usual logits also over 3e-2)",
                    rows["errors"])]
    return tables + [table("tests/test_cuda.py", [{"says": line} for line in cuda_tests([])])]


def cuda_tests(flags, seconds=480):
    """Runs tests/test_cuda.py, for so long at most. Returns pytest's lines on failures and its last one; all that it
    says goes to stderr as it comes."""
    command = [sys.executable, "-m", "pytest", "-v", "-rf", "--tb=short", *flags, str(ROOT / "tests/test_cuda.py")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    lines = []
    for line in process.stdout:
        print(line, end="", file=sys.stderr, flush=True)
        lines.append(line.strip("= \n"))
    timer.cancel()
    if process.wait() >= 0:
        return [line for line in lines if line.startswith(("FAILED ", "ERROR "))] + lines[-1:]
    passed = sum("PASSED" in line for line in lines)
    return [line for line in lines if "FAILED" in line] + [f"{passed} passed, the rest was killed after {seconds} s"]


def gpu_gpt2(args):
    is_on = recomputes(args.device)
    cases = {"this script": {}, f"norms and GELUs {'kept' if is_on else 'recomputed'}": dict(recompute=not is_on),
             "all logits at once": dict(head="plain"), "without cuDNN's attention": dict(attention="without cuDNN"),
             f"residual stream in {args.dtype}": dict(bf16_stream=True)}
    return step_tables(args, "gpt2", cases, shape=args.shape)


def gpu_modern(args):
    cases = {"this script": {}, "Muon, one matrix after the other": dict(optimizer="muon one by one"),
             "kernels tuned by coordinate descent": dict(tuned=True),
             f"residual stream in {args.dtype}": dict(bf16_stream=True)}
    tables = step_tables(args, "modern", cases, shape=args.modern_shape, optimizer="muon")
    return tables + speed.limit(argparse.Namespace(**vars(args) | {"batch_size": args.gpu_batch}))


def gpu_ladder(args):
    changes = {"memory_limit_gb": args.memory_limit_gb or 16, "steps": min(6, args.steps)}
    return speed.ladder(argparse.Namespace(**vars(args) | changes))


def gpu_learning(args):
    """Both presets on the machine's own text: the losses, HellaSwag's code, skipped steps."""
    rows = []
    with machine_shards(args) as folder:
        for preset in ("gpt2", "modern"):
            row = isolated(run_figures, device=args.device, preset=preset, data=folder / "shards",
                           out_dir=folder / preset, bf16_stream=args.bf16_stream, eval_every=args.run_steps // 2,
                           hellaswag_every=args.run_steps, hellaswag_data=folder / "hellaswag.json",
                           max_steps=args.run_steps, max_minutes=3, **args.run_flags)
            rows.append({"preset": preset, **row})
    stream = "bfloat16" if args.bf16_stream else "float32"
    return [table(f"Runs on the machine's own text, residual stream in {stream}, {chip(args.device)}", rows)]


def gpu_limits(args):
    """The automatic batch where 15 GiB are free, a resumed run's bytes, and attention in windows at T=8192."""
    rows = []
    with machine_shards(args) as folder:
        common = dict(device=args.device, data=folder / "shards", eval_every=0, max_minutes=2)
        for preset in ("gpt2", "modern"):
            row = attempted(run_figures, preset=preset, max_steps=4, out_dir=folder / preset, card_gib=args.card_gib,
                            **common | args.run_flags)
            rows.append({"run": f"{preset}, 15 GiB free", **(row or {})})
        flags = dict(preset="modern", deterministic=True, max_steps=8, checkpoint_every=4, **common | args.run_flags)
        flags |= dict(total_batch_size=16 * args.shape["block_size"], batch_size=8)
        resumed = resumed_bytes(folder, flags, last_step=8)
        for window in (0, args.long // 16):
            row = attempted(run_figures, out_dir=folder / f"window{window}", **common | long_flags(args, window))
            rows.append({"run": f"T={args.long}, window {window or 'off'}", **(row or {})})
    return [table(f"Runs at the limits, {chip(args.device)}", rows), table("Deterministic resume", [resumed])]


def long_flags(args, window):
    """Of a run whose text is so long that a window tells. window: 0 for none."""
    return args.run_flags | dict(preset="gpt2", rope=True, rmsnorm=True, swiglu=True, bias=False, max_steps=8,
                                 eval_every=0, window=window, block_size=args.long,
                                 total_batch_size=16 * args.long, batch_size=None)


# in the order of what they tell
PIECES = {1: gpu_attention, 2: gpu_gpt2, 3: gpu_modern, 5: gpu_learning, 6: gpu_limits, 4: gpu_ladder}
SIZES = dict(shape=GPT2, modern_shape=MODERN_GPT2, gpu_batch=64, compiled=True, lengths=range(100, 140),
             windows=(16, 32, 96, 128, 512), characters=500_000_000, examples=10042, long=8192, card_gib=16,
             run_steps=100, run_flags=dict(eval_tokens=2097152))

TINY_SHAPE = dict(n_layer=1, n_head=2, n_embd=32, block_size=32)
TINY = dict(  # for a rehearsal on any machine
    dtype="bfloat16", steps=1, compiled=False, gpu_batch=2, shape=TINY_SHAPE,
    modern_shape=TINY_SHAPE | dict(rope=True, qk_norm=True), lengths=(9, 10), windows=(4,), characters=200_000,
    examples=8, long=64, card_gib=0, run_steps=4,
    run_flags=TINY_SHAPE | dict(total_batch_size=256, batch_size=4, eval_tokens=64, compile=False, dtype="float32"))


def require_cuda():
    if not torch.cuda.is_available():
        problem = "PyTorch finds none (see nvidia-smi)" if torch.version.cuda else "this PyTorch is a build without it"
        refuse(f"gpu needs a GPU with CUDA, and {problem}")


def gpu(args):
    """For any one GPU, with no network. Ends with all tables in one line of JSON, to be sent back."""
    require_cuda()
    args = argparse.Namespace(**vars(args) | SIZES)
    tables = []
    for number in [args.piece] if args.piece else PIECES:
        started = time.time()
        try:
            tables += PIECES[number](args)
        except Exception as error:  # the other pieces still tell something
            traceback.print_exc()
            tables += [table(f"Piece {number} failed", [{"error": fineweb.one_line(error)}])]
        print(f"piece {number}: {time.time() - started:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps({"chip": chip(args.device), "torch": torch.__version__, "pieces": args.piece or "all",
                      "tables": tables}))
    return tables
