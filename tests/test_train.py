"""Training from the command line: first runs, recipes, splits, resuming, errors."""
import collections
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fineweb
import hellaswag
import train_gpt2
from conftest import ROOT, SMALL, call_main, is_untouched, log_lines, losses, refused, run
from test_hellaswag import make_examples
from train_gpt2 import GPT, GPTConfig, RecipeFlags, ScheduleFlags


def test_importing_does_nothing():
    code = ("import sys, io; sys.path.insert(0, %r); import torch, builtins\n"
            "real = builtins.open\n"
            "def watched(path, mode='r', *a, **k):\n"
            "    assert 'w' not in mode and not str(path).endswith(('.npy', 'input.txt', '.json')), path\n"
            "    return real(path, mode, *a, **k)\n"
            "builtins.open = watched\n"
            "import train_gpt2, fineweb, hellaswag\n"
            "heavy = {'datasets', 'transformers', 'tiktoken', 'wandb', 'tensorboard', 'matplotlib', 'pyarrow', 'safetensors', 'tyro'}\n"
            "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
            "assert not torch.cuda.is_initialized()") % str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr


def test_tiny_learns_and_everything_around_it_works(tmp_path):
    """The default run, shortened: falling validation losses, samples, a checkpoint, the command that samples from it."""
    out, _ = run("train_gpt2.py", "--max_steps", 60, "--total_batch_size", 512, "--eval_every", 20, "--eval_tokens", 8192, "--sample_every", 30,
                   "--checkpoint_every", 30, "--out_dir", tmp_path / "log", cwd=ROOT)
    vals = [line["loss"] for line in log_lines(tmp_path / "log", "val")]
    assert len(vals) == 3 and vals[0] > vals[1] > vals[2] and vals[2] < 3.0
    assert "data    input.txt" in out and "--preset" in out and "--device" in out
    assert (tmp_path / "log/latest").is_symlink() and (tmp_path / "log/latest").resolve().name == "step_000060"
    last = out.strip().splitlines()[-1]
    assert "sample --checkpoint" in last
    script, *words = shlex.split(last)[1:]
    said, _ = run(script, *words, "--max_new_tokens", 20, cwd=ROOT)
    prompt = words[words.index("--prompt") + 1]  # of the validation text
    assert said.startswith(prompt) and len(said) > len(prompt) + 9 and prompt in " ".join((ROOT / "input.txt").read_text().split())
    first = json.loads((tmp_path / "log/log.jsonl").read_text().splitlines()[0])
    assert first["kind"] == "config" and first["preset"] == "tiny" and first["max_steps"] == 60
    keys = {"kind", "step", "loss", "lr", "grad_norm", "tokens", "seconds", "tokens_per_second", "mfu"}
    train = log_lines(tmp_path / "log", "train")
    assert [line["step"] for line in train] == list(range(1, 61)) and all(set(line) == keys for line in train)
    assert len(log_lines(tmp_path / "log", "sample")) == 2
    out, _ = run("train_gpt2.py", "eval", "--checkpoint", tmp_path / "log/latest", cwd=ROOT)
    assert "HellaSwag is left out" in out
    loss, perplexity = map(float, re.search(r"validation loss ([\d.]+) nats a token, perplexity ([\d.]+)", out).groups())
    assert loss == pytest.approx(vals[2], abs=1e-3) and perplexity == pytest.approx(math.exp(vals[2]), abs=0.02)
    assert "--eval_tokens 0" in refused("train_gpt2.py", "eval", "--checkpoint", tmp_path / "log/latest", "--eval_tokens", 0)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "train_state.pt"):
        assert (tmp_path / "log/latest" / name).exists()


def test_eval_says_where_it_has_not_the_tokens_of_the_run(text_file, tmp_path):
    data = shutil.copy(text_file, tmp_path / "text.txt")
    run("train_gpt2.py", *SMALL, "--preset", "tiny", "--data", data, "--out_dir", tmp_path / "log", "--checkpoint_every", 6)
    flags = ["eval", "--checkpoint", tmp_path / "log", "--hellaswag_data", tmp_path / "h.jsonl"]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(example) + "\n" for example in make_examples(2)))
    assert "note" not in run("train_gpt2.py", *flags)[0]
    data.write_text(data.read_text() + "a new end")
    assert f"note: {data} has changed since the run" in run("train_gpt2.py", *flags)[0]
    assert "note" not in run("train_gpt2.py", *flags, "--data", data)[0]


