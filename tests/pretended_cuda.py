"""
GPT on a pretended GPU: PyTorch's CPU build is made to believe in one H100, for fake tensors. These have a shape, a dtype
and a device, but no numbers: what runs here shows that devices and dtypes fit together, what memory a step takes and
what Inductor makes of the head; whether the numbers are right it does not show.

$ python tests/pretended_cuda.py mixtures  # all mixtures of parts, three dtypes: loss, optimizers, cache, HellaSwag
$ python tests/pretended_cuda.py memory    # of a training step of the presets gpt2 and modern, uncompiled, B=16, T=1024
$ python tests/pretended_cuda.py parts     # the same of the modern parts at T=8192, B=2
$ python tests/pretended_cuda.py graphs    # into which a windowed model's blocks are compiled, with and without grouped heads
$ python tests/pretended_cuda.py head      # bytes that the compiled head moves for 65,536 tokens, and what it holds
$ python tests/pretended_cuda.py muon      # kernel launches of Muon in an optimizer step of the preset modern

Several commands in one call share the start. Needs a C++ compiler and a build of PyTorch without CUDA.
"""
import argparse
import collections
import contextlib
import ctypes
import gc
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import types
import weakref
from pathlib import Path
from unittest import mock

STUB = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}
namespace c10::impl {
struct Pretended final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device device() const { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return device(); }
  Device getDevice() const override { return device(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, device()); }
  Stream getNewStream(Device, int priority = 0) const override { return Stream(Stream::DEFAULT, device()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, device()); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Pretended);
}
"""


def load_stub():
    """Compiles what the CPU build lacks of a CUDA device and loads it; before torch, which asks for it once."""
    root = os.path.dirname(importlib.util.find_spec("torch").origin)
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "stub.cpp"), Path(folder, "stub.so")
        source.write_text(STUB)
        subprocess.run(["c++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root}/include", source, f"-L{root}/lib",
                        f"-Wl,-rpath,{root}/lib", "-lc10", "-ltorch_cpu", "-o", library], check=True)
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)


load_stub()
import torch  # noqa: E402

H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, gcnArchName="")
RETURNED = {  # by what asks for a GPU
    "torch.cuda.is_available": True, "torch.cuda._is_compiled": True, "torch.cuda._lazy_init": None,
    "torch.cuda.device_count": 1, "torch.cuda.current_device": 0, "torch.cuda.get_device_properties": H100,
    "torch.cuda.get_device_capability": (9, 0), "torch.cuda.is_bf16_supported": True,
    "torch.cuda.get_rng_state": torch.zeros(16, dtype=torch.uint8), "torch.cuda.set_rng_state": None,
    "torch.cuda.amp.common.amp_definitely_not_available": False,
    "torch._C._cuda_getCurrentRawStream": 0, "torch._subclasses.fake_tensor.init_gpu_context": None,
    "torch._subclasses.fake_tensor.FakeTensor.all": False,  # whether all samples have ended
    "torch._subclasses.fake_tensor.FakeTensor.any": True}  # whether a row of HellaSwag has several endings


def pretend():
    """Before the compiler is imported, which keeps some of these functions."""
    for name, value in RETURNED.items():
        mock.patch(name, returning(value), create=True).start()


def returning(value):
    def function(*args, **kwargs):
        return value
    return function


pretend()
import torch.nn as nn  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._guards import detect_fake_mode  # noqa: E402
from torch._inductor import compile_fx  # noqa: E402
from torch._inductor.debug import DebugContext  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.scheduler import ExternKernelSchedulerNode  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hellaswag  # noqa: E402
import train_gpt2  # noqa: E402
from train_gpt2 import GPT, GPTConfig, RecipeFlags, autocast, make_optimizers  # noqa: E402

GIB = 2**30
PARTS = [("rope", True), ("rmsnorm", True), ("swiglu", True), ("qk_norm", True), ("n_kv_head", 2), ("window", 12)]


def cuda_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False):
    """The kernel that CUDA would take, with the checks that it makes; the CPU build would take many operations."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(dtype)
    assert q.dtype == k.dtype == v.dtype
    assert attn_mask is None or attn_mask.dtype in (torch.bool, q.dtype) and attn_mask.device == q.device
    assert k.size(1) == q.size(1) or enable_gqa
    with torch.autocast("cuda", enabled=False):
        if attn_mask is None and q.dtype != torch.float32:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False)[0]
        assert k.size(1) == q.size(1), "this kernel takes as many heads of keys as of queries"
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
            attn_mask = attn_mask.expand(q.size(0), q.size(1), q.size(2), k.size(2))
        efficient_attention = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient_attention(q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal)[0]


