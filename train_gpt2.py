"""
Trains GPT-2 from scratch: on a laptop's CPU, on one GPU, or on many.

$ python train_gpt2.py                                             # Shakespeare, a minute and a half on two CPU cores
$ python fineweb.py && python train_gpt2.py                        # GPT-2 124M on FineWeb-Edu, one GPU
$ torchrun --standalone --nproc_per_node=8 train_gpt2.py           # the same run on eight GPUs
$ torchrun --standalone --nproc_per_node=8 train_gpt2.py --resume  # ... and on from its newest checkpoint
$ python train_gpt2.py sample --checkpoint log/latest --prompt "ROMEO:"
$ python train_gpt2.py eval --checkpoint log/latest
$ python train_gpt2.py plot --out_dir log

In this order: config and presets, model, Transformers' formats, data, optimizer and schedule, distributed helpers,
evaluation and samples, checkpoints and the log, training, commands.
"""

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from inspect import signature
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import fineweb
import hellaswag
from fineweb import UserError, flag

HERE = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# config and presets

model_flag, data_flag, recipe_flag, eval_flag, system_flag = (
    partial(flag, group=group) for group in ("model", "data", "recipe", "evaluation", "system"))


@dataclass
class GPTConfig:
    """The shape of a model. The defaults are GPT-2 124M (Radford et al. 2019). Raises UserError if it cannot be built."""
    n_layer: int = model_flag(12, "transformer blocks")
    n_head: int = model_flag(12, "query heads in a block")
    n_kv_head: int | None = model_flag(None, "key and value heads, shared by groups of query heads",
                                       default_text="n_head")
    n_embd: int = model_flag(768, "channels")
    block_size: int = model_flag(1024, "tokens of context")
    dropout: float = model_flag(0.0, "chance of dropping an activation in training")
    bias: bool = model_flag(True, "biases in linear layers and layer norms")
    rope: bool = model_flag(False, "rotary instead of learned positions")
    rmsnorm: bool = model_flag(False, "RMSNorm instead of LayerNorm")
    swiglu: bool = model_flag(False, "SwiGLU instead of GELU, of the same size")
    qk_norm: bool = model_flag(False, "RMSNorm on every query and key head")
    window: int = model_flag(0, "tokens that a position sees, itself included; 0: all before it")
    zero_init: bool = model_flag(False, "start residual projections at zero instead of GPT-2's scaled normal")
    # Not flags: the tokenizer's, and what a model folder may say otherwise.
    vocab_size: int = 50257
    eot: int | None = None            # end-of-text's id: the last one of the vocabulary
    n_hidden: int | None = None       # width of the MLP: 4 n_embd, or for SwiGLU 8/3 n_embd rounded up to a multiple of 64
    head_dim: int | None = None       # n_embd / n_head
    rope_theta: float = 10000.0
    norm_eps: float | None = None     # 1e-5 as GPT-2's LayerNorm, 1e-6 as Llama's RMSNorm
    tied: bool = True                 # the output head is the token embedding

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.window < 0 or not 0 <= self.dropout < 1:
            raise UserError(f"--window {self.window} --dropout {self.dropout}: a window is 0 or more, a dropout is in [0, 1)")
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise UserError(f"--n_kv_head {self.n_kv_head} does not divide --n_head {self.n_head}; "
                            f"these do: {divisors(self.n_head)}")
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise UserError(f"--n_head {self.n_head} does not divide --n_embd {self.n_embd}; "
                                f"these do: {divisors(self.n_embd)}")
            self.head_dim = self.n_embd // self.n_head
        if self.rope and self.head_dim % 2:
            raise UserError(f"--rope turns channels in pairs, but n_embd / n_head = {self.head_dim} is odd; "
                            f"change --n_head or --n_embd")
        if self.n_hidden is None:
            self.n_hidden = math.ceil(8 * self.n_embd / 3 / 64) * 64 if self.swiglu else 4 * self.n_embd
        if self.norm_eps is None:
            self.norm_eps = 1e-6 if self.rmsnorm else 1e-5
        if self.eot is None:
            self.eot = self.vocab_size - 1

    @property
    def padded_vocab_size(self):
        return math.ceil(self.vocab_size / 64) * 64  # 50,257 -> 50,304: matmuls like multiples of 64


def divisors(n):
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def auto_or_int(text):
    return text if text == "auto" else fineweb.parse_int(text)


@dataclass
class TrainConfig:
    """A run. The defaults are GPT-2 124M's recipe (GPT-3's, Brown et al. 2020, where GPT-2's paper is silent)."""
    preset: str | None = data_flag(None, "a model with its recipe; any other flag overrides it",
                                   choices=["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "modern"],
                                   default_text="gpt2 for shards, tiny for a text file")
    data: str | None = data_flag(None, "a folder of shards, or a UTF-8 text file (its last 10% validates)",
                                 default_text="edu_fineweb10B beside the script if it holds shards, else input.txt")
    tokenizer: str = data_flag("gpt2", "gpt2 or byte, for a text file; shards name their own",
                               choices=["gpt2", "byte"])
    out_dir: str = data_flag("log", "folder for checkpoints and log.jsonl")
    init_from: str = data_flag("scratch", "scratch, or a model to fine-tune: a Hugging Face name (gpt2) or a folder",
                               metavar="MODEL")
    resume: str | None = data_flag(None, "continue from out_dir's newest good checkpoint, if any; a path names one",
                                   const="auto", metavar="PATH", default_text="off", live=True)

    total_batch_size: int = recipe_flag(524288, "tokens in an optimizer step, over all devices")
    max_steps: int = recipe_flag(19073, "optimizer steps", live=True)
    lr: float = recipe_flag(6e-4, "peak learning rate", live=True)
    min_lr: float | None = recipe_flag(None, "learning rate at the end", default_text="lr / 10", live=True)
    warmup_steps: int = recipe_flag(715, "steps of linear warm-up", live=True)
    schedule: str = recipe_flag("cosine", "cosine decay, or wsd: constant, then linear decay",
                                choices=["cosine", "wsd"], live=True)
    decay_fraction: float = recipe_flag(0.4, "part of the run that wsd decays over", live=True)
    weight_decay: float = recipe_flag(0.1, "decoupled weight decay of matrices")
    beta1: float = recipe_flag(0.9, "AdamW's decay of the mean gradient")
    beta2: float = recipe_flag(0.95, "AdamW's decay of the mean square")
    grad_clip: float = recipe_flag(1.0, "largest gradient norm; 0: no limit")
    optimizer: str = recipe_flag("adamw", "muon: torch.optim.Muon for the blocks' matrices, AdamW for the rest",
                                 choices=["adamw", "muon"])
    momentum_warmup_steps: int = recipe_flag(0, "steps in which Muon's momentum rises from 0.85 to 0.95; 0: 0.95 at once")

    eval_every: int = eval_flag(250, "steps between validations; 0: never", live=True)
    eval_tokens: int = eval_flag(10485760, "validation tokens to use", live=True)
    sample_every: int = eval_flag(250, "steps between samples; 0: never", live=True)
    checkpoint_every: int = eval_flag(1000, "steps between checkpoints; 0: only on a signal", live=True)
    keep_checkpoints: int = eval_flag(2, "newest checkpoints to keep; 0: all", live=True)
    hellaswag_every: int = eval_flag(1000, "steps between HellaSwag scores; 0: never", live=True)
    hellaswag_data: str | None = eval_flag(None, "HellaSwag's jsonl", default_text="downloaded", live=True)

    batch_size: int | str = system_flag("auto", "sequences per device in a micro-step; auto: on CUDA a power of two that "
                                                "fits, elsewhere up to 8,192 tokens",
                                        type=auto_or_int, metavar="N|auto", live=True)
    device: str = system_flag("auto", "auto, cpu, cuda, cuda:1, mps", live=True)
    dtype: str = system_flag("auto", "auto: bfloat16 on CUDA chips and CPUs that have it, else float16 on CUDA, else float32",
                             choices=["auto", "bfloat16", "float16", "float32"], live=True)
    compile: bool | None = system_flag(None, "torch.compile the blocks and the loss", default_text="auto", live=True)
    deterministic: bool = system_flag(False, "bit-for-bit repeatable on CUDA, slower", live=True)
    seed: int = system_flag(1337, "seed of initialisation, data order and dropout")
    loss_chunks: int = system_flag(0, "parts in which the loss is computed, to save memory; 0: auto", live=True)
    wandb: str | None = system_flag(None, "log to this Weights & Biases project too",
                                    metavar="PROJECT", default_text="off", live=True)
    tensorboard: bool = system_flag(False, "log to TensorBoard too, in out_dir", live=True)
    quiet: bool = system_flag(False, "no progress bar or samples", live=True)


PRESETS = {  # what differs from the dataclasses' defaults; learning rates by size from GPT-3's table 2.1
    "gpt2": dict(),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, lr=3e-4),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, lr=2.5e-4),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, lr=2e-4),
    "modern": dict(rope=True, rmsnorm=True, swiglu=True, qk_norm=True, bias=False,
                   optimizer="muon", momentum_warmup_steps=300, schedule="wsd", decay_fraction=0.6, lr=1.8e-3, min_lr=0.0),
    "tiny": dict(n_layer=3, n_head=4, n_embd=128, block_size=128, tokenizer="byte",
                 rope=True, rmsnorm=True, swiglu=True, qk_norm=True, bias=False,
                 optimizer="muon", momentum_warmup_steps=50, schedule="wsd", decay_fraction=0.6, lr=6e-3, min_lr=0.0,
                 warmup_steps=15, weight_decay=0.01, total_batch_size=3072, max_steps=270, eval_every=90, eval_tokens=65536,
                 sample_every=90, checkpoint_every=90, hellaswag_every=0, compile=False),
}

# -----------------------------------------------------------------------------
# model

