"""The squared-residual family: one loss with switches; trajectory balance, VarGrad and FlowRL are
settings of it.

    residual_i = log_z_i + m_t(log pi_theta) - beta * rhat_i - m_t(anchor)
    loss       = sum_i w_i * phi(residual_i) / sequences

m_t is the mean over response tokens (length_norm) or their sum. The anchor is the reference or the
old policy. w_i is the bounded sequence importance weight, without gradient. The switches:
residual_settings.py; what they mean for the fixed point: docs/math.md.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from flowrl_kernels import WeightBound
from torch import Tensor

from flowrl.objectives.advantages import zscore
from flowrl.objectives.aggregation import per_token, sequence_mean, unmasked
from flowrl.objectives.base import AllReduce, FixedPoint, Metrics, Objective, given, identity
from flowrl.objectives.groups import group_mean, group_sizes
from flowrl.objectives.residual_loss import Residuals, evaluate
from flowrl.objectives.residual_settings import ResidualOptions, ResidualSettings
from flowrl.records import LossBatch, Totals

OF_THE_GROUP = ("group_mean", "group_best", "group_mean_old", "mean_reward")


class SquaredResidual(Objective):
    """The family's implementation; a member is its `settings`."""

    def __init__(self, options: ResidualOptions, backend: str | None = None) -> None:
        super().__init__(options, backend)
        self.settings = self.resolve_options(options)
        log_z = self.settings.log_z
        self.coupling = "group" if log_z in ("group_mean", "group_best") else "sequence"

    @abstractmethod
    def resolve_options(self, options: Any) -> ResidualSettings:
        """The member's settings, from its own Options."""

    @property
    def needs(self) -> frozenset[str]:
        settings = self.settings
        needs = {settings.anchor}
        if settings.weight_bound is not None or settings.gap_clip is not None:
            needs.add("old")
        if settings.log_z == "learned":
            needs.add("log_z")
        if settings.log_z == "group_mean_old":
            needs.add("old_pass")
        return frozenset(needs)

    @property
    def compares_group(self) -> bool:
        return self.settings.log_z in OF_THE_GROUP or self.settings.reward == "zscore"

    @property
    def beta(self) -> float | None:
        """None for z-scored rewards, whose effective gap depends on how many members are right, and
        for the old policy as anchor, which moves on until only the best answers are left."""
        nominal = self.settings.reward == "raw" and self.settings.anchor == "ref"
        return self.settings.beta if nominal else None

    @property
    def fixed_point(self) -> FixedPoint | None:
        settings = self.settings
        if settings.anchor == "old" or settings.log_z in ("zero", "mean_reward"):
            return None  # the anchor moves on, or nothing makes it sum to 1
        of_group = settings.reward == "zscore" and settings.log_z != "learned"
        return FixedPoint(settings.beta, settings.length_norm, settings.reward, of_group)

    def prepare(self, batch: LossBatch, all_reduce: AllReduce = identity) -> LossBatch:
        """rhat as `advantages` (N,): the raw reward or its z-score over the group."""
        kind = self.settings.log_z
        if kind in OF_THE_GROUP and bool((group_sizes(batch.group_ids) == 1).all()):
            raise ValueError(
                f"{self.name} takes log Z from the group and needs at least 2 samples per prompt, "
                "got 1 for every prompt, where nothing is learned; set batch.group_size=8"
            )
        rhat = batch.rewards
        if self.settings.reward == "zscore":
            rhat = zscore(rhat, batch.group_ids)
        batch = batch.replace(advantages=rhat)
        if kind == "mean_reward":
            log_z = self.settings.beta * group_mean(rhat, batch.group_ids)
            return batch.replace(group_log_z=log_z)
        if kind == "group_mean_old":
            old = batch.replace(logprobs=given(batch.old_logprobs, "old_logprobs"))
            return batch.replace(group_log_z=self._group_mean(old))
        return batch

    def group_statistic(self, batch: LossBatch) -> Tensor:
        """group_mean: mean over the group of beta * rhat + m_t(anchor) - m_t(log pi_theta).
        group_best: the constant that minimises the group's mean phi. Sequences without a response
        token are left out."""
        if self.coupling != "group":
            return super().group_statistic(batch)
        if self.settings.log_z == "group_mean":
            return self._group_mean(batch)
        found = self._at_zero(batch)
        return self.settings.phi.best_constant(-found.z_estimate, batch.group_ids, found.counted)

    def _group_mean(self, batch: LossBatch) -> Tensor:
        found = self._at_zero(batch)
        return group_mean(found.z_estimate, batch.group_ids, include=found.counted)

    @torch.no_grad()
    def _at_zero(self, batch: LossBatch) -> Residuals:
        """The residuals with log Z = 0, at the batch's log-probs."""
        logprobs = given(batch.logprobs, "logprobs")
        totals = Totals(1.0, 1.0, 0.0) if batch.totals is None else batch.totals
        zero = logprobs.new_zeros(batch.num_sequences)
        batch = batch.replace(totals=totals)
        backend = self.backend if logprobs.is_cuda else None  # a whole step's batch is on the CPU
        return evaluate(self.settings, batch, zero, self._mask(batch), backend)

    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        mask = self._mask(batch)
        log_z = self._log_z(batch)
        result = evaluate(self.settings, batch, log_z, mask, self.backend)
        return result.loss, self._metrics(batch, log_z, result, mask)

    def summarize(self, metrics: Metrics, batch: LossBatch) -> dict[str, float]:
        """flow/*: means over sequences, of the weights that multiply the loss. log_z_gap is
        log_z minus the group's mean of beta * rhat + b - a, log_z_gap_abs its absolute value;
        iw_ess is (sum w)^2 / (N sum w^2), 0 where a correction dropped every sequence."""
        weight = metrics["importance_weight"].double()
        gap = metrics["log_z"] - group_mean(metrics["z_estimate"], batch.group_ids)
        largest = weight.max()
        relative = weight / largest if largest > 0 else weight
        numbers = {
            "flow/residual_abs": metrics["residual"].abs().mean(),
            "flow/log_z_mean": metrics["log_z"].mean(),
            "flow/log_z_gap": gap.mean(),
            "flow/log_z_gap_abs": gap.abs().mean(),
            "flow/iw_mean": weight.mean(),
            "flow/iw_max": largest,
            "flow/iw_ess": relative.mean().square() / relative.square().mean().clamp(min=1e-300),
            "flow/iw_clip_frac": metrics["clipped"].mean(),
        }
        if self.settings.token_clip is not None:
            numbers["flow/masked_token_frac"] = metrics["masked_token_frac"].mean()
        return {name: float(value) for name, value in numbers.items()}

    def _log_z(self, batch: LossBatch) -> Tensor:
        if self.settings.log_z == "learned":
            return given(batch.log_z, "log_z")
        if self.settings.log_z in OF_THE_GROUP:
            return given(batch.group_log_z, "group_log_z")
        return given(batch.logprobs, "logprobs").new_zeros(batch.num_sequences)

    def _mask(self, batch: LossBatch) -> Tensor | None:
        """The batch's response mask without the tokens that `token_mask` drops: rhat > 0 and
        ratio > high, or rhat < 0 and ratio < low (verl pull request 3924)."""
        if self.settings.token_clip is None or batch.old_logprobs is None:
            return batch.response_mask
        low, high = self.settings.token_clip
        logprobs = given(batch.logprobs, "logprobs").detach()
        ratio = unmasked(logprobs - batch.old_logprobs, batch).exp()  # (T,)
        rhat = per_token(given(batch.advantages, "advantages"), batch)  # (T,)
        dropped = ((rhat > 0) & (ratio > high)) | ((rhat < 0) & (ratio < low))
        return batch.mask & ~dropped

    def _metrics(
        self, batch: LossBatch, log_z: Tensor, result: Residuals, mask: Tensor | None
    ) -> Metrics:
        residual = result.residual
        log_z = log_z.detach().to(residual.dtype)
        metrics = {
            "residual": residual,
            "importance_weight": result.weight,
            "log_weight": result.log_weight,
            "clipped": _outside(result.log_weight, self.settings.weight_bound).to(residual.dtype),
            "log_z": log_z,
            "z_estimate": result.z_estimate,
        }
        if self.settings.token_clip is not None:
            dropped = batch.mask & ~(batch.mask if mask is None else mask)
            metrics["masked_token_frac"] = sequence_mean(dropped.to(residual.dtype), batch)
        return metrics


def _outside(log_weight: Tensor, bound: WeightBound | None) -> Tensor:
    """(N,) bool: the bound changes the weight."""
    outside = torch.zeros_like(log_weight, dtype=torch.bool)
    if bound is not None and bound.high is not None:
        outside |= log_weight.exp() > bound.high
    if bound is not None and bound.low is not None:
        outside |= log_weight.exp() < bound.low
    return outside
