"""The error budget of every kernel: judged against float64, allowed what plain PyTorch needs.

    max|fused - truth| <= 2 max|plain - truth| + 8 ulp of max|truth|

over the whole tensor. `plain` is straightforward PyTorch at the precision of `fused`; the ulp is
that of fused's dtype, since a result cannot be nearer than its own rounding. A float64 result is
judged against a truth that rounds as often: against extended precision the definition was off by up
to 7 ulp and the chunked form by up to 24, as the order goes in which a library sums on a processor.
There 64 ulp are allowed, 1e-14 relative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ulp(value: float, dtype: torch.dtype) -> float:
    """Spacing of `dtype`'s numbers at |value|."""
    value = max(abs(value), torch.finfo(dtype).tiny)
    return 2.0 ** math.floor(math.log2(value)) * torch.finfo(dtype).eps


def max_error(result: Tensor, truth: Tensor) -> float:
    """max|result - truth| in float64; infinite where a finite truth meets NaN or infinity."""
    if truth.numel() == 0:
        return 0.0
    error = (result.detach().double() - truth.double()).abs()
    return float(error.where(result.isfinite() | ~truth.isfinite(), math.inf).max())


def assert_within_budget(fused: Tensor, plain: Tensor, truth: Tensor, what: str) -> None:
    """AssertionError with the three numbers unless `fused` keeps the budget."""
    assert truth.dtype == torch.float64, f"{what}: the truth is float64, not {truth.dtype}"
    assert fused.shape == truth.shape, f"{what}: shape {fused.shape}, not {truth.shape}"
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    own = 64 if fused.dtype == torch.float64 else 8
    budget = 2 * max_error(plain, truth) + own * ulp(largest, fused.dtype)
    error = max_error(fused, truth)
    assert error <= budget, f"{what}: error {error:.3g}, budget {budget:.3g}, largest {largest:.3g}"
