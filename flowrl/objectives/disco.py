"""DisCO: right answers of a question against its wrong ones, scored apart; no advantage.

    J    = mean_right s - tau log mean_wrong exp(s / tau)       per question that has both
    loss = - sum J / questions + kl_weight * sum_t (rho_t - 1 - log rho_t) / tokens
    s    = mean_t rho_t, or mean_t log pi_theta

The hardest wrong answer weighs most. Questions all right or all wrong stay in the denominator.
kl_weight is kl_penalty * max(KL(pi_old || pi_theta) - max_kl, 0), without gradient; the KL is what
the trainer measured after the update before (the paper's: of the same update's tokens); with one
update a step the policy is the old one, and the penalty has no gradient. No reward distribution is
matched. Source: arXiv:2505.12366.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl.objectives.aggregation import (
    aggregate,
    response_lengths,
    sequence_mean,
    sequence_weights,
)
from flowrl.objectives.base import AllReduce, Metrics, Objective, given, identity
from flowrl.objectives.groups import group_log_mean_exp, group_sum
from flowrl.objectives.policy_gradient import log_ratio_to_old, require_state
from flowrl.records import LossBatch
from flowrl.schema import require

TAU = {"ratio": 1.0, "logprob": 10.0}


class DisCO(Objective):
    """`advantages` hold 1 / right answers of the question, or -1 / wrong ones; 0 without both."""

    name = "disco"
    coupling = "group"

    @dataclass(frozen=True)
    class Options:
        score: Literal["ratio", "logprob"] = "ratio"
        """What an answer is scored by, as a mean over its tokens: the ratio to the old policy, or
        the log-prob."""
        tau: float | None = None
        """How evenly wrong answers count: near 0 the best-scored alone, large all alike. Unset: 1
        for ratio, 10 for logprob."""
        min_reward: float = 0.5
        """An answer with this reward or more is right."""
        max_kl: float = 1e-4
        """Mean KL(pi_old || pi_theta) per token that costs nothing, in nats."""
        kl_penalty: float = 1e3
        """What the KL beyond max_kl is multiplied by to give the penalty's coefficient."""

        def __post_init__(self) -> None:
            require(
                self.tau is None or self.tau > 0,
                f"objective.tau must be > 0, got {self.tau}; set objective.tau=1",
            )
            for name, example in (("max_kl", 1e-4), ("kl_penalty", 1e3)):
                value = getattr(self, name)
                require(
                    value >= 0,
                    f"objective.{name} must be >= 0, got {value}; set objective.{name}={example}",
                )

    def __init__(self, options: Any, backend: str | None = None) -> None:
        super().__init__(options, backend)
        self.tau: float = TAU[options.score] if options.tau is None else options.tau
        self.kl_weight = 0.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old", "kl_old_new"})

    def prepare(self, batch: LossBatch, all_reduce: AllReduce = identity) -> LossBatch:
        right = batch.rewards >= self.options.min_reward
        counted = response_lengths(batch) > 0
        signs = torch.where(right, 1.0, -1.0).to(batch.rewards)
        members = torch.zeros_like(batch.rewards)
        both = counted
        for label in (right, ~right):
            count = group_sum((label & counted).to(batch.rewards), batch.group_ids)
            both = both & (count > 0)
            members = torch.where(label, count, members)
        return batch.replace(advantages=torch.where(both, signs / members.clamp(min=1), 0))

    @torch.no_grad()
    def group_statistic(self, batch: LossBatch) -> Tensor:
        """log mean exp(s / tau) over the wrong answers of the question."""
        wrong = given(batch.advantages, "advantages") < 0
        return group_log_mean_exp(self._scores(batch) / self.tau, batch.group_ids, wrong)

    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        shares = given(batch.advantages, "advantages")
        statistic = given(batch.group_log_z, "group_log_z").detach()
        scores = self._scores(batch)
        # tau (log m - 1 + exp(s / tau) / m), m = mean_wrong exp: their mean is tau log m, and so is
        # its gradient.
        is_wrong = shares < 0
        excess = torch.where(is_wrong, scores / self.tau - statistic, 0)
        wrong = self.tau * (statistic + torch.expm1(excess))
        losses = shares.abs() * torch.where(is_wrong, wrong, -scores)
        weights = sequence_weights(batch) / given(batch.totals, "totals").groups
        log_ratio = log_ratio_to_old(batch)
        kl = aggregate(torch.expm1(log_ratio) - log_ratio, "token-mean", batch)
        metrics = {"score": scores.detach(), "one_sided": (shares == 0).to(scores)}
        return (weights.to(losses.dtype) * losses).sum() + self.kl_weight * kl, metrics

    def _scores(self, batch: LossBatch) -> Tensor:
        """(N,) mean over the response's tokens."""
        if self.options.score == "logprob":
            return sequence_mean(given(batch.logprobs, "logprobs"), batch)
        return sequence_mean(log_ratio_to_old(batch).exp(), batch)

    def after_update(self, kl_old_new: float) -> None:
        """The penalty's coefficient, of the KL beyond max_kl."""
        self.kl_weight = self.options.kl_penalty * max(kl_old_new - self.options.max_kl, 0.0)

    def state(self) -> dict[str, float]:
        return {"kl_weight": self.kl_weight}

    def load_state(self, state: Mapping[str, float]) -> None:
        require_state(self, state)
        self.kl_weight = state["kl_weight"]

    def summarize(self, metrics: Metrics, batch: LossBatch) -> dict[str, float]:
        """The means of the metrics, and actor/kl_weight."""
        return super().summarize(metrics, batch) | {"actor/kl_weight": self.kl_weight}