def test_gpt2_preset_trains_its_real_parameters(tmp_path):
    out, _ = run("train_gpt2.py", "--preset", "gpt2", "--data", ROOT / "input.txt", "--max_steps", 1, "--batch_size", 1,
                 "--total_batch_size", 1024, "--eval_every", 0, "--sample_every", 0, "--checkpoint_every", 0,
                 "--hellaswag_every", 0, "--no_compile", "--out_dir", tmp_path)
    assert "124,439,808 parameters" in out
    assert abs(losses(tmp_path)[0] - math.log(50257) - 0.15) < 0.1


@pytest.fixture(scope="module")
def reference(tmp_path_factory, small_shards):
    """30 steps in one process, one micro-step each."""
    out_dir = tmp_path_factory.mktemp("reference")
    run("train_gpt2.py", *SMALL, "--data", small_shards, "--max_steps", 30, "--eval_every", 10, "--out_dir", out_dir / "log",
        "--batch_size", 16)
    return out_dir / "log"


@pytest.mark.parametrize("batch_size", [1, 8])
def test_losses_do_not_depend_on_the_split(batch_size, reference, small_shards, tmp_path):
    run("train_gpt2.py", *SMALL, "--data", small_shards, "--max_steps", 30, "--eval_every", 10, "--batch_size", batch_size,
        "--out_dir", tmp_path / "log")
    assert len(losses(reference)) == 30
    assert losses(tmp_path / "log") == pytest.approx(losses(reference), abs=1e-5)
    vals = [[line["loss"] for line in log_lines(d, "val")] for d in (tmp_path / "log", reference)]
    assert vals[0] == pytest.approx(vals[1], abs=1e-5)


def test_validation_is_the_mean_over_a_fixed_set_of_tokens(small_shards):
    """Against a loop over the windows one by one."""
    corpus = train_gpt2.open_data(str(small_shards), fineweb.get_tokenizer("byte"), GPTConfig(block_size=32))[1]
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=32, vocab_size=257))
    tokens = fineweb.read_shard(fineweb.list_shards(small_shards, "val")[0]).astype("int64")
    world = train_gpt2.World()
    world.use_device("cpu")
    rows = [torch.from_numpy(tokens[i * 32:i * 32 + 33])[None] for i in range(50)]
    expected = torch.stack([model(r[:, :-1], r[:, 1:]).detach() for r in rows]).mean().item()
    for batch_size in (1, 7, 64):
        found, _ = train_gpt2.validate(model, corpus, 50 * 32, batch_size, world, torch.float32, fineweb.ByteTokenizer().token_bytes())
        assert found == pytest.approx(expected, abs=1e-5)


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that live, as a GPU's allocator does, up to a limit."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.live, self.peak, self.known = limit, 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        if self.live > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    def free(self, key, size):
        self.known.remove(key)
        self.live -= size


@pytest.mark.parametrize("shape, gigabytes", [({"n_layer": 2}, 8), ({"n_layer": 2}, 1.75), ({"n_layer": 2, "block_size": 64}, 8),
                                              ({"n_layer": 4, "n_head": 25, "n_embd": 1600}, 12)])
def test_auto_batch_fits(shape, gigabytes, monkeypatch):
    """In tensors without contents, whose sizes are counted."""
    limit = gigabytes * 2**30
    memory, sizes = Memory(limit), [2**i for i in range(12)]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory.live)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (limit - memory.live, limit))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: setattr(memory, "limit", share * limit))
    world = SimpleNamespace(device="cpu", device_type="cpu", distributed=True, all_reduce=lambda numbers, op: numbers)
    with FakeTensorMode(), memory:
        model = GPT(GPTConfig(**shape))
        parameters = memory.live
        found = train_gpt2.largest_batch(model, sizes, world, torch.bfloat16)
        assert all(p.grad is None for p in model.parameters()) and memory.limit == limit

        def needed(size):
            """By a micro-step that adds to gradients, with AdamW's moments and DDP's buckets."""
            memory.peak, memory.limit = memory.live, math.inf
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            x = torch.zeros(size, model.config.block_size, dtype=torch.long)
            with torch.autocast("cpu", torch.bfloat16):
                model(x, x).backward()
            model.zero_grad(set_to_none=True)
            return memory.peak + 3 * parameters
        assert needed(found) < limit < needed(4 * found)


