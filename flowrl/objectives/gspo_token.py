"""GSPO-token: GSPO's ratio per answer, for advantages that may differ from token to token.

    s_it = sg(s_i) * pi_theta(y_it) / sg(pi_theta(y_it)),   s_i as in GSPO

With one advantage per answer its loss and gradient are GSPO's. Source: arXiv:2507.18071, section 4.
"""

from __future__ import annotations

from torch import Tensor

from flowrl.objectives.aggregation import per_token, sequence_mean
from flowrl.objectives.base import Metrics
from flowrl.objectives.gspo import SequenceClipOptions
from flowrl.objectives.policy_gradient import (
    PolicyGradient,
    log_ratio_to_old,
    token_advantages,
)
from flowrl.objectives.surrogate import clipped_surrogate
from flowrl.records import LossBatch


class GSPOToken(PolicyGradient):
    """The clipped surrogate of z-scored rewards with every token at its answer's ratio."""

    name = "gspo_token"
    Options = SequenceClipOptions

    def policy_loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        log_ratio = log_ratio_to_old(batch)
        mean = per_token(sequence_mean(log_ratio.detach(), batch), batch)
        ratio = (mean + log_ratio - log_ratio.detach()).exp()  # (T,)
        low, high = 1 - self.settings.clip_eps_low, 1 + self.settings.clip_eps_high
        token_losses, clipped = clipped_surrogate(ratio, token_advantages(batch), low, high)
        metrics = {"clip_frac": sequence_mean(clipped.to(ratio.dtype), batch)}
        return self.aggregate(token_losses, batch), metrics
