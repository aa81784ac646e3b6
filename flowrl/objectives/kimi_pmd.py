"""Policy mirror descent of Kimi K1.5 and K2: the policy's move is fitted to the centred reward.

    loss = mean_i (r_i - mean_G(r) - tau sum_t(log pi_theta - log pi_old))^2,    tau = 1 / beta

tau log Z is approximated by the mean reward, which moves less than pi_old exp(r / tau) / Z where
the mean is small (docs/math.md); the anchor moves, so that repeated steps end at the best answers.
Source: arXiv:2501.12599; the approximation: arXiv:2602.05933.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowrl.objectives.residual_settings import ResidualOptions, ResidualSettings, with_bound
from flowrl.objectives.squared_residual import SquaredResidual


class KimiPMD(SquaredResidual):
    """residual = log pi_theta(y) - log pi_old(y) - beta * (r - mean_G(r)); loss in units of r."""

    name = "kimi_pmd"

    @dataclass(frozen=True)
    class Options(ResidualOptions):
        beta: float = 10.0
        """1 / tau, the inverse temperature of one step; the papers tune tau and do not state it."""

    def resolve_options(self, options: Options) -> ResidualSettings:
        settings = ResidualSettings(
            options.beta, log_z="mean_reward", anchor="old", scale=options.beta**-2
        )
        return with_bound(options, "none", settings)
