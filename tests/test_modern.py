"""RoPE, RMSNorm, SwiGLU, QK-norm, grouped-query and sliding-window attention: each against a formula in float64, every
mixture against its promises, and every mixture that Transformers has against Transformers."""
import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen as varlen
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig,
                          MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM, pipeline)

import fineweb
import train_gpt2
from conftest import ROOT, SMALL, log_lines, run, save_llama2_tokenizer, spawn
from test_model import generate_uncached, randomise, relative
from train_gpt2 import GPT, GPTConfig, WindowAttention, full_attention

MODERN = dict(rope=True, rmsnorm=True, swiglu=True)
SHAPE = dict(n_layer=2, n_head=4, n_embd=32, block_size=24, vocab_size=67)
WINDOW = 5
SIX = [("rope", True), ("rmsnorm", True), ("swiglu", True), ("qk_norm", True), ("n_kv_head", 2), ("window", WINDOW)]
MIXTURES = [dict(pair for pair, on in zip(SIX, bits) if on) for bits in itertools.product((False, True), repeat=6)]


@pytest.mark.parametrize("flags", MIXTURES, ids=lambda f: "+".join(f) or "gpt2")
def test_every_mixture(flags):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, **flags))
    idx = torch.randint(0, 67, (8, 25))
    x, y = idx[:, :-1], idx[:, 1:]
    first = model(x, y)
    assert abs(first.item() - math.log(67) - 0.0002 * 32) < 0.1

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert model(x, y) < first

    randomise(model)
    reach = 2 * (WINDOW - 1) if "window" in flags else 24  # two layers
    with torch.no_grad():
        base = model(x[:1])
        for t in (0, 7, 12):
            changed = x[:1].clone()
            changed[0, t] = (changed[0, t] + 1) % 67
            moved = ((model(changed) - base).abs().amax(dim=(0, 2)) > 1e-6).tolist()
            assert moved == [t <= position <= t + reach for position in range(24)], t

    cached = model.generate(x[:3, :4], 40, temperature=0)  # past the window and past block_size
    assert torch.equal(cached, generate_uncached(model, x[:3, :4], 40, temperature=0))


def naive_attention(q, k, v, window):
    """Softmax over the positions that a query sees, in float64; q (B, H, T, D), as many k and v heads."""
    T = q.size(2)
    scores = q.double() @ k.double().transpose(2, 3) / math.sqrt(q.size(3))
    i, j = torch.arange(T)[:, None], torch.arange(T)
    return scores.masked_fill((j > i) | (j <= i - window), -torch.inf).softmax(dim=3) @ v.double()


@pytest.mark.parametrize("T,window", [(1, 4), (4, 4), (5, 4), (16, 4), (19, 4), (23, 1), (9, 100)])
def test_window_equals_masked_softmax_and_gqa_equals_repeated_heads(T, window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, T, 8, requires_grad=True) for h in (6, 2, 2))
    out = torch.cat(WindowAttention(window)(q, k, v, 0.0), dim=2)
    repeated = [t.repeat_interleave(3, dim=1) for t in (k, v)]
    expected = naive_attention(q, *repeated, window)
    assert relative(out.double(), expected) < 1e-5
    weights = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad((out * weights).sum(), (q, k, v)),
                    torch.autograd.grad((expected * weights).sum(), (q, k, v))):
        assert torch.allclose(a, b, atol=1e-5)
    assert relative(full_attention(q, k, v, 0.0)[0].double(), naive_attention(q, *repeated, T)) < 1e-5


