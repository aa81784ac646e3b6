"""GMPO: the geometric mean of an answer's token ratios, each clipped on the side A pushes to.

    d_it = log pi_theta - log pi_old, clipped: min(d, clip_eps_high) where A >= 0,
           max(d, -clip_eps_low) where A < 0
    loss = - (1 / sequences) sum_i A_i exp( mean_t d_it )

Source: arXiv:2507.20673.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.objectives.aggregation import aggregate_sequences, per_token, sequence_mean
from flowrl.objectives.base import Metrics
from flowrl.objectives.kl import KLOptions
from flowrl.objectives.policy_gradient import (
    PolicyGradient,
    log_ratio_to_old,
    sequence_advantages,
)
from flowrl.records import LossBatch
from flowrl.schema import require


class GMPO(PolicyGradient):
    """Ratios are clipped in log space, token by token, before the mean."""

    name = "gmpo"

    @dataclass(frozen=True)
    class Options(KLOptions):
        clip_eps_low: float = 0.4
        """Log-ratios below -eps give no gradient where the advantage is negative."""
        clip_eps_high: float = 0.4
        """Log-ratios above eps give no gradient where the advantage is positive."""

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("clip_eps_low", "clip_eps_high"):
                value = getattr(self, name)
                require(
                    value >= 0,
                    f"objective.{name} bounds a log-ratio and must be >= 0, got {value}; "
                    f"set objective.{name}=0.4",
                )

    def policy_loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        advantages = sequence_advantages(batch)
        log_ratio = log_ratio_to_old(batch)
        bounded = torch.where(
            per_token(advantages, batch) >= 0,
            log_ratio.clamp(max=self.settings.clip_eps_high),
            log_ratio.clamp(min=-self.settings.clip_eps_low),
        )
        losses = -advantages * sequence_mean(bounded, batch).exp()
        clipped = (bounded != log_ratio).to(losses.dtype)
        return aggregate_sequences(losses, batch), {"clip_frac": sequence_mean(clipped, batch)}