def test_a_resumed_run_comes_back_to_its_device(small_shards, tmp_path, monkeypatch):
    """Each process of torchrun has its own: what the checkpoint keeps is what was asked for."""
    asked = []
    monkeypatch.setattr(train_gpt2.hellaswag, "pick_device", lambda name: asked.append(name) or "cpu")
    run("train_gpt2.py", *SMALL, "--data", small_shards, "--checkpoint_every", 6, "--device", "cuda:1", "--out_dir", tmp_path / "log")
    run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log")
    run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log", "--device", "cuda")
    assert asked == ["cuda:1", "cuda:1", "cuda"]


@pytest.mark.parametrize("script,flags", [("train_gpt2.py", ("--data", ROOT / "input.txt")), ("train_gpt2.py", ("sample", "--checkpoint", "x")),
                                          ("hellaswag.py", ())])
def test_a_chip_that_the_build_does_not_know_is_one_line(script, flags, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # there is no run here
    def no_kernels(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", no_kernels)
    said = refused(script, *flags, "--device", "cuda", code=1)
    assert "--device cuda:0: this PyTorch cannot use it (CUDA error: no kernel image" in said and "--device cpu" in said


def test_a_part_of_a_chip_has_no_known_peak(monkeypatch):
    for name, peak in [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None), ("NVIDIA A100-SXM4-40GB", 312e12)]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        assert hellaswag.peak_flops("cuda") == peak


def test_schedules_against_their_formulas():
    flags = ScheduleFlags(lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
    rate = [train_gpt2.learning_rate(step, flags) for step in range(111)]
    assert rate[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rate[10] == 1.0 and rate[110] == pytest.approx(0.1)
    assert rate[60] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2)
    flags = ScheduleFlags(lr=1.0, min_lr=0.0, warmup_steps=10, max_steps=100, schedule="wsd", decay_fraction=0.4)
    rate = [train_gpt2.learning_rate(step, flags) for step in range(101)]
    assert rate[10:60] == pytest.approx([1.0] * 50) and rate[80] == pytest.approx(0.5) and rate[100] == 0.0
    assert train_gpt2.learning_rate(10**6, ScheduleFlags()) == pytest.approx(6e-5)  # lr / 10 where min_lr is left alone
    for max_steps, expected in ((300, [0.85, 0.87, 0.9, 0.95, 0.95]), (19073, [0.85, 0.85 + 1 / 300, 0.85 + 2.5 / 300, 0.85 + 5 / 300, 0.883])):
        momenta = [train_gpt2.muon_momentum(step, ScheduleFlags(max_steps=max_steps)) for step in (0, 10, 25, 50, 99)]
        assert momenta == pytest.approx(expected)
    assert train_gpt2.muon_momentum(300, ScheduleFlags()) == pytest.approx(0.95)


def test_a_time_budget_ends_the_warm_up_with_its_first_tenth():
    """Of however many steps, and the rest by the share of the time; a short warm-up stays as long as it is."""
    flags = ScheduleFlags(lr=1.0, min_lr=0.0, warmup_steps=715, max_steps=10**9, max_minutes=5, schedule="wsd", decay_fraction=0.4)
    rates = [train_gpt2.learning_rate(step, flags, share) for step, share in ((0, 0), (3, 0.05), (7, 0.1), (50, 0.6), (60, 0.8), (70, 1))]
    assert rates == pytest.approx([1 / 715, 0.5, 1.0, 1.0, 0.5, 0.0])
    assert train_gpt2.learning_rate(714, flags, 0.01) == 1.0 and train_gpt2.learning_rate(10, flags, 0.01) == pytest.approx(0.1)
    assert train_gpt2.muon_momentum(2, flags, 1 / 12) == pytest.approx(0.9)


def completed(*argv):
    """The config of a new run, and what the user is told."""
    config, given = train_gpt2.read_flags([str(word) for word in argv])
    return config, train_gpt2.complete_config(config, given)


def test_a_short_run_shortens_its_presets_warm_up():
    flags = ["--preset", "tiny", "--data", ROOT / "input.txt", "--max_steps", 100]
    config, notes = completed(*flags)
    assert config.schedule.warmup_steps == 10 and "a tenth" in notes[0]
    config, notes = completed(*flags, "--warmup_steps", 30)
    assert config.schedule.warmup_steps == 30 and notes == []
    config, notes = completed(*flags[:-2], "--max_minutes", 5)
    assert config.schedule.warmup_steps == 15 and "at most a tenth of --max_minutes" in notes[0]


def test_a_flag_left_alone_follows_the_preset_and_one_that_was_given_does_not(small_shards):
    config, _ = completed("--data", ROOT / "input.txt")
    assert (config.setup.preset, config.setup.tokenizer, config.model.n_embd, config.schedule.lr) == ("tiny", "byte", 128, 6e-3)
    assert config.model.rope and not config.model.bias and config.recipe.optimizer == "muon" and not config.system.compile
    config, _ = completed("--data", ROOT / "input.txt", "--n-embd=64", "--no_rope", "--bias", "--lr", 1e-3, "--compile")
    assert (config.model.n_embd, config.schedule.lr) == (64, 1e-3)
    assert not config.model.rope and config.model.bias and config.system.compile
    config, _ = completed("--data", small_shards)
    assert (config.setup.preset, config.setup.tokenizer, config.schedule.max_steps) == ("gpt2", "byte", 19073)


@pytest.mark.parametrize("depth,tokenizer,expected", [
    # 10.5 tokens for each of 12 depth width^2 + vocabulary x width parameters, written out by hand
    (2, "byte", dict(n_embd=128, block_size=256, total_batch_size=4096, max_steps=1093, warmup_steps=54, lr=6e-3,
                     eval_every=110, checkpoint_every=110, eval_tokens=65536, hellaswag_every=0)),
    (6, "byte", dict(n_embd=384, block_size=256, total_batch_size=16384, max_steps=6868, warmup_steps=343, lr=2e-3,
                     eval_every=687, checkpoint_every=687, eval_tokens=112512, hellaswag_every=0)),
    (12, "gpt2", dict(n_embd=768, block_size=1024, total_batch_size=32768, max_steps=39584, warmup_steps=1979, lr=1e-3,
                      eval_every=3959, checkpoint_every=1000, eval_tokens=1297086, hellaswag_every=39584)),
    (20, "gpt2", dict(n_embd=1280, block_size=1024, total_batch_size=65536, max_steps=73307, warmup_steps=3665, lr=6e-4,
                      eval_every=7331, checkpoint_every=1000, eval_tokens=4804222, hellaswag_every=73307))])
def test_what_follows_from_depth(depth, tokenizer, expected):
    flags = ["--data", ROOT / "input.txt", *(["--tokenizer", tokenizer] if tokenizer != "byte" else [])]
    config, (note, *_) = completed("--depth", depth, *flags)
    values = config.flat()
    assert {name: values[name] for name in expected} == expected
    assert values["tokenizer"] == tokenizer and values["n_layer"] == values["n_head"] == depth
    shape = {name: values[name] for name in vars(config.model)}
    modern = completed("--preset", "modern", "--data", ROOT / "input.txt")[0]
    assert shape == vars(modern.model) | dict(n_layer=depth, n_head=depth, n_embd=64 * depth, block_size=values["block_size"])
    assert (values["optimizer"], values["schedule"], values["min_lr"]) == ("muon", "wsd", 0.0)
    # What the run says can be given as flags, and gives the same run.
    by_hand, _ = completed("--preset", "modern", *flags, *note.partition(": ")[2].split())
    assert by_hand.flat() | {"depth": depth} == values


def test_a_given_flag_wins_over_depth_and_the_rest_follows_it(small_shards):
    def values(*flags, **given):
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        return completed("--depth", 4, "--data", ROOT / "input.txt", *words, *flags)[0].flat()
    wins = dict(n_layer=3, n_head=2, n_embd=192, block_size=64, lr=1e-4, weight_decay=0.3, total_batch_size=4096, max_steps=70,
                warmup_steps=5, eval_every=9, eval_tokens=640, sample_every=8, checkpoint_every=7, hellaswag_every=6, min_lr=1e-5)
    usual = values()
    for name, value in wins.items():
        assert usual[name] != value == values(**{name: value})[name], name
    other = values("--no_rope", schedule="cosine", dropout=0.1)
    assert (other["rope"], other["dropout"], other["schedule"]) == (False, 0.1, "cosine")
    names = "n_head", "lr", "total_batch_size", "max_steps", "eval_every", "warmup_steps"
    assert [usual[name] for name in names] == [4, 3e-3, 8192, 4117, 412, 205]
    assert [values(n_embd=512)[name] for name in names] == [8, 1.5e-3, 16384, 8149, 815, 407]  # 10.5 x 12,714,496
    assert [values(n_layer=2)[name] for name in names] == [4, 3e-3, 8192, 2101, 211, 105]  # 10.5 x 1,638,656
    assert [values(total_batch_size=4096)[name] for name in names] == [4, 2.1e-3, 4096, 8233, 824, 411]  # sqrt(1/2)
    assert values(total_batch_size=2**20)["lr"] == 1.2e-2  # no more than four times as much
    assert [values(max_steps=400)[name] for name in names] == [4, 3e-3, 8192, 400, 40, 20]
    assert values(block_size=192)["total_batch_size"] == 43 * 192
    assert values(init_from="scratch") == usual
    config, _ = completed("--depth", 4, "--data", small_shards)
    assert config.setup.tokenizer == "byte" and config.model.block_size == 256


@pytest.mark.parametrize("devices,batch", [(1, 8192), (3, 11 * 768), (8, 8192)])
def test_a_depths_batch_divides_among_the_devices(devices, batch):
    config, given = train_gpt2.read_flags(["--depth", "4", "--data", str(ROOT / "input.txt")])
    train_gpt2.complete_config(config, given, devices)
    assert config.recipe.total_batch_size == batch


def test_depth_under_a_time_budget():
    config, (note, *_) = completed("--depth", 4, "--data", ROOT / "input.txt", "--max_minutes", 5)
    assert config.schedule.max_steps == train_gpt2.NO_LIMIT and config.evaluation.eval_every == 412 and "max_steps" not in note
    config, (note, *_) = completed("--depth", 4, "--data", ROOT / "input.txt", "--max_minutes", 5, "--max_steps", 50)
    assert (config.schedule.max_steps, config.schedule.warmup_steps) == (50, 2)


def test_depth_counts_the_vocabulary_of_shards(gpt2_shards):
    shards, text = completed("--depth", 2, "--data", gpt2_shards)[0], completed("--depth", 2, "--data", ROOT / "input.txt")[0]
    # 10.5 x (393,216 + 50,257 x 128) tokens
    assert (shards.model.block_size, shards.recipe.total_batch_size, shards.schedule.max_steps) == (1024, 8192, 8750)
    assert text.schedule.max_steps == 1093


def test_a_resumed_run_keeps_what_followed_from_depth(tmp_path, text_file):
    flags = ["--depth", 2, "--data", text_file, "--block_size", 32, "--total_batch_size", 128, "--device", "cpu", "--no_compile",
             "--n_embd", 64, "--sample_every", 0, "--eval_tokens", 640, "--out_dir", tmp_path / "log"]
    out, _ = run("train_gpt2.py", *flags, "--max_steps", 4)
    assert "depth 2: " in out and "by --depth 2: " in out
    run("train_gpt2.py", *flags, "--max_steps", 25, "--resume")
    run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "log", "--max_steps", 40, "--eval_every", 7)
    configs = log_lines(tmp_path / "log", "config")
    assert [[config[name] for name in ("max_steps", "eval_every", "warmup_steps")] for config in configs] == [[4, 1, 0], [25, 1, 0], [40, 7, 0]]
    names = configs[0].keys() - {"step", "chosen", "max_steps", "resume", "eval_every"}
    assert all({name: config[name] for name in names} == {name: configs[0][name] for name in names} for config in configs)
    assert "--depth 3" in refused("train_gpt2.py", "--depth", 3, *flags[2:], "--resume")


def test_decay_groups():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=8, vocab_size=70, swiglu=True, qk_norm=True))
    (adamw,) = train_gpt2.make_optimizers(model, RecipeFlags(), "cpu")
    decayed, plain = adamw.param_groups
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim == 1 for p in plain["params"])
    assert sum(len(g["params"]) for g in adamw.param_groups) == len(list(model.parameters()))
    assert adamw.defaults["betas"] == (0.9, 0.95) and adamw.defaults["eps"] == 1e-8
    adamw, muon = train_gpt2.make_optimizers(model, RecipeFlags(optimizer="muon"), "cpu")
    names = {id(p): n for n, p in model.named_parameters()}
    moved = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    assert moved == {n for n, p in model.named_parameters() if n.startswith("h.") and p.ndim == 2}
    assert sum(len(g["params"]) for o in (adamw, muon) for g in o.param_groups) == len(names)


