"""A critic on the policy's backbone: token advantages by GAE, and the loss that fits its values.

    V_clip = V_old + clip(V - V_old, -value_clip, value_clip)
    loss   = value_coef * sum_t W_t max((V_t - ret_t)^2, (V_clip,t - ret_t)^2)

Sources: arXiv:1506.02438 (GAE), arXiv:1707.06347 (PPO); the value clip as in verl.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.objectives.advantages import whiten
from flowrl.objectives.aggregation import unmasked
from flowrl.objectives.base import AllReduce, given
from flowrl.objectives.returns import at_last_token, gae
from flowrl.records import LossBatch
from flowrl.schema import require


@dataclass(frozen=True)
class Critic:
    gamma: float = 1.0  # discount of rewards, per token
    lam: float = 1.0  # GAE: 1 is the return less the value, 0 one step of bootstrap
    value_coef: float = 0.5
    value_clip: float = 0.5  # 0: none; a value gains nothing by moving further in one step

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            require(
                0 <= value <= 1,
                f"objective.{name} must be in [0, 1], got {value}; set objective.{name}=1",
            )
        require(
            self.value_coef > 0,
            f"objective.value_coef must be > 0, got {self.value_coef}; "
            "set objective.value_coef=0.5",
        )
        require(
            self.value_clip >= 0,
            f"objective.value_clip must be >= 0, got {self.value_clip}; "
            "set objective.value_clip=0.5",
        )

    def estimate(
        self, batch: LossBatch, rewards: Tensor, penalty: Tensor | None, all_reduce: AllReduce
    ) -> LossBatch:
        """`batch` with whitened `advantages` (T,) and `returns` (T,). The sequence's reward (N,)
        is earned by its last token, the penalty (T,) is paid token by token."""
        token_rewards = at_last_token(rewards, batch)
        if penalty is not None:
            token_rewards = token_rewards - penalty
        values = unmasked(given(batch.old_values, "old_values"), batch)
        advantages, returns = gae(token_rewards, values, batch, self.gamma, self.lam)
        return batch.replace(advantages=whiten(advantages, batch.mask, all_reduce), returns=returns)

    def token_losses(self, batch: LossBatch) -> Tensor:
        """(T,) the larger of the squared errors with and without the clip; 0 where masked."""
        values = unmasked(given(batch.values, "values"), batch)
        returns = unmasked(given(batch.returns, "returns"), batch)
        losses = (values - returns).square()
        if self.value_clip:
            old = unmasked(given(batch.old_values, "old_values"), batch)
            clipped = old + (values - old).clamp(-self.value_clip, self.value_clip)
            losses = torch.maximum(losses, (clipped - returns).square())
        return losses
