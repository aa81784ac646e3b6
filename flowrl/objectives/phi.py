"""What the residual of trajectory balance is put through, and the constant that suits a group best.

phi is convex with its minimum 0 at 0, so every phi has the same fixed point; off it they weigh
answers that the policy has too much of and too little of differently. Sources: docs/math.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowrl.objectives.groups import group_log_mean_exp, group_mean

PhiKind = Literal["square", "f_alpha", "linex", "shifted_cosh", "huber"]

MAX_EXPONENT = 10.0  # beyond it exponentials go on as straight lines: finite, and never flat


@dataclass(frozen=True)
class Phi:
    """square       d^2
    f_alpha      (e^x - 1 - x) / (alpha - 1)^2, x = (alpha - 1) d; d^2 / 2 at alpha = 1
    linex        e^d - 1 - d
    shifted_cosh e^d + e^-d - 2
    huber        d^2 within the threshold, a straight line beyond

    f_alpha: arXiv:2605.15417; linex and shifted_cosh: arXiv:2410.02596."""

    kind: PhiKind = "square"
    alpha: float = 0.5  # of f_alpha: below 1 missing mass costs more, above 1 excess mass
    threshold: float = 1.0  # of huber

    def __call__(self, residual: Tensor) -> Tensor:
        if self.kind == "square":
            return residual.square()
        if self.kind == "huber":
            size = residual.abs()
            inner = size.clamp(max=self.threshold)
            return inner * (2 * size - inner)
        if self.kind == "shifted_cosh":
            return _linex(residual) + _linex(-residual)
        rate = self._rate
        return _linex(rate * residual) / rate**2 if rate else residual.square() / 2

    def best_constant(self, residual: Tensor, group_ids: Tensor, include: Tensor) -> Tensor:
        """(N,) C that minimises the mean of phi(residual + C) over the members in `include`; 0 for
        a group without any. Closed forms, for residuals below MAX_EXPONENT."""

        def log_mean_exp(values: Tensor) -> Tensor:
            return group_log_mean_exp(values, group_ids, include)

        if self.kind == "shifted_cosh":
            return (log_mean_exp(-residual) - log_mean_exp(residual)) / 2
        rate = self._rate
        if self.kind in ("f_alpha", "linex") and rate:
            return -log_mean_exp(rate * residual) / rate
        if self.kind == "huber":
            raise ValueError(
                "phi huber has no best constant in closed form; set objective.log_z=learned"
            )
        return -group_mean(residual, group_ids, include)

    @property
    def _rate(self) -> float:
        return 1.0 if self.kind == "linex" else self.alpha - 1


SQUARE = Phi()


def _linex(x: Tensor) -> Tensor:
    """e^x - 1 - x, its exponential continued by its tangent outside of +-MAX_EXPONENT."""
    inner = x.clamp(-MAX_EXPONENT, MAX_EXPONENT)
    outside = (x - inner) * inner.detach().exp()
    return torch.expm1(inner) + outside - x