def test_batched_muon_is_torch_muon_bit_for_bit():
    """Its updates and its state, which either can go on from; matrices that are wide, tall, square, and alone."""
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 24), (24, 8), (16, 16), (8, 24), (8, 8), (24, 8)]
    start = [torch.randn(shape) for shape in shapes]

    def make(kind, params):
        return kind([torch.nn.Parameter(p.clone()) for p in params], lr=0.02, weight_decay=0.1,
                    adjust_lr_fn="match_rms_adamw")
    ours, theirs = make(train_gpt2.BatchedMuon, start), make(torch.optim.Muon, start)
    for step in range(6):
        if step == 3:  # each goes on from the other's state
            saved = [optimizer.state_dict() for optimizer in (ours, theirs)]
            ours.load_state_dict(saved[1])
            theirs.load_state_dict(saved[0])
        for optimizer in (ours, theirs):
            generator = torch.Generator().manual_seed(step)
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.param_groups[0].update(momentum=0.85 + 0.02 * step, lr=0.02 / (step + 1))
            optimizer.step()
        for a, b in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"]):
            assert torch.equal(a, b)
            assert torch.equal(ours.state[a]["momentum_buffer"], theirs.state[b]["momentum_buffer"])


def test_a_step_equals_the_same_step_written_out(small_shards, tmp_path):
    """Accumulated over micro-steps, against one batch, clipping and AdamW by the textbook."""
    run("train_gpt2.py", *SMALL, "--data", small_shards, "--max_steps", 2, "--warmup_steps", 0, "--batch_size", 4, "--grad_clip", 0.1,
        "--out_dir", tmp_path / "log", "--checkpoint_every", 1, "--min_lr", 1e-3, "--keep_checkpoints", 0)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257))
    corpus = train_gpt2.open_data(str(small_shards), fineweb.get_tokenizer("byte"), GPTConfig(block_size=32))[0]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for step in (1, 2):
        batch = corpus.read_windows([corpus.locate(i, 1337) for i in range((step - 1) * 16, step * 16)])
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        with torch.no_grad():
            for p, (m, v) in zip(model.parameters(), moments):
                g = p.grad * min(1.0, 0.1 / norm)
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g * g)
                p.mul_(1 - 1e-3 * (0.1 if p.ndim >= 2 else 0))
                p -= 1e-3 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        line = log_lines(tmp_path / "log", "train")[step - 1]
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-5) and line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    saved = GPT.from_pretrained(tmp_path / "log/step_000002")
    for (name, p), q in zip(saved.named_parameters(), model.parameters()):
        assert torch.allclose(p, q, atol=2e-5), name


