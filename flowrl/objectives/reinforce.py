"""REINFORCE: the log-prob of an answer times what its reward is better than the group's mean.

No ratio and no division by length; one update per step is the unbiased use.
Sources: R. J. Williams, Machine Learning 8 (1992); for language models arXiv:2402.14740.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from flowrl.objectives.aggregation import unmasked
from flowrl.objectives.base import Metrics, given
from flowrl.objectives.kl import Estimator, KLOptions, Placement
from flowrl.objectives.policy_gradient import PolicyGradient, token_advantages
from flowrl.records import LossBatch


class LogProbGradient(PolicyGradient):
    """loss = - sum_i sum_t A_it log pi_theta(y_it) / sequences."""

    aggregation = "seq-mean-token-sum"
    uses_ratio = False

    @property
    def beta(self) -> float | None:
        """1 / kl_coef with k1 in the reward. A group's mean takes 1 / G of the reward with it, and
        of the KL only if that stands in the reward as a whole."""
        exact = self.settings.kl_placement == "reward_sequence" or self.advantage != "mean"
        if not (self.settings.kl_in_reward and self.settings.kl_estimator == "k1" and exact):
            return None
        return 1 / self.settings.kl_coef

    def policy_loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        logprobs = unmasked(given(batch.logprobs, "logprobs"), batch)
        return self.aggregate(-token_advantages(batch) * logprobs, batch), {}


class Reinforce(LogProbGradient):
    """A_i = r_i - mean_G(r), or r_i."""

    name = "reinforce"

    @dataclass(frozen=True)
    class Options(KLOptions):
        advantage: Literal["none", "mean"] = "mean"
        """What the reward is compared with: none, or the mean of its group."""
        kl_estimator: Estimator = "k1"
        """Per-token estimator: k1, k2, k3, or k3_straight_through (value of k3, gradient of k2)."""
        kl_placement: Placement = "reward_sequence"
        """Where the KL enters: reward_sequence, reward_token or loss."""

    def __init__(self, options: Any, backend: str | None = None) -> None:
        super().__init__(options, backend)
        self.advantage = self.settings.advantage
