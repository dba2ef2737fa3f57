"""
GPT-2 and its modern form, trained from scratch in plain PyTorch: read this before train_gpt2.py.

$ python tests/plain_gpt2.py tiny 30        # a preset's name, and how many steps

It computes what train_gpt2.py computes, without what makes that one fast, safe and distributed.
tests/test_plain.py holds both to the same losses, gradient norms and learning rates, to 1e-4 in
float32: whoever changes a formula changes it in both. B: sequences, T: tokens, C: channels.
"""
import math
import sys
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view

# SETTINGS. By default GPT-2 124M (Radford et al. 2019), with GPT-3's recipe (Brown et al. 2020).
@dataclass
class Settings:
    data: str = "edu_fineweb10B"  # a folder of token files, or a text whose bytes are the tokens
    vocab_size: int = 50257  # token ids: 256 bytes, 50,000 merges of them, end-of-text
    n_layer: int = 12
    n_head: int = 12  # heads of queries
    n_kv_head: int = 12  # heads of keys and values
    n_embd: int = 768  # channels
    block_size: int = 1024  # tokens of context
    window: int = 0  # tokens that a position sees in each layer, itself included; 0: all so far
    modern: bool = False  # RoPE, RMSNorm, SwiGLU, QK-norm and no biases in place of GPT-2's parts
    total_batch_size: int = 524288  # tokens in an optimizer step
    batch_size: int = 4  # sequences in a micro-step: what fits in memory
    optimizer: str = "adamw"  # or muon
    schedule: str = "cosine"  # or wsd
    max_steps: int = 19073  # 10 billion tokens
    lr: float = 6e-4  # the highest learning rate
    min_lr: float = 6e-5  # the one that it falls to after the last update
    warmup_steps: int = 715
    decay_fraction: float = 0.4  # part of the steps in which wsd decays
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    eval_tokens: int = 10485760
    seed: int = 1337

MODERN = Settings(modern=True, optimizer="muon", schedule="wsd", decay_fraction=0.6, lr=1.8e-3,
                  min_lr=0.0)
BYTES = dict(data="input.txt", vocab_size=257)  # Shakespeare: 256 bytes, and an end-of-text
SMALL = dict(BYTES, n_layer=2, n_head=4, n_kv_head=4, n_embd=64, block_size=32, lr=1e-3,
             min_lr=1e-4, total_batch_size=512, eval_tokens=4010)
PRESETS = {
    "gpt2": Settings(), "modern": MODERN,
    "tiny": replace(MODERN, **BYTES, n_layer=3, n_head=4, n_kv_head=4, n_embd=128, block_size=128,
                    total_batch_size=3072, batch_size=8, max_steps=300, lr=6e-3, warmup_steps=15,
                    weight_decay=0.01, eval_tokens=65536),
    "small-gpt2": Settings(**SMALL),  # these two run in seconds and use every part, for the test
    "small-modern": replace(MODERN, **(SMALL | dict(n_kv_head=2, window=12, lr=6e-3))),
}

# MODEL. Each position of a sequence predicts the token after it. Its channels, the residual stream,
# run through all blocks; attention and MLP read a normalised copy of them and add what they find.
# Only attention carries anything from one position to another.
def make_norm(s):
    # RMSNorm is LayerNorm without mean and bias: cheaper, and no worse. The weights of both, one
    # for each channel, begin at one.
    return nn.RMSNorm(s.n_embd, eps=1e-6) if s.modern else nn.LayerNorm(s.n_embd, eps=1e-5)

def rotate(x):
    """RoPE (Su et al. 2021). x: (B, heads, T, head_dim); channel i pairs with i + head_dim / 2."""
    # Pair i turns by 10000^(-2i/head_dim) radians a position: the first pairs turn fast and tell
    # neighbours apart, the last slowly and tell near from far. In the dot product of a query and a
    # key that were both turned by their positions, only the distance between the two is left. So
    # positions need not be learned; values are not turned.
    T, head_dim = x.shape[-2:]
    angles = torch.outer(torch.arange(T), 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim))
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()  # (T, head_dim / 2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