def test_flags_of_every_kind(tmp_path, text_file):
    short = [*SMALL[:8], "--total_batch_size=64", "--max-steps", "1", "--eval_every", "0", "--device", "cpu", "--data", text_file]
    run("train_gpt2.py", *short, "--rope", "--no_bias", "--rmsnorm", "--no-compile", "--no-swiglu", "--out_dir", tmp_path / "a",
        "--checkpoint_every=0", "--sample-every=0", "--hellaswag_every=0")
    config = log_lines(tmp_path / "a", "config")[0]
    assert (config["rope"], config["bias"], config["rmsnorm"], config["swiglu"], config["compile"]) == (True, False, True, False, False)
    assert config["n_kv_head"] == 2  # follows n_head


TYROS = [  # what tyro refuses, in its own words
    (["--max_stepz", "3"], "--max_steps"),
    (["--lr", "fast"], "fast"),
    (["--rope=maybe"], "maybe"),
    (["--optimizer", "sgd"], "'adamw', 'muon'"),
    (["--preset", "huge"], "gpt2-xl"),
    (["train"], "train"),
]
ERRORS = [
    (["--max_steps", "0"], "--max_steps 0: must be at least 1"),
    (["--lr", "nan"], "--lr nan"),
    (["--data", "nowhere"], "nowhere"),
    (["--n_head", "3", "--n_embd", "32"], "divide"),
    (["--n_head", "4", "--n_kv_head", "3"], "1, 2, 4"),
    (["--total_batch_size", "1000"], "992 and 1024"),
    (["--batch_size", "3"], "1, 2, 4"),
    (["--device", "tpu"], "cpu"),
    (["--dropout", "1.5"], "--dropout"),
    (["--init_from", "./nowhere"], "nowhere"),
    (["--seed", "-1"], "--seed"),
    (["--resume_from", "nowhere"], "nowhere"),
    (["--decay_fraction", "1.5"], "at most 1"),
    (["--depth", "0"], "--depth 0: must be at least 1"),
    (["--depth", "2", "--preset", "tiny"], "leave out --preset"),
    (["--depth", "2", "--init_from", "gpt2"], "leave out --preset and --init_from"),
]


