"""FlowRL: match pi_ref exp(beta r) / Z with length-normalised trajectory balance.

Source: arXiv:2509.15207, eq. 6-7, and the authors' later commits, each a preset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowrl.objectives.base import LogZDefaults
from flowrl.objectives.residual_settings import (
    BoundName,
    LogZKind,
    ResidualOptions,
    ResidualSettings,
    with_bound,
)
from flowrl.objectives.squared_residual import SquaredResidual

PresetName = Literal["paper", "release", "recipe", "recipe_2025_11"]


@dataclass(frozen=True)
class Preset:
    """What a source sets together; single options override it."""

    bound: BoundName
    log_z: LogZDefaults


_CODE_HEAD = LogZDefaults(dropout=0.1, include_last_prompt_token=False, dtype="bfloat16")

PRESETS: dict[str | None, Preset] = {
    None: Preset("recipe", LogZDefaults()),
    "paper": Preset("paper", LogZDefaults()),
    "release": Preset("release", _CODE_HEAD),
    "recipe": Preset("recipe", _CODE_HEAD),
    "recipe_2025_11": Preset("recipe_2025_11", _CODE_HEAD),
}


class FlowRL(SquaredResidual):
    """residual = log Z(x) + mean_t log pi_theta - beta * rhat - mean_t log pi_ref."""

    name = "flowrl"

    @dataclass(frozen=True)
    class Options(ResidualOptions):
        beta: float = 15.0
        """Inverse temperature of the prepared reward (the paper: 15)."""
        preset: PresetName | None = None
        """Source to follow: paper, release, recipe or recipe_2025_11; sets the bound and the head's
        defaults. Unset: an upper clamp of the weight at 10, a float32 head without dropout."""
        log_z: LogZKind = "learned"
        """log Z: learned (the partition head), zero, or without parameters from the group:
        group_mean, group_best, group_mean_old or mean_reward."""
        length_norm: bool = True
        """Means over response tokens instead of sums. Moves the fixed point: docs/math.md."""
        reward: Literal["raw", "zscore"] = "zscore"
        """The reward itself, or its z-score over the group."""

    options: Options

    def resolve_options(self, options: Options) -> ResidualSettings:
        settings = ResidualSettings(
            options.beta, options.log_z, options.length_norm, options.reward
        )
        return with_bound(options, PRESETS[options.preset].bound, settings)

    @property
    def log_z_defaults(self) -> LogZDefaults:
        return PRESETS[self.options.preset].log_z