class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021), channel i paired with channel i + head_dim/2 as in Llama."""

    def __init__(self, config):
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = torch.outer(torch.arange(config.block_size).float(), config.rope_theta ** -exponents)
        angles = torch.cat((angles, angles), dim=1)                             # (block_size, head_dim)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x, positions):
        """x: (B, heads, T, head_dim); positions: a slice, or (B, T) int64."""
        cos, sin = self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)  # (1 or B, 1, T, D)
        low, high = x.chunk(2, dim=-1)
        return (x * cos + torch.cat((-high, low), dim=-1) * sin).type_as(x)


class NoRotary(nn.Module):
    def forward(self, x, positions):
        return x


def sdpa(q, k, v, **options):
    """Scaled dot-product attention; k and v may have fewer heads than q. Off the CPU only flash attention's kernel takes
    that (bfloat16, no mask): for the others they are repeated."""
    autocast = torch.is_autocast_enabled(q.device.type)
    dtype = torch.get_autocast_dtype(q.device.type) if autocast else q.dtype
    flash = dtype == torch.bfloat16 and options.get("attn_mask") is None
    if k.size(1) != q.size(1) and q.device.type != "cpu" and not flash:
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=k.size(1) != q.size(1), **options)


def full_attention(q, k, v, dropout):
    """Causal attention. q: (B, n_head, T, head_dim); k, v: (B, n_kv_head, T, head_dim). Returns a list of parts along T
    of what q's shape has: here one."""
    return [sdpa(q, k, v, is_causal=True, dropout_p=dropout)]


class WindowAttention(nn.Module):
    """Causal attention in which a position sees itself and the window-1 tokens before it, in O(T * window): blocks of
    `window` queries meet the keys of their own block and of the one before it."""

    def __init__(self, config):
        super().__init__()
        self.window = config.window
        if config.window < config.block_size:
            seen = band(config.window, 2 * config.window, config.window, "cpu")
            self.register_buffer("mask", torch.zeros(seen.shape).masked_fill(~seen, -torch.inf), persistent=False)  # (N, 2N)

    def forward(self, q, k, v, dropout):
        """As `full_attention`; in two parts, since to join them would keep a copy of both for the backward pass."""
        B, T, N = q.size(0), q.size(2), self.window
        if T <= N:
            return full_attention(q, k, v, dropout)
        first = full_attention(q[:, :, :N], k[:, :, :N], v[:, :, :N], dropout)  # has no block before it
        if T % N:
            q, k, v = (F.pad(t, (0, 0, 0, -T % N)) for t in (q, k, v))
        # Views that overlap: for one sequence nothing is copied. (B * blocks, heads, N or 2N, D)
        k, v = (t.unfold(2, 2 * N, N).permute(0, 2, 1, 4, 3).flatten(0, 1) for t in (k, v))
        q = q[:, :, N:].unflatten(2, (-1, N)).transpose(1, 2).flatten(0, 1)
        rest = sdpa(q, k, v, attn_mask=self.mask.to(q.dtype), dropout_p=dropout)
        return first + [rest.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)[:, :, :T - N]]


def band(T, S, window, device):
    """The (T, S) mask of T queries that are the last of S tokens; True where the query sees the key."""
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
    return (distance >= 0) & (distance < (window or S))


class LayerCache:
    """Keys and values of the tokens seen so far in one layer, (B, n_kv_head, tokens, head_dim); of the last `window`."""

    def __init__(self, window):
        self.window, self.seen, self.k, self.v = window, 0, None, None

    def positions(self, T):
        return slice(self.seen, self.seen + T)

    def attend(self, q, k, v, attention):
        """Adds the new k and v; q: (B, n_head, T, head_dim), the queries that came with them."""
        T = q.size(2)
        if self.k is not None:
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.seen += T
        self.k, self.v = k[:, :, -self.window:], v[:, :, -self.window:]         # -0: all
        if k.size(2) == T:
            return attention(q, k, v, 0.0)
        if T == 1:
            k, v, mask = self.k, self.v, None
        else:
            mask = band(T, k.size(2), self.window, q.device)
        return [sdpa(q, k, v, attn_mask=mask)]


class KVCache:
    """The layers' caches; `GPT.hidden_states` fills it. `seen` counts the tokens."""

    def __init__(self, layers):
        self.layers = layers

    @property
    def seen(self):
        return self.layers[0].seen


class Branches:
    """In the place of a layer's cache; see `GPT.branches`."""

    def __init__(self, positions, mask):
        self.positions, self.mask = lambda T: positions, mask

    def attend(self, q, k, v, attention):
        return [sdpa(q, k, v, attn_mask=self.mask)]