class Attention(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s, self.head_dim = s, s.n_embd // s.n_head
        # One matrix makes all heads of queries, then those of keys, then those of values. With
        # grouped heads, n_kv_head < n_head, a group of query heads shares one head of keys and
        # values: of all tokens so far, a model that writes text has fewer of these to keep.
        width = (s.n_head + 2 * s.n_kv_head) * self.head_dim
        self.c_attn = nn.Linear(s.n_embd, width, bias=not s.modern)
        self.c_proj = nn.Linear(s.n_embd, s.n_embd, bias=not s.modern)
        # QK-norm: queries and keys of RMS 1 times a learned weight, so that attention scores stay
        # small as the matrices grow. One weight a channel of a head, shared by the heads.
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if s.modern else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if s.modern else nn.Identity()

    def forward(self, x):
        s, (B, T, C) = self.s, x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, all, T, …)
        q, k, v = heads.split([s.n_head, s.n_kv_head, s.n_kv_head], dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if s.modern:
            q, k = rotate(q), rotate(k)
        # Neighbours form a group: four query heads over two of keys meet the heads 0, 0, 1, 1.
        k, v = [heads.repeat_interleave(s.n_head // s.n_kv_head, dim=1) for heads in (k, v)]
        # Query i sees key j if j is not after it (causal: it must not see what it predicts), and
        # with a window of N if j is one of the last N positions up to i: i - j from 0 to N - 1.
        distance = torch.arange(T)[:, None] - torch.arange(T)  # i - j
        mask = (distance >= 0) & (distance < (s.window or T))
        # A dot product of head_dim terms has a spread of sqrt(head_dim); divided by it, the softmax
        # begins soft. Where the mask forbids, a score of -inf makes the weight zero.
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)  # (B, n_head, T, T)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        return self.c_proj((weights @ v).transpose(1, 2).reshape(B, T, C))

class MLP(nn.Module):
    def __init__(self, s):
        super().__init__()
        # SwiGLU (Shazeer 2020) has three matrices where GPT-2's MLP has two: at a width of 8/3 C
        # both have 8 C² weights. It is rounded up to a multiple of 64, which matmuls like.
        width = math.ceil(8 * s.n_embd / 3 / 64) * 64 if s.modern else 4 * s.n_embd
        self.c_fc = nn.Linear(s.n_embd, width, bias=not s.modern)
        self.c_proj = nn.Linear(width, s.n_embd, bias=not s.modern)
        self.c_gate = nn.Linear(s.n_embd, width, bias=False) if s.modern else None

    def forward(self, x):
        if self.c_gate is None:
            return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # as in GPT-2's release
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))

class Block(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.ln_1, self.attn = make_norm(s), Attention(s)
        self.ln_2, self.mlp = make_norm(s), MLP(s)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s
        rows = math.ceil(s.vocab_size / 64) * 64  # for the matmuls; the last ones are never used
        self.wte = nn.Embedding(rows, s.n_embd)  # a vector for each token
        self.wpe = None if s.modern else nn.Embedding(s.block_size, s.n_embd)  # and each position
        self.h = nn.ModuleList(Block(s) for _ in range(s.n_layer))
        self.ln_f = make_norm(s)
        # The head is tied to the embedding: they are one tensor, which gets both gradients. What a
        # token means is learned once for both, and GPT-2 saves a second 39 million weights.
        self.lm_head = nn.Linear(s.n_embd, rows, bias=False)
        self.lm_head.weight = self.wte.weight
        # Linear and Embedding draw weights as they are made, and here all matrices are drawn again:
        # train_gpt2.py makes its modules and draws in this order, and begins from the same numbers.
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # 2 n_layer such matrices add to the residual stream. Divided by the root of their
                # number, they start it at the same size however deep the model is.
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * s.n_layer))
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)  # embeddings too
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx):  # (B, T) int64, T = block_size -> logits, (B, T, vocab_size)
        x = self.wte(idx) if self.s.modern else self.wte(idx) + self.wpe.weight
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))[..., :self.s.vocab_size]

# DATA. A corpus is a list of shards, arrays of token ids, each cut into windows of T inputs that do
# not overlap. Seed and epoch put all windows in one order, and each step takes the next
# total_batch_size / T of them: devices and micro-steps only share them out. So losses depend on
# neither, but for rounding, a resumed run finds its place by its step, and an epoch shows every
# window once, whereas windows at random places show some twice and over a third of the text never.
def load_data(s):
    """The training and the validation shards, (windows, T + 1) each: a list for either."""
    path = Path(__file__).resolve().parents[1] / s.data
    if path.is_dir():
        splits = [[np.load(file, mmap_mode="r") for file in sorted(path.glob(f"*_{split}_*.npy"))]
                  for split in ("train", "val")]
    else:
        tokens = np.fromfile(path, dtype=np.uint8)
        cut = len(tokens) * 9 // 10  # the last tenth validates
        splits = [[tokens[:cut]], [tokens[cut:]]]
    # T inputs and, one further on, their T targets: a window begins with the last token of the one
    # before. At the end of a shard, what fills no window is left out. These are views, not copies.
    T = s.block_size
    return [[sliding_window_view(tokens, T + 1)[::T] for tokens in shards] for shards in splits]

def shuffled(n, *key):
    """A random order of range(n), by the key alone: from raw bits, the same in every numpy."""
    return np.argsort(np.random.PCG64(key).random_raw(n), kind="stable")

def training_windows(shards, s):
    # Goes on for ever. The shards are shuffled, and the windows within each, anew in every epoch.
    # All of one shard comes before the next: one is read at a time, however large the corpus.
    for epoch in count():
        for shard in shuffled(len(shards), s.seed, epoch).tolist():
            for i in shuffled(len(shards[shard]), s.seed, epoch, shard):
                yield shards[shard][i]

