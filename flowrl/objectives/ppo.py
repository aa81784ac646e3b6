"""PPO with a critic: token advantages by GAE, clipped surrogate, the KL as a cost of every token.

    r_t  = -kl_coef * KL_t, and the answer's reward at its last token
    A    = whiten(GAE(r, V_old))
    loss = clipped surrogate of A + value_coef * clipped value loss

The coefficient is fixed or follows a target KL. Sources: arXiv:1707.06347; for language models
arXiv:1909.08593 (KL in the reward, adaptive coefficient); numbers as in verl, whose own default
keeps the KL out of the reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from flowrl.objectives.aggregation import response_lengths, sequence_mean
from flowrl.objectives.base import AllReduce, Metrics, identity
from flowrl.objectives.critic import Critic
from flowrl.objectives.kl import Estimator, Placement
from flowrl.objectives.policy_gradient import require_state
from flowrl.objectives.surrogate import Surrogate, SurrogateOptions
from flowrl.records import LossBatch
from flowrl.schema import require

MAX_KL_ERROR = 0.2  # of the controller: the relative error counts up to this


class PPO(Surrogate):
    """The clipped surrogate of whitened GAE advantages, and the critic's loss beside it."""

    name = "ppo"

    @dataclass(frozen=True)
    class Options(SurrogateOptions):
        dual_clip: float = 3.0
        """Ratios above this give no gradient where the advantage is negative; 0: no such bound."""
        kl_coef: float = 0.001
        """Coefficient of the KL penalty towards pi_ref; the first one where it adapts; 0: none."""
        kl_estimator: Estimator = "k1"
        """Per-token estimator: k1, k2, k3, or k3_straight_through (value of k3, gradient of k2)."""
        kl_placement: Placement = "reward_token"
        """Where the KL enters: reward_token, reward_sequence (all at the last token) or loss."""
        kl_controller: Literal["fixed", "adaptive"] = "fixed"
        """adaptive: after each step kl_coef *= 1 + clip(KL / kl_target - 1, -0.2, 0.2) * sequences
        / kl_horizon, KL the mean over sequences of their token mean."""
        kl_target: float = 0.1
        """KL per token, in nats, that the adaptive coefficient aims at."""
        kl_horizon: float = 10_000.0
        """Sequences over which the adaptive coefficient moves by its error."""
        gamma: float = 1.0
        """Discount of rewards, per token."""
        lam: float = 1.0
        """GAE's mix: 1 is the return less the value, 0 one step of bootstrap."""
        value_coef: float = 0.5
        """Weight of the critic's loss beside the policy's."""
        value_clip: float = 0.5
        """A value that moved further than this from its old one gains nothing by it; 0: no clip."""

        def __post_init__(self) -> None:
            super().__post_init__()
            require(
                self.kl_controller == "fixed" or self.kl_coef > 0,
                "objective.kl_controller=adaptive multiplies objective.kl_coef, which must be > 0, "
                f"got {self.kl_coef}; set objective.kl_coef=0.001",
            )
            for name in ("kl_target", "kl_horizon"):
                value = getattr(self, name)
                require(
                    value > 0,
                    f"objective.{name} must be > 0, got {value}; set objective.{name}="
                    f"{type(self).__dataclass_fields__[name].default}",
                )

    def __init__(self, options: Any, backend: str | None = None) -> None:
        super().__init__(options, backend)
        self.critic = Critic(options.gamma, options.lam, options.value_coef, options.value_clip)
        self._kl_coef: float = options.kl_coef

    @property
    def adaptive(self) -> bool:
        return self.options.kl_controller == "adaptive"

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"ref", "old_pass"} if self.adaptive else set())

    @property
    def kl_coef(self) -> float:
        return self._kl_coef

    def prepare(self, batch: LossBatch, all_reduce: AllReduce = identity) -> LossBatch:
        """Rewards hold the coefficient as it stands; the controller then moves it, for the loss
        where it holds the KL and for the next step."""
        prepared = super().prepare(batch, all_reduce)
        if self.adaptive:
            self._adapt(batch, all_reduce)
        return prepared

    def _adapt(self, batch: LossBatch, all_reduce: AllReduce) -> None:
        means = sequence_mean(self.old_kl(batch).double(), batch)
        counted = (response_lengths(batch) > 0).sum().double()
        total, count = all_reduce(torch.stack([means.sum(), counted])).tolist()
        if count:
            error = total / count / self.options.kl_target - 1
            error = min(max(error, -MAX_KL_ERROR), MAX_KL_ERROR)
            self._kl_coef *= 1 + error * count / self.options.kl_horizon

    def state(self) -> dict[str, float]:
        return {"kl_coef": self._kl_coef} if self.adaptive else {}

    def load_state(self, state: Mapping[str, float]) -> None:
        require_state(self, state)
        self._kl_coef = state.get("kl_coef", self._kl_coef)

    def summarize(self, metrics: Metrics, batch: LossBatch) -> dict[str, float]:
        """The means of the metrics, and actor/kl_coef where it adapts."""
        adapted = {f"actor/{name}": value for name, value in self.state().items()}
        return super().summarize(metrics, batch) | adapted
