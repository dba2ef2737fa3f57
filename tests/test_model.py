"""The model against Transformers, against formulas written here, and against what it promises."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

import fineweb
import train_gpt2
from train_gpt2 import GPT, GPTConfig

SHAPES = [dict(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=11),
          dict(n_layer=3, n_head=4, n_embd=48, block_size=40, vocab_size=257),
          dict(n_layer=2, n_head=6, n_embd=96, block_size=64, vocab_size=50257)]


def randomise(model):
    """Weights under which every part matters: gains and biases are not at their neutral start."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.1 if p.ndim > 1 else 0.3) + (p if p.ndim == 1 else 0))
        for w in {model.wte.weight, model.lm_head.weight} if isinstance(model, GPT) else []:
            w[model.config.vocab_size:] = 0
    return model.eval()


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def generate_uncached(model, idx, max_new_tokens, temperature=1.0, top_k=50, generator=None):
    """What `generate` promises, in words: every token comes from a full forward pass; when the context is full, its last
    half is kept; a row that reached end-of-text is filled with it, and when all have, it ends."""
    context, made, eot = idx, idx, model.config.eot
    done = torch.zeros(len(idx), 1, dtype=torch.bool)
    for _ in range(max_new_tokens):
        if context.size(1) > model.config.block_size:
            context = context[:, -(model.config.block_size // 2):]
        with torch.no_grad():
            token = train_gpt2.sample_token(model(context)[:, -1], temperature, top_k, generator)
        token[done] = eot
        context, made = torch.cat((context, token), dim=1), torch.cat((made, token), dim=1)
        done |= token == eot
        if done.all():
            break
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_gpt2_both_ways(shape, tmp_path):
    torch.manual_seed(0)
    theirs = randomise(GPT2LMHeadModel(GPT2Config(n_positions=shape["block_size"], bos_token_id=0, eos_token_id=0,
                                                  **{k: v for k, v in shape.items() if k != "block_size"})))
    theirs.save_pretrained(tmp_path / "theirs")
    idx = torch.randint(0, shape["vocab_size"], (3, shape["block_size"]))
    with torch.no_grad():
        reference = theirs(idx, labels=idx)
    ours = GPT.from_pretrained(tmp_path / "theirs").eval()
    assert relative(ours(idx), reference.logits) < 1e-4
    expected = F.cross_entropy(reference.logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    assert abs(ours(idx[:, :-1], idx[:, 1:]) - expected) < 1e-4 * expected

    mine = randomise(GPT(GPTConfig(**shape, dropout=0.2)))
    assert mine.save_pretrained(tmp_path / "mine") == "gpt2"  # no tokenizer known
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "mine").eval()
    assert type(opened) is GPT2LMHeadModel and opened.config.eos_token_id == shape["vocab_size"] - 1
    assert opened.config.embd_pdrop == opened.config.attn_pdrop == opened.config.resid_pdrop == 0.2
    assert opened.config.n_ctx == shape["block_size"]  # which llama.cpp's converter reads
    with torch.no_grad():
        assert relative(mine(idx), opened(idx).logits) < 1e-4


def test_opens_the_hubs_gpt2_layout(tmp_path):
    """OpenAI's file on the hub: names without a prefix, causal masks among the weights, no tied head."""
    from safetensors.torch import load_file, save_file
    model = randomise(GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=40, vocab_size=257)))
    model.save_pretrained(tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 40, 40), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, tmp_path / "model.safetensors")
    idx = torch.randint(0, 257, (2, 40))
    with torch.no_grad():
        assert relative(GPT.from_pretrained(tmp_path).eval()(idx), model(idx).logits) < 1e-4


def test_parameter_count_and_padding():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.num_parameters() == 124_439_808
    assert sum(p.numel() for p in model.parameters()) == 124_475_904 and model.wte.weight.shape == (50304, 768)


def test_first_loss_and_padding_rows():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=256, block_size=32))
    idx = torch.randint(0, 50257, (8, 33))
    loss = model(idx[:, :-1], idx[:, 1:])
    assert abs(loss.item() - math.log(50257) - 0.0002 * 256) < 0.1
    loss.backward()
    assert model.wte.weight.grad[50257:].abs().max() == 0
    with torch.no_grad():
        before = model(idx[:, :-1]), loss.item()
        model.wte.weight[50257:] = 100.0  # whatever the padding holds, nothing shows it
        assert torch.equal(model(idx[:, :-1]), before[0]) and model(idx[:, :-1], idx[:, 1:]).item() == before[1]
    assert model(idx[:, :-1]).shape == (8, 32, 50257)
    assert model.generate(idx[:1, :4], 40, temperature=50.0, top_k=0).max() < 50257


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=256, block_size=256))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert abs(p[:50257].std().item() / std - 1) < 0.05, name
        else:
            assert torch.equal(p, torch.full_like(p, 0.0 if name.endswith("bias") else 1.0)), name
    assert model.lm_head.weight is model.wte.weight


