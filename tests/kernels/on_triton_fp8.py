"""The FP8 forward pass: judged against the exact log-probs of the rounded operands."""

from __future__ import annotations

import pytest
import torch
from flowrl_kernels import linear_logprobs
from flowrl_kernels.head import triton_head
from head_cases import Case
from numerics import max_error
from torch import Tensor
from triton_cases import DEVICE, case_here, nan_in_new_memory

__all__ = ["nan_in_new_memory"]


def emulated_rounding(x: Tensor) -> Tensor:
    # By a tensor of its device: CUDA multiplies by the reciprocal of a Python number.
    largest = torch.full((), 448.0, device=x.device)
    scale = (x.float().abs().amax(1, keepdim=True) / largest).clamp(min=1e-30 / 448)
    quantized = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return quantized.double() * scale.double()


def test_fp8_rows():
    x = torch.randn(37, 50, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    x[3] = 0
    x[4] *= 1e-20
    x[5] *= 1e20
    quantized, scale = triton_head.quantize_rows(x)
    right = quantized.double() * scale.double()[:, None] == emulated_rounding(x)
    if DEVICE.type == "cpu":  # Triton 3.7.1's interpreter loses the carry of 1.111|1 to 10.000
        right |= torch.frexp((x / scale[:, None]).abs()).mantissa >= 1 - 2.0**-5
    assert right.all()
    assert (quantized.float().abs().amax(1) == 448).sum() == 36


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_forward(dtype, monkeypatch):
    if DEVICE.type == "cpu":  # for the carries that the interpreter loses

        def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
            scale = x.float().abs().amax(1) / 448
            return (x.float() / scale[:, None]).to(torch.float8_e4m3fn), scale

        monkeypatch.setattr(triton_head, "quantize_rows", quantize_rows)
    case = case_here(33, 130, 64, size=3)
    case = Case(case.hidden.to(dtype), case.weight.to(dtype), case.targets)
    options = {"temperature": 0.7, "vocab_size": 125, "entropy": "metric"}
    case.targets = case.targets.where(case.targets < 125, 5)
    ours = linear_logprobs(
        case.hidden, case.weight, case.targets, precision="fp8", backend="triton", **options
    )
    rounded = Case(emulated_rounding(case.hidden), emulated_rounding(case.weight), case.targets)
    truth, exact = (
        linear_logprobs(c.hidden.double(), c.weight.double(), c.targets, **options)
        for c in (rounded, case)
    )
    tolerance = 1e-5 if DEVICE.type == "cpu" else 1e-2  # the tensor cores keep 14 bits in a sum
    assert max_error(ours.logprobs, truth.logprobs) < tolerance
    assert max_error(ours.lse, truth.lse) < tolerance
    assert ours.entropy is not None
    assert truth.entropy is not None
    assert max_error(ours.entropy, truth.entropy) < tolerance
    # Negative control and the reason why fp8 is never a default: the rounding itself is not small.
    assert 0.01 < max_error(ours.logprobs, exact.logprobs) < 1.0


@pytest.mark.skipif(DEVICE.type == "cpu", reason="torch._scaled_mm takes row scales on a GPU only")
def test_fp8_agrees_with_the_scaled_product_of_torch():
    case = case_here(256, 4096, 512, masked=0)
    hidden, weight = case.hidden.bfloat16(), case.weight.bfloat16()
    with torch.no_grad():
        ours = linear_logprobs(hidden, weight, case.targets, precision="fp8", backend="triton")
    (a, of_a), (b, of_b) = triton_head.quantize_rows(hidden), triton_head.quantize_rows(weight)
    logits = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a, b.T, scale_a=of_a[:, None], scale_b=of_b[None, :], out_dtype=torch.bfloat16
    ).float()
    theirs = logits.log_softmax(-1).gather(1, case.targets[:, None])[:, 0]
    assert max_error(ours.logprobs, theirs.double()) < 0.03  # bfloat16 logits of size 4: 2^-7 each


def test_fp8_refuses_gradients():
    case = case_here(9, 20).to(torch.float32)
    arguments = (case.hidden, case.weight, case.targets)
    with pytest.raises(ValueError, match=r"precision='fp8' has no gradient.*torch\.no_grad"):
        linear_logprobs(*arguments, precision="fp8", backend="triton")
    with torch.no_grad():
        result = linear_logprobs(*arguments, precision="fp8")  # the one backend that has it
    assert result.logprobs.isfinite().all()