class Attention(nn.Module):

    def __init__(self, config, rotary, attention):
        super().__init__()
        self.head_dim, self.dropout, self.rotary, self.attention = config.head_dim, config.dropout, rotary, attention
        self.widths = [config.n_head * self.head_dim] + 2 * [config.n_kv_head * self.head_dim]
        self.c_attn = nn.Linear(config.n_embd, sum(self.widths), bias=config.bias)
        self.c_proj = nn.Linear(self.widths[0], config.n_embd, bias=config.bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cache=None):
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, -1, self.head_dim) for t in self.c_attn(x).split(self.widths, dim=-1))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        positions = cache.positions(T) if cache else slice(0, T)
        q, k = self.rotary(q, positions), self.rotary(k, positions)
        if cache:
            parts = cache.attend(q, k, v, self.attention)
        else:
            parts = self.attention(q, k, v, self.dropout if self.training else 0.0)
        parts = [self.c_proj(y.transpose(1, 2).flatten(2)) for y in parts]      # (B, part of T, C)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_hidden, bias=config.bias)
        self.c_proj = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))            # GPT-2's approximation


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

    def __init__(self, config, rotary, attention):
        super().__init__()
        self.norm_1 = make_norm(config)
        self.attn = Attention(config, rotary, attention)
        self.norm_2 = make_norm(config)
        self.mlp = SwiGLU(config) if config.swiglu else MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        x = x + self.drop(self.attn(self.norm_1(x), cache))
        return x + self.drop(self.mlp(self.norm_2(x)))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies, with the head's matmul. The logits exist for one chunk of tokens at a time: its
    gradient is taken at once, so that nothing is kept or computed again for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, chunks, need_grad):
        """x: (N, C); weight: (padded_vocab_size, C); targets: (N,), -1 is ignored. Returns a scalar in nats."""
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        x, w = x.to(dtype), weight.to(dtype)
        loss = torch.zeros((), device=x.device)
        grad_x, grad_w = [], torch.zeros(weight.shape if need_grad else (), device=x.device)
        for xc, tc in zip(x.chunk(chunks), targets.chunk(chunks)):
            logits = (xc @ w.T).float()                                         # (N / chunks, padded_vocab_size)
            logits[:, vocab_size:] = -torch.inf
            counted, index = (tc >= 0)[:, None], tc.clamp(min=0)[:, None]
            lse = logits.logsumexp(dim=1, keepdim=True)
            loss += ((lse - logits.gather(1, index)) * counted).sum()
            if need_grad:  # softmax minus one-hot, in the logits' own memory; zero where nothing counts
                p = logits.sub_(lse.masked_fill(~counted, torch.inf)).exp_()
                p = p.scatter_add_(1, index, -counted.float()).to(dtype)
                grad_x.append(p @ w)
                grad_w += p.T @ xc
        ctx.save_for_backward(*([torch.cat(grad_x), grad_w] if need_grad else []))
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad, grad_w * grad, None, None, None, None


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        rotary = Rotary(config) if config.rope else NoRotary()
        attention = WindowAttention(config) if config.window else full_attention
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = None if config.rope else nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, rotary, attention) for _ in range(config.n_layer))
        self.norm_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight
        self.loss_chunks = 0
        self.loss_sum = ChunkedCrossEntropy.apply
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's: normal of 0.02, in the projections that add to the residual stream 0.02 / sqrt(2 n_layer)."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.normal_(std=0.0 if self.config.zero_init else 0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.ndim == 2:
                p.normal_(std=0.02)
            elif name.endswith("bias"):
                p.zero_()
        for weight in {self.wte.weight, self.lm_head.weight}:
            weight[self.config.vocab_size:] = 0  # the padding rows stay zero: no gradient reaches them

    def num_parameters(self, padding=False):
        n = sum(p.numel() for p in self.parameters())
        heads = 1 if self.config.tied else 2
        return n if padding else n - heads * (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd

    def hidden_states(self, idx, cache=None):
        """idx: (B, T) int64, the tokens after those in `cache`, which it extends; or those of `branches`. Returns
        (B, T, n_embd), normalised. Raises ValueError where cache and idx together are longer than block_size."""
        positions = cache.layers[0].positions(idx.size(1)) if cache else slice(0, idx.size(1))
        if isinstance(positions, slice) and positions.stop > self.config.block_size:
            raise ValueError(f"{positions.stop} tokens, but block_size is {self.config.block_size}")
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe.weight[positions]
        x = self.drop(x)
        for i, block in enumerate(self.h):
            x = block(x, cache.layers[i] if cache else None)
        return self.norm_f(x)

    def logits(self, x):
        """x: (..., n_embd) hidden states. Returns (..., vocab_size): the padding ends here."""
        return self.lm_head(x)[..., :self.config.vocab_size]

    def forward(self, idx, targets=None):
        """idx: (B, T) int64. Returns logits (B, T, vocab_size); with targets (B, T), in which -1 is ignored, the mean
        cross-entropy in nats, a scalar."""
        x = self.hidden_states(idx)
        if targets is None:
            return self.logits(x)
        n = targets.numel()  # chunks of 256 MB of fp32 logits, or more where that would be many; short enough for fp16 sums
        chunks = self.loss_chunks or max(1, n // 8192, min(16, n * self.config.padded_vocab_size // 2**26))
        loss = self.loss_sum(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.config.vocab_size, chunks,
                             torch.is_grad_enabled())
        return loss / (targets >= 0).sum()

    def compile(self):
        """Compiles one block for all of them, and the loss. The embedding stays outside: its compiled gradient on a CPU
        adds in no fixed order."""
        torch._dynamo.config.optimize_ddp = False  # a block is a graph already; DDP's buckets would cut it again
        torch._functorch.config.ban_recompute_materialized_backward = False  # norms and GELUs are made again, not kept
        for block in self.h:
            block.compile(dynamic=False)
        self.loss_sum = torch.compile(self.loss_sum, dynamic=False)

    def new_cache(self):
        return KVCache([LayerCache(self.config.window) for _ in self.h])

    def branches(self, positions, mask):
        """What `hidden_states` takes for rows that hold several texts: positions (B, T) int64 are the tokens' places in
        their texts, mask (B, 1, T, T) bool is True where a token sees another."""
        return KVCache([Branches(positions, mask)] * len(self.h))

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=50, generator=None, use_cache=True):
        """Yields the next tokens, (B, 1) at a time; see `generate`."""
        training = self.training
        self.eval()
        try:
            cache, done = self.new_cache(), torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
            for _ in range(max_new_tokens):
                if idx.size(1) > self.config.block_size:  # full: go on from the last half
                    idx, cache = idx[:, -max(1, self.config.block_size // 2):], self.new_cache()
                if not use_cache:
                    cache = self.new_cache()
                x = self.hidden_states(idx[:, cache.seen:], cache)[:, -1]
                token = sample_token(self.logits(x), temperature, top_k, generator)
                token = token.masked_fill(done, self.config.eot)
                yield token
                done |= token == self.config.eot
                if done.all():
                    return
                idx = torch.cat((idx, token), dim=1)
        finally:
            self.train(training)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=50, generator=None, use_cache=True):
        """Samples after idx (B, T) int64. Returns (B, T + new). A row that reached end-of-text is filled with it, and
        when all have, generation stops. temperature 0 takes the likeliest token; top_k 0 keeps all. When block_size is
        full, the last half of it is kept."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, temperature, top_k, generator, use_cache)), dim=1)

    @classmethod
    def from_pretrained(cls, name_or_folder, **overrides):
        """Opens a Transformers GPT-2, Llama, Mistral or Qwen3 model, or one of this project's: a folder, or a name on
        the Hugging Face hub, which is downloaded. `overrides` change dropout or shorten block_size. Raises UserError
        naming what this model class does not have."""
        folder = model_folder(name_or_folder)
        config, names = read_model_config(folder)
        config, length = replace(config, **overrides), config.block_size
        if config.block_size > length:
            raise UserError(f"--block_size {config.block_size}: {name_or_folder} was made for at most {length}")
        model = cls(config)
        load_model_weights(model, folder, names)
        return model

    def save_pretrained(self, folder, tokenizer=None):
        """Writes a folder that Transformers opens (see `transformers_type`), with the files of `tokenizer` (of
        fineweb.get_tokenizer) if given. Returns the model_type written."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        described, names = describe_model(self.config)
        if tokenizer is not None:
            described["tokenizer"] = tokenizer.name
            tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        save_file(dict(export_weights(self, names)), folder / "model.safetensors", metadata={"format": "pt"})
        return described["model_type"]


def sample_token(logits, temperature, top_k, generator):
    """(B, vocab_size) -> (B, 1)"""
    if temperature == 0:
        return logits.argmax(dim=1, keepdim=True)
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(1):
        logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)

# -----------------------------------------------------------------------------
# Transformers' formats

# Our modules and theirs; # is the layer's number. A tuple: they keep apart what we keep in one matrix.
GPT2_NAMES = {
    "wte": "transformer.wte", "wpe": "transformer.wpe",
    "h.#.norm_1": "transformer.h.#.ln_1", "h.#.norm_2": "transformer.h.#.ln_2",
    "h.#.attn.c_attn": "transformer.h.#.attn.c_attn", "h.#.attn.c_proj": "transformer.h.#.attn.c_proj",
    "h.#.mlp.c_fc": "transformer.h.#.mlp.c_fc", "h.#.mlp.c_proj": "transformer.h.#.mlp.c_proj",
    "norm_f": "transformer.ln_f", "lm_head": "lm_head",
}
LLAMA_NAMES = {  # Mistral's and Qwen3's too
    "wte": "model.embed_tokens",
    "h.#.norm_1": "model.layers.#.input_layernorm", "h.#.norm_2": "model.layers.#.post_attention_layernorm",
    "h.#.attn.c_attn": tuple(f"model.layers.#.self_attn.{x}_proj" for x in "qkv"),
    "h.#.attn.q_norm": "model.layers.#.self_attn.q_norm", "h.#.attn.k_norm": "model.layers.#.self_attn.k_norm",
    "h.#.attn.c_proj": "model.layers.#.self_attn.o_proj",
    "h.#.mlp.c_gate": "model.layers.#.mlp.gate_proj", "h.#.mlp.c_fc": "model.layers.#.mlp.up_proj",
    "h.#.mlp.c_proj": "model.layers.#.mlp.down_proj",
    "norm_f": "model.norm", "lm_head": "lm_head",
}
OWN_TYPE = "train_gpt2"
# The fields of GPTConfig that those formats have a place for; another one must be off, as its default, to use them.
KNOWN_TO_THEM = set("n_layer n_head n_kv_head n_embd block_size dropout bias rope rmsnorm swiglu qk_norm window zero_init "
                    "vocab_size eot n_hidden head_dim rope_theta norm_eps tied".split())


def transformers_type(config):
    """The model_type of the Transformers architecture that computes the same, or this project's own."""
    c = config
    if any(getattr(c, f.name) != f.default for f in fields(c) if f.name not in KNOWN_TO_THEM):
        return OWN_TYPE
    if c.rope and c.rmsnorm and c.swiglu:
        if not c.window and not c.qk_norm:
            return "llama"
        if not c.bias:
            return "qwen3" if c.qk_norm else "mistral"
    plain = not (c.rope or c.rmsnorm or c.swiglu or c.qk_norm or c.window) and c.bias and c.n_kv_head == c.n_head
    return "gpt2" if plain and c.head_dim * c.n_head == c.n_embd else OWN_TYPE


def describe_model(config):
    """Returns config.json's content as a dict, and the table of names (None: our own)."""
    c, kind = config, transformers_type(config)
    if kind == OWN_TYPE:
        return {"model_type": kind, **asdict(c)}, None
    common = {"model_type": kind, "vocab_size": c.vocab_size, "bos_token_id": c.eot, "eos_token_id": c.eot,
              "tie_word_embeddings": c.tied, "dtype": "float32"}
    if kind == "gpt2":
        return {**common, "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
                "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_inner": c.n_hidden,
                "n_positions": c.block_size, "layer_norm_epsilon": c.norm_eps,
                "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout}, GPT2_NAMES
    described = {**common, "architectures": [f"{kind.capitalize()}ForCausalLM"], "hidden_act": "silu",
                 "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head,
                 "hidden_size": c.n_embd, "intermediate_size": c.n_hidden, "head_dim": c.head_dim,
                 "max_position_embeddings": c.block_size, "rms_norm_eps": c.norm_eps, "attention_dropout": c.dropout,
                 "rope_theta": c.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}}
    if kind == "llama":
        described |= {"attention_bias": c.bias, "mlp_bias": c.bias}
    elif kind == "mistral":
        described |= {"sliding_window": c.window}
    else:  # without use_sliding_window and max_window_layers, Qwen3 ignores its window
        described |= {"attention_bias": False, "use_sliding_window": c.window > 0, "sliding_window": c.window or None,
                      "max_window_layers": 0 if c.window else c.n_layer}
    return described, LLAMA_NAMES


def model_folder(name_or_folder):
    """The local folder of a model; a name on the hub is downloaded. Raises UserError."""
    if (Path(name_or_folder) / "config.json").exists():
        return Path(name_or_folder)
    if Path(name_or_folder).exists() or str(name_or_folder).startswith((".", "/", "~")):
        raise UserError(f"{name_or_folder}: no model is here (a model folder holds config.json and model.safetensors)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name_or_folder), allow_patterns=["*.json", "model*.safetensors", "merges.txt"]))
    except Exception as error:  # the hub's many: no network, no such name, gated, ...
        raise UserError(f"{name_or_folder}: no such folder, and it could not be downloaded from the Hugging Face hub "
                        f"({one_line(error)})") from None


def one_line(error):
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def read_model_config(folder):
    """Returns the GPTConfig of a model folder and the table of its names. Raises UserError by name for what the model
    class does not have."""
    path = folder / "config.json"
    try:
        theirs = json.loads(path.read_text())
        kind = theirs["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a model's config.json ({type(error).__name__}: {one_line(error)})") from None
    if kind == OWN_TYPE:
        values = {k: v for k, v in theirs.items() if k not in ("model_type", "tokenizer")}
        if unknown := values.keys() - {f.name for f in fields(GPTConfig)}:
            raise UserError(f"{path}: {min(unknown)} = {values[min(unknown)]!r} is a part that this script does not have")
        return GPTConfig(**values), None

    def must_be(key, *allowed):
        if theirs.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key} = {theirs[key]!r} is not supported (only {' or '.join(map(repr, allowed))})")

    if kind == "gpt2":
        must_be("activation_function", "gelu_new", "gelu_pytorch_tanh")
        must_be("scale_attn_weights", True)
        must_be("scale_attn_by_inverse_layer_idx", False)
        must_be("add_cross_attention", False)
        get = {"n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257,
               "layer_norm_epsilon": 1e-5, "n_inner": None, "tie_word_embeddings": True, "eos_token_id": 50256} | theirs
        return GPTConfig(n_layer=get["n_layer"], n_head=get["n_head"], n_embd=get["n_embd"], n_hidden=get["n_inner"],
                         block_size=get["n_positions"], vocab_size=get["vocab_size"], eot=get["eos_token_id"],
                         norm_eps=get["layer_norm_epsilon"], tied=get["tie_word_embeddings"]), GPT2_NAMES
    if kind not in ("llama", "mistral", "qwen3"):
        raise UserError(f"{path}: model_type {kind!r} is not supported (only gpt2, llama, mistral, qwen3)")
    import transformers

    get = transformers.AutoConfig.from_pretrained(folder).to_dict()  # fills in what the file leaves out
    theirs = get
    rope = get.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path}: rope_parameters {rope} is not supported (only rope_type 'default')")
    must_be("hidden_act", "silu")
    must_be("attention_bias", get.get("mlp_bias", False))
    if kind == "qwen3" and len(set(get["layer_types"])) > 1:
        raise UserError(f"{path}: layer_types differ from layer to layer, which is not supported")
    windowed = kind == "mistral" or kind == "qwen3" and get["layer_types"][0] == "sliding_attention"
    eot = get["eos_token_id"][0] if isinstance(get["eos_token_id"], list) else get["eos_token_id"]
    return GPTConfig(n_layer=get["num_hidden_layers"], n_head=get["num_attention_heads"],
                     n_kv_head=get["num_key_value_heads"], n_embd=get["hidden_size"], n_hidden=get["intermediate_size"],
                     head_dim=get["head_dim"], block_size=get["max_position_embeddings"], vocab_size=get["vocab_size"],
                     eot=eot, norm_eps=get["rms_norm_eps"], rope_theta=rope.get("rope_theta", 10000.0),
                     tied=get["tie_word_embeddings"], bias=bool(get.get("mlp_bias", False)), rope=True, rmsnorm=True,
                     swiglu=True, qk_norm=kind == "qwen3", window=(get["sliding_window"] or 0) if windowed else 0), LLAMA_NAMES


