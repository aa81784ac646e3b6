"""CISPO: REINFORCE weighted by the clipped ratio, so that no token loses its gradient.

    loss = - sum_it W_it A_i sg(clip(rho_it, 1 - clip_eps_low, 1 + clip_eps_high)) log pi_theta

Source: arXiv:2506.13585, where the lower clip is switched off (clip_eps_low = 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowrl.objectives.aggregation import sequence_mean, unmasked
from flowrl.objectives.base import Metrics, given
from flowrl.objectives.policy_gradient import (
    AggregationOptions,
    PolicyGradient,
    log_ratio_to_old,
    token_advantages,
)
from flowrl.objectives.surrogate import check_clip
from flowrl.records import LossBatch


class CISPO(PolicyGradient):
    """The ratio is a weight without gradient; z-scored rewards, every token weighted alike."""

    name = "cispo"

    @dataclass(frozen=True)
    class Options(AggregationOptions):
        clip_eps_low: float = 0.2
        """Lower bound of the weight, 1 - eps; 1: none."""
        clip_eps_high: float = 0.28
        """Upper bound of the weight, 1 + eps."""

        def __post_init__(self) -> None:
            super().__post_init__()
            check_clip(self.clip_eps_low, self.clip_eps_high)

    def policy_loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        logprobs = unmasked(given(batch.logprobs, "logprobs"), batch)
        ratio = log_ratio_to_old(batch).detach().exp()
        weight = ratio.clamp(1 - self.settings.clip_eps_low, 1 + self.settings.clip_eps_high)
        loss = self.aggregate(-token_advantages(batch) * weight * logprobs, batch)
        return loss, {"clip_frac": sequence_mean((weight != ratio).to(ratio.dtype), batch)}
