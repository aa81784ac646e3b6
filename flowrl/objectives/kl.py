"""Per-token estimators of KL(pi_theta || pi_ref) on sampled tokens, and where they enter.

With log_ratio = log pi_theta - log pi_ref: k1 is unbiased in value, k3 is unbiased and never
negative, k2 is biased but has the right gradient. Their gradients differ, and so does what they
converge to; the placement matters more than the estimator: docs/math.md.
Source: J. Schulman, "Approximating KL divergence" (2020).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowrl.schema import require

Estimator = Literal["k1", "k2", "k3", "k3_straight_through"]
Placement = Literal["reward_sequence", "reward_token", "loss"]

MAX_LOG_RATIO = 20.0  # e^20 is finite in float32; a ratio that far off is clipped or meaningless


def k1(log_ratio: Tensor) -> Tensor:
    """log_ratio."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """log_ratio^2 / 2."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-log_ratio) - 1 + log_ratio, with expm1, since differences of 1e-4 are common. The
    log-ratio is clamped to +-20, as in verl."""
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-bounded) + bounded


def k3_straight_through(log_ratio: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2."""
    smooth = k2(log_ratio)
    return smooth + (k3(log_ratio) - smooth).detach()


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k3_straight_through": k3_straight_through,
}


@dataclass(frozen=True)
class KLOptions:
    """The penalty towards pi_ref; every policy-gradient objective has its own defaults."""

    kl_coef: float = 0.0
    """Coefficient of the KL penalty towards pi_ref; 0: none, and no reference pass."""
    kl_estimator: Estimator = "k3"
    """Per-token estimator: k1, k2, k3, or k3_straight_through (value of k3, gradient of k2)."""
    kl_placement: Placement = "loss"
    """reward_sequence: its sum is taken off the reward before the baseline; reward_token: off the
    advantage of every token before it; loss: a token loss of its own."""
    kl_ratio_weight: bool = False
    """Multiplies the token loss by the ratio to the old policy, with gradient (DeepSeek-V3.2)."""

    def __post_init__(self) -> None:
        require(
            self.kl_coef >= 0,
            f"objective.kl_coef must be >= 0, got {self.kl_coef}; set objective.kl_coef=0.001",
        )
        in_loss = self.kl_placement == "loss"
        require(
            in_loss or self.kl_estimator != "k3_straight_through",
            "objective.kl_estimator=k3_straight_through differs from k3 in the gradient only and "
            f"needs kl_placement=loss, got {self.kl_placement}; set objective.kl_estimator=k3",
        )
        require(
            in_loss or not self.kl_ratio_weight,
            "objective.kl_ratio_weight multiplies a token loss and needs kl_placement=loss, got "
            f"{self.kl_placement}; set objective.kl_ratio_weight=false",
        )

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef > 0 and self.kl_placement != "loss"

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coef > 0 and self.kl_placement == "loss"