def their_names(ours, names):
    """The tensors' names in Transformers for one of ours, and whether they hold its transpose."""
    if names is None:
        return (ours,), False
    stem, kind = ours.rsplit(".", 1)                                            # "h.3.attn.c_attn", "weight"
    layer = re.match(r"h\.(\d+)\.", stem)
    theirs = names[re.sub(r"^h\.\d+\.", "h.#.", stem)]
    theirs = theirs if isinstance(theirs, tuple) else (theirs,)
    transposed = names is GPT2_NAMES and kind == "weight" and stem.split(".")[-1].startswith("c_")  # its Conv1D
    return tuple(f"{t.replace('#', layer[1] if layer else '')}.{kind}" for t in theirs), transposed


def export_weights(model, names):
    """Yields (name, tensor) as Transformers has them: parts apart, no padding rows, the tied head left out."""
    for ours, p in model.named_parameters():
        tensor = p.detach().cpu()
        if ours in ("wte.weight", "lm_head.weight"):
            tensor = tensor[:model.config.vocab_size]
        theirs, transposed = their_names(ours, names)
        parts = tensor.split(model.h[0].attn.widths) if len(theirs) > 1 else (tensor,)
        for name, part in zip(theirs, parts):
            yield name, (part.T if transposed else part).contiguous()


@torch.no_grad()
def load_model_weights(model, folder, names):
    """Fills the model from the folder's safetensors. Raises UserError if anything is missing, misshapen or left over."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("model*.safetensors"))  # Mistral's repositories hold the same under another name too
    if not files:
        raise UserError(f"{folder}: no model.safetensors; open the model in Transformers and save it again")
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a whole safetensors file ({one_line(error)}); take another copy") from None
    if names is GPT2_NAMES:  # OpenAI's files on the hub have no prefix, and old ones hold the causal masks
        tensors = {k if k.startswith(("transformer.", "lm_head.")) else f"transformer.{k}": v for k, v in tensors.items()
                   if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    for ours, p in model.named_parameters():
        theirs, transposed = their_names(ours, names)
        missing = [name for name in theirs if name not in tensors]
        if missing:
            raise UserError(f"{folder}: the weights lack {missing[0]}, which config.json asks for")
        parts = [tensors.pop(name) for name in theirs]
        tensor = torch.cat([part.T if transposed else part for part in parts])
        target = p
        if ours in ("wte.weight", "lm_head.weight"):
            target = p[:model.config.vocab_size]
        elif ours == "wpe.weight":
            tensor = tensor[:model.config.block_size]
        if tensor.shape != target.shape:
            raise UserError(f"{folder}: {theirs[0]} has shape {tuple(tensor.shape)}, "
                            f"but config.json makes it {tuple(target.shape)}")
        target.copy_(tensor)
    left = [k for k in tensors
            if not k.endswith("rotary_emb.inv_freq") and not (model.config.tied and k == "lm_head.weight")]
    if left:
        raise UserError(f"{folder}: the weights hold {left[0]}, which this model class does not have")


def open_model(name_or_folder, **overrides):
    """A model and its tokenizer."""
    model = GPT.from_pretrained(name_or_folder, **overrides)
    folder = model_folder(name_or_folder)
    name = json.loads((folder / "config.json").read_text()).get("tokenizer")
    if name in ("gpt2", "byte"):  # ours says its name; others come with files
        return model, fineweb.get_tokenizer(name)
    if any((folder / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        tokenizer = fineweb.get_tokenizer(str(folder))
        gpt2 = fineweb.get_tokenizer("gpt2") if tokenizer.vocab_size == 50257 else None
        return model, gpt2 if gpt2 and tokenizer.equals(gpt2) else tokenizer
    if model.config.vocab_size == 50257:
        return model, fineweb.get_tokenizer("gpt2")
    raise UserError(f"{name_or_folder}: no tokenizer files beside the model; save its tokenizer there")

# -----------------------------------------------------------------------------
# data

def permutation(n, *key):
    """A random order of range(n), a function of the key alone (raw PCG64 output: the same on every numpy)."""
    return np.argsort(np.random.PCG64(key).random_raw(n), kind="stable")


class Corpus:
    """One split's tokens, cut into windows of block_size tokens that do not overlap. `shards`: paths, or arrays in
    memory. Raises UserError naming the file that is damaged, or too short."""

    def __init__(self, shards, block_size, vocab_size, name):
        self.shards, self.block_size, self.vocab_size, self.name = shards, block_size, vocab_size, name
        self.counts = np.array([max(0, (len(self.read(s)) - 1) // block_size) for s in shards])
        self.windows = int(self.counts.sum())
        if self.windows == 0:
            raise UserError(f"{name}: {sum(len(self.read(s)) for s in shards)} tokens are fewer than one window of "
                            f"--block_size {block_size} and its target; use more text or a smaller block")
        self.orders = {}                                                        # the few permutations in use

    @staticmethod
    def read(shard):
        return shard if isinstance(shard, np.ndarray) else fineweb.read_shard(shard)

    def order(self, n, *key):
        if key not in self.orders:
            if len(self.orders) > 4:
                self.orders.clear()
            self.orders[key] = permutation(n, *key)
        return self.orders[key]

    def locate(self, position, seed):
        """Where the run's window number `position` lies: shard, window in it. Shards are shuffled by (seed, epoch),
        their windows by (seed, epoch, shard)."""
        epoch, position = divmod(position, self.windows)
        shards = self.order(len(self.shards), seed, epoch)
        ends = self.counts[shards].cumsum()
        i = int(np.searchsorted(ends, position, side="right"))
        shard = int(shards[i])
        count = int(self.counts[shard])
        return shard, int(self.order(count, seed, epoch, shard)[position - ends[i] + count])

    def batch(self, places):
        """places: [(shard, window)]. Returns (len(places), block_size + 1) int64, inputs and targets overlapping."""
        T, rows, opened = self.block_size, [], {}
        for shard, window in places:
            if shard not in opened:
                opened[shard] = self.read(self.shards[shard])
            row = opened[shard][window * T:window * T + T + 1]
            if row.max() >= self.vocab_size:
                where = self.shards[shard] if not isinstance(self.shards[shard], np.ndarray) else self.name
                offset = window * T + int((row >= self.vocab_size).argmax())
                raise UserError(f"{where}: token {row.max()} at offset {offset} is outside the vocabulary of "
                                f"{self.vocab_size}; it was made with another tokenizer, or is damaged")
            rows.append(row)
        return torch.from_numpy(np.stack(rows).astype(np.int64))


class Loader:
    """Walks the training windows in one order, whatever the split: a micro-step takes the next world_size *
    batch_size, this rank the rank-th batch of them. A thread has the next batch ready."""

    def __init__(self, corpus, batch_size, world, seed):
        self.corpus, self.batch_size, self.world, self.seed = corpus, batch_size, world, seed
        self.position, self.pending, self.thread = 0, None, ThreadPoolExecutor(1)

    def read(self, position):
        first = position + self.world.rank * self.batch_size
        batch = self.corpus.batch([self.corpus.locate(p, self.seed) for p in range(first, first + self.batch_size)])
        return batch.pin_memory() if self.world.device_type == "cuda" else batch

    def next_batch(self):
        """Returns x and y on the device, each (batch_size, block_size) int64."""
        pending = self.pending or self.thread.submit(self.read, self.position)
        self.position += self.world.size * self.batch_size
        self.pending = self.thread.submit(self.read, self.position)
        batch = pending.result().to(self.world.device, non_blocking=True)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def state_dict(self):
        epoch, window = divmod(self.position, self.corpus.windows)
        return {"epoch": epoch, "window": window}

    def load_state_dict(self, state):
        self.position, self.pending = state["epoch"] * self.corpus.windows + state["window"], None


def read_text(path):
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert it, for instance with "
                        f"iconv -f latin1 -t utf-8 {path} > utf8.txt") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def shard_tokenizer(folder):
    """The name of the tokenizer that a folder of shards was made with; without a manifest GPT-2's."""
    return (fineweb.read_manifest(folder) or {}).get("tokenizer", "gpt2")


def open_data(path, tokenizer, block_size):
    """The training and the validation corpus of a folder of shards or a text file. Raises UserError."""
    if os.path.isdir(path):
        splits = {split: fineweb.list_shards(path, split) for split in ("train", "val")}
        for split, shards in splits.items():
            if not shards:
                raise UserError(f"{path}: no {split} shards (*_{split}_*.npy); "
                                f"make them with python fineweb.py --out {path}")
    else:
        tokens = np.array(tokenizer.encode(read_text(path)), dtype=np.uint32)
        cut = len(tokens) * 9 // 10
        splits = {"train": [tokens[:cut]], "val": [tokens[cut:]]}
    return [Corpus(shards, block_size, tokenizer.vocab_size, f"{path} ({split})") for split, shards in splits.items()]

# -----------------------------------------------------------------------------
# optimizer and schedule

def make_optimizers(model, config, device_type):
    """AdamW (Loshchilov & Hutter 2019) that decays matrices only; with --optimizer muon the blocks' matrices go to Muon
    (Jordan et al. 2024), its updates scaled to AdamW's so that one learning rate serves both (Liu et al. 2025)."""
    matrices = [p for p in model.h.parameters() if p.ndim == 2] if config.optimizer == "muon" else []
    taken = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2),
                                    eps=1e-8, fused=device_type in ("cuda", "cpu"))]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=config.lr, weight_decay=config.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate(step, config):
    """The rate of the update that follows `step` updates."""
    c, low = config, config.lr / 10 if config.min_lr is None else config.min_lr
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    if c.schedule == "wsd":  # warm-up, stable, decay (Hu et al. 2024)
        remaining = (c.max_steps - step) / max(1, c.decay_fraction * c.max_steps)
        return low + (c.lr - low) * min(1.0, max(0.0, remaining))
    progress = min(1.0, (step - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps))
    return low + (c.lr - low) * 0.5 * (1 + math.cos(math.pi * progress))


def muon_momentum(step, config):
    """Of the update that follows `step` updates: it rises from 0.85 to 0.95 (modded-nanogpt, Jordan et al. 2024)."""
    return 0.95 - 0.1 * max(0, config.momentum_warmup_steps - step) / max(1, config.momentum_warmup_steps)

