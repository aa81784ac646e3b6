"""The clipped surrogate of PPO and its descendants: one loss, whose members differ in defaults.

    rho_t  = exp(log pi_theta - log pi_old)
    l_t    = max(-A_t rho_t, -A_t clip(rho_t, 1 - clip_eps_low, 1 + clip_eps_high))
    l_t    = min(l_t, -A_t dual_clip)   where A_t < 0
    loss   = sum_t W_t (l_t + kl_coef KL_t)

Sources: arXiv:1707.06347 (clip), arXiv:1912.09729 (dual clip), arXiv:2503.14476 (two ranges).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.objectives.aggregation import sequence_mean
from flowrl.objectives.base import Metrics
from flowrl.objectives.policy_gradient import (
    AggregationOptions,
    PolicyGradient,
    log_ratio_to_old,
    token_advantages,
)
from flowrl.records import LossBatch
from flowrl.schema import require


@dataclass(frozen=True)
class SurrogateOptions(AggregationOptions):
    clip_eps_low: float = 0.2
    """Ratios below 1 - eps give no gradient where the advantage is negative."""
    clip_eps_high: float = 0.2
    """Ratios above 1 + eps give no gradient where the advantage is positive."""
    dual_clip: float = 0.0
    """Ratios above this give no gradient where the advantage is negative; 0: no such bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip_eps_low, self.clip_eps_high)
        require(
            self.dual_clip == 0 or self.dual_clip > 1,
            f"objective.dual_clip must be > 1 or 0 (none), got {self.dual_clip}; "
            "set objective.dual_clip=3",
        )


def check_clip(low: float, high: float) -> None:
    """Raises ConfigError unless [1 - low, 1 + high] is a range of ratios that holds 1."""
    require(
        0 <= low <= 1,
        f"objective.clip_eps_low must be in [0, 1], got {low}; set objective.clip_eps_low=0.2",
    )
    require(
        high >= 0,
        f"objective.clip_eps_high must be >= 0, got {high}; set objective.clip_eps_high=0.2",
    )


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The losses for ratios clipped to [low, high], with `dual`, if any, as the cap where A < 0,
    and whether each is held constant by a clip; of any shape."""
    plain, bounded = -advantages * ratio, -advantages * ratio.clamp(low, high)
    losses, clipped = torch.maximum(plain, bounded), bounded > plain
    if dual:
        capped = -advantages * dual
        over = (advantages < 0) & (losses > capped)
        losses, clipped = torch.where(over, capped, losses), clipped | over
    return losses, clipped


class Surrogate(PolicyGradient):
    """Members differ in advantages, clips, aggregation and KL."""

    Options = SurrogateOptions

    def ratio(self, batch: LossBatch) -> Tensor:
        """(T,) what the advantage is multiplied by."""
        return log_ratio_to_old(batch).exp()

    def policy_loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        ratio, options = self.ratio(batch), self.settings
        token_losses, clipped = clipped_surrogate(
            ratio,
            token_advantages(batch),
            1 - options.clip_eps_low,
            1 + options.clip_eps_high,
            options.dual_clip,
        )
        metrics = {"clip_frac": sequence_mean(clipped.to(ratio.dtype), batch)}
        return self.aggregate(token_losses, batch), metrics
