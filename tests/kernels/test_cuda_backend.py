"""The CUDA backend where it cannot run: what it refuses and why, and that it has to be named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from flowrl_kernels import (
    WeightBound,
    backends,
    cuda_support,
    linear_logprobs,
    linear_policy_loss,
    native_library,
    trajectory_balance,
)
from flowrl_kernels.backends import Call
from flowrl_kernels.head import cuda_head

GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.fixture
def hopper(monkeypatch):
    """A machine that has built the operators and has an H100, as far as refusals can tell."""
    monkeypatch.setattr(native_library, "PROBLEM", None)
    monkeypatch.setattr(torch.ops, "flowrl_cuda", SimpleNamespace(tile_columns=None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_tensors_on_a_cpu_are_refused_by_every_operator():
    hidden, weight = torch.zeros(3, 8, dtype=BF16), torch.zeros(5, 8, dtype=BF16)
    targets, offsets = torch.tensor([0, 4, 1]), torch.tensor([0, 1, 3])
    tokens, sequences = torch.zeros(3), torch.zeros(2)
    why = "'cuda' runs on CUDA devices of compute capability 9.0, not on cpu; use backend="
    with pytest.raises(ValueError, match=f"linear_logprobs: backend {why}"):
        linear_logprobs(hidden, weight, targets, backend="cuda")
    with pytest.raises(ValueError, match=f"linear_policy_loss: backend {why}"):
        linear_policy_loss(
            hidden, weight, targets, offsets, lambda x, *_: (x.sum(), {}), backend="cuda"
        )
    with pytest.raises(ValueError, match=f"trajectory_balance: backend {why}"):
        trajectory_balance(
            tokens, None, tokens, sequences, sequences, offsets,
            beta=1.0, weight_bound=WeightBound(), backend="cuda",
        )  # fmt: skip


def test_what_a_hopper_takes(hopper):
    for features in ({"fp8"}, {"group", "entropy", "main_grad"}, set()):
        assert cuda_support.refusal(Call(GPU, BF16, frozenset(features), 3584)) is None
    assert cuda_support.balance_refusal(Call(GPU, torch.float32)) is None


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (Call(GPU, torch.float32), "takes bfloat16, not torch.float32"),
        (Call(GPU, torch.float16), "takes bfloat16, not torch.float16"),
        (Call(GPU, BF16, dim=12), "a multiple of 8 columns (rows of whole 16 bytes), not 12"),
        (Call(GPU, BF16, frozenset({"fp8"}), 24), "a multiple of 16 columns"),
    ],
)
def test_refusals_on_a_hopper(hopper, call, why):
    assert why in str(cuda_support.refusal(call))


def test_other_refusals(hopper, monkeypatch):
    assert "float32 log-probs" in str(cuda_support.balance_refusal(Call(GPU, torch.float64)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    older = cuda_support.refusal(Call(GPU, BF16))
    assert older == "needs compute capability 9.0 (H100, H200), not 10.0"


def test_a_library_without_them_says_how_they_are_built(hopper, monkeypatch):
    monkeypatch.setattr(torch.ops, "flowrl_cuda", SimpleNamespace())
    for refusal in (cuda_support.refusal, cuda_support.balance_refusal):
        dtype = BF16 if refusal is cuda_support.refusal else torch.float32
        why = refusal(Call(GPU, dtype))
        assert "built without nvcc or without CUTLASS" in str(why)
        assert "pip install --no-deps nvidia-cutlass" in str(why)
    monkeypatch.setattr(native_library, "PROBLEM", "is not built in this installation (how)")
    assert cuda_support.build_problem() == "is not built in this installation (how)"


@pytest.mark.parametrize("operator", ["linear_logprobs", "linear_policy_loss"])
def test_it_is_never_picked_unnamed(hopper, monkeypatch, operator):
    call = Call(GPU, BF16, dim=64)
    assert backends.resolve(operator, "cuda", call).backend == "cuda"
    assert backends.resolve(operator, None, call).backend == "torch"
    alone = {operator: {"cuda": backends._registry[operator]["cuda"]}}
    monkeypatch.setattr(backends, "_registry", alone)
    with pytest.raises(ValueError, match="cuda: runs only where it is named"):
        backends.resolve(operator, None, call)


def test_operands_for_the_bulk_copy_engine():
    matrix = torch.arange(6 * 80).reshape(6, 80).to(BF16)
    assert cuda_head.aligned(matrix) is matrix
    for view in (matrix[:, 8:16], matrix[::2]):
        assert cuda_head.aligned(view) is view
    for view in (matrix[:, 1:9], matrix.T, matrix[:, :66].contiguous()[:, :64]):
        copy = cuda_head.aligned(view)
        assert torch.equal(copy, view)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0


@pytest.mark.skipif(cuda_support.build_problem() is not None, reason="built without CUDA")
def test_the_operators_are_there_without_a_gpu():
    operators = torch.ops.flowrl_cuda
    assert (operators.tile_columns(False), operators.tile_columns(True)) == (192, 128)
    with pytest.raises(NotImplementedError, match="CPU"):
        operators.quantize_rows_(torch.zeros(1, 8), torch.zeros(1), torch.zeros(1, 8), 0)
