"""
Trains GPT-2 from scratch: on a laptop's CPU, on one GPU, or on many.

$ python train_gpt2.py                                             # Shakespeare, about a minute on two CPU cores
$ python fineweb.py && python train_gpt2.py                        # GPT-2 124M on FineWeb-Edu, one GPU
$ torchrun --standalone --nproc_per_node=8 train_gpt2.py           # the same run on eight GPUs
$ torchrun --standalone --nproc_per_node=8 train_gpt2.py --resume  # ... and on from its newest checkpoint
$ python train_gpt2.py sample --checkpoint log/latest --prompt "ROMEO:"
$ python train_gpt2.py eval --checkpoint log/latest
$ python train_gpt2.py plot --out_dir log

The training script proper: config and presets · model · data · optimizer and schedule · training · starting a run.
What serves it: evaluation and samples · checkpoints and the log · processes · Transformers' formats · commands.
"""

import contextlib
import ctypes
import gc
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import fineweb
import hellaswag
from fineweb import RunFailed, UserError, explaining, one_line

HERE = Path(__file__).resolve().parent
STARTED = time.time()

# -----------------------------------------------------------------------------
# config and presets: a field is a flag, its comment the flag's help

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
    # a model with its recipe, which any other flag overrides; None: gpt2 for shards, tiny for a text file
    preset: Literal["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "modern"] | None = None
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
    momentum_warmup_steps: int = 0  # steps in which Muon's momentum rises from 0.85 to 0.95; 0: 0.95 at once
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
    loss_chunks: int = 0  # parts in which the loss is computed, to save memory; 0: auto
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
        """{flag: value}, as checkpoints and log.jsonl hold it."""
        return {name: value for group in vars(self).values() for name, value in vars(group).items()}

    def update(self, values, keep=()):
        """Sets the flags that `values` names, but for those in `keep`. Returns itself."""
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
    "modern": dict(MODERN, lr=1.8e-3, momentum_warmup_steps=300),
    "tiny": dict(MODERN, n_layer=3, n_head=4, n_embd=128, block_size=128, tokenizer="byte", compile=False, lr=6e-3,
                 momentum_warmup_steps=50, warmup_steps=15, weight_decay=0.01, total_batch_size=3072, max_steps=300,
                 eval_every=100, eval_tokens=65536, sample_every=100, checkpoint_every=100, hellaswag_every=0),
}
FINE_TUNING = dict(lr=5e-5, block_size=None, tokenizer=None)  # with --init_from; None: the model's

NO_LIMIT = 10**9  # steps

# the least and the most that numbers may be; those not named here: 0 and 1e15
LEAST = dict(n_layer=1, n_head=1, n_kv_head=1, n_embd=1, block_size=1, vocab_size=1, total_batch_size=1, max_steps=1,
             eval_tokens=1, batch_size=1, num_samples=1)
MOST = dict(dropout=0.9999, beta1=0.9999, beta2=0.9999, decay_fraction=1)


def check_ranges(values):
    """Raises UserError for a number in {flag: value} that is out of its range."""
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

class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021), channel i paired with channel i + head_dim/2 as in Llama."""

    def __init__(self, config):
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = torch.outer(torch.arange(config.block_size).float(), config.rope_theta ** -exponents)
        angles = torch.cat((angles, angles), dim=1)  # (block_size, head_dim)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions):
        """positions: a slice, or (B, T) int64. Returns cos and sin, (1, T, head_dim) or (B, 1, T, head_dim) each."""
        return self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)


def rotate(x, rotation):
    """x: (B, heads, T, head_dim); rotation: cos and sin of its positions."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)


def sdpa(q, k, v, **options):
    """Scaled dot-product attention. Where k and v have fewer heads than q, they are repeated for kernels that cannot
    take that: all but the CPU's and flash attention (bfloat16, no mask). A CPU's backward pass in bfloat16 takes 0.2 ms
    a head, however short the text: short ones are in float32."""
    groups, is_bfloat16, is_cpu = q.size(1) // k.size(1), compute_dtype(q) == torch.bfloat16, q.device.type == "cpu"
    if is_cpu and is_bfloat16 and q.requires_grad and q.size(2) <= 256:
        with torch.autocast("cpu", enabled=False):
            return sdpa(q.float(), k.float(), v.float(), **options)
    is_flash = is_bfloat16 and options.get("attn_mask") is None
    if groups > 1 and not is_cpu and not is_flash:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=k.size(1) != q.size(1), **options)


def compute_dtype(x):
    """The dtype that a matmul with x runs in: autocast's where it is on."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def full_attention(q, k, v, dropout):
    """Causal attention. q: (B, n_head, T, head_dim); k, v: (B, n_kv_head, T, head_dim). Returns a list of parts along T
    of what q's shape has: here one."""
    return [sdpa(q, k, v, is_causal=True, dropout_p=dropout)]


class WindowAttention(nn.Module):
    """Causal attention to the last `window` tokens, itself included, in O(T * window): blocks of `window` queries meet
    the keys of their own block and of the one before it."""

    def __init__(self, window):
        super().__init__()
        self.window = window
        distance = torch.arange(window, 2 * window)[:, None] - torch.arange(2 * window)  # from query to key
        self.register_buffer("mask", (distance >= 0) & (distance < window), persistent=False)

    def forward(self, q, k, v, dropout):
        """As `full_attention`, in two parts: to join them here would keep a copy of both for the backward pass."""
        B, T, N = q.size(0), q.size(2), self.window
        first = full_attention(q[:, :, :N], k[:, :, :N], v[:, :, :N], dropout)  # the block with none before it
        if T <= N:
            return first
        if T % N:
            padding = (0, 0, 0, -T % N)
            q, k, v = F.pad(q, padding), F.pad(k, padding), F.pad(v, padding)
        q = q[:, :, N:].unflatten(2, (-1, N)).transpose(1, 2).flatten(0, 1)  # (B * blocks, n_head, N, head_dim)
        rest = sdpa(q, in_pairs(k, N), in_pairs(v, N), attn_mask=self.mask, dropout_p=dropout)
        return first + [rest.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)[:, :, :T - N]]


def in_pairs(x, N):
    """(B, heads, T, head_dim) -> (B * (T/N - 1), heads, 2N, head_dim): blocks of N, each after the one before it."""
    if x.device.type == "cpu":  # a view, where it can be one; its gradient takes atomics on a GPU
        return x.unfold(2, 2 * N, N).permute(0, 2, 1, 4, 3).flatten(0, 1)
    blocks = x.unflatten(2, (-1, N)).transpose(1, 2)  # (B, T/N, heads, N, head_dim)
    return torch.cat((blocks[:, :-1], blocks[:, 1:]), dim=3).flatten(0, 1)


class LayerCache:
    """The keys and values of one layer, (B, n_kv_head, tokens, head_dim) each; of the last `window` tokens only."""

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
        self.k, self.v = k[:, :, -self.window:], v[:, :, -self.window:]  # with window 0 all of them
        return (k, v) if is_prompt else (self.k, self.v)