def cuda_model(**shape):
    """A GPT of fake CUDA tensors; Module.to cannot move what is shared and fake."""
    model, moved = GPT(GPTConfig(**shape)), {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if tensor not in moved:
                        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                        moved[tensor] = nn.Parameter(copy) if isinstance(tensor, nn.Parameter) else copy
                    tensors[name] = moved[tensor]
    return model


def tokens(*shape):
    return torch.empty(shape, dtype=torch.long, device="cuda")


MATMULS = ("mm", "bmm", "addmm", "baddbmm")


class Strict(TorchDispatchMode):
    """Refuses what fake tensors let pass and CUDA does not: matmuls of two dtypes, lists on two devices, and what flash
    attention over sequences does not take. Counts the calls of that."""
    varlen_calls = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if name in MATMULS:
            assert len({tensor.dtype for tensor in tensors}) == 1, f"{function} of several dtypes"
        if name.startswith(("_foreach", "_fused")):
            assert len({tensor.device for tensor in tensors}) == 1, f"{function} on several devices"
        if name == "torch_attn::_varlen_attn":
            assert {tensor.dtype for tensor in tensors} in ({half, torch.int32} for half in (torch.float16, torch.bfloat16))
            assert all(is_on_gpu(tensor) and tensor.stride(-1) == 1 for tensor in tensors) and args[0].size(2) % 8 == 0
            self.varlen_calls += 1
        return function(*args, **(kwargs or {}))


class Meter(TorchDispatchMode):
    """Notes what the operations do to the pretended GPU: bytes alive in the allocator's blocks of 512, and their peak;
    the launches, which are the operations that write; the bytes that they read and write, but for matmuls; the elements
    of the largest tensor in float32."""

    def __init__(self):
        super().__init__()
        self.sizes = {}  # {storage: bytes}
        self.alive = self.peak = self.moved = self.largest_float32 = 0
        self.launches = collections.Counter()

    @classmethod
    def is_infra_mode(cls):
        return True  # torch.compile works under it

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        read = [tensor for tensor in tree_leaves((args, kwargs)) if is_on_gpu(tensor)]
        written = [tensor for tensor in tree_leaves(result) if is_on_gpu(tensor)]
        read_storages = {storage_key(tensor) for tensor in read}
        is_view = all(storage_key(tensor) in read_storages for tensor in written) and not function._schema.is_mutable
        name = function._schema.name.removeprefix("aten::")
        if not is_view and not name.startswith("empty"):
            self.launches[name] += 1
            if name not in MATMULS:
                self.moved += sum(tensor.nbytes for tensor in read + written)
        for tensor in written:
            self.note(tensor)
        return result

    def note(self, tensor):
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if tensor.dtype == torch.float32:
            self.largest_float32 = max(self.largest_float32, tensor.numel())
        if key not in self.sizes:
            self.sizes[key] = (storage.nbytes() + 511) // 512 * 512
            self.alive += self.sizes[key]
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.alive -= self.sizes.pop(key)


def is_on_gpu(value):
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def storage_key(tensor):
    return tensor.untyped_storage()._cdata

# -----------------------------------------------------------------------------
# the commands: each returns a dict of its figures

def mixtures():
    count = varlen_calls = 0
    for bits in itertools.product((False, True), repeat=len(PARTS)):
        parts = dict(part for part, is_on in zip(PARTS, bits) if is_on)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            try:
                with FakeTensorMode(allow_non_fake_inputs=True), Strict() as strict:
                    check_mixture(parts, dtype)
                count += 1
                varlen_calls += strict.varlen_calls
                assert (strict.varlen_calls > 0) == ("window" in parts and dtype != torch.float32)
            except Exception as error:
                error.add_note(f"in {dtype} with {parts or 'no modern part'}")
                raise
    return {"checked": count, "varlen_calls": varlen_calls}


def check_mixture(parts, dtype):
    model = cuda_model(n_layer=1, n_head=4, n_embd=64, block_size=32, vocab_size=500, dropout=0.1, **parts)
    model.loss_chunks = 2
    x = tokens(3, 32)
    with autocast("cuda", dtype):
        loss = model(x, x)
    assert loss.device.type == "cuda" and loss.dtype == torch.float32
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.device.type == "cuda" and p.grad.dtype == torch.float32, name
    if dtype == torch.float32:  # the optimizers see no other
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name in ("adamw", "muon"):
            for optimizer in make_optimizers(model, RecipeFlags(optimizer=name), "cuda"):
                optimizer.step()
    example = {"ctx": "abcdefgh", "endings": ["ab", "abc", "a", "abcdef"]}
    item = hellaswag.make_item(example, list_of_ids, "completion", 32, packed=True)
    with torch.no_grad(), autocast("cuda", dtype):
        new = list(model.stream(x[:, :20], 2))  # after the prompt, and after one more token
        losses = hellaswag.score_batch(model.eval(), [item], torch.device("cuda", 0))
    assert len(new) == 2 and all(token.shape == (3, 1) and token.device.type == "cuda" for token in new)
    assert losses.shape == (1, 4)


def list_of_ids(text):
    return [ord(letter) for letter in text]


def model_and_optimizers(shape, optimizer="adamw"):
    model = cuda_model(**shape)
    gc.collect()  # its copy outside the GPU
    return model, make_optimizers(model, RecipeFlags(optimizer=optimizer), "cuda")


def preset(name):
    """What `model_and_optimizers` takes."""
    flags = train_gpt2.PRESETS[name]
    shape = {flag: value for flag, value in flags.items() if flag in GPTConfig.__dataclass_fields__}
    return shape, flags.get("optimizer", "adamw")


def training_step(batch_size, *what):
    """In bfloat16, uncompiled: a step, and another of two micro-steps, which has the optimizers' state and gradients."""
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        model, optimizers = model_and_optimizers(*what)
        x = tokens(batch_size, model.config.block_size)
        for micro_steps in (1, 2):
            meter.peak, meter.largest_float32 = meter.alive, 0
            for _ in range(micro_steps):
                with autocast("cuda", torch.bfloat16):
                    loss = model(x, x)
                loss.backward()
                del loss
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    logits = x.numel() * model.config.padded_vocab_size
    return {"peak_gib": round(meter.peak / GIB, 2),
            "largest_float32_of_all_logits": round(meter.largest_float32 / logits, 3)}


def memory():
    return {name: training_step(16, *preset(name)) for name in ("gpt2", "modern")}


LONG_CONTEXT = {"standard": {}, "+ RoPE": dict(rope=True), "+ GQA (4 of 12 heads)": dict(rope=True, n_kv_head=4),
                "+ sliding window (512)": dict(rope=True, n_kv_head=4, window=512)}


def parts():
    return {name: training_step(2, dict(flags, block_size=8192)) for name, flags in LONG_CONTEXT.items()}


def graphs():
    """One for all blocks, without a break, or it raises. Dynamo knows the device's properties by their type."""
    torch._dynamo.utils.common_constant_types.add(type(H100))
    for n_kv_head in (4, 2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = cuda_model(n_layer=3, n_head=4, n_kv_head=n_kv_head, n_embd=64, block_size=32, vocab_size=500, rope=True, window=12)
            for block in model.h:
                block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
            x = tokens(3, 32)
            with autocast("cuda", torch.bfloat16):
                model(x, x).backward()
    return {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def muon():
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, optimizers = model_and_optimizers(*preset("modern"))
        optimizer = optimizers[-1]
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()  # makes its state
        with Meter() as meter:
            optimizer.step()
    return {"matrices": sum(len(group["params"]) for group in optimizer.param_groups),
            "launches": meter.launches.total(), "by_operation": dict(meter.launches.most_common())}


def head(batch_size=64):
    """The head's forward pass in bfloat16 as compile_blocks compiles it, with all gradients; the backward pass only
    scales them. triton_gb: what Inductor's kernels read and write, each tensor once a kernel; other_gb: what other
    operations do, matmuls left out; chunk_gib: the buffers of one chunk's code; peak_gib: all that the head makes,
    gradients included."""
    compiled, torch_compile = [], torch.compile

    def lowered(graph, inputs):
        return lower(graph, inputs, compiled)

    def compile_for_gpu(function, **options):
        backend = aot_autograd(fw_compiler=lowered, decompositions=select_decomp_table())
        return torch_compile(function, backend=backend, **options)

    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch("torch.compile", compile_for_gpu):
        model = cuda_model()  # of the default config, GPT-2 124M
        model.h = nn.ModuleList()
        model.compile_blocks()
        x = tokens(batch_size, model.config.block_size)
        meter, apply = Meter(), train_gpt2.ChunkedCrossEntropy.apply

        def metered(*args):
            with meter:
                return apply(*args)

        with autocast("cuda", torch.bfloat16):
            model(x, x)  # compiles
            for part in compiled:
                part.meter = meter
            with mock.patch.object(train_gpt2.ChunkedCrossEntropy, "apply", metered):
                model(x, x)
    triton = sum(part.calls * part.moved for part in compiled)
    return {"tokens": x.numel(), "chunks": sum(part.calls for part in compiled),
            "kernels_of_a_chunk": compiled[0].kernels,
            "triton_gb": round(triton / 1e9, 2), "other_gb": round(meter.moved / 1e9, 2),
            "chunk_gib": round(max(part.buffers for part in compiled) / GIB, 2), "peak_gib": round(meter.peak / GIB, 2)}


def lower(graph, inputs, compiled):
    """A compiler for torch.compile. Inductor writes its Triton code, of which bytes and buffers are noted; it is not
    run, for it would bring no numbers."""
    outputs = [node.meta["val"] for node in graph.graph.output_node().args[0]]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", returning(True)))
        for name, value in (("has_triton", True), ("triton_hash_with_backend", ""), ("triton_backend", None)):
            stack.enter_context(mock.patch(f"torch.utils._triton.{name}", returning(value)))
        stack.enter_context(V.set_fake_mode(detect_fake_mode(inputs)))
        stack.enter_context(V.set_debug_handler(DebugContext()))
        compile_fx._recursive_post_grad_passes(graph, is_inference=True)
        lowering = GraphLowering(graph, example_inputs=inputs, is_inference=True)
        stack.enter_context(V.set_graph_handler(lowering))
        stack.enter_context(V.set_extern_kernel_nodes([]))
        lowering.run(*inputs)
        code = lowering.codegen()[0].value
        kernels = [node for node in lowering.scheduler.nodes if not isinstance(node, ExternKernelSchedulerNode)]
        moved = sum(node.get_read_write_buffers_sizes() for node in kernels)
    part = types.SimpleNamespace(kernels=len(kernels), moved=moved, buffers=peak_of_buffers(code), calls=0, meter=None)
    compiled.append(part)

    def run(args):
        if part.meter:
            part.calls += 1
            part.meter.peak = max(part.meter.peak, part.meter.alive + part.buffers)
        return [torch.empty_like(output) for output in outputs]

    run._boxed_call = True
    return run


def peak_of_buffers(code):
    """Bytes that Inductor's code holds at most, beside its inputs."""
    sizes, alive, peak = {}, 0, 0
    for line in code.splitlines():
        if made := re.match(r"\s*(\w+) = empty_strided_cuda\(\((.*?)\), \(.*?\), torch\.(\w+)\)", line):
            name, shape, dtype = made.groups()
            numel = math.prod(int(size) for size in shape.split(",") if size.strip())
            sizes[name] = numel * getattr(torch, dtype).itemsize
            alive += sizes[name]
            peak = max(peak, alive)
        elif reused := re.match(r"\s*(\w+) = .*; del (\w+)  # reuse", line):
            sizes[reused[1]] = sizes.pop(reused[2], 0)
        elif ended := re.match(r"\s*del (\w+)$", line):
            alive -= sizes.pop(ended[1], 0)
    return peak

# -----------------------------------------------------------------------------
# command line

COMMANDS = {"mixtures": mixtures, "memory": memory, "parts": parts, "graphs": graphs, "head": head, "muon": muon}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", choices=COMMANDS)
    names = parser.parse_args().commands
    mock.patch("torch.nn.functional.scaled_dot_product_attention", cuda_attention).start()
    gc.freeze()  # what is imported need not be gone through again and again
    print(json.dumps({name: COMMANDS[name]() for name in names}, indent=1))


if __name__ == "__main__":
    main()
