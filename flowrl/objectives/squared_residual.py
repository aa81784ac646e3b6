"""The squared-residual family: trajectory balance, VarGrad and FlowRL are one loss with switches.

    residual_i = log_z_i + m_t(log pi_theta) - beta * rhat_i - m_t(log pi_ref)
    loss       = sum_i w_i * residual_i^2 / sequences

m_t is the mean over response tokens (length_norm) or their sum. log_z is learned, the group's own
mean or 0. w_i is the bounded sequence importance weight, without gradient. The bounds, and what
the switches mean for the fixed point: docs/math.md.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from flowrl_kernels import TrajectoryBalance, WeightBound, trajectory_balance
from torch import Tensor

from flowrl.objectives.advantages import zscore
from flowrl.objectives.aggregation import (
    per_token,
    sequence_mean,
    unmasked,
)
from flowrl.objectives.base import AllReduce, FixedPoint, Metrics, Objective, given, identity
from flowrl.objectives.groups import group_mean, group_sizes
from flowrl.records import LossBatch
from flowrl.schema import require

LogZKind = Literal["learned", "group_mean", "zero"]
BoundName = Literal["paper", "release", "recipe", "recipe_2025_11", "none"]


@dataclass(frozen=True)
class BoundDefaults:
    """A named bound of w. `clip` is (eps_low, eps_high) of [1 - eps_low, 1 + eps_high]."""

    clip: tuple[float, float] | None = None
    max_weight: float | None = None
    token_mask: bool = False


BOUNDS: dict[str, BoundDefaults] = {
    "paper": BoundDefaults(clip=(0.2, 0.2)),  # arXiv:2509.15207 eq. 7, which does not state eps
    "release": BoundDefaults(),  # the 2025-09-17 release multiplies by the raw weight
    "recipe": BoundDefaults(max_weight=10.0),  # the authors since 2025-10-27, verl-recipe
    "recipe_2025_11": BoundDefaults(clip=(0.2, 0.28), token_mask=True),  # verl pull request 3924
}
"""Every bound but "none", which is w = 1."""

_OPTIONS_OF_BOUNDS = (
    ("clip_eps_low", "clip", "paper"),
    ("clip_eps_high", "clip", "paper"),
    ("token_mask", "clip", "paper"),
    ("max_weight", "max_weight", "recipe"),
)  # option, what a bound must have for it to work, a bound that has it


@dataclass(frozen=True)
class ResidualOptions:
    """What all objectives of the family can set; each has its own defaults."""

    beta: float = 3.0
    """Inverse temperature of the target pi_ref exp(beta r) / Z: 1 / KL coefficient."""
    bound: BoundName | None = None
    """Bound of the importance weight: paper, release, recipe, recipe_2025_11 or none (w = 1)."""
    clip_eps_low: float | None = None
    """Lower clip of w (and of the token mask) at 1 - eps; for bounds paper and recipe_2025_11."""
    clip_eps_high: float | None = None
    """Upper clip of w (and of the token mask) at 1 + eps; for bounds paper and recipe_2025_11."""
    max_weight: float | None = None
    """Upper clamp of w, without a lower one; for bound recipe."""
    token_mask: bool | None = None
    """Drop tokens whose own ratio left the clip range on the side the reward pushes to; for bounds
    paper and recipe_2025_11. Unset: true for recipe_2025_11."""

    def __post_init__(self) -> None:
        require(
            self.beta > 0, f"objective.beta must be > 0, got {self.beta}; set objective.beta=15"
        )
        low, high, cap = self.clip_eps_low, self.clip_eps_high, self.max_weight
        require(
            low is None or 0 <= low < 1,
            f"objective.clip_eps_low must be in [0, 1), got {low}; set objective.clip_eps_low=0.2",
        )
        require(
            high is None or high >= 0,
            f"objective.clip_eps_high must be >= 0, got {high}; set objective.clip_eps_high=0.2",
        )
        require(
            cap is None or cap > 0,
            f"objective.max_weight must be > 0, got {cap}; set objective.max_weight=10",
        )


@dataclass(frozen=True)
class ResidualSettings:
    """The family's one configuration, with presets and defaults resolved."""

    beta: float
    log_z: LogZKind
    length_norm: bool
    reward: Literal["raw", "zscore"]
    weight_bound: WeightBound | None  # None: w = 1
    token_clip: tuple[float, float] | None  # ratios outside of which tokens are dropped


def resolve(
    options: ResidualOptions,
    bound: BoundName,
    *,
    log_z: LogZKind,
    length_norm: bool,
    reward: Literal["raw", "zscore"],
) -> ResidualSettings:
    """Settings of `bound` with single options on top. Raises ConfigError for one without effect."""
    defaults = BOUNDS.get(bound, BoundDefaults())
    for name, part, suited in _OPTIONS_OF_BOUNDS:
        value = getattr(options, name)
        require(
            value is None or getattr(defaults, part) is not None,
            f"objective.{name} has no effect with bound {bound!r}, got {value}; "
            f"set objective.bound={suited} or leave it out",
        )
    weight_bound = None if bound == "none" else WeightBound(None, None)
    token_clip = None
    if defaults.max_weight is not None:
        weight_bound = WeightBound(None, _or_default(options.max_weight, defaults.max_weight))
    if defaults.clip is not None:
        low = 1 - _or_default(options.clip_eps_low, defaults.clip[0])
        high = 1 + _or_default(options.clip_eps_high, defaults.clip[1])
        weight_bound = WeightBound(low, high)
        if _or_default(options.token_mask, defaults.token_mask):
            token_clip = (low, high)
    require(
        token_clip is None or reward == "zscore",
        "objective.token_mask goes by the sign of the centred reward and needs reward=zscore, got "
        f"reward={reward}; set objective.reward=zscore or objective.token_mask=false",
    )
    return ResidualSettings(options.beta, log_z, length_norm, reward, weight_bound, token_clip)


