"""TBA, trajectory balance with asynchrony: VarGrad on old samples as much as on new ones.

The loss is VarGrad's with beta = 1 / kl_coef and no importance weight: a squared residual has the
same fixed point whatever policy the samples came from. The paper takes K = 20 of 24 samples a
prompt (here batch.group_size) and 5% of its prompts from a buffer on GSM8K, half on TL;DR.
Source: arXiv:2503.18929.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flowrl.objectives.residual_settings import ResidualOptions, ResidualSettings, with_bound
from flowrl.objectives.squared_residual import SquaredResidual
from flowrl.schema import require

PUBLISHED_BETA = 1 / 0.012  # where the paper's anneal of the KL coefficient, 0.012 to 0.004, begins


class TBA(SquaredResidual):
    """residual = d - mean_G(d), d = log pi_theta(y) - log pi_ref(y) - r / kl_coef."""

    name = "tba"
    loop_defaults: ClassVar[Mapping[str, Any]] = {
        "replay_fraction": 0.05,
        "replay_priority": "reward",
        "replay_capacity": 1000,
    }

    @dataclass(frozen=True)
    class Options(ResidualOptions):
        beta: float = PUBLISHED_BETA
        """Inverse temperature of the target: 1 / kl_coef. Unset: 1 / 0.012 (the paper anneals its
        coefficient on to 0.004)."""
        kl_coef: float | None = None
        """1 / beta, as the paper writes it; give one of the two."""

        def __post_init__(self) -> None:
            super().__post_init__()
            require(
                self.kl_coef is None or self.kl_coef > 0,
                f"objective.kl_coef must be > 0, got {self.kl_coef}; set objective.kl_coef=0.012",
            )
            require(
                self.kl_coef is None or self.beta == PUBLISHED_BETA,
                "objective.kl_coef is 1 / objective.beta, got both: "
                f"{self.kl_coef} and {self.beta}; leave one out",
            )

    def resolve_options(self, options: Options) -> ResidualSettings:
        beta = options.beta if options.kl_coef is None else 1 / options.kl_coef
        return with_bound(options, "none", ResidualSettings(beta, log_z="group_mean"))