@pytest.mark.parametrize("flags,says", TYROS + ERRORS, ids=[" ".join(e[0]) for e in TYROS + ERRORS])
def test_bad_flags_are_refused(flags, says, tmp_path, text_file):
    small = ["--device", "cpu"] if "--init_from" in flags else SMALL
    command = ["train_gpt2.py", "--out_dir", tmp_path / "log", "--data", text_file, *small, *flags]
    if (flags, says) in ERRORS:
        assert says in refused(*command)
    else:
        _, err = run(*command, expect=2)
        assert says in err and "Traceback" not in err
    assert is_untouched(tmp_path / "log")


def test_help_is_quick(capsys, monkeypatch):
    """About half a second of its own work, counted in calls of Python functions: they are as many on any machine."""
    monkeypatch.setenv("COLUMNS", "120")  # one group below the other
    calls = collections.Counter()

    def count(frame, event, argument):
        calls[event] += 1
    sys.setprofile(count)
    try:
        assert call_main("train_gpt2.py", ["--help"]) == 0
    finally:
        sys.setprofile(None)
    assert calls["call"] < 300_000  # tyro 1.0 makes 120,000
    text = capsys.readouterr().out
    assert "torchrun --standalone" in text and "--n_layer INT" in text and "transformer blocks (default: 12)" in text
    assert text.index("model options") < text.index("recipe options") < text.index("schedule options")