class SquaredResidual(Objective):
    """The family's implementation; a member is its `settings`."""

    def __init__(self, options: ResidualOptions, backend: str | None = None) -> None:
        super().__init__(options, backend)
        self.settings = self.resolve_options(options)
        self.coupling = "group" if self.settings.log_z == "group_mean" else "sequence"

    @abstractmethod
    def resolve_options(self, options: Any) -> ResidualSettings:
        """The member's settings, from its own Options."""

    @property
    def needs(self) -> frozenset[str]:
        needs = {"ref"}
        if self.settings.weight_bound is not None:
            needs.add("old")
        if self.settings.log_z == "learned":
            needs.add("log_z")
        return frozenset(needs)

    @property
    def beta(self) -> float | None:
        """None for z-scored rewards: their effective gap depends on how many members are right."""
        return self.settings.beta if self.settings.reward == "raw" else None

    @property
    def fixed_point(self) -> FixedPoint | None:
        settings = self.settings
        if settings.log_z == "zero":  # nothing makes it sum to 1
            return None
        return FixedPoint(settings.beta, settings.length_norm, settings.reward)

    def prepare(self, batch: LossBatch, all_reduce: AllReduce = identity) -> LossBatch:
        """rhat as `advantages` (N,): the raw reward or its z-score over the group."""
        if self.coupling == "group" and bool((group_sizes(batch.group_ids) == 1).all()):
            raise ValueError(
                f"{self.name} takes log Z from the group and needs at least 2 samples per prompt, "
                "got 1 for every prompt, where nothing is learned; set batch.group_size=8"
            )
        if self.settings.reward == "raw":
            return batch.replace(advantages=batch.rewards)
        return batch.replace(advantages=zscore(batch.rewards, batch.group_ids))

    @torch.no_grad()
    def group_statistic(self, batch: LossBatch) -> Tensor:
        """mean over the group of beta * rhat + m_t(log pi_ref) - m_t(log pi_theta); sequences
        without a response token are left out."""
        if self.coupling != "group":
            return super().group_statistic(batch)
        mask = self._mask(batch)
        zero = given(batch.logprobs, "logprobs").new_zeros(batch.num_sequences)
        result = self._evaluate(batch, zero, mask)
        return group_mean(-result.residual, batch.group_ids, include=result.num_tokens > 0)

    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        mask = self._mask(batch)
        log_z = self._log_z(batch)
        result = self._evaluate(batch, log_z, mask)
        return result.loss, self._metrics(batch, log_z, result, mask)

    def summarize(self, metrics: Metrics, batch: LossBatch) -> dict[str, float]:
        """flow/*: means over sequences, of the weights that multiply the loss. log_z_gap is
        log_z minus the group's mean of beta * rhat + b - a, log_z_gap_abs its absolute value;
        iw_ess is (sum w)^2 / (N sum w^2)."""
        weight = metrics["importance_weight"].double()
        gap = metrics["log_z"] - group_mean(metrics["z_estimate"], batch.group_ids)
        relative = weight / weight.max()
        numbers = {
            "flow/residual_abs": metrics["residual"].abs().mean(),
            "flow/log_z_mean": metrics["log_z"].mean(),
            "flow/log_z_gap": gap.mean(),
            "flow/log_z_gap_abs": gap.abs().mean(),
            "flow/iw_mean": weight.mean(),
            "flow/iw_max": weight.max(),
            "flow/iw_ess": relative.mean().square() / relative.square().mean(),
            "flow/iw_clip_frac": metrics["clipped"].mean(),
        }
        if self.settings.token_clip is not None:
            numbers["flow/masked_token_frac"] = metrics["masked_token_frac"].mean()
        return {name: float(value) for name, value in numbers.items()}

    def _evaluate(self, batch: LossBatch, log_z: Tensor, mask: Tensor | None) -> TrajectoryBalance:
        return trajectory_balance(
            given(batch.logprobs, "logprobs"),
            batch.old_logprobs,
            given(batch.ref_logprobs, "ref_logprobs"),
            log_z,
            given(batch.advantages, "advantages"),
            batch.cu_seqlens,
            response_mask=mask,
            beta=self.settings.beta,
            weight_bound=self.settings.weight_bound,
            length_norm=self.settings.length_norm,
            scale=1.0 / given(batch.totals, "totals").sequences,
            backend=self.backend,
        )

    def _log_z(self, batch: LossBatch) -> Tensor:
        if self.settings.log_z == "learned":
            return given(batch.log_z, "log_z")
        if self.settings.log_z == "group_mean":
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
        self, batch: LossBatch, log_z: Tensor, result: TrajectoryBalance, mask: Tensor | None
    ) -> Metrics:
        residual = result.residual
        log_z = log_z.detach().to(residual.dtype)
        metrics = {
            "residual": residual,
            "importance_weight": result.weight,
            "log_weight": result.log_weight,
            "clipped": _outside(result.log_weight, self.settings.weight_bound).to(residual.dtype),
            "log_z": log_z,
            "z_estimate": log_z - residual,
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


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None else value
