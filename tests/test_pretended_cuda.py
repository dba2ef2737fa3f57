"""Devices, dtypes and memory on a pretended GPU; not numbers, which it does not have. pretended_cuda.py says how, and
prints the figures when it is started alone. It runs in a process of its own, so that no other test takes the GPU for
real."""
import json
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler, c++, to build what it pretends with"),
    pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip),
                       reason="needs PyTorch's CPU build: this one looks for a real GPU"),
]


def figures(*commands):
    command = [sys.executable, ROOT / "tests/pretended_cuda.py", *commands]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_mixture_in_every_dtype():
    assert figures("mixtures")["mixtures"]["checked"] == 64 * 3


def test_memory_graphs_head_and_muon():
    found = figures("memory", "parts", "graphs", "head", "muon")
    assert found["graphs"]["graphs"] == 2
    *_, without_window, with_window = [step["peak_gib"] for step in found["parts"].values()]
    assert with_window <= 1.01 * without_window  # T=8192; by blocks it takes 1.17 times as much
    assert found["memory"]["gpt2"]["peak_gib"] < 9  # B=16, T=1024: a card of 16 GB has room for it
    for step in found["memory"].values():
        assert step["largest_float32_of_all_logits"] < 0.5
    assert found["head"]["triton_gb"] < 16 and found["head"]["chunk_gib"] < 1
    assert found["muon"]["matrices"] == 60 and found["muon"]["launches"] <= 150
