"""GRPO in the paper's form: clipped token ratios, z-scored rewards, k3 penalty in the loss.

Source: arXiv:2402.03300, eq. 3-4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.objectives.advantages import zscore
from flowrl.objectives.aggregation import (
    Aggregation,
    aggregate,
    per_token,
    sequence_mean,
    unmasked,
)
from flowrl.objectives.base import AllReduce, Metrics, Objective, given, identity
from flowrl.objectives.kl import k3
from flowrl.records import LossBatch
from flowrl.schema import require

MAX_LOG_RATIO = 20.0  # e^20 is finite in float32; a ratio that far off is clipped or meaningless


class GRPO(Objective):
    """loss = sum_it W_it * [max(-A_i rho_it, -A_i clip(rho_it)) + kl_coef * k3_it]."""

    name = "grpo"

    @dataclass(frozen=True)
    class Options:
        clip_eps_low: float = 0.2
        """Ratios below 1 - eps give no gradient where the advantage is negative."""
        clip_eps_high: float = 0.2
        """Ratios above 1 + eps give no gradient where the advantage is positive."""
        kl_coef: float = 0.04
        """Coefficient of the per-token k3 penalty towards pi_ref (DeepSeekMath: 0.04); 0: none."""
        aggregation: Aggregation = "seq-mean-token-mean"
        """How tokens are weighted: seq-mean-token-mean (the paper), token-mean or
        seq-mean-token-sum."""

        def __post_init__(self) -> None:
            low, high, coef = self.clip_eps_low, self.clip_eps_high, self.kl_coef
            require(
                0 <= low <= 1,
                f"objective.clip_eps_low must be in [0, 1], got {low}; "
                "set objective.clip_eps_low=0.2",
            )
            require(
                high >= 0,
                f"objective.clip_eps_high must be >= 0, got {high}; "
                "set objective.clip_eps_high=0.2",
            )
            require(
                coef >= 0,
                f"objective.kl_coef must be >= 0, got {coef}; set objective.kl_coef=0.04",
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old", "ref"} if self.options.kl_coef else {"old"})

    def prepare(self, batch: LossBatch, all_reduce: AllReduce = identity) -> LossBatch:
        return batch.replace(advantages=zscore(batch.rewards, batch.group_ids))

    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        logprobs = unmasked(given(batch.logprobs, "logprobs"), batch)
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        ratio = unmasked(logprobs - old, batch).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        advantages = per_token(given(batch.advantages, "advantages"), batch)  # (T,)
        low, high = 1 - self.options.clip_eps_low, 1 + self.options.clip_eps_high
        plain, clipped = -advantages * ratio, -advantages * ratio.clamp(low, high)
        token_losses = torch.maximum(plain, clipped)
        metrics = {
            "clip_frac": sequence_mean((clipped > plain).to(ratio.dtype), batch),
            "advantage_abs": given(batch.advantages, "advantages").abs(),
        }
        if self.options.kl_coef:
            ref_logprobs = given(batch.ref_logprobs, "ref_logprobs")
            log_ratio = unmasked(logprobs - ref_logprobs, batch)
            token_losses = token_losses + self.options.kl_coef * k3(log_ratio)
        return aggregate(token_losses, self.options.aggregation, batch), metrics