def test_bad_data_is_one_line(tmp_path, small_shards):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin1") * 1000)
    assert "byte 3 is not UTF-8" in refused("train_gpt2.py", *SMALL, "--data", latin, "--out_dir", tmp_path / "log")
    short = tmp_path / "short.txt"
    short.write_text("To be, or not to be")
    assert "fewer than one window" in refused("train_gpt2.py", *SMALL, "--data", short, "--out_dir", tmp_path / "log")
    (tmp_path / "empty").mkdir()
    assert "with train and val shards" in refused("train_gpt2.py", *SMALL, "--data", tmp_path / "empty", "--out_dir", tmp_path / "log")
    line = refused("train_gpt2.py", *SMALL, "--data", small_shards, "--tokenizer", "gpt2", "--out_dir", tmp_path / "log")
    assert "byte tokens" in line


def test_trains_on_other_peoples_shards(gpt2_shards, tmp_path):
    run("train_gpt2.py", *SMALL, "--max_steps", 3, "--data", gpt2_shards, "--out_dir", tmp_path)
    assert log_lines(tmp_path, "config")[0]["vocab_size"] == 50257 and abs(losses(tmp_path)[0] - math.log(50257)) < 0.1


def test_fine_tunes_openais_folder_on_shards(gpt2_shards, text_file, tmp_path):
    """Its config.json names no tokenizer; the files beside it are GPT-2's vocabulary. Another vocabulary of that size is
    not taken for it, and trains on text."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64)).save_pretrained(tmp_path / "model")
    fineweb.get_tokenizer("gpt2").save_pretrained(tmp_path / "fast")
    AutoTokenizer.from_pretrained(tmp_path / "fast").save_pretrained(tmp_path / "model")
    flags = ["--init_from", tmp_path / "model", "--max_steps", 1, "--total_batch_size", 128, "--eval_every", 0, "--sample_every", 0,
             "--hellaswag_every", 0, "--device", "cpu", "--no_compile"]
    run("train_gpt2.py", *flags, "--data", gpt2_shards, "--checkpoint_every", 0, "--out_dir", tmp_path / "log")
    assert log_lines(tmp_path / "log", "config")[0]["tokenizer"] == "gpt2"
    path = tmp_path / "model/tokenizer.json"
    words = json.loads(path.read_text())
    vocab = words["model"]["vocab"]
    vocab["\u0120the"], vocab["\u0120a"] = vocab["\u0120a"], vocab["\u0120the"]
    path.write_text(json.dumps(words))
    assert "has its own" in refused("train_gpt2.py", *flags, "--data", gpt2_shards, "--out_dir", tmp_path / "other")
    run("train_gpt2.py", *flags, "--max_steps", 2, "--checkpoint_every", 1, "--data", text_file, "--out_dir", tmp_path / "other")
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "other/step_000002/tokenizer.json").write_text("{")
    out, _ = run("train_gpt2.py", "--resume", "--out_dir", tmp_path / "other", "--device", "cpu")
    assert "not resumed from step_000002" in out and "at step 1\n" in out and len(losses(tmp_path / "other")) == 2


def test_a_padded_clone_of_gpt2_has_gpt2s_tokenizer(tmp_path):
    """nanoGPT's 50,304 rows with GPT-2's tokenizer files: what counts is the tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=50304)).save_pretrained(tmp_path / "model")
    fineweb.get_tokenizer("gpt2").save_pretrained(tmp_path / "fast")
    AutoTokenizer.from_pretrained(tmp_path / "fast").save_pretrained(tmp_path / "model")
    model, tokenizer = train_gpt2.open_model(tmp_path / "model")
    assert tokenizer.name == "gpt2" and model.config.vocab_size == 50304


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path, text_file):
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=100)).save_pretrained(tmp_path / "m", fineweb.get_tokenizer("byte"))
    for command in (["eval", "--checkpoint", tmp_path / "m", "--data", text_file], ["sample", "--checkpoint", tmp_path / "m", "--prompt", "xyz"],
                    ["--quiet", "--no_compile", "--device", "cpu", "--init_from", tmp_path / "m", "--data", text_file, "--out_dir", tmp_path / "log"]):
        said = refused("train_gpt2.py", *command)
        assert "vocabulary of 100" in said and "token 1" in said