# -----------------------------------------------------------------------------
# distributed helpers

class RunFailed(UserError):
    """A run that could not go on, through no fault of the command line."""
    exit_code = 1


class World:
    """The processes of the run, as torchrun started them; alone without it."""

    def __init__(self, device="auto"):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
        self.device_type = torch.device(self.device).type
        self.distributed = "RANK" in os.environ
        if self.device_type == "cuda":
            torch.cuda.set_device(self.device)
        if self.distributed:
            store, *_ = next(dist.rendezvous("env://", self.rank, self.size))
            dist.init_process_group("nccl" if self.device_type == "cuda" else "gloo", rank=self.rank, world_size=self.size,
                                    store=dist.PrefixStore(self.agree_on_prefix(store), store))
            self.store = store
        # a node whose own workers were well restarts them without counting it
        restarts = self.sum(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
        self.restarted = restarts > 0 and not self.store.add("refused", 0)

    @property
    def launcher(self):
        """What a command line like this run's begins with."""
        if not self.distributed:
            return "python"
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        return f"torchrun --standalone --nproc_per_node={here}" if here == self.size else "torchrun …"

    def refuse(self, message):
        """Raises a UserError that torchrun's restarts do not take for a run to be resumed."""
        if self.distributed:
            self.store.add("refused", 1)
        raise UserError(message)

    def agree_on_prefix(self, store):
        """torchrun keeps one store over its restarts, with the addresses of processes that are dead: a prefix for the
        keys of those that live. Rank 0 chooses it and answers every greeting that it finds, until all have been heard."""
        own = os.urandom(8).hex()
        if self.rank > 0:
            store.set(f"greeting {self.rank}", own)
            prefix = store.get(own).decode()
            store.add(prefix, 1)
            return prefix
        while store.add(own, 0) < self.size - 1:
            for greeting in store.multi_get([f"greeting {rank}" for rank in range(1, self.size)]):
                store.set(greeting.decode(), own)
            time.sleep(0.02)
        return own

    def print(self, text):
        if self.rank == 0:
            from tqdm import tqdm
            tqdm.write(text)  # goes above a progress bar
            sys.stdout.flush()

    def sum(self, value):
        """All ranks' numbers added up."""
        if not self.distributed:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def mean(self, *values):
        """All ranks' means of these scalar tensors and numbers, as floats: one all-reduce, one read from the device."""
        values = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values])
        if self.distributed:
            dist.all_reduce(values)
        return (values / self.size).tolist()

    def min(self, value):
        box = torch.tensor(value, device=self.device)
        if self.distributed:
            dist.all_reduce(box, op=dist.ReduceOp.MIN)
        return box.item()

    def from_rank_0(self, value):
        box = [value]
        if self.distributed:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def fail(self, error):
        """Ends this process for an error of its own or of another rank; the first rank to fail is the one that reports."""
        first = True
        if self.distributed:
            try:
                first = dist.distributed_c10d._get_default_store().add("failed", 1) == 1
            except Exception:  # the store died with the rank that had it
                first = isinstance(error, UserError)
        if not first:
            os._exit(1)
        raise error

    def close(self):
        if self.distributed:
            dist.destroy_process_group()


def pick_device(device, local_rank):
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: not one of auto, cpu, cuda, cuda:N, mps")
    if device.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise UserError(f"--device {device}: for one process; the processes of torchrun take one device each with --device cuda")
    if device == "cuda":
        device = f"cuda:{local_rank}"
    if device.startswith("cuda") and int(device[5:]) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; "
                        f"start as many processes as devices, or use --device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available here; use --device cpu")
    return device


def pick_dtype(name, device_type):
    """The dtype of activations and matmuls; parameters stay in float32."""
    dtype = hellaswag.pick_dtype(name, device_type)
    old_gpu = name == "auto" and device_type == "cuda" and dtype == torch.float32
    return torch.float16 if old_gpu else dtype


def autocast(device_type, dtype):
    return torch.autocast(device_type, dtype) if dtype != torch.float32 else nullcontext()


def compiler_works(device):
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
        return True
    except Exception:  # no C++ compiler, no Triton, an unknown chip, ...
        return False

# dense bf16 (fp16 where the chip has no bf16) FLOP/s with sums in fp32, from NVIDIA's data sheets and white papers
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L4": 121e12,
              "T4": 65e12, "V100": 125e12, "RTX 3060": 25.5e12, "RTX 3070": 40.6e12, "RTX 3080": 59.5e12,
              "RTX 3090": 71e12, "RTX 4070": 58.3e12, "RTX 4080": 97.5e12, "RTX 4090": 165.2e12, "RTX 5070": 61.7e12,
              "RTX 5080": 112.6e12, "RTX 5090": 209.5e12}


def flops_per_token(model):
    """Of a training step: 6 per parameter in a matmul and 12 per layer, channel and key (PaLM's appendix B; nanoGPT)."""
    c = model.config
    positions = 0 if model.wpe is None else model.wpe.weight.numel()
    keys = min(c.block_size, c.window or c.block_size)
    return 6 * (model.num_parameters() - positions) + 12 * c.n_layer * c.n_head * c.head_dim * keys


def peak_flops(device_type):
    """Of one device, or None where it is unknown."""
    name = torch.cuda.get_device_name() if device_type == "cuda" else ""
    return next((flops for chip, flops in PEAK_FLOPS.items()
                 if re.search(rf"\b{chip}\b(?! Ti| SUPER| D| Laptop|.* MIG)", name)), None)

# -----------------------------------------------------------------------------
# evaluation and samples

@torch.no_grad()
def validate(model, corpus, tokens, batch_size, world, dtype):
    """Mean loss in nats over the first `tokens` tokens of the corpus, rounded up to windows. It does not depend on
    batch_size or world size: ranks take turns, and short batches are filled with ignored rows."""
    windows = min(corpus.windows, math.ceil(tokens / corpus.block_size))
    places = ((shard, w) for shard, count in enumerate(corpus.counts) for w in range(count))
    places = list(islice(places, world.rank, windows, world.size))
    sums, training = [], model.training
    model.eval()
    for i in range(0, len(places), batch_size):
        batch = corpus.batch(places[i:i + batch_size])
        batch = F.pad(batch, (0, 0, 0, batch_size - len(batch)), value=-1).to(world.device)
        x, y = batch[:, :-1].clamp(min=0), batch[:, 1:].contiguous()
        with autocast(world.device_type, dtype):
            sums.append(model(x, y) * (y >= 0).sum())
    model.train(training)
    total = math.fsum(torch.stack(sums).tolist()) if sums else 0.0
    return world.sum(total) / (windows * corpus.block_size)


def uncompiled():
    """A context for shapes that change with every call: compiling them would not pay."""
    started = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if started else nullcontext()


def sample_texts(model, tokenizer, prompt, count, max_new_tokens, world, dtype, seed=42):
    """`count` texts that go on from the prompt. Every rank makes the same ones."""
    idx = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eot]] * count, device=world.device)
    generator = torch.Generator(world.device).manual_seed(seed)
    with autocast(world.device_type, dtype), uncompiled():
        rows = model.generate(idx, max_new_tokens, temperature=0.8, generator=generator).tolist()
    return [tokenizer.decode(row[:row.index(tokenizer.eot, 1)] if tokenizer.eot in row[1:] else row) for row in rows]


def open_hellaswag(path, world):
    """The examples; without a path, None on every rank if one of them cannot download them."""
    examples = problem = None
    try:
        examples = hellaswag.load_examples(path)
    except UserError as error:
        if path:
            raise
        problem = error
    if world.min(int(problem is None)):
        return examples
    world.print(f"HellaSwag is left out: {problem or 'another process could not read it'}")


def score_hellaswag(model, examples, tokenizer, world, dtype):
    """A dict with acc, acc_norm and n; all ranks share the work."""
    with autocast(world.device_type, dtype), uncompiled():
        return hellaswag.evaluate(model, examples, tokenizer.encode, style="completion", device=world.device)

# -----------------------------------------------------------------------------
# checkpoints and the log

