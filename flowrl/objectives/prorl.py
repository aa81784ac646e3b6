"""ProRL: long training with a wide upper clip, a weak KL and a reference that is renewed.

v1: DAPO's surrogate with range [0.8, 1.4]; reference and optimizer are reset when validation
stands still. v2: REINFORCE++-baseline advantages, range [0.8, 1.27], k2; the reference is reset
every 200 steps, the optimizer never. The resets are parts of the loop that it switches on.
Sources: arXiv:2505.24864 (v1; the KL coefficient from arXiv:2507.12507); for v2 the authors' notes
and OpenRLHF's script, whose correction of the sampler's log-probs is a setting of the rollout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flowrl.objectives.advantages import Advantage
from flowrl.objectives.aggregation import Aggregation
from flowrl.objectives.kl import Estimator, Placement
from flowrl.objectives.surrogate import Surrogate, SurrogateOptions


@dataclass(frozen=True)
class Preset:
    settings: SurrogateOptions
    advantage: Advantage
    whitened: bool
    loop: Mapping[str, Any]


PRESETS = {
    "v1": Preset(
        SurrogateOptions(clip_eps_high=0.4, dual_clip=10.0, kl_coef=1e-4, kl_estimator="k3"),
        advantage="zscore",
        whitened=False,
        loop={"dynamic_sampling": True, "reference_reset_patience": 3, "reset_optimizer": True},
    ),
    "v2": Preset(
        SurrogateOptions(clip_eps_high=0.27, kl_coef=1e-4, kl_estimator="k2"),
        advantage="mean",
        whitened=True,
        loop={
            "dynamic_sampling": True,
            "reference_reset_every": 200,
            "reset_optimizer": False,
            "truncated_reward": 0.0,
        },
    ),
}


class ProRL(Surrogate):
    """The clipped surrogate with a preset's advantages, ranges and resets."""

    name = "prorl"

    @dataclass(frozen=True)
    class Options:
        preset: Literal["v1", "v2"] = "v1"
        """v1 or v2; sets the advantages, the loop's defaults and what is unset below."""
        clip_eps_low: float | None = None
        """Ratios below 1 - eps give no gradient where the advantage is negative. Unset: 0.2."""
        clip_eps_high: float | None = None
        """Ratios above 1 + eps give no gradient where the advantage is positive. Unset: 0.4 in v1,
        0.27 in v2."""
        dual_clip: float | None = None
        """Ratios above this give no gradient where the advantage is negative; 0: no such bound.
        Unset: 10 in v1, 0 in v2."""
        kl_coef: float | None = None
        """Coefficient of the KL penalty towards pi_ref. Unset: 1e-4; 0: none."""
        kl_estimator: Estimator | None = None
        """Per-token estimator: k1, k2, k3 or k3_straight_through. Unset: k3 in v1, k2 in v2."""
        kl_placement: Placement | None = None
        """Where the KL enters: reward_sequence, reward_token or loss. Unset: loss."""
        kl_ratio_weight: bool | None = None
        """Multiplies the KL in the loss by the ratio to the old policy. Unset: false."""
        aggregation: Aggregation | None = None
        """How tokens are weighted. Unset: token-mean."""
        max_tokens: int | None = None
        """The constant that aggregation=seq-mean-token-sum-norm divides by. Unset: 3000."""

    def __init__(self, options: Any, backend: str | None = None) -> None:
        super().__init__(options, backend)
        preset = PRESETS[options.preset]
        self.advantage, self.whitened = preset.advantage, preset.whitened
        self.loop_defaults = preset.loop

    def resolve_options(self, options: Any) -> SurrogateOptions:
        chosen = {
            name: value
            for name, value in dataclasses.asdict(options).items()
            if name != "preset" and value is not None
        }
        return dataclasses.replace(PRESETS[options.preset].settings, **chosen)
