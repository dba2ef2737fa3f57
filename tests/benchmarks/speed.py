"""Training speed: what the machine's matmuls allow, the way from 2019's script to this one, the head, the loader, the
modern parts, and what a pretended GPU shows."""
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from unittest import mock

import torch
import torch._functorch.config
import torch.nn as nn
import torch.nn.functional as F

import hellaswag
from benchmarks import learning
from benchmarks.shared import (ROOT, ROUNDS, attempted, in_turns, isolated, seconds_of, spread, synchronize, table,
                               train, train_gpt2)
from train_gpt2 import GPT, GPTConfig, RecipeFlags, autocast, make_optimizers

GPT2 = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024)

# -----------------------------------------------------------------------------
# the bound

def limits(device, dtype, batch_size):
    """Seconds that the matmuls and the attention of one micro-step of GPT-2 124M take, each alone, and the bandwidth of
    a copy."""
    if device == "cpu":
        train_gpt2.keep_freed_memory()  # else the results' page faults are in it
    dtype = getattr(torch, dtype)
    N, C, V, T = batch_size * 1024, 768, 50304, 1024
    matmul_seconds = flops = 0
    products = {"attention in": (C, 3 * C, 12), "attention out": (C, C, 12), "mlp in": (C, 4 * C, 12),
                "mlp out": (4 * C, C, 12), "head": (C, V, 1)}  # channels in, channels out, how many
    for inside, outside, count in products.values():
        x = torch.randn(N, inside, device=device, dtype=dtype)
        weight = torch.randn(outside, inside, device=device, dtype=dtype)
        gradient = torch.randn(N, outside, device=device, dtype=dtype)
        for left, right in ((x, weight.T), (gradient, weight), (gradient.T, x)):
            matmul_seconds += count * seconds_of(partial(torch.matmul, left, right), device, 3)
        flops += count * 6 * N * inside * outside
        del x, weight, gradient, left, right  # before the next ones are made
    q, k, v = (torch.randn(batch_size, 12, T, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    ones = torch.ones_like(q)

    def attention():
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(ones)

    sdpa_seconds = 12 * seconds_of(attention, device, 3)
    source = torch.zeros(2**26, device=device)  # 256 MB
    copy_seconds = seconds_of(partial(torch.empty_like(source).copy_, source), device)
    return {"matmul_tflops": flops / matmul_seconds / 1e12, "copy_gb_s": 2 * source.nbytes / copy_seconds / 1e9,
            "matmul_s": matmul_seconds, "sdpa_s": sdpa_seconds,
            "tokens_per_second": N / (matmul_seconds + sdpa_seconds)}


def limit(args):
    """In both dtypes where --dtype auto has timed both."""
    cases = {dtype: partial(isolated, limits, device=args.device, dtype=dtype, batch_size=args.batch_size)
             for dtype in args.dtypes}
    rows = []
    for dtype, row in in_turns(cases).items():
        del row["peak_gb"]
        rows.append({"dtype": dtype, "auto takes": "this" if dtype == args.dtype else "", **row})
    title = f"The machine's own limit for GPT-2 124M, B={args.batch_size}, T=1024: matmuls and attention alone"
    return [table(title, rows)]

# -----------------------------------------------------------------------------
# a training step, whose parts can be exchanged for those of older scripts

def materialised_attention(q, k, v, dropout):
    """With the (T, T) matrix in memory, as before flash attention."""
    T = q.size(2)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    return [scores.masked_fill(~causal, -torch.inf).softmax(dim=-1) @ v]


def plain_loss(x, weight, targets, vocab_size):
    """All the logits, then the sum of the cross-entropies. x: (N, C); weight: (padded_vocab_size, C); targets: (N,)."""
    logits = x @ weight.T.to(x.dtype)
    return F.cross_entropy(logits[:, :vocab_size].float(), targets, reduction="sum")


def plain_forward(model, compiled):
    """What stands for model.forward: the same loss by `plain_loss`."""
    loss_of = torch.compile(plain_loss, dynamic=False) if compiled else plain_loss

    def forward(idx, targets):
        hidden = model.hidden_states(idx).flatten(0, 1)
        return loss_of(hidden, model.lm_head.weight, targets.flatten(), model.config.vocab_size) / targets.numel()
    return forward


def to_compute_dtype(module, args, output):
    """A hook after the embedding: the residual stream stays in the dtype that it begins with."""
    return output.to(train_gpt2.compute_dtype(output))


def training_step(device, batch_size, accumulation=1, dtype="float32", tf32=True, compiled=False, attention="sdpa",
                  padded=True, optimizer="fused", head="chunked", recompute=True, bf16_stream=False, tuned=False,
                  keep_memory=False, shape=GPT2):
    """A model and its training step on random tokens. optimizer: fused, loop, muon, or muon one by one. Sets switches
    of the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if keep_memory:
        train_gpt2.keep_freed_memory()
    if attention == "materialised":
        train_gpt2.full_attention = materialised_attention
    torch.backends.cuda.enable_cudnn_sdp(attention != "without cuDNN" and not shape.get("window"))
    # the keys of its compiled graphs do not tell which attention kernels are allowed
    torch._functorch.config.enable_autograd_cache = attention == "sdpa"
    if not padded:
        GPTConfig.padded_vocab_size = property(unpadded)
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
        model.forward = plain_forward(model, compiled)
    optimizers = optimizers_of(model, optimizer, device.split(":")[0])
    batches = torch.randint(0, 50257, (accumulation, 2, batch_size, shape["block_size"]), device=device)

    def step():
        for x, y in batches:
            with autocast(device.split(":")[0], getattr(torch, dtype)):
                loss = model(x, y)
            (loss / accumulation).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        for part in optimizers:
            part.step()
            part.zero_grad(set_to_none=True)
    return model, step


def unpadded(config):
    return config.vocab_size


def optimizers_of(model, name, device_type):
    recipe = RecipeFlags(optimizer="muon" if name.startswith("muon") else "adamw")
    optimizers = make_optimizers(model, recipe, device_type)
    if name != "loop":
        return optimizers
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in optimizers[0].param_groups]
    return [torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), foreach=False, fused=False)]


def training_speed(device, batch_size, accumulation=1, steps=3, warm_steps=0, **parts):
    """parts: see `training_step`. warm_steps: after the first; a CPU's memory is all touched only after some."""
    model, step = training_step(device, batch_size, accumulation, **parts)
    tokens = accumulation * batch_size * model.config.block_size
    return speed_of(model, step, tokens, device, steps, warm_steps)


def speed_of(model, step, tokens, device, steps, warm_steps=0):
    """Of a step of so many tokens: its median time, and what the first took longer."""
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - started
    for _ in range(warm_steps):
        step()
    seconds = seconds_of(step, device, steps, warm=False)
    peak = hellaswag.peak_flops(device.split(":")[0])
    mfu = tokens / seconds * train_gpt2.flops_per_token(model) / peak if peak else None
    return {"tokens_per_second": tokens / seconds, "ms": 1000 * seconds, "start_s": first - seconds, "mfu": mfu}

# -----------------------------------------------------------------------------
# the ladder

FIRST_RUNG = dict(dtype="float32", tf32=False, compiled=False, attention="materialised", padded=False,
                  optimizer="loop", head="plain", recompute=False)


def rungs_of(cuda, dtype):
    """(name, what it changes), in the order in which build-nanogpt takes them, then what comes after. The last one is
    this script."""
    rungs = [("2019: fp32, eager, materialised attention, 50,257 columns, AdamW in a loop", {})]
    if cuda:
        rungs.append(("+ TF32", dict(tf32=True)))
    if dtype != "float32":
        rungs.append((f"+ {dtype}", dict(dtype=dtype)))
    rungs += [("+ torch.compile", dict(compiled=True)), ("+ flash attention (SDPA)", dict(attention="sdpa")),
              ("+ 50,304 columns", dict(padded=True)), ("+ fused AdamW", dict(optimizer="fused")),
              ("+ chunked head", dict(head="chunked")), ("+ norms and GELUs recomputed", dict(recompute=True))]
    return rungs if cuda else rungs + [("+ freed memory used again", dict(keep_memory=True))]


def ladder(args):
    cuda = args.device.startswith("cuda")
    peer = dict(dtype=args.dtype if cuda else "bfloat16", attention="sdpa", padded=True, head="plain",
                optimizer="fused" if cuda else "loop", compiled=cuda, recompute=False)
    common = dict(device=args.device, accumulation=args.accumulation, steps=args.steps,
                  memory_limit_gb=args.memory_limit_gb, warm_steps=0 if cuda else 2)
    rows = []

    def add(name, batch_size, row):
        first = rows[0] if rows else row
        times = row["tokens_per_second"] / first["tokens_per_second"]
        rows.append({"step": name, "batch": batch_size, **row, "times the first": times})
        print(rows[-1], file=sys.stderr, flush=True)

    def measure(name, batch_size, parts):
        row = isolated(training_speed, batch_size=batch_size, **common, **parts)
        if row:
            add(name, batch_size, row)
        return row

    rungs = rungs_of(cuda, args.dtype)
    state = dict(FIRST_RUNG)
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
    peer_name = f"build-nanogpt's script as shipped, {peer['dtype']}: its parts in this harness"
    cases = {f"{rungs[-1][0]}: this script": partial(isolated, training_speed, batch_size=batch, **common, **state),
             peer_name: partial(isolated, training_speed, batch_size=batch, **common, **peer)}
    for dtype in args.dtypes:
        cases[f"bound, {dtype}: matmuls and attention alone"] = partial(
            isolated, limits, device=args.device, dtype=dtype, batch_size=batch)
    results = in_turns(cases)
    ours, theirs, *bounds = results.values()
    for name, row in results.items():
        speed = row["tokens_per_second"]
        add(name, batch, dict.fromkeys(ours) | {"tokens_per_second": speed} if row in bounds else row)
    bound = max(row["tokens_per_second"] for row in bounds)
    compared = {"dtype": args.dtype, "share of the bound": f"{ours['tokens_per_second'] / bound:.0%}",
                "times build-nanogpt's speed": ours["tokens_per_second"] / theirs["tokens_per_second"],
                "share of its memory": ours["peak_gb"] / theirs["peak_gb"]}
    title = (f"GPT-2 124M, T=1024, {args.accumulation} micro-step(s) a step; from this script on medians of {ROUNDS} "
             "rounds in turns")
    return [table(title, rows), table("This script", [compared])]

# -----------------------------------------------------------------------------
# the head

def checkpointed_loss(x, weight, targets, vocab_size):
    """As `plain_loss`, chunk by chunk, each computed again for its backward pass."""
    from torch.utils.checkpoint import checkpoint
    chunks = max(1, len(x) * len(weight) // 2**26)  # as many as our own loss takes
    return sum(checkpoint(plain_loss, part, weight, target, vocab_size, use_reentrant=False)
               for part, target in zip(x.chunk(chunks), targets.chunk(chunks)))


def linear_cross_entropy(x, weight, targets, vocab_size):
    """PyTorch's own, from 2.13 on."""
    return F.linear_cross_entropy(x, weight[:vocab_size].to(x.dtype), targets, reduction="sum")


THIS_HEAD = "gradient in the forward pass (this script)"
HEADS = {"plain": plain_loss, "checkpointed chunks": checkpointed_loss, THIS_HEAD: None,
         "F.linear_cross_entropy": linear_cross_entropy}


def head_speed(device, dtype, batch_size, head, compiled):
    """Of a forward and backward pass from the last hidden states to their gradients and the head's weight's."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1)).to(device)
    x = torch.randn(batch_size, 1024, model.config.n_embd, device=device, requires_grad=True)
    targets = torch.randint(0, model.config.vocab_size, (batch_size, 1024), device=device)

    def hidden_states(idx):
        return x

    model.hidden_states = hidden_states
    if head == THIS_HEAD:
        if compiled:
            model.compile_blocks()  # the loss too
        loss_of = model
    else:
        function = torch.compile(HEADS[head], dynamic=False) if compiled else HEADS[head]

        def loss_of(idx, targets):
            hidden = hidden_states(idx).to(getattr(torch, dtype)).flatten(0, 1)
            return function(hidden, model.lm_head.weight, targets.flatten(), model.config.vocab_size)

    def step():
        x.grad = model.lm_head.weight.grad = None
        with autocast(device.split(":")[0], getattr(torch, dtype)):
            loss = loss_of(targets, targets)
        loss.backward()
    return {"ms": 1000 * seconds_of(step, device, 2)}


def heads(args):
    common = dict(device=args.device, dtype=args.dtype, batch_size=args.batch_size)
    results = in_turns({(head, compiled): partial(attempted, head_speed, head=head, compiled=compiled, **common)
                        for head in HEADS for compiled in (False, True)})
    rows = []
    for head in HEADS:
        row = {"head": head}
        for compiled, how in ((False, "eager"), (True, "compiled")):
            result = results[head, compiled] or {}
            row |= {f"{how}, ms": result.get("ms"), f"{how}, GB": result.get("peak_gb")}
        rows.append(row)
    tokens = args.batch_size * 1024
    return [table(f"The head's forward and backward pass, {tokens:,} tokens, 50,304 columns, {args.dtype}", rows)]

# -----------------------------------------------------------------------------
# the loader

def loader_run(device):
    """Times of the default run's first 40 steps, and of what each of them waits for its batch."""
    waited = []
    training_batches = train_gpt2.training_batches

    def timed_batches(*args):
        batches = training_batches(*args)
        while True:
            started = time.perf_counter()
            batch = next(batches)
            waited.append(time.perf_counter() - started)
            yield batch

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(train_gpt2, "training_batches", timed_batches):
        lines = train(preset="tiny", data=ROOT / "input.txt", out_dir=folder, max_steps=40, eval_every=0,
                      sample_every=0, checkpoint_every=0, quiet=True, device=device)
    total = time.perf_counter() - started
    step = statistics.median(line["seconds"] for line in lines if line["kind"] == "train")
    wait = statistics.median(waited)
    return {"step, ms": 1000 * step, "of it waiting for the batch, ms": 1000 * wait, "share": f"{wait / step:.2%}",
            "whole run, s": total}


def loader(args):
    row = isolated(loader_run, device=args.device)
    del row["peak_gb"]
    return [table("Waiting for input (medians of 40 steps of the default run)", [row])]

# -----------------------------------------------------------------------------
# a pretended GPU

def simulated(args):
    """What no CPU can show, on a GPU that is pretended: no speed, no numbers, but shapes, memory and kernels."""
    figures = pretended("memory", "head", "muon")
    rows = [{"step": f"{name}, B=16, T=1024", "peak, GiB": step["peak_gib"]}
            for name, step in figures["memory"].items()]
    head = figures["head"]
    kernels = [{"what": "head, compiled: GB moved for 65,536 tokens", "figure": head["triton_gb"]},
               {"what": "head: GiB that a chunk holds", "figure": head["chunk_gib"]},
               {"what": "Muon: kernel launches a step, 60 matrices", "figure": figures["muon"]["launches"]}]
    return [table("Memory of a training step on the simulated GPU, bfloat16, not compiled", rows),
            table("Kernels on the simulated GPU", kernels)]


def pretended(*names):
    """{name: figures} of tests/pretended_cuda.py."""
    command = [sys.executable, str(ROOT / "tests/pretended_cuda.py"), *names]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

# -----------------------------------------------------------------------------
# the modern parts

ARCHITECTURES = {
    "standard": {}, "+ RoPE": dict(rope=True), "+ GQA (2 of 8 heads)": dict(rope=True, n_kv_head=2),
    "+ sliding window (512)": dict(rope=True, n_kv_head=2, window=512)}
SMALL_ARCHITECTURES = {  # the same, where the losses are compared
    "standard": {}, "+ RoPE": dict(rope=True), "+ GQA (1 of 4 heads)": dict(rope=True, n_kv_head=1),
    "+ sliding window (32)": dict(rope=True, n_kv_head=1, window=32),
    "+ RMSNorm, SwiGLU, QK-norm, no biases, all heads and tokens": learning.MODERN}


def architecture_run(device, dtype, flags, T, tokens, compiled):
    """4 layers of 256 on input.txt, 8,192 byte tokens a step."""
    flags = dict(rope=False, rmsnorm=False, swiglu=False, qk_norm=False, bias=True) | flags
    with tempfile.TemporaryDirectory() as folder:
        lines = train(preset="tiny", data=ROOT / "input.txt", out_dir=folder, n_layer=4, n_embd=256, n_head=8,
                      block_size=T, total_batch_size=8192, max_steps=tokens // 8192, lr=2e-3, optimizer="adamw",
                      schedule="cosine", warmup_steps=2, eval_every=0, sample_every=0, checkpoint_every=0, quiet=True,
                      device=device, dtype=dtype, compile=compiled, **flags)
    model = GPT(GPTConfig(**{name: lines[0][name] for name in GPTConfig.__dataclass_fields__}))
    cache = model.new_cache()
    with torch.no_grad():
        model.hidden_states(torch.zeros(1, T, dtype=torch.long), cache=cache)
    kept = sum(tensor.nbytes for layer in cache for tensor in (layer.k, layer.v))
    speeds = [line["tokens_per_second"] for line in lines if line["kind"] == "train"]
    return {"KV cache, kB": kept / 1024, "speeds": speeds[1:]}


def architecture(args):
    """Speed: the median over the steps of two rounds of all models. Then what the parts make of the loss."""
    on_gpu = []
    try:
        on_gpu = [step["peak_gib"] for step in pretended("parts")["parts"].values()]
    except (OSError, subprocess.CalledProcessError) as error:  # no compiler, or a PyTorch with CUDA
        print(train_gpt2.one_line(error), file=sys.stderr)
    return [speed_table(args, 1024, []), speed_table(args, 8192, on_gpu), loss_table(args)]


def speed_table(args, T, on_gpu):
    """on_gpu: GiB of each model on a simulated GPU, or none."""
    compiled = args.device.startswith("cuda")
    rounds = []
    for _ in range(2):
        rounds.append({name: isolated(architecture_run, device=args.device, dtype=args.dtype, flags=flags, T=T,
                                      tokens=args.tokens, compiled=compiled) for name, flags in ARCHITECTURES.items()})
    rows = []
    for i, name in enumerate(ARCHITECTURES):
        speed = statistics.median(speed for runs in rounds for speed in runs[name]["speeds"])
        first = rows[0]["tokens_per_second"] if rows else speed
        cache = rounds[0][name]["KV cache, kB"]
        rows.append({"model": name, "tokens_per_second": speed, "speed": f"{speed / first:.2f}x",
                     "training memory, GB": max(runs[name]["peak_gb"] for runs in rounds),
                     "KV cache in float32, kB": cache, "the same a token of context, kB": cache / T})
        if on_gpu:
            rows[-1]["training memory of GPT-2 124M with these parts, B=2, simulated GPU, GiB"] = on_gpu[i]
    return table(f"4 layers x 256, 8 heads, T={T}, 8,192 byte tokens a step, {args.dtype}", rows)


def loss_table(args):
    """The same parts in a small model with T=128, after as many steps as --steps says, with one recipe."""
    cases = {name: (flags, 3e-3, args.steps) for name, flags in SMALL_ARCHITECTURES.items()}
    rows = []
    for name, losses in learning.final_losses(cases, args.seeds).items():
        rows.append({"model": name, "validation loss": spread(losses), "perplexity": math.exp(statistics.mean(losses))})
    return table(f"4 layers x 128, T=128, after {args.steps * 4096:,} byte tokens of input.txt, {args.seeds} seeds "
                 "(mean ± half the range)", rows)