def fsync_all(folder):
    for path in (*Path(folder).iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def list_checkpoints(out_dir):
    """The checkpoint folders, oldest first."""
    found = (p for p in Path(out_dir).glob("step_*") if re.fullmatch(r"step_\d{6,}", p.name))
    return sorted(found, key=lambda p: int(p.name[5:]))


def save_checkpoint(out_dir, step, model, tokenizer, state, keep):
    """Writes out_dir/step_NNNNNN under a temporary name, flushes and renames it, points `latest` to it, then deletes
    all but the newest `keep` (0: none). Raises UserError, with the older ones untouched, if it cannot be written."""
    final = Path(out_dir) / f"step_{step:06d}"
    temporary = Path(out_dir) / f".tmp_{final.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, tokenizer)
        torch.save(state, temporary / "train_state.pt")
        fsync_all(temporary)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that --resume stepped over
        temporary.rename(final)
        link = Path(out_dir) / ".tmp_latest"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.replace(Path(out_dir) / "latest")
        fsync_all(out_dir)
    except Exception as error:  # OSError, and what torch and safetensors make of it
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunFailed(f"{final} could not be written ({one_line(error)}); free some space; "
                        f"the newest complete checkpoint is {(list_checkpoints(out_dir) or ['none'])[-1]}") from None
    older = [p for p in list_checkpoints(out_dir) if int(p.name[5:]) <= step]  # a newer one is damaged
    for old in older[:-keep] if keep else []:
        shutil.rmtree(old, ignore_errors=True)
    return final


def read_state(folder, **how):
    """A checkpoint's train_state.pt. Raises UserError naming what is damaged."""
    path = Path(folder) / "train_state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, **how)
        return state | {"model": GPTConfig(**state["model"])}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a checkpoint to resume from has one") from None
    except Exception as error:  # zip, pickle and key errors of a damaged file
        raise UserError(f"{path}: damaged ({one_line(error)})") from None


def read_checkpoint(folder):
    """A checkpoint's state, model and tokenizer. Raises UserError naming what is damaged."""
    state = read_state(folder)
    model = GPT(state["model"])
    load_model_weights(model, Path(folder), describe_model(model.config)[1])
    name = state["config"]["tokenizer"]
    tokenizer = fineweb.get_tokenizer(name if name in ("gpt2", "byte") else str(folder))
    tokenizer.name = name
    return state, model, tokenizer


def run_folder(resume):
    """The out_dir of the checkpoint, or the run, that --resume names."""
    path = Path(resume).resolve()
    return path.parent if (path / "train_state.pt").exists() else path


def find_checkpoint(out_dir, resume, world):
    """The folder, state, model and tokenizer to resume from: the one that `resume` names, or out_dir's newest good one; None if
    out_dir holds none."""
    if resume != "auto" and (Path(resume) / "train_state.pt").exists():
        return Path(resume).resolve(), *read_checkpoint(resume)
    if resume != "auto":
        out_dir = resume
        if not list_checkpoints(out_dir):
            raise UserError(f"--resume {resume}: no checkpoint there; name a step_NNNNNN folder or a run's --out_dir")
    for folder in reversed(list_checkpoints(out_dir)):
        try:
            return folder, *read_checkpoint(folder)
        except UserError as error:
            world.print(f"not resumed from {folder.name}: {error}")
    return None


class RunLog:
    """log.jsonl, one object a line, and the trackers beside it. Only rank 0 writes."""

    def __init__(self, world, config, step, description):
        self.path, self.active, self.wandb, self.board = Path(config.out_dir) / "log.jsonl", world.rank == 0, None, None
        kept = [line for line in read_log(self.path) if line.get("step", 0) <= step] if step and self.path.exists() else []
        self.done = {(line["kind"], line["step"]) for line in kept if line["kind"] not in ("config", "train")}
        self.best = min((line["loss"] for line in kept if line["kind"] == "val"), default=math.inf)
        if not self.active:
            return
        Path(config.out_dir).mkdir(parents=True, exist_ok=True)
        kept = kept or [{"kind": "config", **description}]
        temporary = self.path.with_name(".tmp_log.jsonl")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.path)  # lines of steps that will be taken again are gone
        run_id = kept[0].get("run_id")
        if config.wandb:
            wandb = import_optional("wandb", "--wandb")
            self.wandb = wandb.init(project=config.wandb, id=run_id, resume="allow", config=description, dir=config.out_dir)
        if config.tensorboard:
            import_optional("tensorboard", "--tensorboard")
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(config.out_dir, purge_step=step + 1)

    def write(self, kind, step, **values):
        self.done.add((kind, step))
        if kind == "val":
            self.best = min(self.best, values["loss"])
        if not self.active:
            return
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as error:
            raise RunFailed(f"{self.path}: {error.strerror}; free some space, then add --resume") from None
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        if self.wandb:
            self.wandb.log({"step": step, **numbers})
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)

    def close(self):
        if self.wandb:
            self.wandb.finish()
        if self.board:
            self.board.close()


def read_log(path):
    """The lines of a log.jsonl; a line that a killed run left unfinished is left out. Raises UserError."""
    lines = []
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a run writes it to its --out_dir") from None
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def import_optional(name, wanted_by):
    import importlib
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{wanted_by} needs the package {name}: pip install {name}") from None

# -----------------------------------------------------------------------------
# training

def default_data():
    shards = HERE / "edu_fineweb10B"
    return os.path.relpath(shards if fineweb.list_shards(shards, "train") else HERE / "input.txt")


def resolve(given):
    """Config, model and tokenizer of a new run, from the flags given, and notes for the user. A flag left alone follows
    the preset, and then what was set."""
    data = given.get("data") or default_data()
    if not os.path.exists(data):
        raise UserError(f"--data {data}: no such file or folder; python fineweb.py makes shards, "
                        f"and without --data the script trains on input.txt")
    shards = os.path.isdir(data)
    values = {"preset": "gpt2" if shards else "tiny", **given, "data": data}
    values = {**PRESETS[values["preset"]], **values}
    if shards:
        values["tokenizer"] = shard_tokenizer(data)
        if given.get("tokenizer", values["tokenizer"]) != values["tokenizer"]:
            raise UserError(f"--tokenizer {given['tokenizer']}: the shards in {data} are {values['tokenizer']} tokens")
    config = TrainConfig(**pick(values, TrainConfig))
    check(config)
    torch.manual_seed(config.seed)
    if config.init_from == "scratch":
        tokenizer = fineweb.get_tokenizer(config.tokenizer)
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, eot=tokenizer.eot, **pick(values, GPTConfig)))
    else:
        model, tokenizer = open_for_tuning(config, given, shards)
    notes = []
    for name, part, words in (("warmup_steps", 10, "warm-up shortened to {} steps, a tenth of the run"),
                              ("momentum_warmup_steps", 5, "momentum's warm-up shortened to {} steps, a fifth of the run")):
        most = config.max_steps // part
        if name not in given and getattr(config, name) > most:
            setattr(config, name, most)
            notes.append(f"{words.format(most)} (--{name})")
    T = model.config.block_size
    if "total_batch_size" not in given and config.total_batch_size % T:
        config.total_batch_size = max(1, round(config.total_batch_size / T)) * T
        notes.append(f"{config.total_batch_size:,} tokens a step, to hold whole blocks of {T} (--total_batch_size)")
    return config, model, tokenizer, notes


def pick(values, cls):
    return {f.name: values[f.name] for f in fields(cls) if f.name in values}


def check(config):
    for name in ("total_batch_size", "max_steps", "eval_tokens", "batch_size"):
        if getattr(config, name) != "auto" and getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: must be at least 1")
    for name in ("lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "momentum_warmup_steps", "eval_every",
                 "sample_every", "seed", "checkpoint_every", "keep_checkpoints", "hellaswag_every", "loss_chunks"):
        if (getattr(config, name) or 0) < 0:
            raise UserError(f"--{name} {getattr(config, name)}: must not be negative")
    for name, top in (("beta1", False), ("beta2", False), ("decay_fraction", True)):
        if not (0 <= getattr(config, name) < 1 or top and getattr(config, name) == 1):
            raise UserError(f"--{name} {getattr(config, name)}: must be between 0 and 1")


def open_for_tuning(config, given, shards):
    """The model and tokenizer of --init_from, which decide the shape; a fine-tuning rate unless one is given."""
    shape = [f.name for f in fields(GPTConfig) if f.name in given and f.name not in ("dropout", "block_size")]
    if shape:
        raise UserError(f"--{shape[0]}: --init_from takes its shape from the model it opens; leave the flag out")
    model, tokenizer = open_model(config.init_from, **pick(given, GPTConfig))
    for source, name in (("--tokenizer", given.get("tokenizer")),
                         (f"the shards in {config.data}", shards and config.tokenizer)):
        if name and name != tokenizer.name:
            raise UserError(f"{source}: {name} tokens, but the model of --init_from has its own, {tokenizer.name}")
    config.tokenizer = tokenizer.name
    config.lr = given.get("lr", 5e-5)
    return model, tokenizer


def restore(given, state, model, folder):
    """The config of a run that is resumed: its own, but for the flags marked live."""
    config = TrainConfig(**state["config"])
    was = {**asdict(model.config), **asdict(config)}
    live = {f.name for f in fields(TrainConfig) if f.metadata.get("live")} | {"out_dir"}
    for name, value in given.items():
        same = os.path.realpath(value) == os.path.realpath(was[name]) if name == "data" else value == was[name]
        if name not in live and not same:
            raise UserError(f"--{name} {value}: the run in {folder} has {was[name]}, and a resumed run cannot change it; "
                            f"leave the flag out, or start a new run with another --out_dir")
    for name in live & given.keys():
        setattr(config, name, given[name])
    if "batch_size" not in given:
        config.batch_size = "auto"
    check(config)
    return config


def split_batch(config, model, world, dtype, previous):
    """The batch size of a micro-step and the number of micro-steps. `previous`: what the run had before, kept if it
    divides. Raises UserError naming what works."""
    T, total = model.config.block_size, config.total_batch_size
    if total % (T * world.size):
        unit = T * world.size
        raise UserError(f"--total_batch_size {total} does not divide into {world.size} x --block_size {T}; "
                        f"near it, {max(1, total // unit) * unit} and {(total // unit + 1) * unit} do")
    sequences = total // (T * world.size)
    size = config.batch_size
    if size == "auto":
        fitting = [d for d in range(1, sequences + 1) if sequences % d == 0]
        if previous in fitting:
            size = previous
        elif world.device_type == "cuda":
            size = largest_batch(model, [d for d in fitting if d & (d - 1) == 0], world, dtype)
        else:
            size = max(d for d in fitting if d == 1 or d * T <= 8192)  # a CPU gains nothing from more
    elif sequences % size:
        raise UserError(f"--batch_size {size} does not divide the {sequences} sequences that each device has in a step; "
                        f"these do: {divisors(sequences)}")
    return size, sequences // size


def micro_step(model, size, world, dtype):
    """A forward and a backward pass of so many sequences, with gradients held, as after a first micro-step."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.zeros(size, model.config.block_size, dtype=torch.long, device=world.device)
    with autocast(world.device_type, dtype), uncompiled():
        model(x, x).backward()


def largest_batch(model, sizes, world, dtype):
    """The largest of the sizes that fits on the GPU, from what micro-steps of a few and of twice as many sequences take:
    enough of them that their activations outweigh what a backward pass needs for any."""
    few, peaks, chunks = min(max(1, 4096 // model.config.block_size), max(sizes) // 2), [], model.loss_chunks
    while few and len(peaks) < 2:
        peaks = []
        try:
            for size in (few, 2 * few):
                model.loss_chunks = chunks or 4 * size // few  # of one length: the logits are no cost per sequence
                torch.cuda.reset_peak_memory_stats()
                micro_step(model, size, world, dtype)
                peaks.append(torch.cuda.max_memory_allocated())
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            few //= 2
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    model.loss_chunks = chunks
    largest = 1
    if few:
        free, used = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
        per_sequence, later = (peaks[1] - peaks[0]) / few, (2 + world.distributed) * used  # AdamW's moments, DDP's buckets
        room = 0.92 * (free + used) - later - (2 * peaks[0] - peaks[1])
        largest = max([size for size in sizes if size * per_sequence <= room], default=1)
    return world.min(largest)  # the same on all ranks


def is_out_of_memory(error):
    """CUDA's kind, or what MPS and the CPU raise for it."""
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search("out of memory|can't allocate memory", str(error)))