def naive_varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size, enable_gqa):
    """What torch.nn.attention.varlen.varlen_attn says of its arguments; q, k, v: (all tokens, heads, head_dim)."""
    assert enable_gqa or q.size(1) == k.size(1)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and max_q == max_k == cu_seq_q.diff().max()
    groups, (left, right) = q.size(1) // k.size(1), window_size
    sequence = torch.bucketize(torch.arange(len(q)), cu_seq_q[1:], right=True)
    after = torch.arange(len(q)) - torch.arange(len(k))[:, None]  # [key, query]: how far the query is after the key
    sees = (sequence == sequence[:, None]) & (after <= left) & (-after <= right)
    scores = torch.einsum("qhd,khd->hkq", q, k.repeat_interleave(groups, dim=1)) / math.sqrt(q.size(2))
    weights = scores.masked_fill(~sees, -torch.inf).softmax(dim=1)
    return torch.einsum("hkq,khd->qhd", weights, v.repeat_interleave(groups, dim=1))


@pytest.mark.parametrize("T,window", [(5, 4), (16, 4), (19, 4), (23, 1), (9, 8), (9, 9)])
@pytest.mark.parametrize("autocast,has_option", [(False, True), (False, False), (True, True)])
def test_the_window_by_flash_attention_means_the_same_as_a_mask(T, window, autocast, has_option, monkeypatch):
    """Both ends of the window, sequences of a batch that never see each other, grouped heads; with autocast, which leaves
    that kernel alone, all in one dtype; PyTorch 2.11 has no enable_gqa, and needs none."""
    torch.manual_seed(0)
    attention, dtypes = WindowAttention(window), []

    def newer(q, k, v, *args, window_size=(-1, -1), enable_gqa=False):
        dtypes.append((q.dtype, k.dtype, v.dtype))
        return naive_varlen_attn(q.float(), k.float(), v.float(), *args, window_size, enable_gqa).to(q.dtype)

    def older(*args, window_size=(-1, -1)):
        return newer(*args, window_size=window_size, enable_gqa=True)
    monkeypatch.setattr(varlen, "varlen_attn", newer if has_option else older)
    monkeypatch.setattr(train_gpt2, "has_flash_attention", returning_true)
    q, k, v = (torch.randn(3, h, T, 8, requires_grad=True) for h in (6, 2, 2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        [out] = attention(q, k, v.bfloat16() if autocast else v, 0.0)
    assert dtypes == [3 * (torch.bfloat16 if autocast else torch.float32,)]
    expected = naive_attention(q, *(t.repeat_interleave(3, dim=1) for t in (k, v)), window)
    assert relative(out.double(), expected) < (2e-2 if autocast else 1e-5)
    weights = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad((out * weights).sum(), (q, k, v)),
                    torch.autograd.grad((expected * weights).sum(), (q, k, v))):
        assert (a - b).norm() <= (5e-2 * b.norm() if autocast else 1e-5)
    assert len(attention(q, k, v, 0.1)) == 1 + (window < T)  # dropout, which it does not have: by blocks


def returning_true(q):
    return True


def test_who_has_flash_attention(monkeypatch):
    """What PyTorch's source asks for: half precision, compute capability 8.0, head_dim a multiple of 8 and not too wide."""
    def has(major, dtype, head_dim=64, device="cuda"):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
        q = torch.empty(1, 2, 3, head_dim, dtype=dtype, device="meta")
        return train_gpt2.has_flash_attention(
            SimpleNamespace(device=SimpleNamespace(type=device), dtype=dtype, size=q.size))
    assert has(8, torch.bfloat16) and has(9, torch.float16) and has(12, torch.bfloat16, 128)
    assert not has(8, torch.float32) and not has(7, torch.float16) and not has(9, torch.bfloat16, 60) and not has(9, torch.bfloat16, 256)
    assert not has(9, torch.bfloat16, device="cpu") and not has(9, torch.bfloat16, device="mps")


def test_window_never_makes_a_full_mask():
    """Peak memory grows with T, not with its square."""
    largest = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    q, k, v = (torch.randn(1, 1, 1024, 4) for _ in range(3))
    with Watch():
        WindowAttention(16)(q, k, v, 0.0)
    assert max(largest) <= 2 * 1024 * 4 * 2


def test_cache_holds_the_window_and_the_kv_heads_only():
    model = GPT(GPTConfig(**SHAPE, **MODERN, window=WINDOW, n_kv_head=2))
    cache = model.new_cache()
    model.hidden_states(torch.zeros(3, 20, dtype=torch.long), cache=cache)
    model.hidden_states(torch.zeros(3, 1, dtype=torch.long), cache=cache)
    assert len(cache) == 2
    for layer in cache:
        assert layer.num_tokens == 21 and layer.k.shape == layer.v.shape == (3, 2, WINDOW, 8)


def test_formulas():
    torch.manual_seed(0)
    x = torch.randn(3, 7, 32)
    c = GPTConfig(**SHAPE, rmsnorm=True, swiglu=True, rope=True)
    norm = train_gpt2.make_norm(c)
    torch.nn.init.normal_(norm.weight)
    expected = x.double() / torch.sqrt((x.double() ** 2).mean(dim=-1, keepdim=True) + 1e-6) * norm.weight.double()
    assert relative(norm(x).double(), expected) < 1e-6

    mlp = train_gpt2.SwiGLU(c)
    w_gate, w_up, w_down = (w.double() for w in (mlp.c_gate.weight, mlp.c_fc.weight, mlp.c_proj.weight))
    b_gate, b_up, b_down = (b.double() for b in (mlp.c_gate.bias, mlp.c_fc.bias, mlp.c_proj.bias))
    gate = x.double() @ w_gate.T + b_gate
    expected = (gate / (1 + torch.exp(-gate)) * (x.double() @ w_up.T + b_up)) @ w_down.T + b_down
    assert relative(mlp(x).double(), expected) < 1e-5

    q = torch.randn(1, 2, 7, 8)
    turned = train_gpt2.rotate(q, train_gpt2.Rotary(c)(slice(3, 10)))
    for position, i in itertools.product(range(7), range(4)):
        angle = (position + 3) * 10000.0 ** (-2 * i / 8)
        a, b = q[..., position, i].double(), q[..., position, i + 4].double()
        assert torch.allclose(turned[..., position, i].double(), a * math.cos(angle) - b * math.sin(angle), atol=1e-5)
        assert torch.allclose(turned[..., position, i + 4].double(), b * math.cos(angle) + a * math.sin(angle), atol=1e-5)


def test_rope_depends_on_relative_position_only():
    rotary = train_gpt2.Rotary(GPTConfig(**{**SHAPE, "block_size": 200}, rope=True))
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    scores = []
    for at in (0, 1, 50, 190):
        turned_q = train_gpt2.rotate(q, rotary(slice(at + 9, at + 10)))
        turned_k = train_gpt2.rotate(k, rotary(slice(at, at + 1)))
        scores.append((turned_q * turned_k).sum().item())
    assert scores == pytest.approx([scores[0]] * 4, abs=1e-4)


def test_qk_norm_comes_before_the_rotation():
    """A scale in front of the norm changes nothing; each head has length sqrt(head_dim) times its gain."""
    torch.manual_seed(0)
    model = randomise(GPT(GPTConfig(**SHAPE, **MODERN, qk_norm=True, bias=False)))
    idx = torch.randint(0, 67, (2, 24))
    before = model(idx)
    with torch.no_grad():
        for block in model.h:
            block.attn.c_attn.weight[:64] *= 3.0  # q and k
    assert relative(model(idx), before) < 1e-4


def test_sizes():
    for width, wide in [(768, 2048), (1024, 2752), (1600, 4288), (128, 384)]:
        config = GPTConfig(n_embd=width, n_head=width // 32, swiglu=True)
        assert config.n_hidden == wide
        if width >= 768:
            assert abs(3 * width * wide / (8 * width * width) - 1) < 0.011
    with torch.device("meta"):
        full, grouped = (GPT(GPTConfig(n_kv_head=k)).num_parameters() for k in (12, 4))
    assert full - grouped == 12 * (768 + 1) * 2 * 8 * 64


CASES = {
    "llama": dict(**MODERN, n_kv_head=2, bias=False), "llama with biases": dict(**MODERN),
    "mistral": dict(**MODERN, n_kv_head=2, bias=False, window=WINDOW),
    "qwen3": dict(**MODERN, n_kv_head=2, bias=False, qk_norm=True),
    "qwen3 with window": dict(**MODERN, bias=False, qk_norm=True, window=WINDOW),
}


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_is_a_transformers_model(case, tmp_path):
    torch.manual_seed(0)
    tokenizer = fineweb.get_tokenizer("byte")
    model = randomise(GPT(GPTConfig(**{**SHAPE, "vocab_size": 257, "block_size": 48}, **CASES[case])))
    assert model.save_pretrained(tmp_path, tokenizer) == case.split()[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__.lower().startswith(case.split()[0]) and theirs.config.eos_token_id == 256
    idx = torch.randint(0, 257, (2, 48))
    with torch.no_grad():
        assert relative(model(idx), theirs(idx).logits) < 1e-4
    reopened = GPT.from_pretrained(tmp_path)
    assert reopened.config == model.config
    assert all(torch.equal(p, q) for p, q in zip(reopened.parameters(), model.parameters()))
    text = "JULIET:\n<|endoftext|> ü"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer.encode(text)
    made = pipeline("text-generation", model=str(tmp_path), device="cpu")("ROMEO:", max_new_tokens=30, do_sample=False)
    ours = model.generate(torch.tensor([tokenizer.encode("ROMEO:")]), 30, temperature=0)[0].tolist()
    assert made[0]["generated_text"] == tokenizer.decode([t for t in ours if t != 256])


COMMON = dict(vocab_size=91, hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=40, bos_token_id=1, eos_token_id=2)
THEIRS = {
    "llama untied, wide heads, own theta": lambda: LlamaForCausalLM(LlamaConfig(
        **COMMON, head_dim=10, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-4)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=6)),
    "mistral without window": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=None)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=8, tie_word_embeddings=True)),
    "qwen3 with window": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=8, use_sliding_window=True,
                                                              sliding_window=6, max_window_layers=0)),
    "qwen3 whose window is off": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=8, sliding_window=6)),
}


