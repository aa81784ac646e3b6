"""GVPO: the variance, over the group, of what the policy's move misses of the reward.

    loss = mean over prompts of 1 / (2 (G - 1)) sum_i ((D_i - mean D) / beta - (r_i - mean r))^2
    D_i  = sum_t(log pi_theta - log pi_old)

VarGrad with the old policy as anchor: each step moves towards pi_old exp(beta r) / Z, so that
repeated steps end at the best answers. beta is 1 / the paper's. Source: arXiv:2504.19599.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowrl.objectives.residual_settings import ResidualOptions, ResidualSettings, with_bound
from flowrl.objectives.squared_residual import SquaredResidual


class GVPO(SquaredResidual):
    """residual = D - mean_G(D) - beta * (r - mean_G(r)), over groups of one size."""

    name = "gvpo"

    @dataclass(frozen=True)
    class Options(ResidualOptions):
        beta: float = 10.0
        """Inverse temperature of one step, 1 / the paper's beta of 0.1."""

    def resolve_options(self, options: Options) -> ResidualSettings:
        settings = ResidualSettings(
            options.beta,
            log_z="group_mean",
            anchor="old",
            scale=0.5 / options.beta**2,
            divisor="freedom",
        )
        return with_bound(options, "none", settings)