def out_of_memory(run):
    """The error for a run whose micro-step did not fit, naming a batch that does: tried, smaller and smaller."""
    size, run.ddp = run.batch_size, None
    for fitting in reversed([d for d in range(1, size) if (size * run.micro_steps) % d == 0 and d & (d - 1) == 0]):
        run.model.zero_grad(set_to_none=True)
        if run.world.device_type != "cpu":
            getattr(torch, run.world.device_type).empty_cache()
        try:
            later = 2 * (run.step == 0) + run.world.distributed  # AdamW's moments, DDP's buckets
            held = [torch.empty_like(p) for p in run.model.parameters() for _ in range(later)]
            micro_step(run.model, fitting, run.world, run.dtype)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            continue
        finally:
            held = None
        return RunFailed(f"out of memory with --batch_size {size}; {fitting} fits: add --batch_size {fitting} (the tokens "
                         f"of a step, and so the losses, stay the same); {newest(run.config.out_dir)}")
    return RunFailed(f"out of memory with --batch_size {size}, and with 1; a smaller --block_size or model is needed")


class StopRequest:
    """Notes SIGINT and SIGTERM; the training loop ends after the step at hand. A second one stops at once."""

    def __init__(self):
        self.at = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        patience = 3 if "TORCHELASTIC_RUN_ID" in os.environ else 0  # torchrun passes on a Ctrl-C that came here already
        if self.at is None:
            self.at = time.time()
        elif time.time() - self.at > patience:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Run:
    """Everything that a training run has: made once, changed by `train_step`, saved by `save`."""

    def __init__(self, given, world):
        self.world, self.stop = world, StopRequest()
        resume = given.get("resume") or ("auto" if world.restarted else None)
        if world.restarted and resume != "auto":
            home = given.get("out_dir") or run_folder(resume)
            if list_checkpoints(home):  # they are newer than the one that --resume named at the first start
                given, resume = {**given, "out_dir": str(home)}, "auto"
        found = self.find(given, resume)
        if found:
            folder, state, self.model, self.tokenizer = found
            self.config = restore(given, state, self.model, folder)
            self.config.out_dir = given.get("out_dir", str(folder.parent))
            newer = [p for p in list_checkpoints(self.config.out_dir) if int(p.name[5:]) > state["step"]]
            if resume != "auto" and newer:
                raise UserError(f"--resume {resume}: {newer[-1]} is newer; to go back to step {state['step']}, "
                                f"delete what is newer or give another --out_dir")
            self.step = self.saved = state["step"]
            notes = [f"resumed from {folder} at step {state['step']}"]
        else:
            self.config, self.model, self.tokenizer, notes = resolve(given)
            self.step, self.saved, state = 0, None, None
        config = self.config
        set_precision(config.deterministic)
        self.dtype = pick_dtype(config.dtype, world.device_type)
        self.model.to(world.device)
        self.model.loss_chunks = config.loss_chunks
        self.train_data, self.val_data = open_data(config.data, self.tokenizer, self.model.config.block_size)
        self.batch_size, self.micro_steps = split_batch(config, self.model, world, self.dtype, state and state["batch_size"])
        self.compiled = self.compile(notes)
        self.ddp = self.model
        if world.distributed:
            ddp = nn.parallel.DistributedDataParallel
            known = signature(ddp).parameters
            sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.13
            self.ddp = ddp(self.model, gradient_as_bucket_view=True, **{sync: False})
        self.optimizers = make_optimizers(self.model, config, world.device_type)
        self.scaler = torch.amp.GradScaler(world.device_type, enabled=self.dtype == torch.float16)
        self.loader = Loader(self.train_data, self.batch_size, world, config.seed)
        self.skipped, self.run_id = 0, f"{time.time_ns():x}"
        if state:
            self.load_state_dict(state)
        self.log = RunLog(world, config, self.step, {"run_id": self.run_id, **asdict(config), **asdict(self.model.config)})
        self.examples = open_hellaswag(config.hellaswag_data, self.world) if config.hellaswag_every else None
        self.describe(notes)

    def find(self, given, resume):
        """The checkpoint to go on from, or None to start; rank 0 chooses for all."""
        out_dir, world = given.get("out_dir", TrainConfig.out_dir), self.world
        found = None
        if world.rank == 0:
            if resume:
                found = find_checkpoint(out_dir, resume, world)
            elif list_checkpoints(out_dir) or (Path(out_dir) / "log.jsonl").exists():
                world.refuse(f"{out_dir} already holds a run; add --resume to continue it, or choose another --out_dir")
        folder = world.from_rank_0(found and str(found[0]))
        if folder and world.rank > 0:
            found = Path(folder), *read_checkpoint(folder)
        return found

    def compile(self, notes):
        wanted = self.config.compile
        if wanted is None:
            wanted = self.world.device_type != "mps"
        if wanted and not compiler_works(self.world.device):
            notes.append("no working compiler here: training uncompiled, slower (--no-compile drops this note)")
            wanted = False
        if wanted:
            self.model.compile()
        return wanted

    def describe(self, notes):
        c, w, T = self.config, self.world, self.model.config.block_size
        tokens = self.train_data.windows * T
        w.print(f"data    {c.data}: {tokens:,} tokens to train on, {self.val_data.windows * T:,} to validate, "
                f"{c.tokenizer} (--data)\n"
                f"model   {c.preset}: {self.model.num_parameters():,} parameters (--preset, --init_from)\n"
                f"device  {w.size} x {w.device_type}, {str(self.dtype)[6:]}, {'' if self.compiled else 'not '}compiled "
                f"(--device, --dtype, --compile)\n"
                f"batch   {c.total_batch_size:,} tokens a step = {plural(w.size, 'device')} x "
                f"{plural(self.micro_steps, 'micro-step')} x {plural(self.batch_size, 'sequence')} x {plural(T, 'token')} "
                f"(--total_batch_size, --batch_size)\n"
                f"run     {c.max_steps:,} steps, {c.max_steps * c.total_batch_size / tokens:.2f} times through the data, "
                f"logged and saved in {c.out_dir}/ (--max_steps, --out_dir)")
        if transformers_type(self.model.config) == OWN_TYPE:
            notes.append("Transformers has no such mixture of parts: only this script will read the checkpoints")
        for note in notes:
            w.print(f"note    {note}")

    def state_dict(self):
        """Tensors and plain values only. Randomness needs no state: each step seeds from (seed, step, rank)."""
        return {"step": self.step, "config": asdict(self.config), "model": asdict(self.model.config),
                "optimizers": [o.state_dict() for o in self.optimizers], "scaler": self.scaler.state_dict(),
                "loader": self.loader.state_dict(), "batch_size": self.batch_size, "skipped": self.skipped,
                "run_id": self.run_id}

    def load_state_dict(self, state):
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["loader"])
        self.skipped, self.run_id = state["skipped"], state["run_id"]

    def train_step(self):
        """One optimizer step. Returns what `log.jsonl` holds of it, and whether a signal asked any rank to stop."""
        started, config, world = time.time(), self.config, self.world
        seed_everything(config.seed, self.step, world.rank)
        total = torch.zeros((), device=world.device)
        for micro in range(self.micro_steps):
            x, y = self.loader.next_batch()
            if world.distributed:  # gradients meet once a step
                self.ddp.require_backward_grad_sync = micro == self.micro_steps - 1
            with autocast(world.device_type, self.dtype):
                loss = self.ddp(x, y)
            self.scaler.scale(loss / self.micro_steps).backward()
            total += loss.detach() / self.micro_steps
        lr, momentum = learning_rate(self.step, config), muon_momentum(self.step, config)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = lr
                if "momentum" in group:  # Muon's
                    group["momentum"] = momentum
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        loss, norm, stop = world.mean(total, norm, self.stop.at is not None)  # the step's one host read
        for optimizer in self.optimizers:
            if math.isfinite(norm):  # not the scaler's own test, which is an optimizer's: one bad gradient stops both
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        self.step += 1
        seconds = time.time() - started
        rate = config.total_batch_size / seconds
        peak = peak_flops(world.device_type)
        line = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": self.step * config.total_batch_size,
                "seconds": seconds, "tokens_per_second": rate,
                "mfu": rate * flops_per_token(self.model) / (peak * world.size) if peak else None}
        return line | ({"skipped": True} if self.skipped else {}), stop > 0

    def save(self):
        """Returns False, having said why, if the checkpoint could not be written."""
        problem = None
        if self.world.rank == 0:
            try:
                save_checkpoint(self.config.out_dir, self.step, self.model, self.tokenizer, self.state_dict(),
                                self.config.keep_checkpoints)
            except RunFailed as error:
                problem = str(error)
        problem = self.world.from_rank_0(problem)
        if problem:
            self.world.print(f"warning: {problem}")
        else:
            self.saved = self.step
        return not problem

    def evaluate(self):
        """Whatever is due after this step. What the log has already (before a resume) is not done again."""
        c, model, world, log = self.config, self.model, self.world, self.log
        if self.due("val", c.eval_every):
            loss = validate(model, self.val_data, c.eval_tokens, self.batch_size, world, self.dtype)
            log.write("val", self.step, loss=loss, perplexity=math.exp(min(loss, 700)))
            world.print(f"step {self.step:>6,}  validation loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):,.2f}"
                        f"  (best loss {log.best:.4f})")
        if self.examples and self.due("hellaswag", c.hellaswag_every):
            score = score_hellaswag(model, self.examples, self.tokenizer, world, self.dtype)
            log.write("hellaswag", self.step, **{k: score[k] for k in ("acc", "acc_norm", "n")})
            world.print(f"step {self.step:>6,}  HellaSwag acc {score['acc']:.2%}, acc_norm {score['acc_norm']:.2%} "
                        f"of {score['n']:,}")
        if self.due("sample", c.sample_every):
            prompt = SAMPLE_PROMPTS.get(self.tokenizer.name, "\n")
            text = sample_texts(model, self.tokenizer, prompt, 1, 200, world, self.dtype)[0]
            log.write("sample", self.step, text=text)
            if not c.quiet:
                world.print(f"step {self.step:>6,}  sample:\n{text.strip()}\n")

    def due(self, kind, every):
        now = every > 0 and self.step > 0 and (self.step == self.config.max_steps or self.step % every == 0)
        return now and (self.saved != self.step if kind == "checkpoint" else (kind, self.step) not in self.log.done)


def plural(n, noun):
    return f"{n:,} {noun}{'s' if n != 1 else ''}"


SAMPLE_PROMPTS = {"gpt2": "Hello, I'm a language model,"}


def seed_everything(*key):
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def set_precision(deterministic):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # what stays float32 on a GPU
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