class HeadNorm(nn.RMSNorm):
    """With its weight in the input's dtype, bfloat16 under autocast: PyTorch's fused kernel takes no two."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class Attention(nn.Module):
    def __init__(self, config, attention):
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.attention = attention
        self.widths = [config.n_head * self.head_dim] + 2 * [config.n_kv_head * self.head_dim]  # of q, k and v
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
    """Gated MLP (Shazeer 2020)."""

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


def chunk_of_loss(x, head, target, vocab_size, needs_grad):
    """x: (N, C); head: (padded_vocab_size, C); target: (N, 1), -1 is ignored. Returns the sum of the cross-entropies
    and its gradient with respect to the logits (softmax minus one-hot), or None. Compiled, it compares each column with
    the target, which one kernel does as it reads a row; gather and scatter, sooner otherwise, are kernels apart."""
    logits = (x @ head.T).float()
    columns = torch.arange(head.size(0), device=x.device)
    is_compiled, is_target = torch.compiler.is_compiling(), target >= 0
    if is_compiled:
        logits = logits.where(columns < vocab_size, -torch.inf)  # the padding's share of the softmax is zero
        is_label = columns == target
        label_logits = logits.where(is_label, 0).sum(dim=1, keepdim=True)
    else:
        logits[:, vocab_size:] = -torch.inf
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
    """The head's matmul and the sum of the cross-entropies; logits and their gradient exist for one chunk at a time."""

    @staticmethod
    def forward(ctx, chunk_of_loss, hidden, weight, targets, vocab_size, num_chunks, needs_grad):
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
        return None, hidden_grad * grad, weight_grad * grad, None, None, None, None


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.loss_chunks = 0  # 0: chosen in `forward`
        self.end_ids = [config.eot]  # any of them ends a text
        self.hf_extras = {}  # {file: what it has beside the GPTConfig}, of the Transformers model that was opened
        self.loss_sum = partial(ChunkedCrossEntropy.apply, chunk_of_loss)
        has_window = 0 < config.window < config.block_size
        attention = WindowAttention(config.window) if has_window else full_attention
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
        """As GPT-2: std 0.02, and 0.02 / sqrt(2 n_layer) for c_proj, the projections onto the residual stream."""
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
        """Without the padding rows."""
        padding = sum(w[self.config.vocab_size:].numel() for w in {self.wte.weight, self.lm_head.weight})
        return sum(p.numel() for p in self.parameters()) - padding

    def hidden_states(self, idx, positions=None, mask=None, cache=None):
        """idx: (B, T) int64. Returns (B, T, n_embd), normalised, for the head.
        positions: (B, T) int64; else they follow those in `cache`. mask: (B, 1, T, T) bool, True where a token sees
        another; else causal. cache: of `new_cache`; the prompt extends it, then one token at a time.
        Raises ValueError where tokens and cache are longer than block_size."""
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
        for block, layer_cache in zip(self.h, cache or len(self.h) * [None]):
            x = block(x, rotation, mask, layer_cache)
        return self.ln_f(x)

    def new_cache(self):
        return [LayerCache(self.config.window) for _ in self.h]

    def logits(self, hidden):
        """hidden: (..., n_embd). Returns (..., vocab_size): the padding ends here."""
        return self.lm_head(hidden)[..., :self.config.vocab_size]

    def forward(self, idx, targets=None):
        """idx, targets: (B, T) int64; -1 is no target. Returns logits (B, T, vocab_size), or the mean loss in nats."""
        hidden, config = self.hidden_states(idx), self.config
        if targets is None:
            return self.logits(hidden)
        N = targets.numel()
        # 256 MB of fp32 logits a chunk, but at most 16 chunks; none of 16,384 tokens, whose sums could overflow fp16
        num_chunks = self.loss_chunks or max(1, N // 8192, min(16, N * config.padded_vocab_size // 2**26))
        loss = self.loss_sum(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten(), config.vocab_size,
                             num_chunks, torch.is_grad_enabled())
        return loss / (targets >= 0).sum()

    def compile_blocks(self, recompute=True):
        """Compiles the blocks and the loss; not the embedding, whose compiled gradient on a CPU sums in no fixed order.
        recompute: norms and GELUs are made again in the backward pass. Sets two global switches of the compiler."""
        torch._dynamo.config.optimize_ddp = False  # a block is a graph already; DDP's buckets would cut it again
        torch._functorch.config.ban_recompute_materialized_backward = not recompute
        for block in self.h:
            block.compile(dynamic=False)
        self.loss_sum = partial(ChunkedCrossEntropy.apply, torch.compile(chunk_of_loss, dynamic=False))

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=50, generator=None):
        """Yields the next tokens, (B, 1) at a time; see `generate`."""
        was_training = self.training
        self.eval()
        try:
            cache = self.new_cache()
            done = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
            for _ in range(max_new_tokens):
                if idx.size(1) > self.config.block_size:  # full: keep the last half
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
        config, model_type = read_model_config(folder)
        model = cls(replace(config, **{name: value for name, value in overrides.items() if value is not None}))
        if model.config.block_size > config.block_size:
            raise UserError(f"--block_size {model.config.block_size}: {name_or_folder} has {config.block_size} at most")
        load_weights_and_extras(model, folder, model_type)
        return model

    def save_pretrained(self, folder, tokenizer=None):
        """Writes a folder that Transformers opens (see FORMATS), with the tokenizer's files. Returns the model_type."""
        from safetensors.torch import save_file
        folder, model_type = Path(folder), model_type_of(self.config)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"model_type": model_type, **to_hf_config(self.config, model_type)}
        if model_type != OWN_TYPE:
            name = "GPT2LMHeadModel" if model_type == "gpt2" else f"{model_type.capitalize()}ForCausalLM"
            about |= {"architectures": [name], "bos_token_id": self.config.eot, "dtype": "float32"}
            about |= self.hf_extras.get("config.json", {})
        if tokenizer is not None:
            about["tokenizer"] = tokenizer.name
            tokenizer.save_pretrained(folder)
        for file, values in {**self.hf_extras, "config.json": about}.items():
            (folder / file).write_text(json.dumps(values, indent=2) + "\n")
        tensors = {name: tensor.cpu().contiguous() for name, tensor in hf_tensors(self, model_type)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return model_type


def sample_token(logits, temperature, top_k, generator):
    """(B, vocab_size) -> (B, 1)"""
    if temperature < 1e-6:  # 0, or too small to divide by
        return logits.argmax(dim=1, keepdim=True)
    logits = (logits.float() / temperature).nan_to_num()  # of a model that broke
    if 0 < top_k < logits.size(1):
        logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)

# -----------------------------------------------------------------------------
# data: one order of windows that do not overlap, whatever the number of devices and the size of a micro-step

@lru_cache(maxsize=4)
def permutation(n, *key):
    """A random order of range(n), a function of the key alone (raw PCG64 output: the same on every numpy)."""
    return np.argsort(np.random.PCG64(key).random_raw(n), kind="stable")


