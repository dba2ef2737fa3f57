"""hellaswag.py on Transformers models of many kinds, against a scorer that reads one text at a time, without padding."""
import functools
import json
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from packaging.version import Version

import fineweb
import hellaswag
from conftest import run
from test_hellaswag import are_packed, make_examples, make_items, our_scores, randomize

SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=257, max_position_embeddings=512)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=16)
TWO_KINDS = ["linear_attention", "full_attention"]

RECURRENT = {  # by the name of their config class: what makes them small
    "BambaConfig": dict(SIZES, attn_layer_indices=[1], **MAMBA),
    "FalconH1Config": dict(SIZES, head_dim=16, mamba_d_ssm=128, **MAMBA),
    "JambaConfig": dict(SIZES, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=16, mamba_dt_rank=8,
                        use_mamba_kernels=False),
    "Zamba2Config": dict(SIZES, mamba_ngroups=1, mamba_d_state=16, n_mamba_heads=8, mamba_headdim=16, attention_head_dim=32,
                         layers_block_type=["mamba", "hybrid"], num_mem_blocks=1, chunk_size=16),
    "RecurrentGemmaConfig": dict(SIZES, head_dim=16, lru_width=64, block_types=["recurrent", "attention"]),
    "Lfm2Config": dict(SIZES, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "Qwen3NextConfig": dict(SIZES, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
                            shared_expert_intermediate_size=32, linear_num_value_heads=4, linear_num_key_heads=2,
                            linear_key_head_dim=16, linear_value_head_dim=16, layer_types=TWO_KINDS),
    "GraniteMoeHybridConfig": dict(SIZES, layer_types=["mamba", "attention"], shared_intermediate_size=64,
                                   num_local_experts=2, num_experts_per_tok=1, **MAMBA),
    "MambaConfig": dict(hidden_size=64, num_hidden_layers=2, vocab_size=257, state_size=16),
    "RwkvConfig": dict(hidden_size=64, attention_hidden_size=64, num_hidden_layers=2, vocab_size=257),
}
DISTANCE = {  # whose positions come from the row itself: attention with linear biases
    "FalconConfig": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=257, alibi=True),
    "MptConfig": dict(d_model=64, n_layers=2, n_heads=4, vocab_size=257, max_seq_len=100),
}
ATTENTION = {
    "MixtralConfig": dict(SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "GPTNeoXConfig": {name: size for name, size in SIZES.items() if name != "num_key_value_heads"},
    "OPTConfig": dict(hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
                      vocab_size=257, max_position_embeddings=512),
}
NOT_CAUSAL = {
    "XLNetConfig": dict(d_model=64, n_layer=2, n_head=4, d_inner=128, vocab_size=257),
    "BertConfig": {name: size for name, size in SIZES.items() if name != "num_key_value_heads"},
}
ENCODE = fineweb.get_tokenizer("byte").encode
EXAMPLES = [{**example, "ctx": example["ctx"][:70], "endings": [ending[:40] for ending in example["endings"]]}
            for example in make_examples(8, seed=3)]


@functools.cache
def build(name, std=0.1):
    import transformers
    torch.manual_seed(0)
    kinds = {**RECURRENT, **DISTANCE, **ATTENTION, **NOT_CAUSAL}
    config = getattr(transformers, name)(**kinds[name], bos_token_id=256, eos_token_id=256, pad_token_id=256)
    return randomize(transformers.AutoModelForCausalLM.from_config(config), std)


@torch.no_grad()
def one_text_at_a_time(model, block_size):
    sums = []
    for example in EXAMPLES:
        for ending in example["endings"]:
            text, size = ENCODE(example["ctx"]) + ENCODE(" " + ending), len(ENCODE(" " + ending))
            text = torch.tensor(text[-(block_size + 1):])
            logits = model(input_ids=text[None, :-1], use_cache=False).logits[0].float()
            sums.append(F.cross_entropy(logits[-size:], text[-size:], reduction="sum").item())
    return np.array(sums).reshape(-1, 4)


@torch.no_grad()
def check(model, packed, block_size=512):
    items = make_items(model, "completion", EXAMPLES, ENCODE)
    assert are_packed(items) == packed
    scores, _ = our_scores(model, items)
    np.testing.assert_allclose(scores, one_text_at_a_time(model, block_size), rtol=2e-6)


@pytest.mark.parametrize("name", [*RECURRENT, "FalconConfig"])
def test_layers_that_read_the_row_in_order_score_a_text_alone(name):
    import transformers
    if name == "Zamba2Config" and Version(transformers.__version__) < Version("5.16"):
        pytest.skip("it does not run before Transformers 5.6, and is off by 2e-4 before 5.16")
    check(build(name), packed=False)


def test_a_text_is_cut_to_what_mpt_reads():
    check(build("MptConfig"), packed=False, block_size=100)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_alone_reads_packed_rows(name):
    check(build(name), packed=True)


def test_a_state_that_hardly_leaks_is_found():
    """At small weights, where one ending changes another's loss by 1e-4 of it; in bfloat16 that is below rounding."""
    for dtype in (torch.float32, torch.bfloat16):
        model = build("FalconH1Config", std=0.04).to(dtype)
        weights = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        assert not are_packed(make_items(model, "completion", EXAMPLES, ENCODE))
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert tensor.dtype == weights[name].dtype and torch.equal(tensor, weights[name])


def test_an_ending_of_no_tokens_is_in_a_packed_row():
    example = {**EXAMPLES[1], "endings": ["a man", "runs", "home", "[title]"]}  # which the harness cleans away

    def encode(text):
        return ENCODE(text.strip())
    item, = make_items(build("OPTConfig"), "harness", [example], encode)
    (_, endings), = item.rows
    assert endings[3] == []


def evaluate_as_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        hellaswag.evaluate(build("BertConfig"), EXAMPLES[:1], ENCODE)
    except fineweb.UserError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def test_a_model_is_refused_on_ranks_without_examples_too(tmp_path):
    mp.start_processes(evaluate_as_rank, (tmp_path,), nprocs=2, start_method="fork")
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second and "not a causal language model" in first


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_model_that_sees_what_it_predicts_is_refused(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    fineweb.get_tokenizer("byte").save_pretrained(tmp_path)
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    _, err = run("hellaswag.py", "--model", tmp_path, "--data", tmp_path / "val.jsonl", "--device", "cpu", expect=2)
    assert re.search(r"^error: \w+LMHeadModel: not a causal language model", err.splitlines()[-1])


@pytest.mark.parametrize("damage, says", [("lacking", "its files lack weights, such as lm_head.weight"),
                                          ("nan", "LlamaForCausalLM: its loss is nan; its weights are damaged")])
def test_a_model_of_damaged_weights_is_refused(damage, says, tmp_path):
    """Transformers fills in what a file lacks at random, and scores of that look like scores."""
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    fineweb.get_tokenizer("byte").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if damage == "lacking":
        del weights["lm_head.weight"]
    else:
        weights["lm_head.weight"].fill_(torch.nan)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    _, err = run("hellaswag.py", "--model", tmp_path, "--data", tmp_path / "val.jsonl", "--device", "cpu", expect=2)
    assert says in err.splitlines()[-1]


@pytest.mark.parametrize("name, sizes", [
    ("OpenAIGPTConfig", dict(n_positions=256, n_embd=64, n_layer=2, n_head=4)),
    ("XGLMConfig", dict(max_position_embeddings=256, d_model=64, ffn_dim=128, num_layers=2, attention_heads=4)),
    ("LlamaConfig", {key: value for key, value in SIZES.items() if key != "vocab_size"})])
def test_bfloat16_is_as_transformers_opens_it(name, sizes, tmp_path):
    """With buffers that are cast with the parameters (a mask, a table of positions) and such that are not (rotary)."""
    import transformers
    config = getattr(transformers, name)(**sizes, vocab_size=257, bos_token_id=256, eos_token_id=256, pad_token_id=256)
    randomize(transformers.AutoModelForCausalLM.from_config(config), 0.1).save_pretrained(tmp_path)
    fineweb.get_tokenizer("byte").save_pretrained(tmp_path)
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    out, _ = run("hellaswag.py", "--model", tmp_path, "--data", tmp_path / "val.jsonl", "--device", "cpu", "--dtype", "bfloat16")
    result = json.loads(out.splitlines()[-1])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    losses = one_text_at_a_time(theirs, 256)
    right = [int(values.argmin()) == example["label"] for values, example in zip(losses, EXAMPLES)]
    assert result["dtype"] == "bfloat16" and result["acc"] == pytest.approx(np.mean(right))
    opened, encode = hellaswag.open_model(str(tmp_path), "completion", "bfloat16")
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in
               zip((*opened.parameters(), *opened.buffers()), (*theirs.parameters(), *theirs.buffers())))
    scores, _ = our_scores(opened, make_items(opened, "completion", EXAMPLES, encode))
    np.testing.assert_allclose(scores, losses, rtol=0.02)  # bfloat16's rounding


def test_what_does_not_run_in_bfloat16_is_scored_in_float32(tmp_path, monkeypatch):
    """XLNet keeps a part of its parameters in float32, and is no causal model in either dtype."""
    build("XLNetConfig").save_pretrained(tmp_path)
    fineweb.get_tokenizer("byte").save_pretrained(tmp_path)
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    command = "hellaswag.py", "--model", tmp_path, "--data", tmp_path / "val.jsonl", "--device", "cpu", "--dtype", "bfloat16"
    out, err = run(*command, expect=2)
    assert f"{tmp_path}: scored in float32, for its layers do not run in bfloat16" in out
    assert "not a causal language model" in err.splitlines()[-1]
    monkeypatch.setattr(hellaswag, "reads_packed_rows", lambda *args: False)
    assert json.loads(run(*command)[0].splitlines()[-1])["dtype"] == "float32"


def test_half_a_surrogate_pair_in_an_example(tmp_path):
    """Scored as U+FFFD, which stands for it in shards, too."""
    from transformers import LlamaConfig, LlamaForCausalLM
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    fineweb.get_tokenizer("byte").save_pretrained(tmp_path)
    _, encode = hellaswag.open_model(str(tmp_path), "completion")
    assert encode("a\ud83db") == encode("a\ufffdb")


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path):
    """Ids that no text has do no harm: many a tokenizer has some. One that a text has is an error of one line."""
    from transformers import LlamaConfig, LlamaForCausalLM
    (tmp_path / "val.jsonl").write_text(json.dumps(EXAMPLES[1]) + "\n")
    for vocab_size in (256, 100):
        folder = tmp_path / str(vocab_size)
        LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": vocab_size})).save_pretrained(folder)
        fineweb.get_tokenizer("byte").save_pretrained(folder)
        command = "hellaswag.py", "--model", folder, "--data", tmp_path / "val.jsonl", "--device", "cpu"
        if vocab_size == 256:  # of 257
            assert json.loads(run(*command)[0].splitlines()[-1])["n"] == 1
        else:
            line = run(*command, expect=2)[1].splitlines()[-1]  # after Transformers' bar
            assert f"--model {folder}: its tokenizer has 257 ids" in line and "the model has embeddings of 100;" in line