@pytest.mark.parametrize("chunks", [0, 1, 3, 7])
def test_loss_and_gradient_equal_plain_cross_entropy(chunks):
    torch.manual_seed(0)
    model = randomise(GPT(GPTConfig(**SHAPES[1]))).double()
    model.loss_chunks = chunks
    idx = torch.randint(0, 257, (2, 40))
    targets = torch.randint(0, 257, (2, 40)).masked_fill(torch.rand(2, 40) < 0.3, -1)
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    loss = model(idx, targets)
    loss.backward()
    assert abs(loss - expected) < 1e-6
    for p, g in zip(model.parameters(), expected_grads):
        assert torch.allclose(p.grad, g, atol=1e-5)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_the_compiled_chunk_of_loss_equals_the_other(needs_grad):
    """Its own way of finding the target's column, against gather and scatter; with targets that are ignored."""
    torch.manual_seed(0)
    x, head = torch.randn(40, 16), torch.randn(128, 16)
    target = torch.randint(0, 100, (40, 1))
    target[::7] = -1
    loss, grad = train_gpt2.chunk_of_loss(x, head, target, 100, needs_grad)
    compiled_loss, compiled_grad = torch.compile(train_gpt2.chunk_of_loss)(x, head, target, 100, needs_grad)
    assert compiled_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    if needs_grad:
        assert torch.allclose(compiled_grad, grad, atol=1e-6) and not grad[::7].any() and not grad[:, 100:].any()
        assert grad.sum(dim=1) == pytest.approx(0, abs=1e-5)
    else:
        assert grad is None and compiled_grad is None


def test_causal():
    torch.manual_seed(0)
    model = randomise(GPT(GPTConfig(**SHAPES[1])))
    idx = torch.randint(0, 257, (1, 40))
    base = model(idx)
    for t in range(40):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 257
        moved = (model(changed) - base).abs().amax(dim=(0, 2)) > 0
        assert not moved[:t].any() and moved[t:].all()


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=128, block_size=32, vocab_size=257))
    batch = torch.randint(0, 257, (4, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_greedy_generation_equals_transformers(tmp_path):
    torch.manual_seed(0)
    model = randomise(GPT(GPTConfig(**SHAPES[2])))
    model.save_pretrained(tmp_path, fineweb.get_tokenizer("gpt2"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    idx = torch.randint(0, 50257, (1, 10))
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=50, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(idx, 50, temperature=0)[:, :expected.size(1)], expected)


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_pipeline_and_tokenizer_open_offline(name, tmp_path):
    torch.manual_seed(0)
    tokenizer = fineweb.get_tokenizer(name)
    model = randomise(GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=tokenizer.vocab_size)))
    model.save_pretrained(tmp_path, tokenizer)
    text = "ROMEO:\nBut soft, what <|endoftext|> light – ü?"
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)["input_ids"] == tokenizer.encode(text) and theirs.eos_token_id == tokenizer.eot
    assert theirs.decode(tokenizer.encode(text)) == text
    made = pipeline("text-generation", model=str(tmp_path), device="cpu")("ROMEO:", max_new_tokens=12, do_sample=False)
    ids = torch.tensor([tokenizer.encode("ROMEO:")])
    ours = [t for t in model.generate(ids, 12, temperature=0)[0].tolist() if t != tokenizer.eot]
    assert made[0]["generated_text"] == tokenizer.decode(ours)


def test_cached_equals_uncached_past_block_size():
    torch.manual_seed(0)
    model = randomise(GPT(GPTConfig(**SHAPES[1])))
    idx = torch.randint(0, 256, (3, 5))
    for how in (dict(temperature=0), dict(temperature=1.0, top_k=20)):
        cached = model.generate(idx, 100, generator=torch.Generator().manual_seed(1), **how)
        assert torch.equal(cached, generate_uncached(model, idx, 100, generator=torch.Generator().manual_seed(1), **how))
        assert cached.size(1) > 40

    reference = idx  # the rule in numbers
    context = idx
    for _ in range(100):
        if context.size(1) > 40:
            context = context[:, -20:]
        token = model(context)[:, -1].argmax(dim=1, keepdim=True)
        context, reference = torch.cat((context, token), 1), torch.cat((reference, token), 1)
    made = model.generate(idx, 100, temperature=0)
    for row, expected in zip(made, reference):
        stop = (expected == 256).nonzero()
        end = int(stop[0]) + 1 if len(stop) else len(expected)
        assert torch.equal(row[:end], expected[:end])


def test_generate_stops_rows_at_end_of_text():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=16, vocab_size=3))
    out = model.generate(torch.zeros(6, 2, dtype=torch.long), 14, generator=torch.Generator().manual_seed(0))
    for row in out[:, 2:].tolist():
        if 2 in row:
            assert set(row[row.index(2):]) == {2}
    assert out[:, -1].eq(2).any() and model.training


