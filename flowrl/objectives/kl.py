"""Per-token estimators of KL(pi_theta || pi_ref) on sampled tokens.

With log_ratio = log pi_theta - log pi_ref: k1 is unbiased in value, k3 is unbiased and never
negative. Their gradients differ, and so does what they converge to: docs/math.md.
Source: J. Schulman, "Approximating KL divergence" (2020).
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """log_ratio."""
    return log_ratio


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-log_ratio) - 1 + log_ratio, with expm1, since differences of 1e-4 are common."""
    return torch.expm1(-log_ratio) + log_ratio
