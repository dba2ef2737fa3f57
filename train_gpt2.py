"""
Trains GPT-2 from scratch: on a laptop's CPU, on one GPU, or on many.

$ python train_gpt2.py                                             # Shakespeare, about a minute on two CPU cores
$ python fineweb.py && python train_gpt2.py                        # GPT-2 124M on FineWeb-Edu, one GPU
$ torchrun --standalone --nproc_per_node=8 train_gpt2.py           # the same run on eight GPUs
$ torchrun --standalone --nproc_per_node=8 train_gpt2.py --resume  # ... and on from its newest checkpoint
$ python train_gpt2.py sample --checkpoint log/latest --prompt "ROMEO:"
$ python train_gpt2.py eval --checkpoint log/latest
$ python train_gpt2.py plot --out_dir log
"""
# The way in is tests/plain_gpt2.py: the same training in 300 plain lines, which a test holds to the same losses.
# The training script proper: config and presets · model · data · optimizer and schedule · training · starting a run.
# What serves it: evaluation and samples · checkpoints and the log · processes · Transformers' formats · commands.

import contextlib
import ctypes
import gc
import hashlib
import html
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

# Threads that wait for one another spin before they sleep. libgomp's 3 ms of it are as long as a turn on a busy core,
# and the thread that is waited for does not get that turn: on two cores beside one busy program a step of `tiny` took
# 3.2 times as long as alone, and 49 times where that program ran in another session. With this many turns of the
# spinning loop (0.03 ms) it takes 2.4 times beside both, and a run alone is no slower; a sleep costs 0.04 ms, so that
# with a sixth of them it is slower by a fifth, with none by half. libgomp reads this once, when torch loads it; the
# OpenMP of macOS and of Windows does not read it. One thread alone would take 1.5 times as long, whatever runs beside.
if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

# The two helpers are beside this file, where `python -I` and PYTHONSAFEPATH=1 do not look.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import fineweb
import hellaswag
from fineweb import RunFailed, UserError, explaining, one_line

HERE = Path(__file__).resolve().parent
STARTED = time.monotonic()

# -----------------------------------------------------------------------------
# config and presets: a field is a flag, its comment the flag's help
#
# Default, type and help of a flag stand in one line each, from which tyro makes the command line; a config file, or a
# second list of names for checkpoints, would be a copy that drifts. The groups are not decoration: a resumed run may
# change the flags of the last three (see MAY_CHANGE), for what stands in the others decides what the run computes.
# A preset is only other defaults, so that there is one path through the code whatever the size of the model.

@dataclass
class ModelFlags:
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # query heads in a block
    n_kv_head: int | None = None  # key and value heads, shared by groups of query heads; None: n_head
    n_embd: int = 768  # channels
    block_size: int = 1024  # tokens of context
    dropout: float = 0.0  # chance of dropping an activation in training
    bias: bool = True  # biases in linear layers and layer norms
    rope: bool = False  # rotary instead of learned positions
    rmsnorm: bool = False  # RMSNorm instead of LayerNorm
    swiglu: bool = False  # SwiGLU instead of GELU, of the same size
    qk_norm: bool = False  # RMSNorm on every query and key head
    window: int = 0  # tokens that a position sees, itself included; 0: all before it
    zero_init: bool = False  # start residual projections at zero instead of GPT-2's scaled normal


@dataclass
class GPTConfig(ModelFlags):
    """A whole model, by default GPT-2 124M (Radford et al. 2019). Raises UserError for what cannot be built."""
    vocab_size: int = 50257
    eot: int | None = None  # id of end-of-text; None: the last one of the vocabulary
    n_hidden: int | None = None  # width of the MLP; None: 4 n_embd, or for SwiGLU 8/3 n_embd, up to a multiple of 64
    head_dim: int | None = None  # None: n_embd / n_head
    rope_theta: float = 10000.0
    norm_eps: float | None = None  # None: 1e-5 as GPT-2's LayerNorm, 1e-6 as Llama's RMSNorm
    tied: bool = True  # the output head is the token embedding

    def __post_init__(self):
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        check_ranges(vars(self))
        must_divide("n_kv_head", self.n_kv_head, "--n_head", self.n_head)
        if self.head_dim is None:
            must_divide("n_head", self.n_head, "--n_embd", self.n_embd)
            self.head_dim = self.n_embd // self.n_head
        if self.rope and self.head_dim % 2:
            raise UserError(f"--rope turns channels in pairs, but --n_embd / --n_head is {self.head_dim}: make it even")
        if self.n_hidden is None:
            self.n_hidden = math.ceil(8 * self.n_embd / 3 / 64) * 64 if self.swiglu else 4 * self.n_embd
        if self.norm_eps is None:
            self.norm_eps = 1e-6 if self.rmsnorm else 1e-5
        if self.eot is None:
            self.eot = self.vocab_size - 1

    @property
    def padded_vocab_size(self):
        return math.ceil(self.vocab_size / 64) * 64  # 50,257 -> 50,304: matmuls like multiples of 64


@dataclass
class SetupFlags:
    # a model and its recipe, which other flags override; None: gpt2 for shards, tiny for a text file
    preset: Literal["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "modern"] | None = None
    # in place of a preset: so many layers and heads of 64 channels, modern's parts, and all else to match
    depth: int | None = None
    # a folder of shards or a UTF-8 text file (its last 10% validates); None: edu_fineweb10B/ if there, else input.txt
    data: str | None = None
    tokenizer: str = "gpt2"  # for a text file: gpt2, byte, or a folder with a tokenizer; shards name their own
    out_dir: str = "log"  # folder for checkpoints and log.jsonl
    init_from: str = "scratch"  # scratch, or a model to fine-tune: a Hugging Face name (gpt2) or a folder
    resume: bool = False  # continue from out_dir's newest good checkpoint; with none there, start
    resume_from: str | None = None  # continue from this checkpoint


@dataclass
class RecipeFlags:
    total_batch_size: int = 524288  # tokens in an optimizer step, over all devices
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the blocks' matrices, AdamW for the rest
    weight_decay: float = 0.1  # decoupled weight decay of matrices
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean square
    grad_clip: float = 1.0  # largest gradient norm; 0: no limit
    seed: int = 1337  # seed of initialisation, data order and dropout


@dataclass
class ScheduleFlags:
    max_steps: int = 19073  # optimizer steps
    max_minutes: float = 0.0  # end after so much training, the schedule too, not after max_steps; 0: no limit
    lr: float = 6e-4  # peak learning rate
    min_lr: float | None = None  # learning rate at the end; None: lr / 10
    warmup_steps: int = 715  # steps of linear warm-up
    schedule: Literal["cosine", "wsd"] = "cosine"  # cosine decay, or wsd: constant, then linear decay
    decay_fraction: float = 0.4  # part of the run that wsd decays over


@dataclass
class EvaluationFlags:
    eval_every: int = 250  # steps between validations; 0: never
    eval_tokens: int = 10485760  # validation tokens to use
    sample_every: int = 250  # steps between samples; 0: never
    checkpoint_every: int = 1000  # steps between checkpoints; 0: only on a signal
    keep_checkpoints: int = 2  # newest checkpoints to keep, beside the best one; 0: all
    hellaswag_every: int = 1000  # steps between HellaSwag scores; 0: never
    hellaswag_data: str | None = None  # HellaSwag's jsonl; None: downloaded


@dataclass
class SystemFlags:
    # sequences per device in a micro-step; auto: on CUDA a power of two that fits, elsewhere up to 8,192 tokens
    batch_size: int | Literal["auto"] = "auto"
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    # auto: on CUDA bfloat16, float16 on chips without it; on a CPU the faster of bfloat16 and float32
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    compile: bool = True  # torch.compile the blocks and the loss, where a compiler works
    deterministic: bool = False  # bit-for-bit repeatable on CUDA, slower
    wandb: str | None = None  # log to this Weights & Biases project too
    tensorboard: bool = False  # log to TensorBoard too, in out_dir
    quiet: bool = False  # no progress bar or samples


@dataclass
class TrainConfig:
    """A run. The defaults are GPT-2 124M's recipe (GPT-3's, Brown et al. 2020, where GPT-2's paper is silent)."""
    model: ModelFlags = field(default_factory=ModelFlags)
    setup: SetupFlags = field(default_factory=SetupFlags)
    recipe: RecipeFlags = field(default_factory=RecipeFlags)
    schedule: ScheduleFlags = field(default_factory=ScheduleFlags)
    evaluation: EvaluationFlags = field(default_factory=EvaluationFlags)
    system: SystemFlags = field(default_factory=SystemFlags)

    def flat(self):
        return {name: value for group in vars(self).values() for name, value in vars(group).items()}

    def update(self, values, keep=()):
        # Sets the flags that `values` names, but for those in `keep`. Returns itself.
        group_of = {name: group for group in vars(self).values() for name in vars(group)}
        for name in values.keys() - keep:
            if name not in group_of:
                raise UserError(f"{name} = {values[name]!r}: this script has no such flag")
            setattr(group_of[name], name, values[name])
        return self


MODERN = dict(rope=True, rmsnorm=True, swiglu=True, qk_norm=True, bias=False, optimizer="muon", schedule="wsd",
              decay_fraction=0.6, min_lr=0.0)
PRESETS = {  # what differs from the defaults above; learning rates by size from GPT-3's table 2.1
    "gpt2": dict(),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, lr=3e-4),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, lr=2.5e-4),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, lr=2e-4),
    "modern": dict(MODERN, lr=1.8e-3),
    "tiny": dict(MODERN, n_layer=3, n_head=4, n_embd=128, block_size=128, tokenizer="byte", compile=False, lr=6e-3,
                 warmup_steps=15, weight_decay=0.01, total_batch_size=3072, max_steps=300, eval_every=100,
                 eval_tokens=65536, sample_every=100, checkpoint_every=100, hellaswag_every=0),
}
FINE_TUNING = dict(lr=5e-5, block_size=None, tokenizer=None)  # with --init_from; None: the model's

NO_LIMIT = 10**9  # steps

# the least and the most that numbers may be; those not named here: 0 and 1e15
LEAST = dict(n_layer=1, n_head=1, n_kv_head=1, n_embd=1, block_size=1, vocab_size=1, total_batch_size=1, max_steps=1,
             eval_tokens=1, batch_size=1, num_samples=1, depth=1)
MOST = dict(dropout=0.9999, beta1=0.9999, beta2=0.9999, decay_fraction=1)


def check_ranges(values):
    for name, value in values.items():
        least, most = LEAST.get(name, 0), MOST.get(name, 1e15)
        if isinstance(value, (int, float)) and not least <= value <= most:  # nan is in no range
            raise UserError(f"--{name} {value}: must be at least {least}, at most {most:g}")


def must_divide(name, part, whole_name, whole):
    if whole % part:
        works = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
        raise UserError(f"--{name} {part} does not divide {whole_name} {whole}; these do: {works}")

# -----------------------------------------------------------------------------
# model
#
# GPT-2 (Radford et al. 2019) and its modern parts. A flag chooses a module where the model is made, so the forward pass
# is one for all mixtures; it knows nothing of ranks or of the run. Matmuls run in autocast's dtype; weights, residual
# stream, norms and loss stay in float32. A stream in bfloat16 would save 19 GB of traffic in a micro-step of GPT-2 124M
# (counted on a simulated H100, perhaps 5% of its time), but others needed 1.3% more steps with it: not tried here.

# Rotary position embedding (Su et al. 2021), channel i paired with channel i + head_dim/2 as in Llama.
class Rotary(nn.Module):
    def __init__(self, config):
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = torch.outer(torch.arange(config.block_size).float(), config.rope_theta ** -exponents).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)  # (block_size, head_dim)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions):
        """positions: a slice, or (B, T) int64. Returns cos and sin, (1, T, head_dim) or (B, 1, T, head_dim) each."""
        return self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)


def rotate(x, rotation):
    # x: (B, heads, T, head_dim); rotation: cos and sin of its positions.
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)


# Attention: PyTorch chooses the kernel; here stands what it does not do by itself. Keys that groups of queries share
# are repeated only for kernels that cannot take fewer of them: the copies cost what sharing saves. None is written by
# hand: on a CPU this script has 87 to 89% of the speed that its matmuls and this attention alone allow.
def sdpa(q, k, v, **options):
    """Scaled dot-product attention. q: (B, n_head, T, head_dim); k, v: (B, n_kv_head, tokens, head_dim)."""
    groups = q.size(1) // k.size(1)
    is_cpu = q.device.type == "cpu"
    # These kernels take fewer heads of keys than of queries: the CPU's, and flash attention, which takes no mask.
    if groups > 1 and not is_cpu and not (options.get("attn_mask") is None and has_flash_attention(q)):
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    options["enable_gqa"] = k.size(1) < q.size(1)
    # A CPU's backward pass in bfloat16 takes 0.2 ms a head, however short the text.
    if is_cpu and q.size(2) <= 256 and q.requires_grad and compute_dtype(q) == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).type_as(q)
    return F.scaled_dot_product_attention(q, k, v, **options)


def has_flash_attention(q):
    # Whether PyTorch's flash attention takes q (B, n_head, T, head_dim).
    # Its kernels go up to 256 channels a head, but on some chips not in the backward pass.
    fits = compute_dtype(q) in (torch.bfloat16, torch.float16) and q.size(3) % 8 == 0 and q.size(3) <= 192
    return fits and q.device.type == "cuda" and torch.cuda.get_device_properties(q.device).major >= 8


