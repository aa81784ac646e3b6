"""REINFORCE++: the KL of the tokens to come in the advantage, whitened over the whole step.

    A_it = whiten( r_i - kl_coef * sum_{u >= t} (log pi_old - log pi_ref)_iu )

The clipped surrogate without a critic and without groups: one sample per prompt is enough.
Source: arXiv:2501.03262.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowrl.objectives.kl import Estimator, Placement
from flowrl.objectives.surrogate import Surrogate, SurrogateOptions


class ReinforcePP(Surrogate):
    """A is whitened over all tokens of the step and of all ranks, never of a micro-batch."""

    name = "reinforce_pp"
    advantage = "none"
    whitened = True

    @dataclass(frozen=True)
    class Options(SurrogateOptions):
        kl_coef: float = 0.01
        """Coefficient of the KL penalty towards pi_ref (OpenRLHF: 0.01); 0: none."""
        kl_estimator: Estimator = "k1"
        """Per-token estimator: k1, k2, k3, or k3_straight_through (value of k3, gradient of k2)."""
        kl_placement: Placement = "reward_token"
        """Where the KL enters: reward_sequence, reward_token or loss."""
