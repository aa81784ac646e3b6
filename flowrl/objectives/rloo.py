"""RLOO: REINFORCE with the mean of the other members' rewards as baseline.

One update per step is the unbiased use. Source: arXiv:2402.14740.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowrl.objectives.kl import Estimator, KLOptions, Placement
from flowrl.objectives.reinforce import LogProbGradient


class RLOO(LogProbGradient):
    """A_i = r_i - mean of the others' rewards = (r_i - mean_G(r)) G / (G - 1)."""

    name = "rloo"
    advantage = "leave_one_out"

    @dataclass(frozen=True)
    class Options(KLOptions):
        kl_estimator: Estimator = "k1"
        """Per-token estimator: k1, k2, k3, or k3_straight_through (value of k3, gradient of k2)."""
        kl_placement: Placement = "reward_sequence"
        """Where the KL enters: reward_sequence, reward_token or loss."""