def test_generate_sampling_follows_temperature_and_top_k():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20000, 1)
    draws = train_gpt2.sample_token(logits, 0.5, 3, torch.Generator().manual_seed(0))
    expected = torch.softmax(torch.tensor([2.0, 1.0, 0.0]) / 0.5, 0)
    assert torch.allclose(torch.bincount(draws.flatten(), minlength=4)[:3] / 20000, expected, atol=0.01)
    assert draws.max() == 2 and train_gpt2.sample_token(logits, 0, 50, None).eq(0).all()


def test_refuses_what_it_does_not_have(tmp_path):
    import json
    model = GPT(GPTConfig(**SHAPES[0]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())

    def opened(**changes):
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(fineweb.UserError) as error:
            GPT.from_pretrained(tmp_path)
        return str(error.value)

    assert "activation_function = 'relu'" in opened(activation_function="relu")
    assert "scale_attn_by_inverse_layer_idx" in opened(scale_attn_by_inverse_layer_idx=True)
    assert "'bert'" in opened(model_type="bert")
    assert "lack" in opened(n_layer=2)
    assert "shape" in opened(vocab_size=12)
    path.write_text("{")
    with pytest.raises(fineweb.UserError, match="config.json"):
        GPT.from_pretrained(tmp_path)
    path.write_text(json.dumps(good))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-5])
    with pytest.raises(fineweb.UserError, match="model.safetensors"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="block_size is 8"):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_reads_untied_heads_and_other_widths(tmp_path):
    torch.manual_seed(0)
    theirs = randomise(GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=70, n_inner=80,
                                                  tie_word_embeddings=False, layer_norm_epsilon=1e-3, bos_token_id=1, eos_token_id=7)))
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    assert ours.config.eot == 7 and not ours.config.tied and ours.config.n_hidden == 80
    idx = torch.randint(0, 70, (2, 16))
    with torch.no_grad():
        assert relative(ours(idx), theirs(idx).logits) < 1e-4


def test_short_texts_attend_in_float32_in_training_on_a_cpu(monkeypatch):
    """A CPU's backward pass in bfloat16 takes ever the same time for a head, however short the text."""
    seen = []

    def spy(q, k, v, known=F.scaled_dot_product_attention, **options):
        seen.append(q.dtype)
        return known(q, k, v, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=512, vocab_size=64, rope=True, qk_norm=True))
    idx = torch.randint(64, (1, 512))
    with torch.autocast("cpu", torch.bfloat16):
        for T in (64, 256, 512):
            model(idx[:, :T], idx[:, :T]).backward()
        with torch.no_grad():
            model(idx[:, :64])
    assert seen[:2] == [torch.float32, torch.float32] and len(seen) == 4
    exact = GPT(model.config)
    exact.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx[:, :64], idx[:, 1:65])
    assert loss.item() == pytest.approx(exact(idx[:, :64], idx[:, 1:65]).item(), abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("parts", [{}, dict(rope=True, qk_norm=True, n_kv_head=1, window=20)], ids=["gpt2", "modern"])
def test_a_model_of_another_dtype_trains_and_samples_on_a_cpu(parts, dtype):
    """Without autocast; a text of 64 tokens takes the way for short ones, one of 300 does not."""
    torch.manual_seed(0)
    exact = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=300, vocab_size=67, **parts))
    model = GPT(exact.config)
    model.load_state_dict(exact.state_dict())
    model.to(dtype)
    for T in (64, 300):
        idx = torch.randint(67, (2, T + 1))
        x, y = idx[:, :-1], idx[:, 1:]
        loss, expected = model(x, y), exact(x, y)
        loss.backward()
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-2)
        for p, q in zip(model.parameters(), exact.parameters()):
            assert p.grad.dtype == dtype and (p.grad.float() - q.grad).norm() < 0.2 * q.grad.norm()
        model.zero_grad()
        exact.zero_grad()
        assert model(x).dtype == dtype and model.generate(x[:, :50], 2).shape == (2, 52)


@pytest.mark.parametrize("device_type", ["cpu", "mps", "cuda"])
def test_a_batch_is_sent_without_waiting_from_pinned_memory_alone(device_type, monkeypatch):
    """A Mac read what had been freed and used again (pytorch issue 189690)."""
    seen = []

    def to(batch, device, non_blocking=False, known=torch.Tensor.to):
        seen.append((getattr(batch, "was_pinned", False), non_blocking))
        return known(batch, device)

    def pin_memory(batch):
        batch.was_pinned = True
        return batch
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    data = train_gpt2.Corpus([torch.arange(81).numpy()], 8, 81, "data")
    world = SimpleNamespace(rank=0, size=1, device="cpu", device_type=device_type)
    x, y = next(train_gpt2.training_batches(data, 0, 3, world, 1))
    assert torch.equal(y, x + 1) and x.shape == (3, 8)
    is_cuda = device_type == "cuda"
    assert seen == [(is_cuda, is_cuda)]
