"""REINFORCE++-baseline: the reward less its group's mean, whitened over the whole step.

Differs from GRPO in dividing by the spread of the step instead of the group's.
Source: arXiv:2501.03262.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowrl.objectives.kl import Estimator
from flowrl.objectives.surrogate import Surrogate, SurrogateOptions


class ReinforcePPBaseline(Surrogate):
    """A_it = whiten(r_i - mean_G(r)) over all tokens of the step and of all ranks; k2 in the
    loss."""

    name = "reinforce_pp_baseline"
    advantage = "mean"
    whitened = True

    @dataclass(frozen=True)
    class Options(SurrogateOptions):
        kl_coef: float = 0.01
        """Coefficient of the KL penalty towards pi_ref (OpenRLHF: 0.01); 0: none."""
        kl_estimator: Estimator = "k2"
        """Per-token estimator: k1, k2, k3, or k3_straight_through (value of k3, gradient of k2)."""