def test_eval_refuses_shards_of_another_tokenizer(gpt2_shards, tmp_path):
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=257)).save_pretrained(tmp_path, fineweb.get_tokenizer("byte"))
    line = refused("train_gpt2.py", "eval", "--checkpoint", tmp_path, "--data", gpt2_shards, "--device", "cpu")
    assert "holds gpt2 tokens" in line and "byte" in line


def test_fine_tuning_takes_shape_and_tokenizer(tmp_path, text_file):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=257))
    model.save_pretrained(tmp_path / "model", fineweb.get_tokenizer("byte"))
    flags = ["--init_from", tmp_path / "model", "--data", text_file, "--max_steps", 2, "--sample_every", 0, "--device", "cpu"]
    run("train_gpt2.py", *flags, "--out_dir", tmp_path / "log", "--block_size", 32)
    config = log_lines(tmp_path / "log", "config")[0]
    assert (config["n_embd"], config["block_size"], config["tokenizer"], config["lr"]) == (32, 32, "byte", 5e-5)
    idx = torch.randint(0, 257, (1, 32))
    assert torch.allclose(GPT.from_pretrained(tmp_path / "log/latest")(idx), model(idx), atol=0.05)
    assert "takes its shape" in refused("train_gpt2.py", *flags, "--n_layer", 2, "--out_dir", tmp_path / "b")
    assert "--dropout 1.5" in refused("train_gpt2.py", *flags, "--dropout", 1.5, "--out_dir", tmp_path / "b")
