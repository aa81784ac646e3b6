"""What all policy-gradient objectives share: where the KL enters, advantages, the loss as a sum.

    prepare   rewards, less the KL where it stands in the reward -> advantages
    loss      policy_loss + kl_coef * sum_t W_t KL_t where it stands in the loss
                          + value_coef * sum_t W_t value_loss_t with a critic

A member says what its advantage is and writes `policy_loss`; docs/math.md has every equation, and
CONTRIBUTING.md adds a member step by step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowrl.objectives.advantages import ADVANTAGES, Advantage, whiten
from flowrl.objectives.aggregation import (
    MAX_TOKENS,
    Aggregation,
    aggregate,
    per_token,
    sequence_mean,
    sequence_sum,
    unmasked,
)
from flowrl.objectives.base import AllReduce, Metrics, Objective, given, identity
from flowrl.objectives.critic import Critic
from flowrl.objectives.kl import ESTIMATORS, MAX_LOG_RATIO, KLOptions
from flowrl.objectives.returns import discounted_to_go
from flowrl.records import LossBatch
from flowrl.schema import require


@dataclass(frozen=True)
class AggregationOptions(KLOptions):
    aggregation: Aggregation = "token-mean"
    """How tokens are weighted: token-mean, seq-mean-token-mean, seq-mean-token-sum,
    seq-mean-token-sum-norm or token-sum."""
    max_tokens: int | None = None
    """The constant that seq-mean-token-sum-norm divides by, such as rollout.max_new_tokens; scales
    the loss only. Unset: 3000, the longest answer in Dr. GRPO's runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.max_tokens
        require(
            size is None or size > 0,
            f"objective.max_tokens must be > 0, got {size}; set objective.max_tokens=3000",
        )
        require(
            size is None or self.aggregation == "seq-mean-token-sum-norm",
            f"objective.max_tokens has no effect with aggregation={self.aggregation}, got {size}; "
            "set objective.aggregation=seq-mean-token-sum-norm or leave it out",
        )