class Corpus:
    """A split's tokens in windows of block_size. `shards`: paths, or arrays. Raises UserError naming a damaged one."""

    def __init__(self, shards, block_size, vocab_size, name):
        self.shards = shards
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.name = name
        self.windows_per_shard = np.array([max(0, (len(self.read(shard)) - 1) // block_size) for shard in shards])
        self.num_windows = int(self.windows_per_shard.sum())
        if self.num_windows == 0:
            raise UserError(f"{name}: fewer than one window of --block_size {block_size} and its target: use more text")

    @staticmethod
    def read(shard):
        return shard if isinstance(shard, np.ndarray) else fineweb.read_shard(shard)

    def fingerprint(self):
        """A sha256 that tells this data from other, wherever it lies: of a text's tokens, or shards' sizes and ends."""
        digest = hashlib.sha256()
        for shard in self.shards:
            tokens = self.read(shard)
            parts = [tokens] if tokens is shard else [tokens[:1024], tokens[-1024:]]
            digest.update(str(len(tokens)).encode() + b"".join(part.tobytes() for part in parts))
        return digest.hexdigest()

    def find(self, number, order):
        """The place of window `number` where shards follow one another in this order: (shard, window in it)."""
        ends = self.windows_per_shard[order].cumsum()
        i = int(np.searchsorted(ends, number, side="right"))
        return int(order[i]), int(number - ends[i] + self.windows_per_shard[order[i]])

    def locate(self, number, seed):
        """As `find`, for training: shards are shuffled by (seed, epoch), their windows by (seed, epoch, shard)."""
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
    """Yields x and y, (batch_size, block_size) int64 on the device, from window `start` on. A thread reads ahead."""
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
            batch = batch.to(world.device, non_blocking=True)
            yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


NOT_PLAIN_TEXT = (".gz", ".zst", ".parquet", ".json", ".jsonl", ".ndjson", ".csv", ".tsv")


def open_data(path, tokenizer, config):
    """The training and validation corpus of a folder of shards or a text file, for a GPTConfig. Raises UserError."""
    path = Path(path)
    name = path.name.split(".")[0]
    maker = shlex.join(["python", "fineweb.py", "--files", str(path), "--out", f"{name}_tokens"])
    if path.is_dir():
        own = fineweb.shard_tokenizer(path)
        if own != tokenizer.name and not fineweb.same_tokenizer(fineweb.open_shard_tokenizer(path), tokenizer):
            raise UserError(f"{path} holds {own} tokens, but the model has its own tokenizer, {tokenizer.name}")
        splits = {split: fineweb.list_shards(path, split) for split in ("train", "val")}
        fineweb.check_complete(path, splits["train"] + splits["val"])
        for split, shards in splits.items():
            if not shards:
                raise UserError(f"{path}: no {split} shards (*_{split}_*.npy or .bin); of texts make some: {maker}")
    else:
        if path.suffix.lower() in (".npy", ".bin"):
            raise UserError(f"{path}: a shard; give the folder that holds it: --data {shlex.quote(str(path.parent))}")
        if path.suffix.lower() in NOT_PLAIN_TEXT:
            raise UserError(f"{path}: no plain text; make shards of it by: {maker}")
        tokens = np.array(tokenizer.encode(fineweb.decode_utf8(path.read_bytes(), path)), dtype=np.uint32)
        cut = len(tokens) * 9 // 10
        splits = {"train": [tokens[:cut]], "val": [tokens[cut:]]}
    vocab_size = min(tokenizer.vocab_size, config.vocab_size)  # a tokenizer may have ids that its model has not
    return [Corpus(shards, config.block_size, vocab_size, f"{path} ({split})") for split, shards in splits.items()]

# -----------------------------------------------------------------------------
# optimizer and schedule

class BatchedMuon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024) with adjust_lr_fn="match_rms_adamw" and the same updates and state, but all
    matrices of one shape at a time: a tenth of the kernel launches."""

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
    """x: (matrices, rows, columns), rows <= columns. Newton and Schulz's iteration towards singular values of 1."""
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    a, b, c = group["ns_coefficients"]
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def make_optimizers(model, recipe, device_type):
    """AdamW (Loshchilov & Hutter 2019) that decays matrices only; with --optimizer muon the blocks' matrices go to Muon
    (Jordan et al. 2024), its updates scaled to AdamW's so that one learning rate serves both (Liu et al. 2025)."""
    for_muon = [p for p in model.h.parameters() if p.ndim == 2] if recipe.optimizer == "muon" else []
    taken = set(for_muon)
    rest = [p for p in model.parameters() if p not in taken]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": recipe.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), fused=device_type in ("cuda", "cpu"))
    if not for_muon:
        return [adamw]
    return [adamw, BatchedMuon(for_muon, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")]


def learning_rate(step, schedule, seconds=0.0):
    """The learning rate of update number `step`, counted from 0, after so many seconds of training. Warm-up goes by
    steps; what follows goes by the share of the run that is over, with --max_minutes by the share of the time."""
    peak, warmup_steps, max_steps = schedule.lr, schedule.warmup_steps, schedule.max_steps
    lowest = peak / 10 if schedule.min_lr is None else schedule.min_lr
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    time_share = seconds / (60 * schedule.max_minutes) if schedule.max_minutes else 0.0
    if schedule.schedule == "wsd":  # warm-up, stable, decay (Hu et al. 2024)
        remaining = 1 - max(step / max_steps, time_share)
        return lowest + (peak - lowest) * min(1.0, max(0.0, remaining) / max(1 / max_steps, schedule.decay_fraction))
    progress = min(1.0, max((step - warmup_steps) / max(1, max_steps - warmup_steps), time_share))
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def muon_momentum(step, recipe):
    """Muon's momentum in the same update: it rises from 0.85 to 0.95 (modded-nanogpt, Jordan et al. 2024)."""
    return 0.95 - 0.1 * max(0, recipe.momentum_warmup_steps - step) / max(1, recipe.momentum_warmup_steps)

# -----------------------------------------------------------------------------
# training

class Run:
    """A training run, new or resumed, as a command line asks for it. Raises UserError."""

    def __init__(self, argv, world):
        config, given = read_flags(argv)
        check_restarts(config.setup.resume)
        notes = []
        earlier = open_earlier_run(config.setup, world, notes)
        state = earlier.state
        if earlier.config:
            config = resumed_config(config, given, earlier, notes)
        else:
            complete_config(config, given, notes)
        check_out_dir(config.setup.out_dir)
        model, tokenizer = (earlier.model, earlier.tokenizer) if state else new_model(config)
        setup, recipe, system = config.setup, config.recipe, config.system
        world.use_device(system.device, system.deterministic)

        self.config, self.world, self.tokenizer = config, world, tokenizer
        self.model = model.to(world.device)
        self.model.loss_chunks = system.loss_chunks
        self.config.model = model.config
        self.dtype, reason = choose_dtype(system.dtype, model.config, world, state.get("dtype"))
        notes += [reason] if reason else []
        self.step = state.get("step", 0)  # updates made
        self.saved_step = self.step  # those in the newest checkpoint
        self.skipped = state.get("skipped", 0)  # updates left out in a row, since their gradients were not finite
        self.run_id = state.get("run_id", f"{time.time_ns():x}")
        self.stopped = False  # by a signal to any rank
        self.token_bytes = tokenizer.token_bytes()
        self.seconds = state.get("seconds", 0.0)  # of training, without a process's first step
        self.timed_steps = state.get("timed_steps", 0)  # those that took these seconds
        self.is_warm = False  # after the first step, which compiles
        if model.config.window:  # cuDNN's masked backward pass has given NaNs on Hopper (pytorch issue 196678)
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.train_data, self.val_data = open_data(setup.data, tokenizer, model.config)
        self.fingerprint = self.train_data.fingerprint()
        if state.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise UserError(f"--data {setup.data}: the run in {setup.out_dir} has other data, by its tokens; give its "
                            "own, or begin a new run with --init_from and a checkpoint")
        self.batch_size, self.micro_steps = split_batch(self, state.get("batch_size"))
        self.ddp = model_to_train(self, notes)
        self.optimizers = make_optimizers(model, recipe, world.device_type)
        self.scaler = torch.amp.GradScaler(world.device_type, enabled=self.dtype == torch.float16)
        if state:
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
            if state["scaler"]:  # else it was not in float16
                self.scaler.load_state_dict(state["scaler"])
            notes.append(f"resumed from {earlier.folder} at step {self.step}")
        first_window = self.step * recipe.total_batch_size // model.config.block_size
        self.batches = training_batches(self.train_data, first_window, self.batch_size, world, recipe.seed)
        self.log = RunLog(self)
        evaluation = config.evaluation
        self.hellaswag_examples = evaluation.hellaswag_every and load_hellaswag(evaluation.hellaswag_data, world)
        print_summary(self, notes)
        if state and earlier.folder.resolve() != Path(setup.out_dir, f"step_{self.step:06d}").resolve():
            self.saved_step = None  # of another place: from here on, what out_dir holds must be enough to resume
            self.save()
        self.stop = StopRequest()  # of this rank

    def train_step(self):
        """One optimizer step. Returns what log.jsonl holds of it."""
        started, recipe, world = time.time(), self.config.recipe, self.world
        seed = np.random.SeedSequence((recipe.seed, self.step, world.rank)).generate_state(1)
        torch.manual_seed(int(seed[0]))  # so that checkpoints need no generator state
        loss = torch.zeros((), device=world.device)
        for micro_step in range(self.micro_steps):
            x, y = next(self.batches)
            if world.distributed:  # all-reduce in the last micro-step only
                self.ddp.require_backward_grad_sync = micro_step == self.micro_steps - 1
            with autocast(world.device_type, self.dtype):
                micro_loss = self.ddp(x, y) / self.micro_steps
            self.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        lr = learning_rate(self.step, self.config.schedule, self.seconds)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = lr
                if "momentum" in group:  # Muon's
                    group["momentum"] = muon_momentum(self.step, recipe)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.grad_clip or math.inf)
        loss, norm = torch.stack((loss, norm)).tolist()  # the step's one read from the device
        is_finite = math.isfinite(norm)  # on all ranks alike, for they have the same gradients
        for optimizer in self.optimizers:
            if is_finite:  # scaler.step would decide for each optimizer alone
                optimizer.step()
            optimizer.zero_grad()
        self.scaler.update()
        mine = [loss / world.size, self.stop.time is not None, (time.time() - started) * (world.rank == 0)]
        loss, stop, seconds = world.all_reduce(mine)  # the step's one small all-reduce; the time is rank 0's
        tokens = recipe.total_batch_size
        self.skipped = 0 if is_finite else self.skipped + 1
        self.stopped = stop > 0
        self.step += 1
        self.seconds += self.is_warm * seconds
        self.timed_steps += self.is_warm
        self.is_warm = True
        peak = peak_flops(world.device_type)
        mfu = flops_per_token(self.model) * tokens / seconds / (peak * world.size) if peak else None
        line = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": self.step * tokens, "seconds": seconds,
                "tokens_per_second": tokens / seconds, "mfu": mfu}
        return line if is_finite else {**line, "skipped": True}

    def print(self, text):
        self.world.print(f"step {self.step:>6,}  {text}")

    def is_over(self):
        schedule = self.config.schedule
        return self.step >= schedule.max_steps or 0 < 60 * schedule.max_minutes <= self.seconds

    def is_due(self, every):
        """Whether it is time for what is done every so many steps (0: never) and after the last."""
        return every > 0 and self.step > 0 and (self.is_over() or self.step % every == 0)

    def state_dict(self):
        """Tensors and plain values. The place in the data and all randomness follow from the step."""
        return {"step": self.step, "config": self.config.flat(), "scaler": self.scaler.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "batch_size": self.batch_size, "dtype": [self.world.device_type, str(self.dtype)[6:]],
                "seconds": self.seconds, "timed_steps": self.timed_steps, "skipped": self.skipped,
                "run_id": self.run_id, "fingerprint": self.fingerprint}

    def save(self):
        """Writes a checkpoint of this step, unless there is one. If the disk refuses, training goes on."""
        if self.saved_step != self.step:
            if self.world.from_rank_0(self.world.rank == 0 and save_checkpoint(self)):
                self.saved_step = self.step


def training_loop(run):
    every, world, schedule = run.config.evaluation, run.world, run.config.schedule
    first_step = run.step + 1
    total = schedule.max_steps if schedule.max_steps < NO_LIMIT else None
    bar = tqdm(total=total, initial=run.step, unit="step", dynamic_ncols=True,
               disable=run.config.system.quiet or world.rank > 0, mininterval=0.1 if sys.stderr.isatty() else 10)
    while True:
        if run.stopped or run.is_due(every.checkpoint_every):
            run.save()
        if run.stopped:
            break
        if run.is_due(every.eval_every):
            log_validation(run)
        if run.hellaswag_examples and run.is_due(every.hellaswag_every):
            log_hellaswag(run)
        if run.is_due(every.sample_every):
            log_sample(run)
        if run.is_over():
            break
        line = run.train_step()
        collect_garbage(run.step, first_step)
        run.log.write("train", run.step, **line)
        with contextlib.suppress(OSError):  # as in World.print
            bar.set_postfix_str(f"loss {line['loss']:.4f}, lr {line['lr']:.2e}, norm {line['grad_norm']:.3f}, "
                                f"{line['tokens_per_second']:,.0f} tokens/s", refresh=False)
            bar.update()
        if run.skipped:
            run.print("the gradient was not finite; the update was skipped")
        if run.skipped == 10:
            raise RunFailed(f"10 steps in a row had a gradient that was not finite, the last one step {run.step}; "
                            f"{describe_newest_checkpoint(run)}; lower --lr, or look at the data")
    with contextlib.suppress(OSError):
        bar.close()
    if run.is_over():
        log_end(run)
    run.log.close()
    if run.saved_step != run.step and (run.stopped or every.checkpoint_every):
        raise RunFailed(f"the last checkpoint could not be written; {describe_newest_checkpoint(run)}")
    script = shlex.quote(os.path.relpath(HERE / "train_gpt2.py"))
    out_dir = shlex.quote(run.config.setup.out_dir)
    if run.stopped:
        is_one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        torchrun = f"torchrun --standalone --nproc_per_node={world.size}" if is_one_node else "torchrun …"
        launcher = torchrun if world.distributed else "python"
        world.print(f"stopped by a signal at step {run.step:,}; go on with:\n"
                    f"  {launcher} {script} --out_dir {out_dir} --resume")
    elif run.saved_step == run.step:
        world.print(f"done at step {run.step:,}; sample from the model with:\n"
                    f"  python {script} sample --checkpoint {out_dir}/latest --prompt \"ROMEO:\"")


def collect_garbage(step, first_step):
    """Python's collector runs here alone: within a step of one rank it would keep all waiting."""
    if step == first_step or step % 1000 == 0:
        gc.collect()
    if step == first_step:
        gc.freeze()  # what is there now stays
        gc.disable()


class StopRequest:
    """Notes the signals of users (SIGINT), of closing terminals (SIGHUP) and of clusters; the training loop ends after
    the step at hand. A second one of the same kind stops at once: some systems send two kinds."""

    def __init__(self):
        self.time = self.number = None  # of the first signal
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
                signal.signal(number, self)

    def __call__(self, number, frame):
        grace = 3 if "TORCHELASTIC_RUN_ID" in os.environ else 0  # seconds: torchrun repeats a Ctrl-C that came here
        if self.time is None:
            self.time, self.number = time.time(), number
        elif number == self.number and time.time() - self.time > grace:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

# -----------------------------------------------------------------------------
# starting a run: a new one, or one that goes on from a checkpoint

# the flags that a resumed run may change: a flag stands in its group for this reason
MAY_CHANGE = {flag.name for group in (ScheduleFlags, EvaluationFlags, SystemFlags) for flag in fields(group)}
MAY_CHANGE.add("data")  # its place, not its content


def check_out_dir(out_dir):
    """Raises UserError where nothing can be written: before the work of starting, and before anything is made."""
    path = Path(out_dir).absolute()
    while not path.exists():
        path = path.parent
    with explaining(f"--out_dir {out_dir}: cannot be written", "choose another"):
        tempfile.TemporaryFile(dir=path).close()


def read_flags(argv):
    """The config, and the names of the flags that were given."""
    config = fineweb.parse_flags(TrainConfig, argv, prog="train_gpt2.py", description=__doc__)
    words = [word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]  # tyro does not tell
    given = {word.removeprefix("no_") for word in words}
    check_ranges(config.flat())
    if config.setup.resume_from and "out_dir" not in given:
        config.setup.out_dir = str(follow(config.setup.resume_from).resolve().parent)
    return config, given


def resumed_config(config, given, earlier, notes):
    """The config of a run that goes on, with the flags of `config` that were given and may change."""
    own, step = earlier.config, earlier.state.get("step", 0)
    values, own_values = config.flat(), own.flat()
    for name in given - MAY_CHANGE - {"out_dir", "resume", "resume_from"}:
        new, old = values[name], own_values[name]
        if new != old:
            raise UserError(f"--{name} {new}: the run in {own.setup.out_dir} has {old}, and a resumed run cannot "
                            f"change it; leave the flag out, or start a new run with another --out_dir")
    last_lr = learning_rate(step - 1, own.schedule) if step else math.inf
    changes = {name: values[name] for name in given & MAY_CHANGE}
    own.update({"batch_size": "auto", **changes, "out_dir": config.setup.out_dir})
    if not os.path.exists(own.setup.data):
        raise UserError(f"{own.setup.data}, the run's data, is not there; if it was moved, give --data its new place")
    lr = learning_rate(step, own.schedule)
    if lr > 2 * last_lr and step >= own.schedule.warmup_steps:
        notes.append(f"the learning rate jumps from {last_lr:.1e} back to {lr:.1e}, for the run had decayed already: "
                     "--resume_from a checkpoint before its decay wastes less")
    return own


def complete_config(config, given, notes):
    """Gives the flags of a new run that were left alone their values, by the preset and then by what was set."""
    setup, schedule, recipe = config.setup, config.schedule, config.recipe
    setup.data = find_data(setup.data)
    has_shards = os.path.isdir(setup.data)
    setup.preset = setup.preset or ("gpt2" if has_shards else "tiny")
    config.update(PRESETS[setup.preset], keep=given)
    if schedule.max_minutes and "max_steps" not in given:
        schedule.max_steps = NO_LIMIT
    for group, name, share in ((schedule, "warmup_steps", 10), (recipe, "momentum_warmup_steps", 5)):
        longest = schedule.max_steps // share
        if getattr(group, name) > longest and name not in given:
            setattr(group, name, longest)
            notes.append(f"--{name} {longest}: shortened to a {'tenth' if share == 10 else 'fifth'} of the run")
    if setup.init_from != "scratch":
        shape_flags = given & {flag.name for flag in fields(ModelFlags)} - {"dropout", "block_size"}
        if shape_flags:
            raise UserError(f"--{min(shape_flags)}: --init_from takes its shape from the model; leave the flag out")
        config.update(FINE_TUNING, keep=given)
    elif has_shards:
        wanted, setup.tokenizer = setup.tokenizer, fineweb.shard_tokenizer(setup.data)
        if "tokenizer" in given and wanted != setup.tokenizer:
            raise UserError(f"--tokenizer {wanted}: {setup.data} holds {setup.tokenizer} tokens")


def new_model(config):
    """The model of a new run and its tokenizer."""
    setup, flags = config.setup, config.model
    torch.manual_seed(config.recipe.seed)
    if setup.init_from == "scratch":
        has_shards = os.path.isdir(setup.data)
        tokenizer = fineweb.open_shard_tokenizer(setup.data) if has_shards else fineweb.new_tokenizer(setup.tokenizer)
        values = vars(flags) | {"vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}
        return GPT(GPTConfig(**values)), tokenizer
    model, tokenizer = open_model(setup.init_from, dropout=flags.dropout, block_size=flags.block_size)
    if setup.tokenizer not in (None, tokenizer.name):
        raise UserError(f"--tokenizer {setup.tokenizer}: the model of --init_from has its own, {tokenizer.name}")
    setup.tokenizer = tokenizer.name
    return model, tokenizer


def find_data(path):
    """The path, or the default where it is None. Raises UserError where nothing is there."""
    shards = HERE / "edu_fineweb10B"
    path = path or os.path.relpath(shards if fineweb.list_shards(shards, "train") else HERE / "input.txt")
    if not os.path.exists(path):
        raise UserError(f"--data {path}: no such file or folder; make shards with fineweb.py, or take input.txt")
    return path


def choose_dtype(name, model_config, world, previous=None):
    """The dtype of --dtype `name`, and why. auto: `previous`, the run's on such a device, or rank 0's choice."""
    if name == "auto" and previous and previous[0] == world.device_type:
        name = previous[1]
    matmul = (256, model_config.n_embd, model_config.n_hidden)
    return world.from_rank_0(world.rank == 0 and hellaswag.pick_dtype(name, world.device_type, matmul, torch.float16))


def split_batch(run, previous):
    """The batch size, that which the run had (`previous`) if it divides, and the micro-steps. Raises UserError."""
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
            size = max(size for size in sizes if size == 1 or size * T <= 8192)  # a CPU gains nothing from more
    must_divide("batch_size", size, "a device's sequences in a step,", sequences)
    return size, sequences // size


def largest_batch(model, sizes, world, dtype):
    """The largest of the sizes, given in order, whose micro-step fits on the GPU: tried from the largest down, beside
    copies of the parameters that stand for the gradients, AdamW's moments and DDP's buckets."""
    free, total = torch.cuda.mem_get_info()
    ours = free + torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(0.92 * ours / total)  # the rest is for fragmentation
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
    return int(world.all_reduce([size], dist.ReduceOp.MIN)[0])  # the smallest if none fitted; the same on all ranks


def is_out_of_memory(error):
    """Whether it is CUDA's, MPS's or the CPU's."""
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


def model_to_train(run, notes):
    """The model: compiled where that is wanted and works, under torchrun in DDP's wrapper."""
    run.is_compiled = run.config.system.compile and run.world.device_type != "mps"
    if run.is_compiled:
        try:
            torch.compile(torch.sin)(torch.zeros(8, device=run.world.device))
        except Exception as error:  # no C++ compiler, no Triton, an unknown chip, ...
            run.is_compiled = False
            notes.append(f"training uncompiled, slower, for the compiler does not work here ({one_line(error)})")
    if run.is_compiled:
        has_room = run.world.device_type == "cuda" and torch.cuda.mem_get_info()[1] > 40e9  # bytes
        run.model.compile_blocks(recompute=not has_room)
    if not run.world.distributed:
        return run.model
    # Without it buckets change after the first step: a resumed run would add up in another order than the whole one.
    keeps_buckets = run.config.system.deterministic or run.world.device_type == "cpu"
    warnings.filterwarnings("ignore", "find_unused_parameters")  # there are none
    ddp = nn.parallel.DistributedDataParallel(run.model, gradient_as_bucket_view=True,
                                              find_unused_parameters=keeps_buckets)
    ddp.broadcast_buffers = False  # rotary tables and masks never change
    return ddp


def print_summary(run, notes):
    """What was chosen, and the flags that choose otherwise."""
    setup, world, T = run.config.setup, run.world, run.model.config.block_size
    steps, tokens = run.config.schedule.max_steps, run.config.recipe.total_batch_size
    train, val = run.train_data.num_windows * T, run.val_data.num_windows * T  # tokens
    compiled = "compiled" if run.is_compiled else "not compiled"
    minutes = run.config.schedule.max_minutes
    lengths = [f"{minutes:g} minutes of training"] if minutes else []
    lengths += [f"{steps:,} steps, {steps * tokens / train:.2f} times through the data"] if steps < NO_LIMIT else []
    is_new = setup.init_from == "scratch"
    name = setup.preset if is_new else f"{setup.init_from}, fine-tuned by the recipe of {setup.preset}"
    if model_type_of(run.model.config) == OWN_TYPE:
        notes.append("Transformers has no such mixture of parts: only this script will read the checkpoints")
    lines = [
        f"data    {setup.data}: {train:,} tokens to train on, {val:,} to validate, {setup.tokenizer} (--data)",
        f"model   {name}: {run.model.num_parameters():,} parameters (--preset, --init_from)",
        f"device  {world.size} x {world.device_type}, {str(run.dtype)[6:]}, {compiled} (--device, --dtype, --compile)",
        f"batch   {tokens:,} tokens a step = {world.size} device(s) x {run.micro_steps} micro-step(s) x "
        f"{run.batch_size} sequence(s) x {T} tokens (--total_batch_size, --batch_size)",
        f"run     {' or '.join(lengths)}, logged and saved in {setup.out_dir}/ (--max_steps, --max_minutes, --out_dir)",
    ]
    world.print("\n".join(lines + [f"note    {note}" for note in notes]))

# -----------------------------------------------------------------------------
# evaluation and samples: through the raw model, on all ranks; no training number depends on them

@torch.no_grad()
def validate(model, corpus, tokens, batch_size, world, dtype, token_bytes):
    """Mean loss in nats over the first `tokens` tokens of the corpus, rounded up to windows, and in bits per byte of
    their text, for any batch_size and world size: ranks take turns, and short batches are filled with ignored rows."""
    num_windows = min(corpus.num_windows, math.ceil(tokens / corpus.block_size))
    mine = [corpus.find(i, np.arange(len(corpus.shards))) for i in range(world.rank, num_windows, world.size)]
    model.eval()
    sums = [torch.zeros((), device=world.device)]  # a rank may have no window
    num_bytes = 0
    for i in range(0, len(mine), batch_size):
        batch = corpus.read_windows(mine[i:i + batch_size])
        num_bytes += int(token_bytes[batch[:, 1:].numpy()].sum())
        batch = F.pad(batch, (0, 0, 0, batch_size - len(batch)), value=-1).to(world.device)
        x, y = batch[:, :-1].clamp(min=0), batch[:, 1:].contiguous()
        with autocast(world.device_type, dtype):
            sums.append(model(x, y) * (y >= 0).sum())
    model.train()
    total, num_bytes = world.all_reduce([math.fsum(torch.stack(sums).tolist()), num_bytes])
    return total / (num_windows * corpus.block_size), total / math.log(2) / max(1, num_bytes)


def log_validation(run):
    tokens = run.config.evaluation.eval_tokens
    loss, bpb = validate(run.model, run.val_data, tokens, run.batch_size, run.world, run.dtype, run.token_bytes)
    perplexity = math.exp(min(loss, 700))
    checkpoints = list_checkpoints(run.config.setup.out_dir)
    run.log.write("val", run.step, loss=loss, perplexity=perplexity, bpb=bpb)
    if run.world.rank == 0 and run.saved_step == run.step == run.log.best_step(checkpoints):
        point_to(checkpoints[run.step], "best")
        delete_old_checkpoints(run)
    run.print(f"validation loss {loss:.4f}, perplexity {perplexity:,.2f}, {bpb:.4f} bits per byte  "
              f"(best loss {run.log.best('loss'):.4f})")


def log_end(run):
    """The figures of a finished run, for a script to read: the last line of log.jsonl, and a line each here."""
    tokens, flops, device_type = run.config.recipe.total_batch_size, flops_per_token(run.model), run.world.device_type
    peak, speed = peak_flops(device_type), run.timed_steps * tokens / max(run.seconds, 1e-9)
    last = run.log.vals[-1] if run.log.vals else {}
    numbers = {
        "val_loss": last.get("loss"), "val_bpb": last.get("bpb"), "best_val_loss": run.log.best("loss"),
        "best_val_bpb": run.log.best("bpb"), "tokens": run.step * tokens, "training_seconds": run.seconds,
        "total_seconds": time.time() - STARTED, "tokens_per_second": speed,
        "mfu": flops * speed / (peak * run.world.size) if peak else None,
        "peak_memory_gb": peak_memory(device_type) / 1e9, "parameters": run.model.num_parameters(),
    }
    run.log.write("done", run.step, **numbers)
    lines = ["---"]
    for name, value in numbers.items():
        lines.append(f"{name + ':':<19}" + (f"{value:.6g}" if isinstance(value, float) else str(value)))
    run.world.print("\n".join(lines))


def stream_text(model, tokenizer, flags, generator):
    """Yields what the model writes after flags.prompt, piece by piece, up to end-of-text. flags: SampleFlags."""
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


def log_sample(run):
    """Every rank makes the same text; in float32, for to cast all weights for one token costs more than it saves."""
    prompt = "Hello, I'm a language model," if run.tokenizer.name == "gpt2" else "\n"
    flags = SampleFlags(prompt=prompt, max_new_tokens=200)
    generator = torch.Generator(run.world.device).manual_seed(flags.seed)
    text = prompt + "".join(stream_text(run.model, run.tokenizer, flags, generator))
    run.log.write("sample", run.step, text=text)
    if not run.config.system.quiet:
        run.print(f"sample:\n{text.strip()}\n")


def load_hellaswag(path, world):
    """The examples, which rank 0 reads for all. Without a path, None if they cannot be downloaded."""
    examples = None
    try:
        examples = hellaswag.load_examples(path) if world.rank == 0 else None
    except UserError as error:
        if path:
            raise
        world.print(f"HellaSwag is left out: {error}")
    return world.from_rank_0(examples)


def score_hellaswag(model, examples, tokenizer, world, dtype):
    """hellaswag.evaluate's dict; all ranks share the work."""
    with autocast(world.device_type, dtype), changing_shapes():
        return hellaswag.evaluate(model, examples, tokenizer.encode, style="completion", device=world.device)


def log_hellaswag(run):
    score = score_hellaswag(run.model, run.hellaswag_examples, run.tokenizer, run.world, run.dtype)
    run.log.write("hellaswag", run.step, acc=score["acc"], acc_norm=score["acc_norm"], n=score["n"])
    run.print(f"HellaSwag acc {score['acc']:.2%}, acc_norm {score['acc_norm']:.2%} of {score['n']:,}")

# -----------------------------------------------------------------------------
# checkpoints and the log

def list_checkpoints(out_dir):
    """{step: checkpoint folder}, oldest first."""
    folders = {int(path.name[5:]): path for path in Path(out_dir).glob("step_*") if path.name[5:].isdigit()}
    return dict(sorted(folders.items()))


def describe_newest_checkpoint(run):
    """For a message."""
    folders = list(list_checkpoints(run.config.setup.out_dir).values())
    return f"the last good checkpoint is {folders[-1]}" if folders else "no checkpoint was written"


def save_checkpoint(run):
    """Writes out_dir/step_NNNNNN under a temporary name, flushes and renames it, points `latest` to it and deletes the
    oldest. Returns whether it could be written; if not, it says so and the older ones stay."""
    out_dir = Path(run.config.setup.out_dir)
    folder = out_dir / f"step_{run.step:06d}"
    temporary = out_dir / f".tmp_{folder.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        run.model.save_pretrained(temporary, run.tokenizer)
        torch.save(run.state_dict(), temporary / "train_state.pt")
        fsync_all(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one that --resume stepped over
        temporary.rename(folder)
        fsync_all(out_dir)
    except Exception as error:  # OSError, and what torch and safetensors make of it
        shutil.rmtree(temporary, ignore_errors=True)
        problem = f"{folder} could not be written ({one_line(error)})"
        run.print(f"warning: {problem}; free some space; {describe_newest_checkpoint(run)}")
        return False
    point_to(folder, "latest")
    delete_old_checkpoints(run)
    return True


def delete_old_checkpoints(run):
    """All but the best one and the newest."""
    out_dir, keep = Path(run.config.setup.out_dir), run.config.evaluation.keep_checkpoints
    older = {step: old for step, old in list_checkpoints(out_dir).items() if step <= run.step}  # newer ones are damaged
    best = (run.log.best_step(older), follow(out_dir / "best").name)  # by the log, and by the link
    for step in list(older)[:-keep] if keep else []:
        if step != best[0] and older[step].name != best[1]:
            shutil.rmtree(older[step], ignore_errors=True)


def point_to(folder, name):
    """Makes `name`, beside the checkpoint, a link to it; on a file system without links a text file with its name."""
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


def follow(path):
    """The checkpoint that `point_to` made `path` name; another path as it is."""
    path = Path(path)
    if path.is_file() and path.stat().st_size < 100:
        return path.parent / path.read_text().strip()
    return path.resolve() if path.is_symlink() else path


def fsync_all(folder):
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def load_state(folder, mmap=False):
    """A checkpoint's train_state.pt (see `Run.state_dict`) and its config. Raises UserError."""
    path = Path(folder) / "train_state.pt"
    if not path.exists():
        raise UserError(f"{path}: not there, so this is no checkpoint; a model alone is fine-tuned by --init_from")
    # what cannot be read now is not damaged
    with explaining(f"{path}: damaged, or of another version of this script", but=(OSError, MemoryError)):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return state, TrainConfig(model=GPTConfig()).update(state["config"])


def load_checkpoint(folder):
    """Its folder, state, config, model and tokenizer. Raises UserError naming what is damaged."""
    state, config = load_state(folder)
    model = GPT(config.model)
    load_weights_and_extras(model, folder, model_type_of(config.model))
    name = config.setup.tokenizer
    tokenizer = fineweb.get_tokenizer(name if name in ("gpt2", "byte") else str(folder))
    tokenizer.name = name
    return SimpleNamespace(folder=folder, state=state, config=config, model=model, tokenizer=tokenizer)


def choose_checkpoint(setup, world):
    """The newest good checkpoint of out_dir with --resume, or that of --resume_from; None to begin a run."""
    out_dir, folders = Path(setup.out_dir).resolve(), list_checkpoints(setup.out_dir)
    is_own = setup.resume or setup.resume_from and follow(setup.resume_from).resolve().parent == out_dir
    if not is_own and (folders or (out_dir / "log.jsonl").exists()):
        raise UserError(f"{setup.out_dir} already holds a run; add --resume, or choose another --out_dir")
    if setup.resume:
        for folder in reversed(folders.values()):
            try:
                return load_checkpoint(folder)
            except UserError as error:
                world.print(f"not resumed from {folder.name}: {error}")
    if not setup.resume_from:
        return None
    checkpoint = load_checkpoint(follow(setup.resume_from).resolve())
    if not setup.resume and max(folders, default=0) > checkpoint.state["step"]:
        raise UserError(f"{folders[max(folders)]} is newer than --resume_from: delete it, or give another --out_dir")
    return checkpoint


def open_earlier_run(setup, world, notes):
    """What to go on from, on every rank: the checkpoint that rank 0 chooses. Without one its state is empty, its config
    None, or that of a run which left only a log in out_dir and now begins anew."""
    checkpoint = choose_checkpoint(setup, world) if world.rank == 0 else None
    folder = world.from_rank_0(checkpoint and checkpoint.folder)
    if folder:
        return checkpoint or load_checkpoint(folder)
    path, config = Path(setup.out_dir, "log.jsonl"), None
    log = world.from_rank_0(read_log(path) if path.exists() else [])
    if log:
        notes.append(f"no good checkpoint in {setup.out_dir}: its run begins anew, its log so far is {path.name}.old")
        config = TrainConfig(model=GPTConfig()).update(log[0], keep=("kind", "run_id"))
    elif setup.resume:
        notes.append(f"nothing to resume in {setup.out_dir}: a new run")
    return SimpleNamespace(state={}, config=config)


class RunLog:
    """log.jsonl, one object a line, and the trackers beside it. Only rank 0 writes."""

    def __init__(self, run):
        system, out_dir = run.config.system, run.config.setup.out_dir
        self.path = Path(out_dir, "log.jsonl")
        lines = read_log(self.path) if run.step and self.path.exists() else []
        about = {"kind": "config", "run_id": run.run_id, **run.config.flat()}
        # This step's validation and samples are made again, where they are due; its training line stays.
        kept = ("train",) if run.is_due(run.config.evaluation.eval_every) else ("train", "val")
        lines = [line for line in lines if line.get("step", 0) < run.step + (line["kind"] in kept)] or [about]
        self.vals = [line for line in lines if line["kind"] == "val"]
        self.file = self.wandb = self.tensorboard = None
        self.opened = contextlib.ExitStack()
        if run.world.rank > 0:
            return
        if system.wandb:
            import wandb
            with explaining(f"--wandb {system.wandb}: Weights & Biases does not start",
                            "run `wandb login` first, or set WANDB_MODE=offline"):
                self.wandb = wandb.init(project=system.wandb, id=run.run_id, resume="allow", config=about, dir=out_dir)
            self.opened.callback(self.wandb.finish)
            self.wandb.define_metric("*", step_metric="step")  # not by its own count of calls
        if system.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = self.opened.enter_context(SummaryWriter(out_dir, purge_step=run.step + 1))
        run.world.lock = fineweb.lock_folder(out_dir)
        if run.step == 0 and self.path.exists():
            self.path.replace(f"{self.path}.old")
        with fineweb.replacing(self.path) as f:
            f.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self.file = self.opened.enter_context(open(self.path, "a", buffering=1))

    def write(self, kind, step, **values):
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None  # JSON has no nan
        if kind == "val":
            self.vals.append({"step": step, **values})
        if self.file is None:
            return
        line = json.dumps({"kind": kind, "step": step, **values})
        with explaining(f"{self.path}: cannot be written", "free some space, then add --resume", kind=RunFailed):
            self.file.write(line + "\n")
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        if self.wandb:
            self.wandb.log({"step": step, **numbers})
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)

    def best(self, name):
        """The least validation loss or bpb so far."""
        return min((line[name] for line in self.vals if line.get(name)), default=math.inf)

    def best_step(self, steps):
        """That of the least validation loss, among these; None if there is none."""
        found = [(line["loss"], line["step"]) for line in self.vals if line.get("loss") and line["step"] in steps]
        return min(found, default=(math.inf, None))[1]

    def close(self):
        self.opened.close()


def read_log(path):
    """The lines of a log.jsonl; those that a killed run or machine left unfinished are left out."""
    lines = []
    with open(path, errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines

# -----------------------------------------------------------------------------
# processes and chips

class World:
    """The processes of the run, as torchrun started them; alone without it."""

    def __init__(self):
        self.distributed = "RANK" in os.environ
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ["WORLD_SIZE"]) if self.distributed else 1
        self.lock = None  # rank 0's on out_dir
        tasks = int(os.environ.get("SLURM_NTASKS", 1))
        if tasks > 1 and not self.distributed:
            raise UserError(f"SLURM_NTASKS is {tasks}, but tasks of Slurm do not know each other: start one a node, "
                            "each a torchrun --nnodes … --nproc_per_node …; for one process set SLURM_NTASKS=1")
        if self.distributed:  # numbers and objects go over gloo, gradients over NCCL
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    def use_device(self, name, deterministic=False):
        self.device = hellaswag.pick_device(name)  # "cuda:3"
        self.device_type = torch.device(self.device).type  # "cuda"
        hellaswag.check_device(self.device)
        if self.device_type == "cuda":
            torch.cuda.set_device(self.device)
        if self.device_type == "cpu":
            keep_freed_memory()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # what stays float32 on a GPU
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False

    def print(self, text):
        with contextlib.suppress(OSError):  # a terminal or a `tee` that is gone ends no run
            if self.rank == 0:
                tqdm.write(text)  # goes above a progress bar
                sys.stdout.flush()

    def all_reduce(self, numbers, op=dist.ReduceOp.SUM):
        """The sum of each number over the ranks, or what else `op` says."""
        values = torch.tensor(numbers, dtype=torch.float64)
        if self.distributed:
            dist.all_reduce(values, op=op)
        return values.tolist()

    def from_rank_0(self, value):
        box = [value]
        if self.distributed:
            dist.broadcast_object_list(box, src=0, device="cpu")
        return box[0]

    def close(self):
        if self.distributed:
            dist.destroy_process_group()


def keep_freed_memory():
    """Lets glibc use freed memory again, not return it to the system, which gives it back page by page, and slowly."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large array
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def check_restarts(resume):
    """Raises UserError where a job that torchrun starts again could not go on."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and not (resume and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"):
        raise UserError("torchrun --max_restarts needs --resume from the first start, so that the job can go on, and "
                        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before it, so that its processes find each other")


@contextlib.contextmanager
def changing_shapes():
    """For inputs of ever new shapes: nothing is compiled, and no attention by cuDNN, which plans for each shape."""
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(kernels):
        yield


def autocast(device_type, dtype):
    return torch.autocast(device_type, dtype, enabled=dtype != torch.float32)


# dense bf16 (fp16 where the chip has no bf16) TFLOP/s with sums in fp32, from NVIDIA's data sheets and white papers
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "A10": 125, "L40S": 362,
               "L4": 121, "T4": 65, "V100": 125, "A4000": 76.7, "RTX 3060": 25.5, "RTX 3070": 40.6, "RTX 3080": 59.5,
               "RTX 3090": 71, "RTX 4060 Ti": 44.1, "RTX 4070": 58.3, "RTX 4080": 97.5, "RTX 4090": 165.2,
               "RTX 5070": 61.7, "RTX 5080": 112.6, "RTX 5090": 209.5}


def peak_flops(device_type):
    """Of one device, or None where it is unknown."""
    name = torch.cuda.get_device_name() if device_type == "cuda" else ""
    for chip, teraflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{chip}\b(?! Ti| SUPER| D| Laptop|.* MIG)", name):
            return teraflops * 1e12
    return None


def peak_memory(device_type):
    """In bytes, of this process so far."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def flops_per_token(model):
    """Of a training step: 6 per parameter and 12 per layer, channel and key (PaLM's appendix B)."""
    config = model.config
    positions = 0 if model.wpe is None else model.wpe.weight.numel()
    keys = min(config.block_size, config.window or config.block_size)
    return 6 * (model.num_parameters() - positions) + 12 * config.n_layer * config.n_head * config.head_dim * keys

# -----------------------------------------------------------------------------
# Transformers' formats

GPT2_NAMES = dict(n_layer="n_layer", n_head="n_head", n_embd="n_embd", n_hidden="n_inner", block_size="n_positions",
                  vocab_size="vocab_size", eot="eos_token_id", norm_eps="layer_norm_epsilon", dropout="resid_pdrop",
                  tied="tie_word_embeddings")
LLAMA_NAMES = dict(n_layer="num_hidden_layers", n_head="num_attention_heads", n_kv_head="num_key_value_heads",
                   n_embd="hidden_size", n_hidden="intermediate_size", head_dim="head_dim", vocab_size="vocab_size",
                   block_size="max_position_embeddings", eot="eos_token_id", norm_eps="rms_norm_eps",
                   rope_theta="rope_theta", dropout="attention_dropout", tied="tie_word_embeddings")
LLAMA_PARTS = dict(rope=True, rmsnorm=True, swiglu=True)
OWN_TYPE = "train_gpt2"
FORMATS = {  # model_type: the fields of GPTConfig that its models have in common; the others' names in config.json
    "gpt2": (dict(rope=False, rmsnorm=False, swiglu=False, qk_norm=False, window=0, bias=True), GPT2_NAMES),
    "llama": ({**LLAMA_PARTS, "qk_norm": False, "window": 0}, {**LLAMA_NAMES, "bias": "mlp_bias"}),
    "mistral": ({**LLAMA_PARTS, "qk_norm": False, "bias": False}, {**LLAMA_NAMES, "window": "sliding_window"}),
    "qwen3": ({**LLAMA_PARTS, "qk_norm": True, "bias": False}, {**LLAMA_NAMES, "window": "sliding_window"}),
    OWN_TYPE: ({}, {flag.name: flag.name for flag in fields(GPTConfig)}),
}
LLAMA_MODULES = {  # Mistral's and Qwen3's too; they keep apart what c_attn has in one matrix
    "wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head", "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm", "attn.c_attn": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm", "attn.c_proj": "self_attn.o_proj",
    "mlp.c_gate": "mlp.gate_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
}


def model_type_of(config):
    """The first of FORMATS that loses nothing of the config, found by writing and reading it; OWN_TYPE never does."""
    config = replace(config, zero_init=False)  # says how training began, not what the model is
    for model_type, (shared, _) in FORMATS.items():
        has_parts = all(getattr(config, name) == value for name, value in shared.items())
        if has_parts and from_hf_config(to_hf_config(config, model_type), model_type) == config:
            return model_type


def to_hf_config(config, model_type):
    """What config.json says of the model."""
    hf = {hf_name: getattr(config, name) for name, hf_name in FORMATS[model_type][1].items()}
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


def from_hf_config(hf, model_type, path="config.json"):
    """The GPTConfig that a config.json, completed by Transformers, stands for. Raises UserError for a value that
    `to_hf_config` would write differently: a part that our model does not have."""
    shared, names = FORMATS[model_type]
    values = {name: hf[hf_name] for name, hf_name in names.items() if hf_name in hf} | shared
    rope = hf.get("rope_parameters") or {}
    values["rope_theta"] = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    values["window"] = values.get("window") or 0
    if isinstance(values["eot"], list):
        values["eot"] = values["eot"][0]
    config = GPTConfig(**values)
    may_differ = ("rope_theta", "n_inner", "n_ctx", "eos_token_id", "max_window_layers", "embd_pdrop", "attn_pdrop")
    for name, value in to_hf_config(config, model_type).items():
        if name not in may_differ and hf.get(name, value) not in (value, "gelu_pytorch_tanh"):  # gelu_new's other name
            raise UserError(f"{path}: {name} = {hf[name]!r} is not supported (only {value!r})")
    return config


def model_folder(name_or_folder):
    """The local folder of a model; a name on the hub is downloaded. Raises UserError."""
    name_or_folder = follow(name_or_folder)
    if (name_or_folder / "config.json").exists():
        return name_or_folder
    if name_or_folder.exists():
        raise UserError(f"{name_or_folder}: no model is here (a model folder holds config.json and model.safetensors)")
    from huggingface_hub import snapshot_download
    files = ["*.json", "model*.safetensors", "merges.txt"]
    with explaining(f"{name_or_folder}: no such folder, and the Hugging Face hub gave no such model"):
        return Path(snapshot_download(str(name_or_folder), allow_patterns=files))


def read_json(path):
    """The object in a model folder's file. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path}: not there")
    with explaining(f"{path}: not JSON", but=OSError):  # what cannot be read now is not damaged
        return {**json.loads(path.read_text())}


def read_model_config(folder):
    """The GPTConfig of a model folder and its model_type. Raises UserError naming what our model does not have."""
    path = folder / "config.json"
    hf = read_json(path)
    model_type = hf.get("model_type")
    if model_type not in FORMATS:
        raise UserError(f"{path}: model_type {model_type!r} is not supported (only gpt2, llama, mistral, qwen3)")
    if model_type == OWN_TYPE:
        unknown = hf.keys() - FORMATS[OWN_TYPE][1].keys() - {"model_type", "tokenizer"}
        if unknown:
            raise UserError(f"{path}: {min(unknown)} = {hf[min(unknown)]!r} is a part that this script does not have")
    else:
        import transformers
        with explaining(f"{path}: Transformers refuses it"):
            hf = transformers.AutoConfig.from_pretrained(folder).to_dict()  # fills in what the file leaves out
    return from_hf_config(hf, model_type, path), model_type


def hf_tensors(model, model_type):
    """Yields (name, tensor) as Transformers has them. The tensors are views of our parameters: without padding rows,
    GPT-2's matrices transposed, Llama's parts apart, a tied head left out."""
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


def load_weights_and_extras(model, folder, model_type):
    """Fills the model from the folder's safetensors, and notes for `save_pretrained` what GPTConfig does not hold.
    Raises UserError for weights that are missing, misshapen or left over."""
    from safetensors.torch import load_file
    hf = read_json(folder / "config.json")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.hf_extras["config.json"] = {name: hf[name] for name in names if hf.get(name) is not None}
    path = folder / "generation_config.json"
    if path.exists():
        model.hf_extras[path.name] = read_json(path)
        hf |= model.hf_extras[path.name]  # its ends go before config.json's, as in Transformers
    if hf.get("eos_token_id") is not None:
        model.end_ids = np.atleast_1d(hf["eos_token_id"]).tolist()
    files = sorted(folder.glob("model*.safetensors"))  # Mistral's repositories hold the same under another name too
    if not files:
        raise UserError(f"{folder}: no model.safetensors; open the model in Transformers and save it again")
    stored = {}
    for file in files:
        with explaining(f"{file}: not a whole safetensors file", "take another copy", but=(OSError, MemoryError)):
            stored |= load_file(file)
    for name, tensor in hf_tensors(model, model_type):
        name = name if name in stored else name.removeprefix("transformer.")  # as OpenAI's file on the hub has it
        if name not in stored:
            raise UserError(f"{folder}: the weights lack {name}, which config.json asks for")
        value = stored.pop(name)
        if name.endswith("wpe.weight"):
            value = value[:model.config.block_size]
        if value.shape != tensor.shape:
            raise UserError(f"{folder}: {name} has shape {list(value.shape)}, by config.json {list(tensor.shape)}")
        tensor.copy_(value)
    for name in stored:
        is_derived = name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"))  # in old files
        head = model.lm_head.weight[:model.config.vocab_size]  # a tied one may be stored again, but not another one
        if not is_derived and not (name == "lm_head.weight" and torch.equal(stored[name].float(), head)):
            raise UserError(f"{folder}: the weights hold {name}, which this model class does not have")


def open_model(name_or_folder, **overrides):
    """A model and its tokenizer."""
    folder = model_folder(name_or_folder)
    model = GPT.from_pretrained(folder, **overrides)
    name = read_json(folder / "config.json").get("tokenizer")
    if name in ("gpt2", "byte"):  # ours says its name; others come with files
        return model, fineweb.get_tokenizer(name)
    gpt2 = fineweb.get_tokenizer("gpt2")
    if any((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        tokenizer = fineweb.FolderTokenizer(folder)
        return model, gpt2 if fineweb.same_tokenizer(tokenizer, gpt2) else tokenizer
    if model.config.vocab_size != gpt2.vocab_size:
        raise UserError(f"{name_or_folder}: no tokenizer files beside the model; save its tokenizer there")
    return model, gpt2

# -----------------------------------------------------------------------------
# commands

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
    finally:
        gc.enable()
        gc.unfreeze()
        if world.lock is not None:
            os.close(world.lock)
    del run  # and DDP with it, which must not outlive the process group
    world.close()


def out_of_memory(run):
    """The error to raise; it names the next smaller batch that divides."""
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
    max_new_tokens: int = 500  # tokens of each at most; it ends earlier at end-of-text
    temperature: float = 0.8  # 0: always the likeliest token; 1: the model's own spread
    top_k: int = 50  # choose among this many likeliest tokens; 0: all
    seed: int = 42  # of the choice; the same seed gives the same text
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps


def sample(argv):
    flags = fineweb.parse_flags(SampleFlags, argv, "train_gpt2.py sample", "Writes text with a trained model.")
    check_ranges(vars(flags))
    device = hellaswag.pick_device(flags.device)
    hellaswag.check_device(device)
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
    data: str | None = None  # a folder of shards or a text file, whose validation part is used; None: the run's
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
    folder = follow(flags.checkpoint)
    is_checkpoint = (folder / "train_state.pt").exists()
    config = load_state(folder, mmap=True)[1] if is_checkpoint else TrainConfig()
    data = find_data(flags.data or config.setup.data)
    tokens = flags.eval_tokens or config.evaluation.eval_tokens
    corpus = open_data(data, tokenizer, model.config)[1]
    model.to(world.device)
    batch_size = max(1, 8192 // model.config.block_size)
    loss, bpb = validate(model, corpus, tokens, batch_size, world, dtype, tokenizer.token_bytes())
    world.print(f"{data}: validation loss {loss:.4f} nats a token, perplexity {math.exp(min(loss, 700)):,.3f}, "
                f"{bpb:.4f} bits per byte, in {reason or str(dtype)[6:]}")
    if examples := load_hellaswag(flags.hellaswag_data, world):
        score = score_hellaswag(model, examples, tokenizer, world, dtype)
        world.print(f"HellaSwag: acc {score['acc']:.2%}, acc_norm {score['acc_norm']:.2%} of {score['n']:,}")
    world.close()


@dataclass
class PlotFlags:
    out_dir: tuple[str, ...] = ("log",)  # run folders to draw, one line each
    x: Literal["step", "tokens", "seconds"] = "step"  # the horizontal axis
    y: Literal["loss", "bpb"] = "loss"  # nats a token, or bits per byte of text
    output: str = "loss.png"  # picture to write


def plot(argv):
    flags = fineweb.parse_flags(PlotFlags, argv, "train_gpt2.py plot", "Draws the loss curves of runs.")
    from matplotlib.figure import Figure
    logs = {folder: read_log(Path(folder, "log.jsonl")) for folder in flags.out_dir}
    is_gpt2s = any(log[0]["tokenizer"] == "gpt2" and "fineweb" in log[0]["data"] for log in logs.values() if log)
    gpt2_loss = 3.2924 if is_gpt2s else None  # of OpenAI's 124M weights, as below, by build-nanogpt
    panels = [("val", "loss", "loss, nats a token (faint: training; dots: validation)", gpt2_loss)]
    if flags.y == "bpb":
        panels = [("val", "bpb", "validation loss, bits per byte", None)]
    if any(line["kind"] == "hellaswag" for log in logs.values() for line in log):
        panels.append(("hellaswag", "acc_norm", "HellaSwag, acc_norm", 0.2955))
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (kind, name, label, gpt2) in zip(axes, panels):
        for i, (folder, log) in enumerate(logs.items()):
            steps = [line for line in log if line["kind"] == "train"]
            x = [line[flags.x] for line in steps]
            x = np.cumsum(x) if flags.x == "seconds" else x
            x_of = {line["step"]: value for line, value in zip(steps, x)}
            if name == "loss":
                axis.plot(x, [line["loss"] for line in steps], color=f"C{i}", alpha=0.3, lw=0.8)
            points = [(x_of[line["step"]], line.get(name)) for line in log
                      if line["kind"] == kind and line["step"] in x_of]
            axis.plot(*np.array(points, dtype=float).reshape(-1, 2).T, "o-", color=f"C{i}", label=folder)
        if gpt2:
            axis.axhline(gpt2, ls="--", color="gray", label="OpenAI's GPT-2 124M")
        axis.set(xlabel=flags.x, ylabel=label)
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