# OPTIMIZERS AND SCHEDULES.
def make_optimizers(model, s):
    muon, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.ndim < 2:
            vectors.append(p)
        elif s.optimizer == "muon" and name.startswith("h."):
            muon.append(p)
        else:
            matrices.append(p)
    # Weight decay takes lr * weight_decay of a weight in each step, apart from the gradient. It
    # bounds matrices and embeddings, whose products could grow without end. Biases and the weights
    # of norms shift and scale single channels, and zero is no natural place for them.
    groups = [dict(params=matrices, weight_decay=s.weight_decay),
              dict(params=vectors, weight_decay=0)]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)]
    # Muon (Jordan et al. 2024) averages the gradient of a matrix and then makes its singular values
    # all about 1: rare directions are learned as fast as common ones. Embeddings are lists of
    # vectors, not maps, and stay with AdamW. match_rms_adamw, a factor of 0.2 sqrt(longer side),
    # makes updates as large as AdamW's, so that one learning rate serves both (Liu et al. 2025).
    if muon:
        optimizers.append(torch.optim.Muon(muon, weight_decay=s.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers

def learning_rate(step, s):
    """Of update number `step`, counted from 0."""
    # Warm-up, in a line from lr / warmup to lr, within a tenth of the run: at first AdamW's
    # averages are of few gradients.
    warmup = min(s.warmup_steps, s.max_steps // 10)
    if step < warmup:
        return s.lr * (step + 1) / warmup
    # wsd (warm-up, stable, decay; Hu et al. 2024): lr until decay_fraction of the steps is left,
    # and from there in a line to min_lr. Until it decays, a run can still be made longer. cosine:
    # after the warm-up half a wave, from lr down to min_lr, steepest half-way.
    if s.schedule == "wsd":
        height = min(1, (1 - step / s.max_steps) / s.decay_fraction)
    else:
        height = (1 + math.cos(math.pi * (step - warmup) / (s.max_steps - warmup))) / 2
    return s.min_lr + (s.lr - s.min_lr) * height

def muon_momentum(step, s):
    # Muon averages over about 1 / (1 - momentum) gradients, and early ones are soon out of date. So
    # momentum rises in a line from 0.85 (7 gradients) to 0.95 (20), over the first 300 steps, or
    # over the first sixth of a run of fewer than 1,800.
    return 0.85 + 0.1 * min(1, max(step / 300, 6 * step / s.max_steps))

# TRAINING.
def loss_sum(model, windows):
    """The cross-entropy of the predictions in nats, summed over all tokens of a list of windows."""
    ids = torch.from_numpy(np.stack(windows).astype(np.int64))
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

def train(s):
    """Prints a line a step. Returns what train_gpt2.py logs of each, and the validation loss."""
    train_shards, val_shards = load_data(s)
    torch.manual_seed(s.seed)
    model = GPT(s)
    optimizers, windows, log = make_optimizers(model, s), training_windows(train_shards, s), []
    for step in range(s.max_steps):
        # Half a million tokens fit in few memories at once. Gradients of a sum add up, so each
        # micro-step adds its part, and the update follows the last. A part is a sum over tokens,
        # divided by those of the whole step: every token counts the same, however it is split.
        loss = 0.0
        for _ in range(s.total_batch_size // s.block_size // s.batch_size):
            part = loss_sum(model, list(islice(windows, s.batch_size))) / s.total_batch_size
            part.backward()
            loss += part.item()
        # Clipping: if the norm of all gradients, as one vector, is above grad_clip, all are scaled
        # down to it, so that a rare bad batch moves little. It returns the norm before.
        norm = nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip).item()
        lr = learning_rate(step, s)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
                if "momentum" in group:  # Muon's
                    group["momentum"] = muon_momentum(step, s)
            optimizer.step()
            optimizer.zero_grad()
        log.append({"step": step + 1, "loss": loss, "grad_norm": norm, "lr": lr})
        print(*(f"{name} {value:.4g}" for name, value in log[-1].items()), sep="  ", flush=True)
    val_loss = evaluate(model, val_shards, s)
    print(f"validation loss {val_loss:.4f}")
    return log, val_loss

@torch.no_grad()
def evaluate(model, shards, s):
    """The validation loss in nats a token, over the first windows that hold eval_tokens targets."""
    # Always the same windows, in the order of the files, so that losses of any runs compare.
    windows = list(islice(chain(*shards), math.ceil(s.eval_tokens / s.block_size)))
    total = sum(loss_sum(model, [window]).item() for window in windows)
    return total / (len(windows) * s.block_size)

if __name__ == "__main__":
    train(replace(PRESETS[sys.argv[1]], max_steps=int(sys.argv[2])))
