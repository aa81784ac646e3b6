"""TRPO: the surrogate without a clip, inside a trust region KL(pi_old || pi_theta) <= max_kl.

    penalty             loss = sum_t W_t (-A_t rho_t + kl_penalty (rho_t - 1 - log rho_t)); after an
                        update kl_penalty doubles above 1.5 max_kl and halves below max_kl / 1.5
    line_search         the optimizer's step, halved until the measured KL keeps the bound and the
                        surrogate improves: no update leaves the region
    conjugate_gradient  a natural-gradient step of length max_kl, then the same; for small models

rho - 1 - log rho on samples of pi_old is unbiased for KL(pi_old || pi_theta) and never negative.
Sources: arXiv:1502.05477; the adaptive penalty arXiv:1707.06347, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl.objectives.aggregation import sequence_mean
from flowrl.objectives.base import Metrics, TrustRegion
from flowrl.objectives.critic import Critic
from flowrl.objectives.policy_gradient import (
    AggregationOptions,
    PolicyGradient,
    log_ratio_to_old,
    require_state,
    token_advantages,
)
from flowrl.records import LossBatch
from flowrl.schema import require

TOLERANCE = 1.5  # a KL within this factor of max_kl leaves the penalty as it is
PENALTY_RANGE = (1e-6, 1e6)  # halved to 0, it could never double again

METHODS_OF_OPTIONS = {
    "kl_penalty": ("penalty",),
    "max_backtracks": ("line_search", "conjugate_gradient"),
    "damping": ("conjugate_gradient",),
    "cg_iterations": ("conjugate_gradient",),
}
CRITIC_OPTIONS = ("gamma", "lam", "value_coef", "value_clip")


class TRPO(PolicyGradient):
    """z-scored rewards, or whitened GAE advantages with a critic."""

    name = "trpo"

    @dataclass(frozen=True)
    class Options(AggregationOptions):
        method: Literal["penalty", "line_search", "conjugate_gradient"] = "penalty"
        """How the bound is kept: penalty (adaptive, approximate), line_search (measured and
        enforced), or conjugate_gradient (natural gradient; for small models)."""
        max_kl: float = 0.01
        """Largest mean KL(pi_old || pi_theta) per token of one update, in nats."""
        kl_penalty: float | None = None
        """First coefficient of the penalty towards pi_old; for method penalty. Unset: 1."""
        max_backtracks: int | None = None
        """How often a step is shortened before it is given up; for methods line_search and
        conjugate_gradient. Unset: 10."""
        damping: float | None = None
        """Added to the Fisher matrix's diagonal; for method conjugate_gradient. Unset: 0.1."""
        cg_iterations: int | None = None
        """Iterations of the linear solver; for method conjugate_gradient. Unset: 10."""
        critic: bool = False
        """Advantages from a value head and GAE instead of the group."""
        gamma: float | None = None
        """Discount of rewards, per token; with a critic. Unset: 1."""
        lam: float | None = None
        """GAE's mix, 1 the return less the value, 0 one step; with a critic. Unset: 1."""
        value_coef: float | None = None
        """Weight of the critic's loss beside the policy's; with a critic. Unset: 0.5."""
        value_clip: float | None = None
        """A value that moved further than this from its old one gains nothing by it, 0: no clip;
        with a critic. Unset: 0.5."""

        def __post_init__(self) -> None:
            super().__post_init__()
            for name, methods in METHODS_OF_OPTIONS.items():
                value = getattr(self, name)
                require(
                    value is None or self.method in methods,
                    f"objective.{name} has no effect with method={self.method}, got {value}; "
                    f"set objective.method={methods[0]} or leave it out",
                )
            for name in CRITIC_OPTIONS:
                value = getattr(self, name)
                require(
                    value is None or self.critic,
                    f"objective.{name} has no effect without a critic, got {value}; "
                    "set objective.critic=true or leave it out",
                )
            require(
                not self.critic or self.method != "conjugate_gradient",
                "objective.critic=true needs a first-order step for its values, got "
                "method=conjugate_gradient; set objective.method=line_search",
            )
            for name, example in (
                ("max_kl", 0.01),
                ("kl_penalty", 1),
                ("max_backtracks", 10),
                ("damping", 0.1),
                ("cg_iterations", 10),
            ):
                value = getattr(self, name)
                require(
                    value is None or value > 0,
                    f"objective.{name} must be > 0, got {value}; set objective.{name}={example}",
                )

    def __init__(self, options: Any, backend: str | None = None) -> None:
        super().__init__(options, backend)
        if options.critic:
            self.critic = Critic(**_chosen(options, CRITIC_OPTIONS))
        self.kl_penalty: float = 1.0 if options.kl_penalty is None else options.kl_penalty

    @property
    def penalized(self) -> bool:
        return self.options.method == "penalty"

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"kl_old_new"} if self.penalized else set())

    @property
    def trust_region(self) -> TrustRegion | None:
        if self.penalized:
            return None
        names = ("max_backtracks", "damping", "cg_iterations")
        chosen = _chosen(self.options, names)
        return TrustRegion(max_kl=self.options.max_kl, method=self.options.method, **chosen)

    def policy_loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        log_ratio = log_ratio_to_old(batch)
        kl = torch.expm1(log_ratio) - log_ratio  # (T,) KL(old || new)
        token_losses = -token_advantages(batch) * log_ratio.exp()
        if self.penalized:
            token_losses = token_losses + self.kl_penalty * kl
        metrics = {"kl_old_new": sequence_mean(kl.detach(), batch)}
        return self.aggregate(token_losses, batch), metrics

    def after_update(self, kl_old_new: float) -> None:
        """Doubles or halves the penalty where the measured KL is off by more than 1.5 times."""
        low, high = PENALTY_RANGE
        if kl_old_new > TOLERANCE * self.options.max_kl:
            self.kl_penalty = min(self.kl_penalty * 2, high)
        elif kl_old_new < self.options.max_kl / TOLERANCE:
            self.kl_penalty = max(self.kl_penalty / 2, low)

    def state(self) -> dict[str, float]:
        return {"kl_penalty": self.kl_penalty} if self.penalized else {}

    def load_state(self, state: Mapping[str, float]) -> None:
        require_state(self, state)
        self.kl_penalty = state.get("kl_penalty", self.kl_penalty)

    def summarize(self, metrics: Metrics, batch: LossBatch) -> dict[str, float]:
        """The means of the metrics, and actor/kl_penalty where it adapts."""
        adapted = {f"actor/{name}": value for name, value in self.state().items()}
        return super().summarize(metrics, batch) | adapted


def _chosen(options: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Those that are set; the rest keep their defaults elsewhere."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}