class Progress:
    """The terminal during a run: a bar with loss, rate and time left, or a line now and then where it is no terminal."""

    def __init__(self, run):
        from tqdm import tqdm
        self.run, self.first, self.printed = run, run.step, time.time()
        self.plain = not sys.stderr.isatty() and not run.config.quiet and run.world.rank == 0
        self.bar = tqdm(total=run.config.max_steps, initial=run.step, unit="step", dynamic_ncols=True,
                        disable=self.plain or run.config.quiet or run.world.rank > 0)

    def update(self, line):
        text = f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        done, left = self.run.step - self.first, self.run.config.max_steps - self.run.step
        if done == 1:
            self.clock = time.time()  # the first step compiles
        if done == 10 and left > 10 and not self.run.config.quiet:
            seconds = left * (time.time() - self.clock) / 9
            self.run.world.print(f"step {self.run.step:>6,}  about {seconds / 60:,.1f} minutes of training left at this rate, "
                                 f"evaluations aside")
        if self.plain and (done == 1 or left == 0 or time.time() - self.printed > 10):
            self.printed = time.time()
            self.run.world.print(f"step {self.run.step:>6,}  {text}, lr {line['lr']:.2e}, norm {line['grad_norm']:.3f}")
        if "skipped" in line:
            self.run.world.print(f"step {self.run.step:>6,}  the gradient was not finite; the update was skipped")


def run_training(given, world):
    run = Run(given, world)
    out_dir, stopped, progress = run.config.out_dir, False, Progress(run)
    while True:
        saved = run.save() if stopped and run.saved != run.step or run.due("checkpoint", run.config.checkpoint_every) else True
        if stopped:
            break
        run.evaluate()
        if run.step >= run.config.max_steps:
            break
        try:
            line, stopped = run.train_step()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            line = None
        if line is None:  # outside of the handler, whose traceback holds the tensors
            raise out_of_memory(run)
        run.log.write("train", run.step, **line)
        progress.update(line)
        if run.skipped == 10:
            raise RunFailed(f"10 steps in a row had a gradient that was not finite, the last one step {run.step}; "
                            f"{newest(out_dir)}; lower --lr, or look at the data")
    progress.bar.close()
    run.log.close()
    if not saved:
        raise RunFailed(f"the last checkpoint could not be written; {newest(out_dir)}")
    command = os.path.relpath(HERE / "train_gpt2.py")
    if stopped:
        world.print(f"stopped by a signal at step {run.step:,}; go on with:\n"
                    f"  {world.launcher} {command} --out_dir {out_dir} --resume")
    elif run.saved == run.step:
        world.print(f"done at step {run.step:,}; sample from the model with:\n"
                    f"  python {command} sample --checkpoint {out_dir}/latest --prompt \"ROMEO:\"")


def newest(out_dir):
    """The newest checkpoint, for a message."""
    found = list_checkpoints(out_dir)
    return f"the last good checkpoint is {found[-1]}" if found else "no checkpoint was written"


def saved_device(given):
    """The --device of the run that is resumed, perhaps on another number of devices."""
    resume = given.get("resume")
    folder = run_folder(resume) if resume not in (None, "auto") else Path(given.get("out_dir", TrainConfig.out_dir))
    lines = read_log(folder / "log.jsonl") if resume and (folder / "log.jsonl").exists() else []
    device = lines[0].get("device", "auto") if lines else "auto"
    return device.split(":")[0] if "RANK" in os.environ else device


def train(argv):
    given = fineweb.parse_flags(argv, GPTConfig, TrainConfig, prog="train_gpt2.py", description=__doc__.strip())
    world = World(given.get("device") or saved_device(given))
    try:
        run_training(given, world)
    except (Exception, KeyboardInterrupt) as error:
        world.fail(error)
    world.close()

# -----------------------------------------------------------------------------
# commands

@dataclass
class SampleConfig:
    checkpoint: str = flag("log/latest", "a checkpoint, a model folder, or a Hugging Face name (gpt2)",
                           metavar="MODEL")
    prompt: str = flag("\n", "text to go on from", default_text="a line break")
    num_samples: int = flag(1, "texts, one after the other")
    max_new_tokens: int = flag(500, "tokens of each at most; it ends earlier at end-of-text")
    temperature: float = flag(0.8, "0: always the likeliest token; 1: the model's own spread")
    top_k: int = flag(50, "choose among this many likeliest tokens; 0: all")
    seed: int = flag(42, "of the choice; the same seed gives the same text")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")


@dataclass
class EvalConfig:
    checkpoint: str = flag("log/latest", "a checkpoint, a model folder, or a Hugging Face name (gpt2)",
                           metavar="MODEL")
    data: str | None = flag(None, "a folder of shards or a text file, whose validation part is used",
                            default_text="the run's")
    eval_tokens: int | None = flag(None, "validation tokens to use", default_text="the run's")
    hellaswag_data: str | None = flag(None, "HellaSwag's jsonl", default_text="downloaded")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")


@dataclass
class PlotConfig:
    out_dir: str = flag("log", "run folders to draw, one line each", nargs="+")
    x: str = flag("step", "the horizontal axis", choices=["step", "tokens", "seconds"])
    output: str = flag("loss.png", "picture to write")


def given_config(cls, argv, name, description):
    return cls(**fineweb.parse_flags(argv, cls, prog=f"train_gpt2.py {name}", description=description))


def sample(argv):
    c = given_config(SampleConfig, argv, "sample", "Writes text with a trained model.")
    if c.temperature < 0 or c.top_k < 0 or c.max_new_tokens < 0 or c.num_samples < 1:
        raise UserError("--temperature, --top_k and --max_new_tokens must not be negative, --num_samples at least 1")
    device = pick_device(c.device, 0)
    model, tokenizer = open_model(c.checkpoint)
    model.to(device)
    prompt = torch.tensor([tokenizer.encode(c.prompt) or [tokenizer.eot]], device=device)
    generator = torch.Generator(device).manual_seed(c.seed)
    for i in range(c.num_samples):
        print(c.prompt.lstrip("\n") if i == 0 else "\n---\n" + c.prompt.lstrip("\n"), end="", flush=True)
        ids, shown = prompt[0].tolist(), tokenizer.decode(prompt[0].tolist())  # some decoders drop a text's first space
        for token in model.stream(prompt, c.max_new_tokens, c.temperature, c.top_k, generator):
            if token.item() == model.config.eot:
                break
            ids.append(token.item())
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # a character whose other bytes are still to come
                print(text[len(shown):], end="", flush=True)
                shown = text
        print(tokenizer.decode(ids)[len(shown):], flush=True)


def evaluate(argv):
    c = given_config(EvalConfig, argv, "eval", "Validation loss, perplexity and HellaSwag of a model.")
    world = World(c.device)
    dtype = pick_dtype("auto", world.device_type)
    model, tokenizer = open_model(c.checkpoint)
    ours = (Path(c.checkpoint) / "train_state.pt").exists()
    run = TrainConfig(**read_state(c.checkpoint, mmap=True)["config"]) if ours else TrainConfig(data=default_data())
    data, tokens = c.data or run.data, run.eval_tokens if c.eval_tokens is None else c.eval_tokens
    if tokens < 1:
        raise UserError(f"--eval_tokens {tokens}: must be at least 1")
    if not os.path.exists(data):
        raise UserError(f"--data {data}: no such file or folder")
    model.to(world.device)
    corpus = open_data(data, tokenizer, model.config.block_size)[1]
    loss = validate(model, corpus, tokens, max(1, 8192 // model.config.block_size), world, dtype)
    world.print(f"{data}: validation loss {loss:.4f} nats a token, perplexity {math.exp(min(loss, 700)):,.3f}")
    if examples := open_hellaswag(c.hellaswag_data, world):
        score = score_hellaswag(model, examples, tokenizer, world, dtype)
        world.print(f"HellaSwag: acc {score['acc']:.2%}, acc_norm {score['acc_norm']:.2%} of {score['n']:,}")
    world.close()


GPT2_VAL_LOSS, GPT2_HELLASWAG = 3.2924, 0.2955  # OpenAI's 124M weights on FineWeb-Edu and HellaSwag, by build-nanogpt


def plot(argv):
    c = given_config(PlotConfig, argv, "plot", "Draws the loss curves of runs.")
    folders = [c.out_dir] if isinstance(c.out_dir, str) else c.out_dir
    runs = {folder: read_log(Path(folder) / "log.jsonl") for folder in folders}
    import_optional("matplotlib", "plot").use("Agg")
    from matplotlib import pyplot as plt

    scored = any(line["kind"] == "hellaswag" for lines in runs.values() for line in lines)
    figure, all_axes = plt.subplots(1, 1 + scored, figsize=(7 * (1 + scored), 4.5), layout="constrained", squeeze=False)
    axes = all_axes[0]
    for folder, lines in runs.items():
        steps = [line for line in lines if line["kind"] == "train" and line["loss"] is not None]
        at, clock = {}, 0.0  # a step's place on the horizontal axis
        for line in steps:
            clock += line["seconds"]
            at[line["step"]] = {"step": line["step"], "tokens": line["tokens"], "seconds": clock}[c.x]
        color = axes[0].plot(list(at.values()), [line["loss"] for line in steps], alpha=0.3, lw=0.8)[0].get_color()
        for i, (kind, value) in enumerate([("val", "loss"), ("hellaswag", "acc_norm")][:1 + scored]):
            points = [(at[line["step"]], line[value]) for line in lines if line["kind"] == kind and line["step"] in at]
            axes[i].plot(*zip(*points) if points else ([], []), "o-", color=color, label=folder)
    if any(line.get("tokenizer") == "gpt2" and "fineweb" in line["data"] for lines in runs.values() for line in lines[:1]):
        axes[0].axhline(GPT2_VAL_LOSS, ls="--", color="gray", label="OpenAI's GPT-2 124M")
    if scored:
        axes[1].axhline(GPT2_HELLASWAG, ls="--", color="gray", label="OpenAI's GPT-2 124M")
        axes[1].set(xlabel=c.x, ylabel="HellaSwag, acc_norm")
    axes[0].set(xlabel=c.x, ylabel="loss, nats a token (faint: training; dots: validation)")
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(c.output, dpi=150)
    print(f"wrote {c.output}")


def main(argv):
    commands = {"sample": sample, "eval": evaluate, "plot": plot}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    return train(argv)


if __name__ == "__main__":
    fineweb.run_cli(main)