@pytest.mark.parametrize("case", THEIRS)
def test_opens_what_transformers_wrote(case, tmp_path):
    torch.manual_seed(0)
    theirs = randomise(THEIRS[case]())
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    assert ours.config.eot == 2
    idx = torch.randint(0, 91, (2, 40))
    with torch.no_grad():
        assert relative(ours(idx), theirs(idx).logits) < 1e-4
        expected = theirs.generate(idx[:1, :5], attention_mask=torch.ones(1, 5), max_new_tokens=30, do_sample=False, pad_token_id=0)
    made = ours.generate(idx[:1, :5], 30, temperature=0)
    assert torch.equal(made[:, :expected.size(1)], expected)


def test_opens_shards_of_weights_beside_others(tmp_path):
    """As Mistral's repositories are: Transformers' files, and the same weights once more under other names."""
    from safetensors.torch import save_file
    theirs = randomise(MistralForCausalLM(MistralConfig(**COMMON)))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    save_file({"layers.0.attention.wk.weight": torch.zeros(2, 2)}, tmp_path / "consolidated.safetensors")
    idx = torch.randint(0, 91, (1, 20))
    assert relative(GPT.from_pretrained(tmp_path)(idx), theirs(idx).logits) < 1e-4


def test_samples_keep_the_space_after_the_prompt(tmp_path):
    """Some decoders drop the first space of what they are given."""
    words = "the man runs home and sees it".split()
    size = save_llama2_tokenizer(tmp_path, words)
    randomise(LlamaForCausalLM(LlamaConfig(**{**COMMON, "vocab_size": size, "eos_token_id": 1}))).save_pretrained(tmp_path)
    out, _ = run("train_gpt2.py", "sample", "--checkpoint", tmp_path, "--prompt", "the man", "--max_new_tokens", 6, "--device", "cpu")
    prompt, made = torch.tensor([[3, 4]]), train_gpt2.GPT.from_pretrained(tmp_path)
    ids = made.generate(prompt, 6, 0.8, 50, torch.Generator().manual_seed(42))[0].tolist()
    assert out == AutoTokenizer.from_pretrained(tmp_path).decode(ids[:ids.index(1)] if 1 in ids else ids) + "\n" and len(out) > 9