def compute_dtype(x):
    # The dtype that a matmul with x runs in: autocast's where it is on.
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def full_attention(q, k, v, dropout):
    # Causal attention, for q, k and v as `sdpa`'s. Returns a list of parts along T, here one.
    return [sdpa(q, k, v, is_causal=True, dropout_p=dropout)]


# Windows: causal attention to the last `window` tokens, itself included, in O(T * window). One call of flash attention
# where a GPU has it: no mask, no copies, at T=8192 as much memory as without a window (GPT-2 124M, B=2, simulated: 7.66
# GiB; by blocks 8.99, of copied keys and values). It has no dropout, no float32 and no CPU: there the queries go in
# blocks, 2.5 times as fast as without a window at T=8192 on a CPU. One mask over all T x T pairs would be simpler, but
# costs what the window is to save.
# The first block and the rest stay two tensors until after the projection: joined here they are copied and kept for the
# backward pass once more (2.19 GB for 1.82, T=8192 on a CPU).
class WindowAttention(nn.Module):
    def __init__(self, window):
        super().__init__()
        self.window = window
        distance = torch.arange(window, 2 * window)[:, None] - torch.arange(2 * window)  # from query to key
        self.register_buffer("mask", (distance >= 0) & (distance < window), persistent=False)

    def forward(self, q, k, v, dropout):
        # As `full_attention`; by blocks in two parts.
        if dropout == 0 and has_flash_attention(q):
            return [self.by_flash_attention(q, k, v)]
        B, T, N = q.size(0), q.size(2), self.window
        first = full_attention(q[:, :, :N], k[:, :, :N], v[:, :, :N], dropout)  # the block with none before it
        if T <= N:
            return first
        if T % N:
            q, k, v = F.pad(q, (0, 0, 0, -T % N)), F.pad(k, (0, 0, 0, -T % N)), F.pad(v, (0, 0, 0, -T % N))
        q = q[:, :, N:].unflatten(2, (-1, N)).transpose(1, 2).flatten(0, 1)  # (B * blocks, n_head, N, head_dim)
        pairs = [x.unfold(2, 2 * N, N).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v)]  # a block and that before
        rest = sdpa(q, *pairs, attn_mask=self.mask, dropout_p=dropout)
        return first + [rest.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)[:, :, :T - N]]

    def by_flash_attention(self, q, k, v):
        from torch.nn.attention.varlen import varlen_attn  # here, for it loads the compiler: a second
        B, T = q.size(0), q.size(2)
        # Autocast leaves this kernel alone. Its tensors are (B * T, heads, head_dim).
        inputs = [x.to(compute_dtype(q)).transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        ends = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)  # of the sequences, after a 0
        # PyTorch 2.11 has no such option; fewer heads of keys it takes without being asked.
        options = {"enable_gqa": True} if "enable_gqa" in varlen_attn.__kwdefaults__ else {}
        # The window's two numbers count the tokens before a position and after it, without itself.
        y = varlen_attn(*inputs, ends, ends, T, T, window_size=(self.window - 1, 0), **options)
        return y.unflatten(0, (B, T)).transpose(1, 2)


# The keys and values of one layer, (B, n_kv_head, tokens, head_dim) each; of the last `window` tokens only.
class LayerCache:
    def __init__(self, window):
        self.window = window
        self.num_tokens = 0
        self.k = self.v = None

    def extend(self, k, v):
        """Adds new tokens: the prompt, then one at a time. Returns the keys and values that these may see."""
        is_prompt = self.k is None
        self.num_tokens += k.size(2)
        if not is_prompt:
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        # Older ones are let go: at T=8192 a window of 512 keeps a sixteenth. A prompt's own attention still needs all.
        self.k, self.v = k[:, :, -self.window:], v[:, :, -self.window:]  # with window 0 all of them
        return (k, v) if is_prompt else (self.k, self.v)


# With its weight in the input's dtype, bfloat16 under autocast: PyTorch's fused kernel takes no two.
class HeadNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class Attention(nn.Module):
    def __init__(self, config, attention):
        super().__init__()
        self.head_dim, self.dropout, self.attention = config.head_dim, config.dropout, attention
        self.widths = [n * self.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]  # of q, k and v
        self.c_attn = nn.Linear(config.n_embd, sum(self.widths), bias=config.bias)
        self.c_proj = nn.Linear(self.widths[0], config.n_embd, bias=config.bias)
        self.q_norm = HeadNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rotation=None, mask=None, cache=None):
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).split(self.widths, dim=-1)
        q = self.q_norm(q.view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, n_head, T, head_dim)
        k = self.k_norm(k.view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        v = v.view(B, T, -1, self.head_dim).transpose(1, 2)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.extend(k, v)
        if mask is not None or T == 1:  # one token sees all that there is
            parts = [sdpa(q, k, v, attn_mask=mask)]
        else:
            parts = self.attention(q, k, v, self.dropout if self.training else 0.0)
        parts = [self.c_proj(y.transpose(1, 2).flatten(2)) for y in parts]  # (B, a part of T, C) each
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_hidden, bias=config.bias)
        self.c_proj = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2's approximation


