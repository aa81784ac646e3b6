"""[loop]: what any objective can have around its loss. Unset fields take the objective's own
defaults (`Objective.loop_defaults`, what its paper does), and else switch the mechanism off."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flowrl.schema import ConfigError, nearest, require


@dataclass(frozen=True)
class LoopConfig:
    dynamic_sampling: bool | None = None
    """Keep a prompt only if its samples do not all have one reward; sample further prompts until
    batch.prompts_per_step are kept (DAPO)."""
    max_sampling_rounds: int = 10
    """Rounds of dynamic sampling a step; past them the step is filled with prompts left out."""
    overlong_buffer: float | None = None
    """Share of rollout.max_new_tokens at its end over which a response is punished ever more, up to
    loop.overlong_penalty (DAPO: 4096 of 20480 tokens, 0.2); 0: not."""
    overlong_penalty: float = 1.0
    """Largest punishment of the buffer, in reward."""
    truncated_reward: float | None = None
    """Truncated responses: >= 0 multiplies their reward, < 0 replaces it (ProRL v2: 0); 1: as is.
    """
    mask_truncated: bool | None = None
    """Truncated responses take no part in the loss; they stay in their group's statistics."""
    reference_reset_every: int | None = None
    """Steps after which the reference becomes the current policy (ProRL); 0: never."""
    reference_reset_patience: int | None = None
    """The same after so many evaluations in a row without a better avg@n; 0: never."""
    reset_optimizer: bool | None = None
    """A reset of the reference also clears the optimizer's moments."""
    reward_scale_start: float | None = None
    """Factor of the rewards at step 1, which goes linearly to 1 at step loop.reward_scale_steps:
    below 1 the inverse temperature beta rises (Flow of Reasoning: 0.5; TBA: 1/3)."""
    reward_scale_steps: int | None = None
    """Steps until the rewards count in full."""
    replay_fraction: float | None = None
    """Share of a step's prompts whose samples come from the replay buffer; 0: no buffer."""
    replay_capacity: int | None = None
    """Groups that the buffer holds; the oldest leaves first."""
    replay_priority: Literal["uniform", "recent", "reward"] | None = None
    """How groups are drawn: alike, the newest first, or in proportion to exp(mean reward)."""

    def __post_init__(self) -> None:
        require(
            self.max_sampling_rounds >= 1,
            f"loop.max_sampling_rounds must be >= 1, got {self.max_sampling_rounds}; "
            "set loop.max_sampling_rounds=10",
        )
        for name, low, high, remedy in (
            ("overlong_buffer", 0, 1, 0.2),
            ("replay_fraction", 0, 0.9, 0.5),
            ("overlong_penalty", 0, None, 1.0),
            ("reward_scale_start", 0, None, 0.5),
            ("reward_scale_steps", 1, None, 200),
            ("reference_reset_every", 0, None, 200),
            ("reference_reset_patience", 0, None, 3),
            ("replay_capacity", 1, None, 1000),
        ):
            value = getattr(self, name)
            require(
                value is None or (low <= value and (high is None or value <= high)),
                f"loop.{name} must be {f'in [{low}, {high}]' if high else f'>= {low}'}, got "
                f"{value}; set loop.{name}={remedy}",
            )

    def reward_scale(self, step: int) -> float:
        """Factor of the rewards at step 1, 2, ...; of a resolved config."""
        start, steps = self.reward_scale_start, self.reward_scale_steps
        assert start is not None, "assembly.resolve fills it"
        assert steps is not None, "assembly.resolve fills it"
        return start + (1.0 - start) * min(1.0, (step - 1) / max(1, steps - 1))

    @property
    def shares_groups(self) -> bool:
        """Whether a step's groups are put together from those of all ranks."""
        return bool(self.dynamic_sampling or self.replay_fraction)


OFF = {
    "dynamic_sampling": False,
    "overlong_buffer": 0.0,
    "truncated_reward": 1.0,
    "mask_truncated": False,
    "reference_reset_every": 0,
    "reference_reset_patience": 0,
    "reset_optimizer": False,
    "reward_scale_start": 1.0,
    "reward_scale_steps": 200,
    "replay_fraction": 0.0,
    "replay_capacity": 1000,
    "replay_priority": "uniform",
}
"""Without a default of the objective's."""


def with_defaults(loop: LoopConfig, defaults: Mapping[str, Any], objective: str) -> LoopConfig:
    """`loop` with unset fields filled in. Raises ConfigError for a setting without effect."""
    for name in defaults:
        if name not in OFF:
            raise ConfigError(f"{objective} sets loop.{name}{nearest(name, OFF)}")
    given = {k: v for k, v in dataclasses.asdict(loop).items() if v is not None}
    filled = LoopConfig(**{**OFF, **defaults, **given})
    unset = {**dataclasses.asdict(LoopConfig()), **OFF, **defaults}
    asked = {name for name, value in given.items() if value != unset[name]}
    for name, needed in (
        ("max_sampling_rounds", "dynamic_sampling"),
        ("overlong_penalty", "overlong_buffer"),
        ("replay_capacity", "replay_fraction"),
        ("replay_priority", "replay_fraction"),
    ):
        require(
            name not in asked or bool(getattr(filled, needed)),
            f"loop.{name} has no effect without loop.{needed}, got {given.get(name)}; "
            f"set loop.{needed} or leave it out",
        )
    require(
        "reward_scale_steps" not in asked or filled.reward_scale_start != 1,
        "loop.reward_scale_steps has no effect without loop.reward_scale_start, got "
        f"{loop.reward_scale_steps}; set loop.reward_scale_start=0.5 or leave it out",
    )
    require(
        "reset_optimizer" not in asked
        or not filled.reset_optimizer
        or bool(filled.reference_reset_every or filled.reference_reset_patience),
        "loop.reset_optimizer has no effect without a reset of the reference; set "
        "loop.reference_reset_every=200 or leave it out",
    )
    return filled
