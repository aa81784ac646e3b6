"""GSPO: one ratio per answer, the geometric mean of its tokens' ratios, clipped as a whole.

    s_i  = exp( mean_t (log pi_theta - log pi_old)_it )
    loss = - (1 / sequences) sum_i min(s_i A_i, clip(s_i, 1 - clip_eps_low, 1 + clip_eps_high) A_i)

The range is a thousandth of the usual one, since a mean moves that much less.
Source: arXiv:2507.18071.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowrl.objectives.aggregation import aggregate_sequences, sequence_mean
from flowrl.objectives.base import Metrics
from flowrl.objectives.kl import KLOptions
from flowrl.objectives.policy_gradient import (
    PolicyGradient,
    log_ratio_to_old,
    sequence_advantages,
)
from flowrl.objectives.surrogate import check_clip, clipped_surrogate
from flowrl.records import LossBatch


@dataclass(frozen=True)
class SequenceClipOptions(KLOptions):
    clip_eps_low: float = 3e-4
    """Answers whose ratio is below 1 - eps give no gradient where the advantage is negative."""
    clip_eps_high: float = 4e-4
    """Answers whose ratio is above 1 + eps give no gradient where the advantage is positive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip_eps_low, self.clip_eps_high)


class GSPO(PolicyGradient):
    """The clipped surrogate of z-scored rewards at the level of sequences."""

    name = "gspo"
    Options = SequenceClipOptions

    def policy_loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        ratio = sequence_mean(log_ratio_to_old(batch), batch).exp()  # (N,)
        low, high = 1 - self.settings.clip_eps_low, 1 + self.settings.clip_eps_high
        losses, clipped = clipped_surrogate(ratio, sequence_advantages(batch), low, high)
        return aggregate_sequences(losses, batch), {"clip_frac": clipped.to(ratio.dtype)}