class SwiGLU(MLP):
    # Shazeer 2020.
    def __init__(self, config):
        super().__init__(config)
        self.c_gate = nn.Linear(config.n_embd, config.n_hidden, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


def make_norm(config):
    if config.rmsnorm:
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class Block(nn.Module):
    def __init__(self, config, attention):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = Attention(config, attention)
        self.ln_2 = make_norm(config)
        self.mlp = SwiGLU(config) if config.swiglu else MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rotation=None, mask=None, cache=None):
        x = x + self.drop(self.attn(self.ln_1(x), rotation, mask, cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


# The loss. All logits at once are the largest tensor of a small model: a step of GPT-2 124M with 16 sequences would
# take 16.4 GiB for 8.2 (simulated). So the head and the cross-entropy go chunk by chunk, and each chunk makes its
# gradient at once, in the forward pass, while its logits exist. Checkpointed chunks compute them again: 5.9 s for 3.8
# (4,096 tokens on a CPU; compiled 4.2 for 3.1). F.linear_cross_entropy takes 4.3 s and 2.5 GB for 0.9.
# The loop over chunks is not compiled, a chunk is: unrolled, the compiler holds several (4.8 GiB for 2.7, B=64).
#
# A chunk has two forms. Compiled, it compares each column with the target, which one kernel does as it reads a row;
# gather and scatter are kernels apart, which write the probabilities in float32 (41.5 GB for 65,536 tokens, now 13.2).
# Uncompiled, every operation is a kernel, and that one form for both made losses 1.5 to 1.9 times slower.
#
# What changes the logits, as a softcap, stands in both forms' common lines, before the padding's -inf, with its slope
# multiplied into logits_grad at the end; and once more in GPT.logits, where samples and HellaSwag have theirs from.
def chunk_of_loss(x, head, target, vocab_size, needs_grad):
    """x: (N, C); head: (padded_vocab_size, C); target: (N, 1), -1 is ignored. Returns the sum of the cross-entropies
    and its gradient with respect to the logits (softmax minus one-hot), or None."""
    logits = (x @ head.T).float()
    is_compiled, is_target = torch.compiler.is_compiling(), target >= 0
    logits[:, vocab_size:] = -torch.inf  # the padding's share of the softmax is zero
    if is_compiled:
        is_label = torch.arange(head.size(0), device=x.device) == target
        label_logits = logits.where(is_label, 0).sum(dim=1, keepdim=True)
    else:
        label = target.clamp(min=0)
        label_logits = logits.gather(1, label)
    log_sum_exp = logits.logsumexp(dim=1, keepdim=True)
    loss = ((log_sum_exp - label_logits) * is_target).sum()
    if not needs_grad:
        return loss, None
    log_sum_exp = log_sum_exp.masked_fill(~is_target, torch.inf)  # exp(-inf) = 0 where there is no target
    if is_compiled:
        logits_grad = (logits - log_sum_exp).exp() - is_label.float()
    else:
        logits_grad = logits.sub_(log_sum_exp).exp_().scatter_add_(1, label, -is_target.float())  # in place
    return loss, logits_grad.to(x.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, num_chunks, chunk_of_loss, needs_grad):
        """hidden (N, C), weight (padded_vocab_size, C), targets (N,) -> nats. needs_grad: in here it is always off."""
        dtype = compute_dtype(hidden)
        hidden, head = hidden.to(dtype), weight.to(dtype)
        loss = torch.zeros((), device=hidden.device)
        hidden_grads = []
        weight_grad = torch.zeros(weight.shape if needs_grad else (), device=hidden.device)
        for x, target in zip(hidden.chunk(num_chunks), targets[:, None].chunk(num_chunks)):
            part, logits_grad = chunk_of_loss(x, head, target, vocab_size, needs_grad)
            loss += part
            if needs_grad:
                hidden_grads.append(logits_grad @ head)
                weight_grad += logits_grad.T @ x
            del logits_grad  # before the next chunk's is made
        if needs_grad:
            ctx.save_for_backward(torch.cat(hidden_grads), weight_grad)
        return loss

    @staticmethod
    def backward(ctx, grad):
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grad, weight_grad * grad, None, None, None, None, None


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.loss_chunks = 0  # 0: chosen in `forward`
        self.chunk_of_loss = chunk_of_loss  # or its compiled form, of compile_blocks
        # Of a Transformers model: from_pretrained fills both in, save_pretrained writes the second again.
        self.end_ids = [config.eot]  # any of them ends a text
        self.hf_extras = {}  # {file: what it says beside GPTConfig}
        attention = WindowAttention(config.window) if 0 < config.window < config.block_size else full_attention
        self.rotary = Rotary(config) if config.rope else None
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = None if config.rope else nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, attention) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        # As GPT-2: std 0.02, and 0.02 / sqrt(2 n_layer) for c_proj, the projections onto the residual stream.
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.normal_(std=0.0 if self.config.zero_init else 0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.ndim == 2:
                p.normal_(std=0.02)
            elif name.endswith("bias"):
                p.zero_()
        for weight in {self.wte.weight, self.lm_head.weight}:
            weight[self.config.vocab_size:] = 0  # the padding rows stay zero: no gradient reaches them

    def num_parameters(self):
        # Without the padding rows.
        padding = sum(w[self.config.vocab_size:].numel() for w in {self.wte.weight, self.lm_head.weight})
        return sum(p.numel() for p in self.parameters()) - padding

    def hidden_states(self, idx, positions=None, mask=None, cache=None):
        """idx: (B, T) int64. Returns (B, T, n_embd), normalised. positions: (B, T) int64; else those after `cache`'s.
        mask: (B, 1, T, T) bool, True where a token sees another; else causal. cache: of `new_cache`; the prompt extends
        it, then one token at a time. Raises ValueError where tokens and cache are longer than block_size."""
        if positions is None:
            start = cache[0].num_tokens if cache else 0
            positions = slice(start, start + idx.size(1))
            if positions.stop > self.config.block_size:
                raise ValueError(f"{positions.stop} tokens, but block_size is {self.config.block_size}")
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe.weight[positions]
        x = self.drop(x)
        rotation = self.rotary(positions) if self.rotary is not None else None
        for block, layer_cache in zip(self.h, cache or [None] * len(self.h)):
            x = block(x, rotation, mask, layer_cache)
        return self.ln_f(x)

    def new_cache(self):
        return [LayerCache(self.config.window) for _ in self.h]

    def logits(self, hidden):
        """hidden: (..., n_embd). Returns (..., vocab_size): the padding ends here."""
        return self.lm_head(hidden)[..., :self.config.vocab_size]

    def forward(self, idx, targets=None):
        """idx, targets: (B, T) int64; -1 is no target. Returns logits (B, T, vocab_size), or the mean loss in nats."""
        hidden = self.hidden_states(idx)
        if targets is None:
            return self.logits(hidden)
        N = targets.numel()
        fewest = max(1, N // 8192)  # in a chunk of 16,384 tokens a sum could overflow fp16
        wanted = min(16, N * self.config.padded_vocab_size // 2**26)  # 256 MB of fp32 logits each
        loss = ChunkedCrossEntropy.apply(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                         self.config.vocab_size, self.loss_chunks or max(fewest, wanted),
                                         self.chunk_of_loss, torch.is_grad_enabled())
        return loss / (targets >= 0).sum()

    def compile_blocks(self, recompute=True):
        # recompute: norms and GELUs are made again in the backward pass. Sets two global switches of the compiler.
        # Block by block, not the model at once: all blocks share one graph, which is compiled once, not n_layer times.
        # The embedding stays outside: its compiled gradient on a CPU adds up by atomics, in no fixed order, so that a
        # resumed run would not equal the whole one bit for bit.
        # Recomputing saves 9.4 MB a block and sequence of GPT-2 124M: on a CPU 3.1 GB for 3.7, and no slower (B=4). On
        # an H100 it costs 1.4 to 1.9% of the time by a model of it, for 7.3 GB a micro-step: not where memory is ample.
        torch._dynamo.config.optimize_ddp = False  # a block is a graph already; DDP's buckets would cut it again
        torch._functorch.config.ban_recompute_materialized_backward = not recompute
        for block in self.h:
            block.compile(dynamic=False)
        self.chunk_of_loss = torch.compile(chunk_of_loss, dynamic=False)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=50, generator=None):
        # Yields the next tokens, (B, 1) at a time; see `generate`.
        was_training = self.training
        self.eval()
        try:
            cache = self.new_cache()
            done = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
            for _ in range(max_new_tokens):
                # Full: to drop one token would move all positions, so that nothing cached holds and every new token
                # costs a pass over the whole text; to keep half costs one such pass in block_size / 2 tokens.
                if idx.size(1) > self.config.block_size:
                    idx = idx[:, -max(1, self.config.block_size // 2):]
                    cache = self.new_cache()
                with changing_shapes():
                    hidden = self.hidden_states(idx[:, cache[0].num_tokens:], cache=cache)
                token = sample_token(self.logits(hidden[:, -1]), temperature, top_k, generator)
                token = token.masked_fill(done, self.config.eot)
                yield token
                for end in self.end_ids:
                    done |= token == end
                if done.all():
                    return
                idx = torch.cat((idx, token), dim=1)
        finally:
            self.train(was_training)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=50, generator=None):
        """Samples after idx, (B, T) int64. Returns (B, T + new), at end-of-text in all rows fewer; rows repeat theirs.
        temperature 0: the likeliest token; top_k 0: no limit. When block_size is full, its last half is kept."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, temperature, top_k, generator)), dim=1)

    @classmethod
    def from_pretrained(cls, name_or_folder, **overrides):
        """Opens a GPT-2, Llama, Mistral or Qwen3 model, or one of ours: a folder, or a name on the Hugging Face hub.
        `overrides`: another dropout, a shorter block_size. Raises UserError naming what this class does not have."""
        folder = model_folder(name_or_folder)
        hf, config, weights = read_model(folder)
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if overrides.get("block_size", 0) > config.block_size:
            raise UserError(f"--block_size {overrides['block_size']}: {name_or_folder} has {config.block_size} at most")
        # A head that config.json says is tied may have weights of its own: it is what they are.
        model = cls(replace(config, tied=config.tied and "lm_head.weight" not in weights, **overrides))
        tensors = dict(hf_tensors(model, hf["model_type"]))
        for name in sorted(tensors.keys() ^ weights.keys()):
            problem = "lack" if name in tensors else "should not hold"
            raise UserError(f"{folder}: by config.json the weights {problem} {name}")
        for name, tensor in tensors.items():
            weight = weights[name][:model.config.block_size] if name.endswith("wpe.weight") else weights[name]
            if weight.shape != tensor.shape:
                raise UserError(f"{folder}: {name} has shape {[*weight.shape]}, by config.json {[*tensor.shape]}")
            tensor.copy_(weight)
        special = {name: hf[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in hf}
        generation = {path.name: read_json(path) for path in folder.glob("generation_config.json")}
        model.hf_extras = {"config.json": special, **generation}
        # As in Transformers, the ends of generation_config.json go before those of config.json.
        ends = {**special, **generation.get("generation_config.json", {})}.get("eos_token_id", config.eot)
        model.end_ids = [end for end in np.ravel(ends).tolist() if end is not None]  # of one, a list, or null
        return model

    def save_pretrained(self, folder, tokenizer=None):
        """Writes a folder that Transformers opens (see PARTS), with the tokenizer's files. Returns the model_type."""
        from safetensors.torch import save_file
        folder, model_type = Path(folder), model_type_of(self.config)
        folder.mkdir(parents=True, exist_ok=True)
        # The tokenizer is named also where there is none (null): by this key `read_model` knows a folder of ours.
        hf = to_hf_config(self.config, model_type) | {"tokenizer": tokenizer and tokenizer.name}
        if model_type != OWN_TYPE:
            name = "GPT2LMHeadModel" if model_type == "gpt2" else f"{model_type.capitalize()}ForCausalLM"
            # Why no pad_token_id? Of the token that it names, here end-of-text, Transformers trains no embedding.
            hf |= {"architectures": [name], "bos_token_id": self.config.eot, "dtype": "float32"}
            hf |= self.hf_extras.get("config.json", {})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for file, values in {**self.hf_extras, "config.json": hf}.items():
            (folder / file).write_text(json.dumps(values, indent=2) + "\n")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in hf_tensors(self, model_type)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else 0600, whatever the umask
        return model_type


def sample_token(logits, temperature, top_k, generator):
    # (B, vocab_size) -> (B, 1)
    if temperature < 1e-6:  # 0, or too small to divide by
        return logits.argmax(dim=1, keepdim=True)
    logits = (logits.float() / temperature).nan_to_num()  # of a model that broke
    if 0 < top_k < logits.size(1):
        logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)

# -----------------------------------------------------------------------------
# data: one order of windows that do not overlap, whatever the number of devices and the size of a micro-step
#
# A step takes the next total_batch_size / block_size windows of one global order; ranks and micro-steps only split
# them. So losses can be compared between machines, a run goes on with another number of GPUs, and the loader's whole
# state is the number of its next window. Windows at random offsets, as in nanoGPT, show some tokens twice and others
# never, and their state is that of a generator. What it costs: windows are shuffled within a shard, shards among
# themselves, so that a batch comes out of one or two shards; documents have to be shuffled before they become shards,
# as hubs' are. Shards are mapped into memory anew for each batch: maps that stay open count as the memory of the
# process.

@lru_cache(maxsize=4)
def permutation(n, *key):
    # By raw bits of PCG64, which are the same on every numpy; its generators' methods may change.
    return np.argsort(np.random.PCG64(key).random_raw(n), kind="stable")


class Corpus:
    """A split's tokens in windows of block_size. `shards`: paths, or arrays. Raises UserError naming a damaged one."""
    def __init__(self, shards, block_size, vocab_size, name):
        self.shards, self.name, self.block_size, self.vocab_size = shards, name, block_size, vocab_size
        self.windows_per_shard = np.array([max(0, (len(self.read(shard)) - 1) // block_size) for shard in shards])
        self.num_windows = int(self.windows_per_shard.sum())
        if self.num_windows == 0:
            raise UserError(f"{name}: fewer than one window of --block_size {block_size} and its target: use more text")

    @staticmethod
    def read(shard):
        return shard if isinstance(shard, np.ndarray) else fineweb.read_shard(shard)

    def fingerprint(self):
        # A sha256 that tells this data from other, wherever it lies.
        # Of shards only by sizes and ends: to read 20 GB at every start would take minutes.
        digest = hashlib.sha256()
        for shard in self.shards:
            tokens = self.read(shard)
            parts = [tokens] if tokens is shard else [tokens[:1024], tokens[-1024:]]
            digest.update(str(len(tokens)).encode() + b"".join(part.tobytes() for part in parts))
        return digest.hexdigest()

    def find(self, number, order):
        # The place of window `number` where shards follow one another in this order: (shard, window in it).
        ends = self.windows_per_shard[order].cumsum()
        i = int(np.searchsorted(ends, number, side="right"))
        return int(order[i]), int(number - ends[i] + self.windows_per_shard[order[i]])

    def locate(self, number, seed):
        # Shards are shuffled by (seed, epoch), windows by (seed, epoch, shard): any window is found without those
        # before.
        epoch, number = divmod(number, self.num_windows)
        shard, window = self.find(number, permutation(len(self.shards), seed, epoch))
        return shard, int(permutation(int(self.windows_per_shard[shard]), seed, epoch, shard)[window])

    def read_windows(self, pairs):
        """pairs: [(shard, window)]. Returns (len(pairs), block_size + 1) int64: inputs, and targets one further."""
        T = self.block_size
        shards = {shard: self.read(self.shards[shard]) for shard in {shard for shard, _ in pairs}}
        rows = np.stack([shards[shard][window * T:window * T + T + 1] for shard, window in pairs]).astype(np.int64)
        if rows.max() >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            shard, window = pairs[row]
            where = self.name if isinstance(self.shards[shard], np.ndarray) else self.shards[shard]
            raise UserError(f"{where}: token {rows[row, column]} at offset {window * T + column} is outside the "
                            f"vocabulary of {self.vocab_size}: it is damaged, or of another tokenizer")
        return torch.from_numpy(rows)


def training_batches(corpus, start, batch_size, world, seed):
    # Yields x and y, (batch_size, block_size) int64 on the device, from window `start` on. A thread reads ahead.
    def read(number):
        first = number + world.rank * batch_size  # the ranks take the next world.size * batch_size windows
        batch = corpus.read_windows([corpus.locate(i, seed) for i in range(first, first + batch_size)])
        return batch.pin_memory() if world.device_type == "cuda" else batch

    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(read, start)
        while True:
            batch = pending.result()
            start += world.size * batch_size
            pending = thread.submit(read, start)
            # CUDA's allocator keeps pinned memory until the copy has ended. From other memory a copy must be waited
            # for: this batch is dropped at once, and Macs have read what came after it (pytorch issue 189690).
            batch = batch.to(world.device, non_blocking=world.device_type == "cuda")
            yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


NOT_PLAIN_TEXT = (".gz", ".zst", ".parquet", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".npy", ".bin")


def open_data(path, tokenizer, config):
    """The training and validation corpus of a folder of shards or a text file, for a GPTConfig. Raises UserError."""
    path = Path(path)
    is_readable = path.suffix.lower() not in NOT_PLAIN_TEXT
    if path.is_dir():
        splits = {split: fineweb.list_shards(path, split) for split in ("train", "val")}
        fineweb.check_complete(path, splits["train"] + splits["val"])
        is_readable = all(splits.values())
    if not is_readable:
        maker = shlex.join(["python", "fineweb.py", "--files", str(path), "--out", f"{path.name.split('.')[0]}_tokens"])
        raise UserError(f"{path}: neither plain text nor a folder with train and val shards; for one shard give its "
                        f"folder, --data {shlex.quote(str(path.parent))}; of texts make shards by: {maker}")
    if path.is_dir():
        name = fineweb.shard_tokenizer(path)
        if name != tokenizer.name and not fineweb.same_tokenizer(fineweb.open_shard_tokenizer(path), tokenizer):
            raise UserError(f"{path} holds {name} tokens, but the model has its own tokenizer, {tokenizer.name}")
    else:
        tokens = np.array(tokenizer.encode(fineweb.decode_utf8(path.read_bytes(), path)), dtype=np.uint32)
        cut = len(tokens) * 9 // 10
        splits = {"train": [tokens[:cut]], "val": [tokens[cut:]]}
    vocab_size = min(tokenizer.vocab_size, config.vocab_size)  # a tokenizer may have ids that its model has not
    return [Corpus(shards, config.block_size, vocab_size, f"{path} ({split})") for split, shards in splits.items()]

# -----------------------------------------------------------------------------
# optimizer and schedule
#
# AdamW's weight decay is for matrices: biases, norms and other vectors have no scale to keep in check. Muon makes the
# updates of the blocks' matrices orthogonal, so that small directions learn as fast as large ones; embedding and
# head, whose rows are words, stay with AdamW. Muon's updates are scaled to the size of AdamW's, and one --lr serves
# both. Every schedule is a function of the step (and of the time, with --max_minutes) alone: nothing of it is in a
# checkpoint.

class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) with adjust_lr_fn="match_rms_adamw": the same updates and state."""
    # Why not torch's as it is: matrix by matrix it launches 1,380 kernels a step for the 60 of GPT-2 124M; this takes
    # all matrices of one shape at a time and launches 100. To share them out among ranks would save at most 2% of a
    # step on eight A100s, less the gather of all updates.
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in sorted({p.shape for p in group["params"]}):
                params = [p for p in group["params"] if p.shape == shape]
                grads = [p.grad for p in params]
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                x = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])).bfloat16()  # Nesterov's
                updates = orthogonalize(x.mT if shape[0] > shape[1] else x, group)
                updates = updates.mT if shape[0] > shape[1] else updates
                lr = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.to(params[0].dtype)), alpha=-lr)


def orthogonalize(x, group):
    # x: (matrices, rows, columns), rows <= columns. Newton and Schulz's iteration towards singular values of 1.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    a, b, c = group["ns_coefficients"]
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def make_optimizers(model, recipe, device_type):
    # AdamW: Loshchilov & Hutter 2019. Muon's scale: Liu et al. 2025.
    for_muon = [p for p in model.h.parameters() if p.ndim == 2] if recipe.optimizer == "muon" else []
    taken = set(for_muon)
    rest = [p for p in model.parameters() if p not in taken]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": recipe.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), fused=device_type in ("cuda", "cpu"))
    if not for_muon:
        return [adamw]
    return [adamw, BatchedMuon(for_muon, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")]


# Nobody knows how many steps a time budget holds: a preset's warm-up of 715 could outlast it. So with --max_minutes the
# schedule goes by time_share, the part of it that is over, and warm-up ends with its first tenth at the latest.
def learning_rate(step, schedule, time_share=0.0):
    # Of update number `step`, counted from 0.
    peak, warmup_steps, max_steps = schedule.lr, schedule.warmup_steps, schedule.max_steps
    lowest = peak / 10 if schedule.min_lr is None else schedule.min_lr
    if step < warmup_steps and time_share < 0.1:
        return peak * max((step + 1) / warmup_steps, 10 * time_share)
    if schedule.schedule == "wsd":  # warm-up, stable, decay (Hu et al. 2024)
        remaining = max(0.0, 1 - max(step / max_steps, time_share))
        return lowest + (peak - lowest) * min(1.0, remaining / max(1 / max_steps, schedule.decay_fraction))
    progress = min(1.0, max((step - warmup_steps) / max(1, max_steps - warmup_steps), time_share))
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


# A high momentum holds on to the first gradients, which soon point elsewhere (modded-nanogpt, Jordan et al. 2024).
def muon_momentum(step, schedule, time_share=0.0):
    # In the same update: from 0.85 it rises to 0.95, in 300 steps or the first sixth of a shorter run.
    return 0.85 + 0.1 * min(1.0, max(step / 300, 6 * step / schedule.max_steps, 6 * time_share))

# -----------------------------------------------------------------------------
# training
#
# A run is its config, the number of its steps and the tensors of a checkpoint; whatever else a step needs follows
# from these: the windows from the step, dropout from a seed made of it, the rate from the schedule. So a checkpoint
# holds no state of generators or loaders, which would be another one on another number of ranks, and a run that was
# killed ends as if nobody had killed it. The host waits for the device once a step and ranks for one another once,
# for a few numbers and a stop request: more often, and the device would run dry between micro-steps.

# What a checkpoint holds beside config and tensors, in a new run. step: updates made. skipped: updates left out in a
# row, since their gradients were not finite. seconds: of training, without each process's first step, which compiles;
# that is timed_steps steps. total_seconds: of all processes so far, from their start. dtype: [device_type, dtype].
# forked_from: the checkpoint of another run, which this one went on from under an id of its own.
NEW_RUN = dict(step=0, skipped=0, seconds=0.0, timed_steps=0, total_seconds=0.0, batch_size=None, dtype=None,
               run_id=None, forked_from=None, fingerprint=None)


class Run:
    # A training run, new or resumed, as a command line asks for it. Raises UserError.
    def __init__(self, argv, world):
        flags, given = read_flags(argv)
        # Locked before anything in it is read: a run that ends meanwhile would save a checkpoint newer than the one
        # chosen here, and one that goes on would share its trackers with this.
        world.lock_folder(flags.setup.out_dir)
        checkpoint = choose_checkpoint(flags.setup, world) if world.rank == 0 else None
        # Rank 0 chooses: another rank could find another folder whole, on a network's disk.
        folder = world.from_rank_0(checkpoint and checkpoint.folder)
        checkpoint = checkpoint or folder and load_checkpoint(folder)
        if checkpoint:
            config, self.notes = resumed_config(flags, given, checkpoint.config), []
            model, tokenizer, state = checkpoint.model, checkpoint.tokenizer, NEW_RUN | checkpoint.state
        else:
            config, self.notes = flags, complete_config(flags, given, world.size)
            (model, tokenizer), state = new_model(flags), NEW_RUN
        setup, recipe, system, evaluation = config.setup, config.recipe, config.system, config.evaluation
        world.use_device(system.device, system.deterministic)
        self.config, self.world, self.model, self.tokenizer = config, world, model.to(world.device), tokenizer
        self.config.model = model.config
        self.dtype, reason = choose_dtype(system.dtype, model.config, world, state["dtype"])
        self.notes += [reason] if reason else []
        self.stopped = self.is_warm = False  # by a signal to any rank; after the first step of this process
        self.token_bytes = tokenizer.token_bytes()
        if model.config.window:  # cuDNN's masked backward pass has given NaNs on Hopper (pytorch issue 196678)
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.train_data, self.val_data = open_data(setup.data, tokenizer, model.config)
        self.batch_size, self.micro_steps = split_batch(self, state["batch_size"])
        self.ddp, self.is_compiled = model_to_train(self)
        self.optimizers = make_optimizers(model, recipe, world.device_type)
        self.scaler = torch.amp.GradScaler(world.device_type, enabled=self.dtype == torch.float16)
        self.load_state_dict(state)
        if checkpoint:
            self.notes.append(f"resumed from {checkpoint.folder} at step {self.step}")
            if checkpoint.folder.resolve().parent != Path(setup.out_dir).resolve():
                self.forked_from, self.run_id = str(checkpoint.folder), f"{time.time_ns():x}"
        first_window = self.step * recipe.total_batch_size // model.config.block_size
        self.batches = training_batches(self.train_data, first_window, self.batch_size, world, recipe.seed)
        self.hellaswag_examples = evaluation.hellaswag_every and load_hellaswag(evaluation.hellaswag_data, world)
        self.log = RunLog(self)
        print_summary(self)
        if checkpoint and checkpoint.folder.resolve() != Path(setup.out_dir, f"step_{self.step:06d}").resolve():
            self.saved_step = None  # of another place: from here on, what out_dir holds must be enough to resume
            self.save()
        self.stop = StopRequest()  # of this rank

    def state_dict(self):
        # Tensors and plain values; the place in the data and all randomness follow from the step.
        return {"config": self.config.flat(), "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "scaler": self.scaler.state_dict(), "step": self.step, "skipped": self.skipped,
                "seconds": self.seconds, "timed_steps": self.timed_steps, "total_seconds": self.total_seconds(),
                "batch_size": self.batch_size, "dtype": [self.world.device_type, str(self.dtype)[6:]],
                "run_id": self.run_id, "forked_from": self.forked_from, "fingerprint": self.fingerprint}

    def load_state_dict(self, state):
        # What `state_dict` gave, or NEW_RUN. Device, dtype and batch split are chosen before.
        self.step = self.saved_step = state["step"]  # saved_step: of the newest checkpoint
        self.skipped, self.seconds, self.timed_steps = state["skipped"], state["seconds"], state["timed_steps"]
        self.earlier_seconds = state["total_seconds"]
        self.run_id, self.forked_from = state["run_id"] or f"{time.time_ns():x}", state["forked_from"]
        self.fingerprint = self.train_data.fingerprint() + self.val_data.fingerprint()
        if not self.fingerprint.startswith(state["fingerprint"] or ""):  # older ones are of the training data alone
            setup = self.config.setup
            raise UserError(f"--data {setup.data}: the run in {setup.out_dir} has other data, by its tokens; give its "
                            "own, or begin a new run with --init_from and a checkpoint")
        for optimizer, saved in zip(self.optimizers, state.get("optimizers", [])):
            optimizer.load_state_dict(saved)
        if state.get("scaler"):  # else it was not in float16
            self.scaler.load_state_dict(state["scaler"])

    def total_seconds(self):
        return self.earlier_seconds + time.monotonic() - STARTED

    def train_step(self):
        # One optimizer step. Returns what log.jsonl holds of it.
        started, recipe, world = time.monotonic(), self.config.recipe, self.world
        # One seed a step and rank: dropout is that of the uninterrupted run, and checkpoints need no generator's state.
        seed = np.random.SeedSequence((recipe.seed, self.step, world.rank)).generate_state(1)
        torch.manual_seed(int(seed[0]))
        loss = torch.zeros((), device=world.device)
        for micro_step in range(self.micro_steps):
            x, y = next(self.batches)
            if world.distributed:  # all-reduce in the last micro-step only
                self.ddp.require_backward_grad_sync = micro_step == self.micro_steps - 1
            with autocast(world.device_type, self.dtype):
                # All micro-steps have as many targets: the mean of their means is the sum over tokens by their number.
                micro_loss = self.ddp(x, y) / self.micro_steps
            self.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        schedule, time_share = self.config.schedule, self.time_share()
        lr = learning_rate(self.step, schedule, time_share)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = lr
                if "momentum" in group:  # Muon's
                    group["momentum"] = muon_momentum(self.step, schedule, time_share)
        # The clip is asked for before the host reads its norm: until then the device has work, and loss and norm come
        # in one read, the step's only one. It decides, for an update by a gradient that is not finite would spoil all
        # weights; on all ranks alike, which have the same gradients; for both optimizers, where scaler.step would
        # decide for each alone.
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.grad_clip or math.inf)
        loss, norm = torch.stack((loss, norm)).tolist()
        is_finite = math.isfinite(norm)
        for optimizer in self.optimizers:
            if is_finite:
                optimizer.step()
            optimizer.zero_grad()
        self.scaler.update()
        # The step's one small all-reduce. Rank 0's time is that of all: a budget must end on all in the same step.
        seconds = time.monotonic() - started if world.rank == 0 else 0.0
        numbers = [loss / world.size, seconds, self.stop.number > 0, self.stop.was_suspended]
        loss, seconds, stops, suspensions = world.all_reduce(numbers)
        self.stopped, self.stop.was_suspended = stops > 0, False
        self.step += 1
        self.skipped = 0 if is_finite else self.skipped + 1
        if self.is_warm and not suspensions:
            self.seconds += seconds
            self.timed_steps += 1
        self.is_warm = True
        tokens = recipe.total_batch_size
        line = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": self.step * tokens, "seconds": seconds,
                "tokens_per_second": tokens / seconds, "mfu": self.mfu(tokens / seconds)}
        if not is_finite:
            line["skipped"] = True
        if suspensions:
            line["suspended"] = True
        return line

    def mfu(self, tokens_per_second):
        # The share of the chips' peak FLOP/s that the model makes use of, where that peak is known.
        peak = hellaswag.peak_flops(self.world.device_type)
        return peak and flops_per_token(self.model) * tokens_per_second / (peak * self.world.size)

    def print(self, text):
        self.world.print(f"step {self.step:>6,}  {text}")

    def time_share(self):
        # The part of --max_minutes that is over; 0 without that limit.
        minutes = self.config.schedule.max_minutes
        return self.seconds / (60 * minutes) if minutes else 0.0

    def is_over(self):
        return self.step >= self.config.schedule.max_steps or self.time_share() >= 1

    def is_due(self, every):
        # Whether it is time for what is done every so many steps (0: never) and after the last, if none stopped it.
        return every > 0 and self.step > 0 and not self.stopped and (self.is_over() or self.step % every == 0)

    def save(self):
        if self.saved_step != self.step and self.world.on_rank_0(save_checkpoint, self):
            self.saved_step = self.step


def training_loop(run):
    evaluation = run.config.evaluation
    first_step, max_steps = run.step + 1, run.config.schedule.max_steps
    bar = tqdm(total=max_steps if max_steps < NO_LIMIT else None, initial=run.step, unit="step", dynamic_ncols=True,
               disable=run.config.system.quiet or run.world.rank > 0, mininterval=0.1 if sys.stderr.isatty() else 10)
    while True:
        # A turn begins with what is due after the step before it: so a resumed run does what its stop left undone, and
        # the last weights are evaluated without a copy of these lines behind the loop.
        if run.stopped or run.is_due(evaluation.checkpoint_every):
            run.save()
        if run.stopped:
            break
        try:
            if run.is_due(evaluation.eval_every):
                log_validation(run)
            if run.hellaswag_examples and run.is_due(evaluation.hellaswag_every):
                log_hellaswag(run)
            if run.is_due(evaluation.sample_every):
                log_sample(run)
        except hellaswag.Interrupted:  # on all ranks
            run.stopped = True
            continue
        if run.is_over():
            break
        line = run.train_step()
        collect_garbage(run.step, first_step)
        run.log.write("train", run.step, **line)
        bar.set_postfix_str(f"loss {line['loss']:.4f}, lr {line['lr']:.2e}, norm {line['grad_norm']:.3f}, "
                            f"{line['tokens_per_second']:,.0f} tokens/s", refresh=False)
        bar.update()
        if line.get("suspended"):
            run.print(f"suspended for some of {line['seconds']:,.0f} seconds, which do not count as training")
        if run.skipped:
            run.print("the gradient was not finite; the update was skipped")
        if run.skipped == 10:
            raise RunFailed(f"10 steps in a row had a gradient that was not finite, the last one step {run.step}; "
                            f"{describe_newest_checkpoint(run)}; lower --lr, or look at the data")
    bar.close()
    if not run.stopped:
        log_end(run)
    run.log.opened.close()
    if run.saved_step != run.step and (run.stopped or evaluation.checkpoint_every):
        raise RunFailed(f"the last checkpoint could not be written; {describe_newest_checkpoint(run)}")
    if run.stopped:
        run.world.print(f"stopped by a signal at step {run.step:,}; the same command with --resume goes on")
    elif run.saved_step == run.step:
        text = run.tokenizer.decode(run.val_data.read(run.val_data.shards[0])[1:100].tolist())
        prompt = shlex.quote(" ".join(text.split()[1:5])[:40])  # some words of the validation text
        script, out_dir = shlex.quote(os.path.relpath(HERE / "train_gpt2.py")), shlex.quote(run.config.setup.out_dir)
        run.world.print(f"done at step {run.step:,}; sample from the model with:\n"
                        f"  python {script} sample --checkpoint {out_dir}/latest --prompt {prompt}")
    if waiting := run.log.waiting.count(b"\n"):
        raise RunFailed(f"{run.log.path}: its last lines could not be written, {waiting} of them")


# Python's collector runs here alone: within a step of one rank it would keep all waiting. What is there after the first
# step stays, and need not be looked at again.
def collect_garbage(step, first_step):
    if step == first_step or step % 1000 == 0:
        gc.collect()
    if step == first_step:
        gc.freeze()
        gc.disable()


class StopRequest:
    # Notes the signals of users (SIGINT), closing terminals (SIGHUP) and clusters; the loop ends after its step.
    def __init__(self):
        self.time = self.number = 0  # of the first signal
        self.was_suspended = False  # since the last step
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
                       signal.SIGCONT):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
                signal.signal(number, self)

    # A second signal of the same kind stops at once. Not of another: some systems send two. Not within three seconds
    # under torchrun, which repeats a Ctrl-C that came here too: without that clock four of nine runs lost their last
    # checkpoint, with it none of six. And not SIGXCPU, which the kernel repeats every second, also at the end. SIGCONT
    # is no request: it ends a suspension by Ctrl-Z, which cannot be noted itself and which no clock tells, for they go
    # on meanwhile.
    def __call__(self, number, frame):
        grace = 3 if "TORCHELASTIC_RUN_ID" in os.environ else 0  # seconds
        if number == signal.SIGCONT:
            self.was_suspended = True
        elif not self.number:
            self.time, self.number = time.monotonic(), number
            if number == signal.SIGXCPU:
                signal.signal(number, signal.SIG_IGN)
        elif number == self.number and time.monotonic() - self.time > grace:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

# -----------------------------------------------------------------------------
# starting a run: a new one, or one that goes on from a checkpoint
#
# A flag's value is that of the command line, else the run's (resumed) or the preset's (new), else what follows from
# other flags. Whether a flag was given cannot be seen in the config, where it may equal the default: `given` are
# their names.

# the flags that a resumed run may change: a flag stands in its group for this reason; of the data the place may change
MAY_CHANGE = {flag.name for group in (ScheduleFlags, EvaluationFlags, SystemFlags) for flag in fields(group)} | {"data"}
PLACES = {"out_dir", "resume", "resume_from"}  # not the run's, but this command's
FORMER_FLAGS = {"loss_chunks", "momentum_warmup_steps"}  # in older checkpoints; both follow from other flags now


def read_flags(argv):
    config = fineweb.parse_flags(TrainConfig, argv, prog="train_gpt2.py", description=__doc__)
    # tyro does not tell them
    given = {word[2:].split("=")[0].replace("-", "_").removeprefix("no_") for word in argv if word.startswith("--")}
    check_ranges(config.flat())
    if config.setup.resume_from:
        config.setup.resume_from = str(hellaswag.follow(config.setup.resume_from).resolve())
        if "out_dir" not in given:
            config.setup.out_dir = str(Path(config.setup.resume_from).parent)
    return config, given


def resumed_config(flags, given, config):
    values, saved = flags.flat(), config.flat()
    for name in given - MAY_CHANGE - PLACES:
        if values[name] != saved[name]:
            raise UserError(f"--{name} {values[name]}: the run in {config.setup.out_dir} has {saved[name]}, and a "
                            f"resumed run cannot change it; leave it out, or start a new run with another --out_dir")
    if "max_minutes" in given and "max_steps" not in given:
        values["max_steps"] = NO_LIMIT if values["max_minutes"] else config.schedule.max_steps
        given = given | {"max_steps"}
    changes = {name: values[name] for name in given & MAY_CHANGE}
    config.update({"batch_size": "auto", **changes, "out_dir": flags.setup.out_dir})
    if not os.path.exists(config.setup.data):
        raise UserError(f"{config.setup.data}, the run's data, is not there; give --data its new place")
    return config


def complete_config(config, given, num_devices=1):
    # Gives the flags of a new run that were left alone their values. Returns notes for the user.
    setup, schedule, notes = config.setup, config.schedule, []
    setup.data = find_data(setup.data)
    has_shards = os.path.isdir(setup.data)
    if setup.depth and (setup.preset or setup.init_from != "scratch"):
        raise UserError(f"--depth {setup.depth} is a new model with a recipe: leave out --preset and --init_from")
    setup.preset = setup.preset or ("modern" if setup.depth else "gpt2" if has_shards else "tiny")
    config.update(PRESETS[setup.preset] | ({"tokenizer": "byte"} if setup.depth else {}), keep=given)
    if setup.init_from != "scratch":
        shape_flags = given & {flag.name for flag in fields(ModelFlags)} - {"dropout", "block_size"}
        if shape_flags:
            raise UserError(f"--{min(shape_flags)}: --init_from takes its shape from the model; leave the flag out")
        config.update(FINE_TUNING, keep=given)
    elif has_shards:
        wanted, setup.tokenizer = setup.tokenizer, fineweb.shard_tokenizer(setup.data)
        if "tokenizer" in given and wanted != setup.tokenizer:
            raise UserError(f"--tokenizer {wanted}: {setup.data} holds {setup.tokenizer} tokens")
    if setup.depth:
        derived = recipe_of_depth(config, given, num_devices)
        config.update(derived, keep=given)
        chosen = [f"--{name} {value}" for name, value in derived.items() if name not in given and value != NO_LIMIT]
        notes.append(f"by --depth {setup.depth}: {' '.join(chosen)}")
    if schedule.max_minutes:
        notes.append(f"warm-up takes {schedule.warmup_steps} steps (--warmup_steps), at most a tenth of --max_minutes")
        if "max_steps" not in given:
            schedule.max_steps = NO_LIMIT
    if schedule.warmup_steps > schedule.max_steps // 10 and "warmup_steps" not in given:
        schedule.warmup_steps = schedule.max_steps // 10
        notes.append(f"--warmup_steps {schedule.warmup_steps}: shortened to a tenth of the run")
    return notes


# One number for a whole run, as nanochat has it. Measured here, in runs of 512 steps on bytes: the rates at depths 2, 4
# and 6 (tests/RESULTS.md, sizes), and a few trials of one seed. The rest is others' measure or a guess.
# - tokens, for each parameter of the matrices and of the head: nanochat's measure of what makes the best of a budget
#   of FLOPs. With AdamW it was twice as many (Hoffmann et al. 2022).
# - tokens a step grow with a power of all tokens (Bergsma et al. 2025, arXiv 2505.13738), here from those of our runs.
#   nanochat found sixteen times as many best at depth 12: many GPUs want more.
# - the rate is as 1/width: of three or more rates tried at each depth none was better by more than 0.008 nats, about
#   what two seeds differ by. Depth 2's rate was worse by 0.017 at depth 4; at depth 6 twice its own was better by
#   0.006, so that for wide models this rule may be a low one, which costs less than a high one.
# - it goes by the square root of the batch (Malladi et al. 2022), as far as four times: in a trial at depth 2 with
#   16,384 tokens a step, twice the usual rate was best of one, two and four times. At depth 12 it comes with nanochat's
#   batch to 1.1 times nanochat's rate. --optimizer adamw wants another.
# - as modern has them, for no trial told more than two seeds differ by (0.006 nats at depth 2, up to 0.023 at depth 4):
#   weight decay (a tenth of it, as the ladder had, at depths 2 and 4), the embedding's rate (three times, at both), the
#   norms' rate (three times, at depth 2), the length of the rate's decay (half, at depth 2).
# - ten evaluations, each of a small part of the tokens but not of fewer than tiny's; HellaSwag at the end.
def recipe_of_depth(config, given, num_devices):
    values = {name: value for name, value in config.flat().items() if name in given}
    depth, vocab_size = config.setup.depth, data_tokenizer(config.setup).vocab_size
    n_layer, n_embd = values.get("n_layer", depth), values.get("n_embd", 64 * depth)
    unit = num_devices * values.get("block_size", 256 if vocab_size < 1000 else 1024)
    tokens = 10.5 * (12 * n_layer * n_embd**2 + vocab_size * n_embd)
    usual_batch = 4096 * 2 ** max(0, int(0.383 * math.log2(tokens / 2**21)))
    batch = values.get("total_batch_size", math.ceil(usual_batch / unit) * unit)
    steps = values.get("max_steps", math.ceil(tokens / batch))
    every = math.ceil(steps / 10)
    return dict(tokenizer=config.setup.tokenizer, n_layer=depth, n_head=n_embd // 64 or 1, n_embd=n_embd,
                lr=float(f"{0.77 / n_embd * min(4, math.sqrt(batch / usual_batch)):.2g}"), total_batch_size=batch,
                max_steps=NO_LIMIT if config.schedule.max_minutes else steps, block_size=unit // num_devices,
                warmup_steps=steps // 20, eval_every=every, sample_every=every, checkpoint_every=min(1000, every),
                eval_tokens=max(65536, int(tokens / 1000)), hellaswag_every=0 if vocab_size < 1000 else steps)


def data_tokenizer(setup):
    has_shards = os.path.isdir(setup.data)
    return fineweb.open_shard_tokenizer(setup.data) if has_shards else fineweb.new_tokenizer(setup.tokenizer)


def new_model(config):
    setup, flags = config.setup, config.model
    torch.manual_seed(config.recipe.seed)
    if setup.init_from == "scratch":
        tokenizer = data_tokenizer(setup)
        return GPT(GPTConfig(**vars(flags), vocab_size=tokenizer.vocab_size, eot=tokenizer.eot)), tokenizer
    model, tokenizer = open_model(setup.init_from, dropout=flags.dropout, block_size=flags.block_size)
    if setup.tokenizer not in (None, tokenizer.name):
        raise UserError(f"--tokenizer {setup.tokenizer}: the model of --init_from has its own, {tokenizer.name}")
    setup.tokenizer = tokenizer.name
    return model, tokenizer


def find_data(path):
    # The path, or the default where it is None. Raises UserError where nothing is there.
    shards = HERE / "edu_fineweb10B"
    path = path or os.path.relpath(shards if fineweb.list_shards(shards, "train") else HERE / "input.txt")
    if not os.path.exists(path):
        raise UserError(f"--data {path}: no such file or folder; make shards with fineweb.py, or take input.txt")
    return path


def choose_dtype(name, model_config, world, previous=None):
    # auto: `previous`, the run's on such a device, or rank 0's choice.
    if name == "auto" and previous and previous[0] == world.device_type:
        name = previous[1]
    matmul = (256, model_config.n_embd, model_config.n_hidden)
    # Rank 0 alone asks its clock: another rank could find another dtype the faster one.
    return world.on_rank_0(hellaswag.pick_dtype, name, world.device_type, matmul, torch.float16)


def split_batch(run, previous):
    # The batch size, that which the run had (`previous`) if it divides, and the micro-steps.
    world, T, total = run.world, run.model.config.block_size, run.config.recipe.total_batch_size
    unit = T * world.size
    sequences = total // unit  # of each device in a step
    if total % unit:
        near = f"{max(1, sequences) * unit} and {max(2, sequences + 1) * unit}"
        raise UserError(f"--total_batch_size {total} is not a multiple of {world.size} x --block_size {T}; {near} are")
    size = run.config.system.batch_size
    if size == "auto":
        sizes = [size for size in range(1, sequences + 1) if sequences % size == 0]
        if previous in sizes:
            size = previous
        elif world.device_type == "cuda":
            size = largest_batch(run.model, [size for size in sizes if size.bit_count() == 1], world, run.dtype)
        else:
            # A CPU gains nothing from more. It must divide: half of a size need not, and would leave a smaller
            # micro-step.
            size = max(size for size in sizes if size == 1 or size * T <= 8192)
    must_divide("batch_size", size, "a device's sequences in a step,", sequences)
    return size, sequences // size


def largest_batch(model, sizes, world, dtype):
    # The largest of the sizes, given in order, whose micro-step fits on the GPU; the smallest if none does.
    # Tried, not computed: kernels' workspaces and what the compiler keeps follow no formula. From the largest down,
    # beside copies of the parameters that stand for the gradients, AdamW's moments and DDP's buckets. The sizes divide
    # the sequences of a step; one that is only halved need not: its last micro-step would be smaller than the others,
    # while each counts the same in the gradient.
    free, total = torch.cuda.mem_get_info()
    # What is free or ours already; a rest of 8% is for fragmentation.
    torch.cuda.set_per_process_memory_fraction(0.92 * (free + torch.cuda.memory_allocated()) / total)
    copies = None
    for size in reversed(sizes):
        try:
            copies = copies or [torch.empty_like(p) for p in model.parameters() for _ in range(3 + world.distributed)]
            x = torch.zeros(size, model.config.block_size, dtype=torch.long, device=world.device)
            with autocast(world.device_type, dtype):
                model(x, x).backward()
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        finally:
            model.zero_grad()
            torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)
    return int(world.all_reduce([size], dist.ReduceOp.MIN)[0])  # the same on all ranks


def is_out_of_memory(error):
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


def model_to_train(run):
    system, world = run.config.system, run.world
    is_compiled = system.compile and world.device_type != "mps"
    if is_compiled:
        try:
            torch.compile(torch.sin)(torch.zeros(8, device=world.device))
            # Norms and GELUs are recomputed but on a GPU of 40 GB or more.
            run.model.compile_blocks(recompute=world.device_type == "cpu" or torch.cuda.mem_get_info()[1] < 40e9)
        except Exception as error:  # no C++ compiler, no Triton, an unknown chip, ...
            is_compiled = False
            run.notes.append(f"training uncompiled, slower, for the compiler does not work here ({one_line(error)})")
    if not world.distributed:
        return run.model, is_compiled
    # There are no unused parameters. But DDP orders its buckets anew after a process's first step, as the gradients
    # arrived, unless it looks for unused ones: a resumed run would add up in another order than the whole one. To look
    # costs another small all-reduce a step, so a GPU does it only where bits are promised.
    warnings.filterwarnings("ignore", "find_unused_parameters")
    in_order = system.deterministic or world.device_type == "cpu"
    ddp = nn.parallel.DistributedDataParallel(run.model, gradient_as_bucket_view=True, find_unused_parameters=in_order)
    # Not an argument: PyTorch 2.13 warns of it, and its new name is none that 2.11 knows.
    ddp.broadcast_buffers = False  # rotary tables and masks never change
    return ddp, is_compiled


def print_summary(run):
    config, setup, world, T = run.config, run.config.setup, run.world, run.model.config.block_size
    steps, minutes, tokens = config.schedule.max_steps, config.schedule.max_minutes, config.recipe.total_batch_size
    train, val = run.train_data.num_windows * T, run.val_data.num_windows * T  # tokens
    compiled = "compiled" if run.is_compiled else "not compiled"
    lengths = [f"{minutes:g} minutes of training"] if minutes else []
    lengths += [f"{steps:,} steps, {steps * tokens / train:.2f} times through the data"] if steps < NO_LIMIT else []
    name = setup.preset if setup.init_from == "scratch" else f"{setup.init_from}, fine-tuned, recipe {setup.preset}"
    name = f"depth {setup.depth}" if setup.depth else name
    parts = [flag.name for flag in fields(ModelFlags) if flag.default is False and getattr(run.model.config, flag.name)]
    if model_type_of(run.model.config) == OWN_TYPE:
        run.notes.append("Transformers has no such mixture of parts: only this script will read the checkpoints")
    lines = [
        f"data    {setup.data}: {train:,} tokens to train on, {val:,} to validate, {setup.tokenizer} (--data)",
        f"model   {name}: {run.model.num_parameters():,} parameters, "
        f"{' '.join(parts) or 'no rope, rmsnorm, swiglu, qk_norm'} (--preset, --depth, --init_from)",
        f"device  {world.size} x {world.device_type}, {str(run.dtype)[6:]}, {compiled} (--device, --dtype, --compile)",
        f"batch   {tokens:,} tokens a step = {world.size} device(s) x {run.micro_steps} micro-step(s) x "
        f"{run.batch_size} sequence(s) x {T} tokens (--total_batch_size, --batch_size)",
        f"run     {' or '.join(lengths)}, logged and saved in {setup.out_dir}/ (--max_steps, --max_minutes, --out_dir)"]
    world.print("\n".join(lines + [f"note    {note}" for note in run.notes]))

# -----------------------------------------------------------------------------
# evaluation and samples: through the raw model, on all ranks; no training number depends on them
#
# Validation covers one fixed set of tokens, whatever the batch size and the number of ranks, so that losses of
# different machines can be compared; random batches, as in nanoGPT, are another set each time. Ranks do not wait for
# one another within it, as they would in DDP's wrapper, which hangs where one has a batch more. A cluster that takes
# its machines back waits half a minute, not for an evaluation: a signal ends it between two batches, without a
# figure.

@torch.no_grad()
def validate(model, corpus, tokens, batch_size, world, dtype, token_bytes, stop=None):
    """Mean loss in nats over the first `tokens` tokens of the corpus, rounded up to windows, and in bits per byte of
    their text. Raises hellaswag.Interrupted on all ranks where any one's StopRequest `stop` was set meanwhile."""
    # Ranks take turns, and short batches are filled with ignored rows: a compiled model would compile each new shape.
    num_windows = min(corpus.num_windows, math.ceil(tokens / corpus.block_size))
    share = [corpus.find(i, np.arange(len(corpus.shards))) for i in range(world.rank, num_windows, world.size)]
    model.eval()
    sums = [torch.zeros((), device=world.device)]  # a rank may have no window
    num_bytes = 0
    for i in range(0, len(share), batch_size):
        if stop is not None and stop.number:
            break
        batch = corpus.read_windows(share[i:i + batch_size])
        num_bytes += int(token_bytes[batch[:, 1:].numpy()].sum())
        batch = F.pad(batch, (0, 0, 0, batch_size - len(batch)), value=-1).to(world.device)
        x, y = batch[:, :-1].clamp(min=0), batch[:, 1:].contiguous()
        with autocast(world.device_type, dtype):
            sums.append(model(x, y) * (y >= 0).sum())
    model.train()
    is_stopped = stop is not None and stop.number > 0
    total, num_bytes, stops = world.all_reduce([math.fsum(torch.stack(sums).tolist()), num_bytes, is_stopped])
    if stops:
        raise hellaswag.Interrupted
    return total / (num_windows * corpus.block_size), total / math.log(2) / max(1, num_bytes)


def log_validation(run):
    tokens, world = run.config.evaluation.eval_tokens, run.world
    loss, bpb = validate(run.model, run.val_data, tokens, run.batch_size, world, run.dtype, run.token_bytes, run.stop)
    perplexity = math.exp(min(loss, 700))
    run.log.write("val", run.step, loss=loss, perplexity=perplexity, bpb=bpb)
    if world.rank == 0 and run.saved_step == run.step:
        checkpoints = list_checkpoints(run.config.setup.out_dir)
        if run.log.best_step(checkpoints) == run.step:
            point_to(checkpoints[run.step], "best")
            delete_old_checkpoints(run)
    run.print(f"validation loss {loss:.4f}, perplexity {perplexity:,.2f}, {bpb:.4f} bits per byte  "
              f"(best loss {run.log.best('loss'):.4f})")


def log_end(run):
    # For a script to read: the last line of log.jsonl, and a line each here.
    tokens = run.config.recipe.total_batch_size
    speed = run.timed_steps * tokens / max(run.seconds, 1e-9)
    last = run.log.vals.get(run.step, {})  # none where validation is off
    numbers = {"val_loss": last.get("loss"), "val_bpb": last.get("bpb"), "best_val_loss": run.log.best("loss"),
               "best_val_bpb": run.log.best("bpb"), "tokens": run.step * tokens, "training_seconds": run.seconds,
               "total_seconds": run.total_seconds(), "tokens_per_second": speed, "mfu": run.mfu(speed),
               "peak_memory_gb": peak_memory(run.world.device_type) / 1e9, "parameters": run.model.num_parameters()}
    run.log.write("done", run.step, **numbers)
    lines = [f"{name + ':':<19}" + (f"{value:.6g}" if isinstance(value, float) else str(value))
             for name, value in numbers.items() if value is not None]
    run.world.print("\n".join(["---", *lines]))


def stream_text(model, tokenizer, flags, generator):
    # Yields what the model writes after flags.prompt, piece by piece, up to end-of-text. flags: SampleFlags.
    ids = tokenizer.encode(flags.prompt) or [tokenizer.eot]
    if max(ids) >= model.config.vocab_size:
        raise UserError(f"the prompt has token {max(ids)}, the model a vocabulary of {model.config.vocab_size}: give "
                        "it the tokenizer that it was trained with")
    prompt = torch.tensor([ids], device=generator.device)
    shown = tokenizer.decode(ids)  # some decoders drop a text's first space: new ids are decoded with those before
    for token in model.stream(prompt, flags.max_new_tokens, flags.temperature, flags.top_k, generator):
        if token.item() in model.end_ids:
            break
        ids.append(token.item())
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # else a character's other bytes are still to come
            yield text[len(shown):]
            ids = ids[-8:]
            shown = tokenizer.decode(ids)
    yield tokenizer.decode(ids)[len(shown):]


# Every rank makes the same text; in float32, for to cast all weights for one token costs more than it saves.
def log_sample(run):
    prompt = "Hello, I'm a language model," if run.tokenizer.name == "gpt2" else "\n"
    flags = SampleFlags(prompt=prompt, max_new_tokens=200)
    generator = torch.Generator(run.world.device).manual_seed(flags.seed)
    text = prompt
    for piece in stream_text(run.model, run.tokenizer, flags, generator):
        text += piece
        if run.stop.number:
            break
    if run.world.all_reduce([run.stop.number])[0]:
        raise hellaswag.Interrupted
    run.log.write("sample", run.step, text=text)
    if not run.config.system.quiet:
        run.print(f"sample:\n{text.strip()}\n")


def load_hellaswag(path, world):
    # Rank 0 reads for all. Without a path, a download that fails is no reason not to train.
    try:
        examples = hellaswag.load_examples(path) if world.rank == 0 else None
    except UserError as error:
        if path:
            raise
        examples = None
        world.print(f"HellaSwag is left out: {error}")
    return world.from_rank_0(examples)


def score_hellaswag(model, examples, tokenizer, world, dtype, stop=None):
    with autocast(world.device_type, dtype), changing_shapes():
        return hellaswag.evaluate(model, examples, tokenizer.encode, style="completion", device=world.device, stop=stop)


def log_hellaswag(run):
    score = score_hellaswag(run.model, run.hellaswag_examples, run.tokenizer, run.world, run.dtype, run.stop)
    run.log.write("hellaswag", run.step, acc=score["acc"], acc_norm=score["acc_norm"], n=score["n"])
    run.print(f"HellaSwag acc {score['acc']:.2%}, acc_norm {score['acc_norm']:.2%} of {score['n']:,}")

# -----------------------------------------------------------------------------
# checkpoints and the log
#
# A checkpoint is written under another name, flushed and then renamed: whenever the machine dies, the folders named
# step_N are whole, and `latest` and `best` are links to two of them. Damage is looked for anyway, since disks and
# copies do what they like: --resume takes the newest checkpoint that opens. The log is text that any program reads, and
# the only record of what the run was: a resumed run keeps the lines of it that are still true, and reads it line by
# line, however long it is.

def list_checkpoints(out_dir):
    # {step: checkpoint folder}, oldest first.
    folders = {int(path.name[5:]): path for path in Path(out_dir).glob("step_*") if path.name[5:].isdigit()}
    return dict(sorted(folders.items()))


def describe_newest_checkpoint(run):
    folders = list(list_checkpoints(run.config.setup.out_dir).values())
    return f"the last good checkpoint is {folders[-1]}" if folders else "no checkpoint was written"


def save_checkpoint(run):
    # Returns whether it could be written; if not, it says so, and the older ones stay.
    out_dir = current_place(run)
    folder = out_dir / f"step_{run.step:06d}"
    temporary = out_dir / f".tmp_{folder.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        run.model.save_pretrained(temporary, run.tokenizer)
        torch.save(run.state_dict(), temporary / "train_state.pt")
        fsync(*temporary.iterdir(), temporary)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one that --resume stepped over
        temporary.rename(folder)
        fsync(out_dir)
    except Exception as error:  # OSError, and what torch and safetensors make of it
        shutil.rmtree(temporary, ignore_errors=True)
        run.print(f"warning: {folder} could not be written ({one_line(error)}); free some space; "
                  f"{describe_newest_checkpoint(run)}")
        return False
    point_to(folder, "latest")
    delete_old_checkpoints(run)
    return True


# The run follows a folder that was moved, whose lock and log it holds: else half of it would land in a new one of the
# old name. Of a deleted one the name may be another run's by now, so this one goes on in a new folder. Linux tells
# both.
def current_place(run):
    setup, handle = run.config.setup, Path(f"/proc/self/fd/{run.world.lock}")
    if handle.is_symlink() and handle.resolve() != Path(setup.out_dir).resolve():
        is_moved = handle.is_dir() and handle.resolve().is_dir()
        place = str(handle.resolve()) if is_moved else f"{setup.out_dir}_{run.run_id}"
        run.print(f"{setup.out_dir} was {'moved' if is_moved else 'deleted'}: the run goes on in {place}")
        setup.out_dir = place
        if not is_moved:
            run.world.lock_folder(place)
            run.log = RunLog(run)
    return Path(setup.out_dir)


def delete_old_checkpoints(run):
    out_dir, keep = Path(run.config.setup.out_dir), run.config.evaluation.keep_checkpoints
    older = {step: old for step, old in list_checkpoints(out_dir).items() if step <= run.step}  # newer ones are damaged
    # The best one stays, by the log, for copies of a run's folder may hold no links, and by the link.
    best = (run.log.best_step(older), hellaswag.follow(out_dir / "best").name)
    for step in list(older)[:-keep] if keep else []:
        if step != best[0] and older[step].name != best[1]:
            shutil.rmtree(older[step], ignore_errors=True)
    delete_unfinished_saves(out_dir)


def delete_unfinished_saves(out_dir):
    for folder in Path(out_dir).glob(".tmp_step_*"):  # of a process that was killed: a whole checkpoint each
        shutil.rmtree(folder, ignore_errors=True)


def point_to(folder, name):
    # On a file system without links it is a text file with the checkpoint's name, which hellaswag.follow reads.
    path, temporary = folder.parent / name, folder.parent / f".tmp_{name}"
    try:
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(folder.name)
        except OSError:
            temporary.write_text(folder.name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)  # a copy of a checkpoint, as programs that follow links leave it
        temporary.replace(path)
    except OSError as error:
        print(f"warning: {path} does not name the newest checkpoint ({one_line(error)}); {folder} is whole", flush=True)


def fsync(*paths):
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def load_state(folder, mmap=False):
    # A checkpoint's train_state.pt (see `Run.state_dict`) and its config. Raises UserError.
    path = Path(folder) / "train_state.pt"
    if not path.exists():
        raise UserError(f"{path}: not there, so this is no checkpoint; a model alone is fine-tuned by --init_from")
    # What cannot be read now, of a disk that is away, is not damaged: that error ends the program, and nothing begins
    # anew for it. Torn files are found by zipfile, since torch's error for them is the disk's, an OSError.
    with explaining(f"{path}: damaged, or of another version of this script", but=(OSError, MemoryError)):
        zipfile.ZipFile(path).close()
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return state, TrainConfig(model=GPTConfig()).update(state["config"], keep=FORMER_FLAGS)


def load_checkpoint(folder):
    # Its folder, state, config, model and tokenizer.
    state, config = load_state(folder)
    model = GPT.from_pretrained(folder)
    model.config.zero_init = config.model.zero_init  # how training began is in no model's file
    tokenizer = fineweb.get_tokenizer(config.setup.tokenizer, folder)
    return SimpleNamespace(folder=folder, state=state, config=config, model=model, tokenizer=tokenizer)


def choose_checkpoint(setup, world):
    # With --resume the newest good one of out_dir, else that of --resume_from; None to begin a run.
    delete_unfinished_saves(setup.out_dir)
    out_dir, folders = Path(setup.out_dir).resolve(), list_checkpoints(setup.out_dir)
    is_own = setup.resume or setup.resume_from and Path(setup.resume_from).parent == out_dir
    if not is_own and (folders or (out_dir / "log.jsonl").exists()):
        raise UserError(f"{setup.out_dir} already holds a run; add --resume, or choose another --out_dir")
    if setup.resume:
        for folder in reversed(folders.values()):
            try:
                return load_checkpoint(folder)
            except UserError as error:
                problem = f"{folder.name}: {error}"
                world.print(f"not resumed from {problem}")
        if folders:  # another version's, or damaged: to begin anew would write over what may still be saved of them
            raise UserError(f"none of the checkpoints opens, {problem}; put that right, or choose another --out_dir")
    if not setup.resume_from:
        return None
    checkpoint = load_checkpoint(Path(setup.resume_from))
    if not setup.resume and max(folders, default=0) > checkpoint.state["step"]:
        raise UserError(f"{folders[max(folders)]} is newer than --resume_from: delete it, or give another --out_dir")
    return checkpoint


class RunLog:
    # log.jsonl, one object a line, and the trackers beside it. Only rank 0 writes, and knows the validations.
    def __init__(self, run):
        self.path = Path(run.config.setup.out_dir, "log.jsonl")
        self.vals = {}  # {step: what log.jsonl holds of its validation}
        self.print, self.waiting = run.world.print, bytearray()  # waiting: lines that a full disk did not take
        self.file = self.wandb = self.tensorboard = None
        self.opened = contextlib.ExitStack()
        if run.world.rank == 0:
            if run.step == 0:
                check_lost_run(run, self.path)
            config_line = describe_run(run)
            self.open_trackers(run, config_line)
            self.open_file(run, config_line)

    def open_trackers(self, run, config_line):
        project, out_dir = run.config.system.wandb, Path(run.config.setup.out_dir)
        if project:
            import wandb
            self.wandb = wandb
            with explaining(f"--wandb {project}: Weights & Biases does not start",
                            "run `wandb login` first, or set WANDB_MODE=offline"):
                self.wandb.init(project=project, id=run.run_id, name=out_dir.resolve().name, dir=out_dir,
                                config=config_line, resume="allow", allow_val_change=True)
            self.opened.callback(self.wandb.finish)
            self.wandb.define_metric("*", step_metric="step")  # not by its own count of calls
        if run.config.system.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.opened.enter_context(contextlib.suppress(OSError))
            self.tensorboard = self.opened.enter_context(SummaryWriter(out_dir, purge_step=run.step + 1))
            self.tensorboard.add_text("config", f"```\n{json.dumps(config_line, indent=2)}\n```", run.step)

    def open_file(self, run, config_line):
        # Keeps of an earlier log what is still true, and adds the run's config unless it is that of the last.
        last_config = {}
        if run.step == 0 and self.path.exists():
            with fineweb.replacing(f"{self.path}.old") as f:  # a copy, so that at no moment there is no log
                f.write(self.path.read_bytes())
        with fineweb.replacing(self.path) as f:
            for line in read_log(self.path) if run.step and self.path.exists() else ():
                if is_kept(line, run):
                    f.write(json.dumps(line).encode() + b"\n")
                    if line["kind"] == "config":
                        last_config = line
                    if line["kind"] == "val":
                        self.vals[line["step"]] = line
            if any(last_config.get(name) != config_line[name] for name in config_line.keys() - PLACES - {"step"}):
                f.write(json.dumps(config_line).encode() + b"\n")
        self.file = self.opened.enter_context(open(self.path, "ab", buffering=0))

    def write(self, kind, step, **values):
        if self.file is None:
            return
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None  # JSON has no nan
        if kind == "val":
            self.vals[step] = values
        self.waiting += json.dumps({"kind": kind, "step": step, **values}).encode() + b"\n"
        try:
            while self.waiting:
                del self.waiting[:self.file.write(self.waiting)]
        except OSError as error:
            if self.waiting.count(b"\n") == 1:  # the first
                self.print(f"warning: {self.path}: lines wait ({one_line(error)}); free some space: training goes on")
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        text = values.get("text")
        if self.wandb:
            shown = {kind: self.wandb.Html(f"<pre>{html.escape(text)}</pre>")} if text else numbers
            self.wandb.log({"step": step, **shown})
        with contextlib.suppress(OSError):  # of the full disk, which the log has told
            for name, value in numbers.items() if self.tensorboard else ():
                self.tensorboard.add_scalar(name, value, step)
            if self.tensorboard and text:
                self.tensorboard.add_text(kind, f"```\n{text}\n```", step)

    def best(self, name):
        return min((line[name] for line in self.vals.values() if line.get(name) is not None), default=math.inf)

    def best_step(self, steps):
        # That of the least validation loss, among these; None if there is none.
        known = [(self.vals[step]["loss"], step) for step in steps if self.vals.get(step, {}).get("loss") is not None]
        return min(known, default=(math.inf, None))[1]


# With a log but no good checkpoint --resume begins that run anew, but not another one in its place.
def check_lost_run(run, path):
    lines = read_log(path) if path.exists() else ()
    earlier = next((line for line in lines if line["kind"] == "config"), {})
    for name, value in run.config.flat().items():
        if name not in MAY_CHANGE | PLACES and earlier.get(name, value) != value:
            raise UserError(f"--{name} {value}: {path} is of a run with {earlier[name]}, without a good checkpoint; to "
                            "begin that run anew give its own flags, or choose another --out_dir")
    if path.exists():
        run.notes.append(f"no good checkpoint in {path.parent}: its run begins anew, its log so far is {path.name}.old")
    elif run.config.setup.resume:
        run.notes.append(f"nothing to resume in {path.parent}: a new run")


def describe_run(run):
    world, config = run.world, run.config
    chip = torch.cuda.get_device_name() if world.device_type == "cuda" else torch.backends.cpu.get_cpu_capability()
    chosen = {"device": world.device, "chip": chip, "world_size": world.size, "dtype": str(run.dtype)[6:],
              "compiled": run.is_compiled, "batch_size": run.batch_size, "micro_steps": run.micro_steps,
              "torch": torch.__version__, "numpy": np.__version__, "script_sha256": fineweb.sha256_of(__file__)}
    return {"kind": "config", "step": run.step, "run_id": run.run_id, "forked_from": run.forked_from, "chosen": chosen,
            **config.flat()}


def is_kept(line, run):
    # Whether a line of an earlier log is still true: not of later steps, nor of this one if it is made again now.
    evaluation, kind, step = run.config.evaluation, line["kind"], line.get("step", 0)  # older config lines have none
    if step != run.step:
        return step < run.step
    every = {"train": 0, "val": evaluation.eval_every, "sample": evaluation.sample_every,
             "hellaswag": run.hellaswag_examples and evaluation.hellaswag_every}
    return kind in every and not (every[kind] and run.is_due(every[kind]))


def read_log(path):
    # Yields the lines of a log.jsonl, but for what a killed run left unfinished or others wrote into it.
    with open(path, errors="replace") as f:
        for text in f:
            with contextlib.suppress(ValueError):
                if is_log_line(line := json.loads(text)):
                    yield line


def is_log_line(line):
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return False
    step = line.get("step", 0 if line["kind"] == "config" else None)
    numbers = [line.get(name) or 0 for name in ("loss", "bpb", "acc_norm")]
    return type(step) is int and all(type(number) in (int, float) for number in numbers)

# -----------------------------------------------------------------------------
# processes and chips
#
# All that knows of more than one process is here, but for DDP's wrapper in model_to_train: the rest asks `world`,
# which of a single process is a world of one. Numbers and objects go over gloo, even with GPUs: that needs no memory
# there, and does not wait for the kernels that are still running.

class World:
    # The processes of the run, as torchrun started them; alone without it.
    def __init__(self):
        self.distributed = "RANK" in os.environ
        self.rank = int(os.environ.get("RANK", 0))
        self.lock, self.size = None, 1  # lock: rank 0's on out_dir
        if self.distributed:
            with explaining("RANK is set, but the processes do not find each other", "start them by torchrun"):
                self.size = int(os.environ["WORLD_SIZE"])
                dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    def use_device(self, name, deterministic=False):
        self.device = hellaswag.check_device(hellaswag.pick_device(name))  # "cuda:3"
        self.device_type = torch.device(self.device).type  # "cuda"
        if self.device_type == "cuda":
            torch.cuda.set_device(self.device)
        if self.device_type == "cpu":
            keep_freed_memory()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # what stays float32 on a GPU
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False

    def lock_folder(self, folder):
        # Made, and kept from other runs until the end of this process.
        if self.rank == 0:
            with explaining(f"--out_dir {folder}: cannot be written", "choose another", but=UserError):
                self.lock = fineweb.lock_folder(folder)
                tempfile.TemporaryFile(dir=folder).close()

    def print(self, text):
        with contextlib.suppress(OSError):  # a terminal or a `tee` that is gone ends no run
            if self.rank == 0:
                tqdm.write(text)  # goes above a progress bar
                sys.stdout.flush()

    def all_reduce(self, numbers, op=dist.ReduceOp.SUM):
        # The sum of each number over the ranks, or what else `op` says.
        values = torch.tensor(numbers, dtype=torch.float64)
        if self.distributed:
            dist.all_reduce(values, op=op)
        return values.tolist()

    def from_rank_0(self, value):
        values = [value]
        if self.distributed:
            dist.broadcast_object_list(values, src=0, device="cpu")
        return values[0]

    def on_rank_0(self, function, *args):
        return self.from_rank_0(function(*args) if self.rank == 0 else None)

    def close(self):
        if self.distributed:
            dist.destroy_process_group()


def keep_freed_memory():
    # glibc shall use freed memory again, not return it to the system, which gives it back page by page: page faults
    # were a quarter of a step of GPT-2 124M.
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large array
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


@contextlib.contextmanager
def changing_shapes():
    # For inputs of ever new shapes: the compiler would compile each, and cuDNN's attention plans for each, up to 0.4 s.
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(kernels):
        yield


def autocast(device_type, dtype):
    return torch.autocast(device_type, dtype, enabled=dtype != torch.float32)


# In bytes, of this process so far.
def peak_memory(device_type):
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def flops_per_token(model):
    # Of a training step: 6 per parameter and 12 per layer, channel and key (PaLM's appendix B).
    config = model.config
    positions = 0 if model.wpe is None else model.wpe.weight.numel()
    keys = min(config.block_size, config.window or config.block_size)
    return 6 * (model.num_parameters() - positions) + 12 * config.n_layer * config.n_head * config.head_dim * keys

# -----------------------------------------------------------------------------
# Transformers' formats
# A checkpoint is a model folder of Transformers wherever it has the architecture: what serves, scores or fine-tunes
# such folders takes ours as they are, and no converter can fall behind the model. PARTS and NAMES say what a format is,
# hf_tensors how its weights are called, for writing and for reading; a mixture of parts that no format has is OWN_TYPE.
# Models of others are opened by Transformers itself, then copied by the same names. To read their safetensors here was
# no shorter, and knew neither .bin files nor a head that is wrongly said to be tied. It costs an import of four seconds
# on two cores, so folders that this script wrote are read directly: sampling and resuming need no Transformers.

GPT2_NAMES = dict(n_layer="n_layer", n_head="n_head", n_embd="n_embd", n_hidden="n_inner", block_size="n_positions",
                  vocab_size="vocab_size", eot="eos_token_id", norm_eps="layer_norm_epsilon", dropout="resid_pdrop",
                  tied="tie_word_embeddings")
LLAMA_NAMES = dict(n_layer="num_hidden_layers", n_head="num_attention_heads", n_kv_head="num_key_value_heads",
                   n_embd="hidden_size", n_hidden="intermediate_size", head_dim="head_dim", vocab_size="vocab_size",
                   block_size="max_position_embeddings", eot="eos_token_id", norm_eps="rms_norm_eps",
                   rope_theta="rope_theta", dropout="attention_dropout", tied="tie_word_embeddings")
WINDOW_NAMES = LLAMA_NAMES | {"window": "sliding_window"}
LLAMA_PARTS = dict(rope=True, rmsnorm=True, swiglu=True)
OWN_TYPE = "train_gpt2"
PARTS = {  # model_type: the fields of GPTConfig that its models have in common
    "gpt2": dict(rope=False, rmsnorm=False, swiglu=False, qk_norm=False, window=0, bias=True),
    "llama": dict(LLAMA_PARTS, qk_norm=False, window=0), "mistral": dict(LLAMA_PARTS, qk_norm=False, bias=False),
    "qwen3": dict(LLAMA_PARTS, qk_norm=True, bias=False), OWN_TYPE: {},
}
NAMES = {  # model_type: the other fields' names in config.json
    "gpt2": GPT2_NAMES, "llama": LLAMA_NAMES | {"bias": "mlp_bias"}, "mistral": WINDOW_NAMES, "qwen3": WINDOW_NAMES,
    OWN_TYPE: {flag.name: flag.name for flag in fields(GPTConfig)},
}
LLAMA_MODULES = {  # Mistral's and Qwen3's too; they keep apart what c_attn has in one matrix
    "wte": "model.embed_tokens", "ln_f": "model.norm", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
    "attn.c_attn": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
    "mlp.c_gate": "mlp.gate_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
}


def model_type_of(config):
    # The first format that loses nothing of the config, found by writing and reading it; OWN_TYPE never does.
    config = replace(config, zero_init=False)  # says how training began, not what the model is
    # Transformers' GPT-2 and Llama want heads that divide the width, whatever head_dim is; no flag makes others.
    for model_type in PARTS if config.n_embd % config.n_head == 0 else ("mistral", "qwen3", OWN_TYPE):
        has_parts = all(getattr(config, name) == value for name, value in PARTS[model_type].items())
        if has_parts and from_hf_config(to_hf_config(config, model_type)) == config:
            return model_type


def to_hf_config(config, model_type):
    hf = {"model_type": model_type} | {hf: getattr(config, name) for name, hf in NAMES[model_type].items()}
    if model_type == "gpt2":
        hf |= {"activation_function": "gelu_new", "scale_attn_weights": True, "add_cross_attention": False,
               "scale_attn_by_inverse_layer_idx": False, "n_ctx": config.block_size,  # n_ctx is for llama.cpp
               "embd_pdrop": config.dropout, "attn_pdrop": config.dropout}  # GPT-2 has three rates, we have one
    elif model_type != OWN_TYPE:
        hf |= {"hidden_act": "silu", "attention_bias": config.bias,
               "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    if "sliding_window" in hf:
        hf["sliding_window"] = config.window or None
    if model_type == "qwen3":  # it ignores a window without these
        kind = "sliding_attention" if config.window else "full_attention"
        hf |= {"use_sliding_window": config.window > 0, "layer_types": config.n_layer * [kind],
               "max_window_layers": 0 if config.window else config.n_layer}
    return hf


def from_hf_config(hf, path="config.json"):
    """The GPTConfig that a config.json, completed by Transformers, stands for. Raises UserError for other parts."""
    model_type = hf["model_type"]
    values = {name: hf[hf_name] for name, hf_name in NAMES[model_type].items() if hf_name in hf} | PARTS[model_type]
    values["rope_theta"] = (hf.get("rope_parameters") or hf).get("rope_theta", 10000.0)
    values["window"] = values.get("window") or 0
    values["eot"], *_ = *np.ravel(values["eot"]).tolist(), None  # a number, a list, or null
    config = GPTConfig(**values)
    # Why not a list of what is supported? What `to_hf_config` would not write as it stands is a part that our model
    # does not have: scaled rotations, biases in places, another activation. One formula each would be a second truth.
    may_differ = ("rope_theta", "n_inner", "n_ctx", "eos_token_id", "max_window_layers", "embd_pdrop", "attn_pdrop")
    for name, value in to_hf_config(config, model_type).items():
        given = "gelu_new" if hf.get(name) == "gelu_pytorch_tanh" else hf.get(name, value)  # one formula, two names
        if name not in may_differ and given != value:
            raise UserError(f"{path}: {name} = {hf[name]!r} is not supported (only {value!r})")
    return config


def model_folder(name_or_folder):
    # A model's folder: of a run's folder the newest checkpoint, of a name on the hub a copy. Raises UserError.
    path = hellaswag.follow(name_or_folder)
    if (path / "config.json").exists():
        return path
    if path.exists():
        raise UserError(f"{path}: no model is here (a model folder holds config.json and model.safetensors)")
    from huggingface_hub import snapshot_download
    with explaining(f"{path}: no such folder, and the Hugging Face hub gave no such model"):
        folder = Path(snapshot_download(str(path), allow_patterns=["*.json", "model*.safetensors", "merges.txt"]))
        # Why not both kinds at once? Most repositories hold the same weights in both.
        if not list(folder.glob("model*.safetensors")):
            snapshot_download(str(path), allow_patterns="pytorch_model*.bin")
    return folder


def read_json(path):
    if not path.exists():
        raise UserError(f"{path}: not there")
    with explaining(f"{path}: not JSON", but=OSError):  # what cannot be read now is not damaged
        return {**json.loads(path.read_text())}


def read_model(folder):
    """config.json (dict), GPTConfig and weights ({name: tensor}, without a tied head) of a folder. Raises UserError."""
    # A folder is ours if its config.json names a tokenizer, unless Transformers has saved it again: it keeps that key,
    # adds its version, and may have changed the weights' dtype, files or number. train_state.pt would not tell these
    # two apart, and is not beside a model alone.
    path = folder / "config.json"
    hf = read_json(path)
    model_type = hf.get("model_type")
    if model_type not in PARTS:
        raise UserError(f"{path}: model_type {model_type!r} is not supported (only gpt2, llama, mistral, qwen3)")
    unknown = hf.keys() - NAMES[OWN_TYPE].keys() - {"model_type", "tokenizer"}
    if model_type == OWN_TYPE and unknown:
        raise UserError(f"{path}: {min(unknown)} = {hf[min(unknown)]!r} is a part that this script does not have")
    if model_type == OWN_TYPE or "tokenizer" in hf and "transformers_version" not in hf:
        from safetensors.torch import load_file
        config, path = from_hf_config(hf, path), folder / "model.safetensors"
        if not path.exists():
            raise UserError(f"{path}: not there")
        with explaining(f"{path}: not a whole safetensors file", "take another copy", but=(OSError, MemoryError)):
            return hf, config, load_file(path)
    import transformers
    # The config is read alone before the weights: a large model that this class does not have is refused at once.
    transformers.logging.disable_progress_bar()
    with explaining(f"{folder}: Transformers cannot open it", but=UserError):
        hf = transformers.AutoConfig.from_pretrained(folder).to_dict()  # fills in what the file leaves out
        config = from_hf_config(hf, path)
        model, unexpected = hellaswag.load_causal_lm(str(folder))
    weights = model.state_dict() | dict.fromkeys(unexpected)  # which `from_pretrained` refuses by name
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        del weights["lm_head.weight"]
    return hf, config, weights


def hf_tensors(model, model_type):
    """Yields (name, tensor) as Transformers has them: views of our parameters, for writing as for reading."""
    # Without padding rows, which are for this machine's matmuls and no part of the vocabulary; GPT-2's matrices are
    # transposed, Llama's q, k and v are apart, a tied head is left out.
    for name, p in model.named_parameters():
        tensor = p.detach()
        if name in ("wte.weight", "lm_head.weight"):
            tensor = tensor[:model.config.vocab_size]
        if model_type == OWN_TYPE or name == "lm_head.weight":
            yield name, tensor
        elif model_type == "gpt2":
            is_transposed = ".c_" in name and name.endswith(".weight")  # its Conv1D
            yield f"transformer.{name}", tensor.T if is_transposed else tensor
        else:
            *path, kind = name.split(".")  # ["h", "0", "attn", "c_attn"], "weight"
            prefix = f"model.layers.{path[1]}." if path[0] == "h" else ""
            hf_modules = LLAMA_MODULES[".".join(path[2:] or path)].split()
            parts = tensor.split(model.h[0].attn.widths) if len(hf_modules) > 1 else [tensor]
            for hf_module, part in zip(hf_modules, parts):
                yield f"{prefix}{hf_module}.{kind}", part


def open_model(name_or_folder, **overrides):
    # A name in config.json goes before the files, which take Transformers to open, where the vocabulary has its size:
    # another program may have added tokens. Of the files counts what they do: many folders hold GPT-2's vocabulary.
    folder = model_folder(name_or_folder)
    model = GPT.from_pretrained(folder, **overrides)
    name = read_json(folder / "config.json").get("tokenizer")
    builtin = fineweb.get_tokenizer(name if name in ("gpt2", "byte") else "gpt2")
    has_its_size = model.config.vocab_size == builtin.vocab_size
    has_files = any((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))
    if has_files and not (has_its_size and name == builtin.name):
        tokenizer = fineweb.FolderTokenizer(folder)
        return model, builtin if fineweb.same_tokenizer(tokenizer, builtin) else tokenizer
    if not has_its_size:
        raise UserError(f"{name_or_folder}: no tokenizer files beside the model; save its tokenizer there")
    return model, builtin

# -----------------------------------------------------------------------------
# commands
#
# Each opens a run or a model by the functions above, and prints. Whatever of it is the user's to put right is raised as
# a UserError, which fineweb.run_cli makes one line of.

def train(argv):
    world = World()
    run = None
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # Ctrl-C, before StopRequest: ends it at once
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        run = Run(argv, world)
        training_loop(run)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(run) from None
    was_interrupted = run.stopped and run.stop.number == signal.SIGINT
    del run  # and DDP with it, which must not outlive the process group
    world.close()
    # A shell's loop goes on to its next command unless this one dies of the Ctrl-C; torchrun sees to its own end.
    if was_interrupted and not world.distributed:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def out_of_memory(run):
    if run is None:
        return RunFailed("out of memory before the first step; a smaller model is needed")
    size, sequences = run.batch_size, run.batch_size * run.micro_steps
    remedies = ["a smaller --block_size or model is needed"]
    remedies += [f"add --batch_size {n} (the losses stay the same)" for n in range(1, size) if sequences % n == 0]
    return RunFailed(f"out of memory with --batch_size {size}; {remedies[-1]}; {describe_newest_checkpoint(run)}")


@dataclass
class SampleFlags:
    checkpoint: str = "log/latest"  # a checkpoint, a model folder, or a Hugging Face name (gpt2)
    prompt: str = "\n"  # text to go on from
    num_samples: int = 1  # texts, one after the other
    max_new_tokens: int = 500  # tokens of each at most
    temperature: float = 0.8  # 0: always the likeliest token; 1: the model's own spread
    top_k: int = 50  # choose among this many likeliest tokens; 0: all
    seed: int = 42  # the same seed gives the same text
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def sample(argv):
    flags = fineweb.parse_flags(SampleFlags, argv, "train_gpt2.py sample", "Writes text with a trained model.")
    check_ranges(vars(flags))
    device = hellaswag.check_device(hellaswag.pick_device(flags.device))
    model, tokenizer = open_model(flags.checkpoint)
    matmul = (1, model.config.n_embd, model.config.n_hidden)  # one token at a time is seldom faster in bfloat16
    dtype, _ = hellaswag.pick_dtype("auto", torch.device(device).type, matmul, torch.float16)
    model.to(device)
    for p in model.parameters():  # not the rotary table, which needs float32
        p.data = p.data.to(dtype)
    generator = torch.Generator(device).manual_seed(flags.seed)
    for i in range(flags.num_samples):
        print("\n---\n" if i else "", flags.prompt.lstrip("\n"), sep="", end="", flush=True)
        for text in stream_text(model, tokenizer, flags, generator):
            print(text, end="", flush=True)
        print()


@dataclass
class EvalFlags:
    checkpoint: str = "log/latest"  # a checkpoint, a model folder, or a Hugging Face name (gpt2)
    data: str | None = None  # shards or a text, whose validation part is used; None: the run's
    eval_tokens: int | None = None  # validation tokens to use; None: as many as the run
    hellaswag_data: str | None = None  # HellaSwag's jsonl; None: downloaded
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def evaluate(argv):
    flags = fineweb.parse_flags(EvalFlags, argv, "train_gpt2.py eval", "Scores a model: validation loss and HellaSwag.")
    check_ranges(vars(flags))
    world = World()
    world.use_device(flags.device)
    model, tokenizer = open_model(flags.checkpoint)
    dtype, reason = choose_dtype("auto", model.config, world)
    folder = model_folder(flags.checkpoint)
    state, config = load_state(folder, mmap=True) if (folder / "train_state.pt").exists() else ({}, TrainConfig())
    data = find_data(flags.data or config.setup.data)
    tokens = flags.eval_tokens or config.evaluation.eval_tokens
    splits = open_data(data, tokenizer, model.config)
    if not flags.data and not "".join(split.fingerprint() for split in splits).startswith(state.get("fingerprint", "")):
        world.print(f"note: {data} has changed since the run: these are not the tokens that it had")
    model.to(world.device)
    batch_size = max(1, 8192 // model.config.block_size)
    loss, bpb = validate(model, splits[1], tokens, batch_size, world, dtype, tokenizer.token_bytes())
    world.print(f"{data}: validation loss {loss:.4f} nats a token, perplexity {math.exp(min(loss, 700)):,.3f}, "
                f"{bpb:.4f} bits per byte, in {reason or str(dtype)[6:]}")
    if examples := load_hellaswag(flags.hellaswag_data, world):
        score = score_hellaswag(model, examples, tokenizer, world, dtype)
        world.print(f"HellaSwag: acc {score['acc']:.2%}, acc_norm {score['acc_norm']:.2%} of {score['n']:,}")
    world.close()


@dataclass
class PlotFlags:
    out_dir: tuple[str, ...] = ("log",)  # run folders to draw, one line each
    y: Literal["loss", "bpb"] = "loss"  # nats a token, or bits per byte of text
    output: str = "loss.png"  # picture to write


def plot(argv):
    flags = fineweb.parse_flags(PlotFlags, argv, "train_gpt2.py plot", "Draws the loss curves of runs.")
    from matplotlib.figure import Figure
    has_gpt2s_data, points = False, {}  # {(folder, kind, name): [(step, number)]}
    for folder in flags.out_dir:
        for line in read_log(Path(folder, "log.jsonl")):
            has_gpt2s_data |= line.get("tokenizer") == "gpt2" and "fineweb" in str(line.get("data"))
            for name in ("loss", "bpb", "acc_norm"):
                if line.get(name) is not None:
                    points.setdefault((folder, line["kind"], name), []).append((line["step"], line[name]))
    # OpenAI's 124M weights have this loss, and the accuracy below, by build-nanogpt.
    gpt2_loss = 3.2924 if has_gpt2s_data and flags.y == "loss" else None
    labels = {"loss": "loss, nats a token (faint: training; dots: validation)", "bpb": "validation loss, bits per byte"}
    panels = [("val", flags.y, labels[flags.y], gpt2_loss)]
    if any(kind == "hellaswag" for _, kind, _ in points):
        panels.append(("hellaswag", "acc_norm", "HellaSwag, acc_norm", 0.2955))
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (kind, name, label, gpt2) in zip(axes, panels):
        for i, folder in enumerate(flags.out_dir):
            if (folder, "train", name) in points:
                axis.plot(*zip(*points[folder, "train", name]), color=f"C{i}", alpha=0.3, lw=0.8)
            axis.plot(*zip(*points.get((folder, kind, name), [(0, math.nan)])), "o-", color=f"C{i}", label=folder)
        if gpt2:
            axis.axhline(gpt2, ls="--", color="gray", label="OpenAI's GPT-2 124M")
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    with explaining(f"--output {flags.output}: cannot be written"):
        figure.savefig(flags.output, dpi=150)
    print(f"wrote {flags.output}")


def main(argv):
    commands = {"sample": sample, "eval": evaluate, "plot": plot}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    return train(argv)


if __name__ == "__main__":
    fineweb.run_cli(main)