@pytest.mark.parametrize("make,says", [
    (lambda: LlamaForCausalLM(LlamaConfig(**COMMON, attention_bias=True)), "attention_bias"),
    (lambda: LlamaForCausalLM(LlamaConfig(**COMMON, hidden_act="gelu")), "hidden_act"),
    (lambda: LlamaForCausalLM(LlamaConfig(**COMMON, hidden_act="gelu_pytorch_tanh")), "hidden_act"),  # GPT-2's may be
    (lambda: LlamaForCausalLM(LlamaConfig(**COMMON, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})), "rope"),
    (lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=8, use_sliding_window=True, sliding_window=6, max_window_layers=1)), "layer_types"),
])
def test_refuses_other_parts_by_name(make, says, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(fineweb.UserError, match=says):
        GPT.from_pretrained(tmp_path)


def test_other_mixtures_have_our_own_type(tmp_path):
    torch.manual_seed(0)
    model = randomise(GPT(GPTConfig(**SHAPE, rope=True, window=WINDOW)))
    assert model.save_pretrained(tmp_path) == "train_gpt2"
    reopened = GPT.from_pretrained(tmp_path)
    assert reopened.config == model.config
    idx = torch.randint(0, 67, (2, 24))
    assert torch.equal(reopened.eval()(idx), model(idx))


def test_a_part_that_is_added_survives_a_checkpoint(tmp_path):
    """README's squared ReLU, in its three places."""
    text = (ROOT / "train_gpt2.py").read_text()
    for old, new in [("    zero_init: bool =", "    relu2: bool = False  # squared ReLU instead of GELU\n    zero_init: bool ="),
                     ("class SwiGLU(MLP):", "class ReLU2(MLP):\n\n    def forward(self, x):\n"
                                            "        return self.c_proj(F.relu(self.c_fc(x)).square())\n\n\nclass SwiGLU(MLP):"),
                     ("else MLP(config)", "else ReLU2(config) if config.relu2 else MLP(config)")]:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "train_gpt2.py").write_text(text)
    for name in ("fineweb.py", "hellaswag.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    script = tmp_path / "train_gpt2.py"
    out, _ = spawn(script, *SMALL, "--relu2", "--checkpoint_every", 6, "--data", ROOT / "input.txt", "--tokenizer", "byte",
                   "--out_dir", tmp_path / "log", "--no_rope", "--no_rmsnorm", "--no_swiglu", "--no_qk_norm", "--bias").finish()
    assert "only this script" in out
    loss = log_lines(tmp_path / "log", "val")[-1]["loss"]
    out, _ = spawn(script, "eval", "--checkpoint", tmp_path / "log/latest", "--device", "cpu", "--data", ROOT / "input.txt",
                   "--eval_tokens", 2048).finish()
    assert float(re.search(r"validation loss ([\d.]+)", out)[1]) == pytest.approx(loss, abs=5e-3)
    with pytest.raises(train_gpt2.UserError, match="relu2 = True is a part that this script does not have"):
        GPT.from_pretrained(tmp_path / "log/latest")


def test_zero_init_starts_as_the_embedding_alone():
    model = GPT(GPTConfig(**SHAPE, **MODERN, zero_init=True))
    idx = torch.randint(0, 67, (2, 24))
    assert torch.equal(model(idx), model.logits(model.ln_f(model.wte(idx))))
