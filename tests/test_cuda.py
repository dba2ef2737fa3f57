"""What only a GPU shows; skipped without one. Every run is a process of its own: one that has used CUDA cannot be forked, and
other tests fork this one."""
import multiprocessing
import shutil

import pytest
import torch

import train_gpt2
from conftest import SMALL, losses, spawn

# Counted by the driver's NVML where it can be: CUDA itself stays untouched.
pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs CUDA")
ON_CUDA = [*SMALL[:-2], "--device", "cuda", "--max_steps", 12, "--eval_every", 6]
SYNCS = ("--preset gpt2 --n_layer 2 --n_head 2 --n_embd 64 --block_size 64 --total_batch_size 1024 --batch_size 4 --max_steps 8 "
         "--eval_every 0 --sample_every 0 --checkpoint_every 0 --hellaswag_every 0 --no_compile --device cuda").split()


@pytest.fixture(autouse=True)
def as_users_start_them(monkeypatch):
    """Without conftest.py's settings, which are for tests that fork and for CPUs."""
    for name in ("PYTORCH_NVML_BASED_CUDA_CHECK", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TORCHINDUCTOR_VEC_ISA_OK",
                 "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.delenv(name, raising=False)


def steps_without_a_sync(flags):
    """Two steps, and a third in which every wait for the device is an error, until the step reads its loss."""
    run = train_gpt2.Run(list(map(str, flags)), train_gpt2.World())
    for _ in range(2):
        run.train_step()
    tolist = torch.Tensor.tolist
    reads = []

    def read(tensor):
        if tensor.is_cuda:
            reads.append(tensor)
            torch.cuda.set_sync_debug_mode("default")
        return tolist(tensor)

    torch.Tensor.tolist = read
    torch.cuda.set_sync_debug_mode("error")
    line = run.train_step()  # four micro-steps
    assert line["loss"] > 0 and len(reads) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_host_sync_before_the_steps_one_read(optimizer, small_shards, tmp_path):
    flags = [*SYNCS, "--optimizer", optimizer, "--data", small_shards, "--out_dir", tmp_path / "log"]
    process = multiprocessing.get_context("spawn").Process(target=steps_without_a_sync, args=(flags,))
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0


def test_losses_are_the_cpus(small_shards, tmp_path):
    spawn("train_gpt2.py", *ON_CUDA, "--data", small_shards, "--out_dir", tmp_path / "cuda").finish()
    spawn("train_gpt2.py", *ON_CUDA, "--device", "cpu", "--data", small_shards, "--out_dir", tmp_path / "cpu").finish()
    assert len(losses(tmp_path / "cuda")) == 12
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-2)  # TF32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_learns(dtype, small_shards, tmp_path):
    spawn("train_gpt2.py", *ON_CUDA, "--dtype", dtype, "--data", small_shards, "--out_dir", tmp_path / "log").finish()
    found = losses(tmp_path / "log")
    assert found[-1] < found[0] - 0.1


def test_deterministic_resume_is_bit_for_bit(small_shards, tmp_path):
    flags = [*ON_CUDA, "--deterministic", "--dropout", 0.1, "--checkpoint_every", 5, "--keep_checkpoints", 0, "--data", small_shards]
    spawn("train_gpt2.py", *flags, "--out_dir", tmp_path / "whole").finish()
    shutil.copytree(tmp_path / "whole/step_000005", tmp_path / "log/step_000005")
    shutil.copy(tmp_path / "whole/log.jsonl", tmp_path / "log/log.jsonl")
    spawn("train_gpt2.py", *flags, "--out_dir", tmp_path / "log", "--resume").finish()
    assert losses(tmp_path / "log") == losses(tmp_path / "whole")
    assert (tmp_path / "log/latest/model.safetensors").read_bytes() == (tmp_path / "whole/latest/model.safetensors").read_bytes()


def test_auto_batch_fits_gpt2(tmp_path):
    """The reference run's first steps, with the batch found by itself and everything compiled."""
    out, _ = spawn("train_gpt2.py", "--preset", "gpt2", "--data", train_gpt2.HERE / "input.txt", "--max_steps", 3,
                   "--total_batch_size", 65536, "--eval_tokens", 20480, "--sample_every", 0, "--checkpoint_every", 0,
                   "--hellaswag_every", 0, "--out_dir", tmp_path).finish(timeout=600)
    assert ", compiled" in out and len(losses(tmp_path)) == 3


@pytest.mark.parametrize("parts", [["--window", 16], ["--n_head", 4, "--n_kv_head", 2, "--rope"], ["--optimizer", "muon", "--rmsnorm", "--swiglu"]])
def test_modern_parts_compile(parts, small_shards, tmp_path):
    flags = [flag for flag in ON_CUDA if flag != "--no_compile"]
    spawn("train_gpt2.py", *flags, *parts, "--dtype", "bfloat16", "--compile", "--data", small_shards, "--out_dir", tmp_path / "log",
          torchrun=1).finish(timeout=600)
    assert losses(tmp_path / "log")[-1] < losses(tmp_path / "log")[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_one(small_shards, tmp_path):
    exact = {"NVIDIA_TF32_OVERRIDE": "0"}  # the shapes differ, and with them cuBLAS may choose TF32 for one only
    spawn("train_gpt2.py", *ON_CUDA, "--data", small_shards, "--out_dir", tmp_path / "one", env=exact).finish()
    spawn("train_gpt2.py", *ON_CUDA, "--data", small_shards, "--out_dir", tmp_path / "two", env=exact, torchrun=2).finish()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def window_by_both(window, T, heads, dtype, compiled):
    """The output, and the gradients of q, k and v: by flash attention, and by blocks in float64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, n, T, 64, device="cuda", dtype=dtype, requires_grad=True) for n in heads)
    weights = torch.randn(3, heads[0], T, 64, device="cuda", dtype=dtype)
    attention = train_gpt2.WindowAttention(window).cuda()
    assert train_gpt2.has_flash_attention(q)
    found = []
    for inputs in ((q, k, v), [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]):
        function = torch.compile(attention, fullgraph=True) if compiled and inputs[0] is q else attention
        parts = function(*inputs, 0.0)
        assert len(parts) == (1 if inputs[0] is q or T <= window else 2)
        out = torch.cat(parts, dim=2)
        found.append([out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), inputs)])
    for a, b in zip(*found):
        assert ((a.double() - b).norm() / b.norm()).item() < 2e-2


@pytest.mark.skipif(torch.cuda.device_count() > 0 and torch.cuda.get_device_capability() < (8, 0), reason="needs an A100 or newer")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window,T", [(32, 33), (32, 200), (1, 70), (512, 1024), (96, 64)])
def test_the_window_by_flash_attention_equals_the_blocks(window, T, dtype, compiled):
    for heads in ((4, 4, 4), (6, 2, 2)):
        args = (window, T, heads, dtype, compiled)
        process = multiprocessing.get_context("spawn").Process(target=window_by_both, args=args)
        process.start()
        process.join(300)
        process.kill()
        assert process.exitcode == 0
