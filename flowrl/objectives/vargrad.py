"""VarGrad: trajectory balance with the group's own mean as log Z, without parameters for it.

The residual is the deviation of log pi_theta(y) - log pi_ref(y) - beta r from its group mean. Its
fixed point is that of TB; with w = 1, detaching the mean leaves the gradient of the group variance
unchanged. Source: arXiv:2302.05446.
"""

from __future__ import annotations

from flowrl.objectives.residual_settings import ResidualOptions, ResidualSettings, with_bound
from flowrl.objectives.squared_residual import SquaredResidual


class VarGrad(SquaredResidual):
    """residual = d - mean_G(d), d = log pi_theta(y) - log pi_ref(y) - beta * r."""

    name = "vargrad"
    Options = ResidualOptions

    def resolve_options(self, options: ResidualOptions) -> ResidualSettings:
        return with_bound(options, "none", ResidualSettings(options.beta, log_z="group_mean"))
