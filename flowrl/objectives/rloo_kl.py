"""RLOO with the sequence KL inside the reward: the control arm of FlowRL at the same beta.

    y_i = r_i - (1 / beta) * sum_t (log pi_old - log pi_ref),   A_i = y_i - mean of the others' y

On-policy its gradient is VarGrad's divided by 2 * beta * (G - 1) / G, so it has the same target
pi_ref exp(beta r) / Z. Source: arXiv:2402.14740; the placement of the KL: docs/math.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowrl.objectives.kl import KLOptions
from flowrl.objectives.rloo import RLOO
from flowrl.schema import require


class RLOOKL(RLOO):
    """RLOO of the reward minus (1 / beta) times the sequence's k1 estimate of the KL to pi_ref."""

    name = "rloo_kl"

    @dataclass(frozen=True)
    class Options:
        beta: float = 3.0
        """Inverse temperature of the target pi_ref exp(beta r) / Z: 1 / KL coefficient."""

        def __post_init__(self) -> None:
            require(
                self.beta > 0, f"objective.beta must be > 0, got {self.beta}; set objective.beta=3"
            )

    def resolve_options(self, options: Any) -> KLOptions:
        return KLOptions(1 / options.beta, "k1", "reward_sequence")

    @property
    def beta(self) -> float | None:
        return self.options.beta  # not by way of 1 / kl_coef, which may round
