"""The squared-residual family's one configuration, and what a recipe can set of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from flowrl_kernels import WeightBound

from flowrl.objectives.phi import SQUARE, Phi
from flowrl.schema import require

LogZKind = Literal["learned", "group_mean", "group_best", "group_mean_old", "mean_reward", "zero"]
"""learned         the partition head
group_mean      the group's mean of what makes a residual 0, at the current policy
group_best      the constant with the least mean phi over the group; group_mean where phi is square
group_mean_old  group_mean at the old policy, from `prepare`
mean_reward     beta times the group's mean reward: log Z of an old policy that hardly moves
zero            0"""

RewardKind = Literal["raw", "zscore"]
BoundName = Literal["paper", "release", "recipe", "recipe_2025_11", "gflowrl", "none"]


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
    "gflowrl": BoundDefaults(max_weight=1.2),  # arXiv:2607.13394
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
    """Bound of the importance weight: paper, release, recipe, recipe_2025_11, gflowrl or none
    (w = 1)."""
    clip_eps_low: float | None = None
    """Lower clip of w (and of the token mask) at 1 - eps; for bounds paper and recipe_2025_11."""
    clip_eps_high: float | None = None
    """Upper clip of w (and of the token mask) at 1 + eps; for bounds paper and recipe_2025_11."""
    max_weight: float | None = None
    """Upper clamp of w, without a lower one; for bounds recipe and gflowrl."""
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
    """The family's one configuration. The defaults are those of VarGrad without a weight."""

    beta: float
    log_z: LogZKind = "group_mean"
    length_norm: bool = False  # means over response tokens instead of sums
    reward: RewardKind = "raw"
    weight_bound: WeightBound | None = None  # None: w = 1
    token_clip: tuple[float, float] | None = None  # ratios outside of which tokens are dropped
    anchor: Literal["ref", "old"] = "ref"  # what the policy's log-prob is compared with
    gap_clip: tuple[float, float] | None = None  # (low, high) of the residual at the old policy
    phi: Phi = SQUARE
    scale: float = 1.0  # factor of the loss
    divisor: Literal["sequences", "freedom"] = "sequences"  # freedom: sequences - groups


def with_bound(
    options: ResidualOptions, default: BoundName, settings: ResidualSettings
) -> ResidualSettings:
    """`settings` with the bound that the options name, else `default`, and single options on top.

    Raises ConfigError for an option without effect."""
    bound = options.bound or default
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
        token_clip is None or settings.reward == "zscore",
        "objective.token_mask goes by the sign of the centred reward and needs reward=zscore, got "
        f"reward={settings.reward}; set objective.reward=zscore or objective.token_mask=false",
    )
    return dataclasses.replace(settings, weight_bound=weight_bound, token_clip=token_clip)


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None else value