class PolicyGradient(Objective):
    """The family's implementation; a member is its class data, `Options` and `policy_loss`."""

    advantage: Advantage = "zscore"
    whitened: bool = False  # advantages as one number per token, whitened over all ranks
    aggregation: Aggregation = "seq-mean-token-mean"
    max_tokens: int = MAX_TOKENS  # of the aggregation seq-mean-token-sum-norm
    uses_ratio: bool = True
    critic: Critic | None = None  # estimates advantages in place of the group

    def __init__(self, options: Any, backend: str | None = None) -> None:
        super().__init__(options, backend)
        self.settings: Any = self.resolve_options(options)
        if isinstance(self.settings, AggregationOptions):
            self.aggregation = self.settings.aggregation
            self.max_tokens = self.settings.max_tokens or MAX_TOKENS

    def resolve_options(self, options: Any) -> Any:
        """The settings, at least KLOptions, that the member's own Options stand for."""
        return options

    @property
    def needs(self) -> frozenset[str]:
        needs = set()
        if self.uses_ratio or self.settings.kl_ratio_weight:
            needs.add("old")
        if self.settings.kl_in_reward:
            needs |= {"ref", "old_pass"}
        elif self.settings.kl_in_loss:
            needs.add("ref")
        if self.critic is not None:
            needs |= {"values", "old_pass"}
        return frozenset(needs)

    @property
    def compares_group(self) -> bool:
        return super().compares_group or (self.critic is None and self.advantage != "none")

    @property
    def kl_coef(self) -> float:
        return self.settings.kl_coef

    def prepare(self, batch: LossBatch, all_reduce: AllReduce = identity) -> LossBatch:
        """`advantages`: (N,), or (T,) where tokens of a sequence differ or are whitened."""
        rewards, penalty = batch.rewards, None
        if self.settings.kl_in_reward:
            penalty = self.kl_coef * self.old_kl(batch)
            if self.settings.kl_placement == "reward_sequence":
                rewards, penalty = rewards - sequence_sum(penalty, batch), None
        return self.estimate(batch, rewards, penalty, all_reduce)

    def estimate(
        self, batch: LossBatch, rewards: Tensor, penalty: Tensor | None, all_reduce: AllReduce
    ) -> LossBatch:
        """`batch` with advantages of `rewards` (N,) less what is to come of `penalty` (T,)."""
        if self.critic is not None:
            return self.critic.estimate(batch, rewards, penalty, all_reduce)
        advantages = self.advantages(rewards, batch.group_ids)  # (N,)
        if penalty is not None:
            advantages = per_token(advantages, batch) - discounted_to_go(penalty, 1.0, batch)
        if self.whitened:
            advantages = whiten(per_token(advantages, batch), batch.mask, all_reduce)
        return batch.replace(advantages=advantages)

    def advantages(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """(N,) rewards (N,) against what they are compared with."""
        return ADVANTAGES[self.advantage](rewards, group_ids)

    def old_kl(self, batch: LossBatch) -> Tensor:
        """(T,) estimate of KL(pi_old || pi_ref), without gradient; 0 where masked."""
        old_logprobs = given(batch.old_logprobs, "old_logprobs")
        log_ratio = unmasked(old_logprobs - given(batch.ref_logprobs, "ref_logprobs"), batch)
        return ESTIMATORS[self.settings.kl_estimator](log_ratio)

    @abstractmethod
    def policy_loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        """The loss without KL penalty and critic, and metrics."""

    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        loss, metrics = self.policy_loss(batch)
        metrics["advantage_abs"] = advantage_abs(batch)
        if self.settings.kl_in_loss:
            token_losses = self.current_kl(batch)
            loss = loss + self.kl_coef * self.aggregate(token_losses, batch)
            metrics["kl_loss"] = sequence_mean(token_losses.detach(), batch)
        if self.critic is not None:
            token_losses = self.critic.token_losses(batch)
            loss = loss + self.critic.value_coef * self.aggregate(token_losses, batch)
            metrics["value_loss"] = sequence_mean(token_losses.detach(), batch)
        return loss, metrics

    def current_kl(self, batch: LossBatch) -> Tensor:
        """(T,) estimate of KL(pi_theta || pi_ref) with its gradient; 0 where masked."""
        logprobs = given(batch.logprobs, "logprobs")
        log_ratio = unmasked(logprobs - given(batch.ref_logprobs, "ref_logprobs"), batch)
        kl = ESTIMATORS[self.settings.kl_estimator](log_ratio)
        return log_ratio_to_old(batch).exp() * kl if self.settings.kl_ratio_weight else kl

    def aggregate(self, token_losses: Tensor, batch: LossBatch) -> Tensor:
        return aggregate(token_losses, self.aggregation, batch, self.max_tokens)


def log_ratio_to_old(batch: LossBatch) -> Tensor:
    """(T,) log pi_theta - log pi_old within +-20, 0 where masked. On-policy, without
    `old_logprobs`, its value is 0 and its gradient 1."""
    logprobs = given(batch.logprobs, "logprobs")
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    return unmasked(logprobs - old, batch).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def token_advantages(batch: LossBatch) -> Tensor:
    """(T,) whichever shape `prepare` gave them."""
    return per_token(given(batch.advantages, "advantages"), batch)


def sequence_advantages(batch: LossBatch) -> Tensor:
    """(N,) as `prepare` gave them, or the mean over the sequence's tokens."""
    advantages = given(batch.advantages, "advantages")
    if advantages.numel() == batch.num_sequences:
        return advantages
    return sequence_mean(advantages, batch)


def advantage_abs(batch: LossBatch) -> Tensor:
    """(N,) mean |A| over the sequence's tokens."""
    advantages = given(batch.advantages, "advantages").abs()
    if advantages.numel() == batch.num_sequences:
        return advantages
    return sequence_mean(advantages, batch)


def require_state(objective: Objective, state: Mapping[str, float]) -> None:
    """Raises ValueError unless `state` holds what the objective's `state` would give."""
    wanted = sorted(objective.state())
    if sorted(state) != wanted:
        raise ValueError(
            f"the state of {objective.name} must hold {wanted}, got {sorted(state)}; resume with "
            "the objective settings that it was written with"
        )
