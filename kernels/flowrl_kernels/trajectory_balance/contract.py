"""The bound on the importance weight, and what trajectory_balance returns."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, log
from typing import NamedTuple

from torch import Tensor

from flowrl_kernels.checks import require


@dataclass(frozen=True)
class WeightBound:
    """Bounds on a sequence's importance weight w, applied to log w before the exponential."""

    low: float | None = None
    """Smallest w, such as 0.8. None: no lower bound."""
    high: float | None = None
    """Largest w, such as 1.2 or 10. None: no upper bound."""

    def __post_init__(self) -> None:
        for name, bound in (("low", self.low), ("high", self.high)):
            require(
                bound is None or (isfinite(bound) and bound > 0),
                f"WeightBound.{name} must be positive and finite",
                bound,
                "use None for no bound",
            )
        require(
            self.low is None or self.high is None or self.low <= self.high,
            "WeightBound.low must not exceed high",
            f"{self.low} and {self.high}",
            "swap them",
        )

    @property
    def log_low(self) -> float | None:
        return None if self.low is None else log(self.low)

    @property
    def log_high(self) -> float | None:
        return None if self.high is None else log(self.high)


class TrajectoryBalance(NamedTuple):
    """Only `loss` is differentiable. A sequence with no counted token holds 0 (weight: 1)."""

    loss: Tensor  # ()
    residual: Tensor  # (N,)
    log_weight: Tensor  # (N,) sum_t(logprobs - old_logprobs), before the bound
    weight: Tensor  # (N,) w, after the bound
    mean_logprob: Tensor  # (N,) means over counted tokens, whatever length_norm says
    mean_ref_logprob: Tensor  # (N,)
    num_tokens: Tensor  # (N,) int64 counted tokens
