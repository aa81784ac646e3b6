"""RLOO: REINFORCE with the mean of the other members' rewards as baseline.

No ratio and no division by length; one update per step is the unbiased use.
Source: arXiv:2402.14740.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowrl.objectives.advantages import leave_one_out
from flowrl.objectives.aggregation import aggregate, per_token, unmasked
from flowrl.objectives.base import AllReduce, Metrics, Objective, given, identity
from flowrl.records import LossBatch


class RLOO(Objective):
    """loss = - sum_i A_i * sum_t log pi_theta(y_it) / sequences."""

    name = "rloo"

    @dataclass(frozen=True)
    class Options:
        """RLOO has no settings."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def shaped_reward(self, batch: LossBatch) -> Tensor:
        """(N,) what the baseline is taken over: the reward."""
        return batch.rewards

    def prepare(self, batch: LossBatch, all_reduce: AllReduce = identity) -> LossBatch:
        return batch.replace(advantages=leave_one_out(self.shaped_reward(batch), batch.group_ids))

    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        advantages = given(batch.advantages, "advantages")
        logprobs = unmasked(given(batch.logprobs, "logprobs"), batch)
        loss = aggregate(-per_token(advantages, batch) * logprobs, "seq-mean-token-sum", batch)
        return loss, {"advantage_abs": advantages.abs()}
