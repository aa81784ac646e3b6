"""What the Triton backend says about calls that it cannot take; needs no triton."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from flowrl_kernels import triton_support
from flowrl_kernels.backends import Call

pytestmark = pytest.mark.usefixtures("with_triton")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def with_triton(monkeypatch):
    """As if triton were installed, the interpreter off, and a Hopper GPU there."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_support, "find_spec", lambda name: object())
    on_gpu(monkeypatch, (9, 0))


def on_gpu(monkeypatch, capability):
    """With that GPU's shared memory of a block: an A100 has 163 KiB."""
    shared = (227 if capability[0] == 9 else 163) << 10
    properties = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize(
    ("device", "dtype", "interpret", "capability", "reason"),
    [
        (CUDA, torch.bfloat16, "", (9, 0), None),
        (CUDA, torch.bfloat16, "", (7, 5), "compute capability 8.0 or newer, not 7.5"),
        (CUDA, torch.bfloat16, "", (8, 0), "this GPU has 163 KiB a block"),
        (CUDA, torch.float32, "", (8, 0), None),
        (CUDA, torch.float64, "", (9, 0), "takes float32, bfloat16 and float16, not"),
        (CUDA, torch.float32, "1", (9, 0), "is for tensors on a CPU"),
        (CPU, torch.float32, "1", (9, 0), None),
        (CPU, torch.float32, "", (9, 0), "runs on CUDA devices, not on cpu"),
    ],
)
def test_refusals(monkeypatch, device, dtype, interpret, capability, reason):
    on_gpu(monkeypatch, capability)
    if interpret:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    refusal = triton_support.refusal(Call(device, dtype))
    assert (refusal is None) == (reason is None)
    assert reason is None or reason in str(refusal)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(triton_support, "find_spec", lambda name: None)
    refusal = triton_support.refusal(Call(CUDA, torch.bfloat16))
    assert refusal == "needs triton, which is not installed (pip install triton)"
