"""Trajectory balance: a learned log Z, raw rewards, whole-sequence log-probs.

Its fixed point is pi_ref exp(beta r) / Z exactly. Source: arXiv:2201.13259, with pi_ref as prior.
"""

from __future__ import annotations

from flowrl.objectives.residual_settings import ResidualOptions, ResidualSettings, with_bound
from flowrl.objectives.squared_residual import SquaredResidual


class TB(SquaredResidual):
    """residual = log Z(x) + log pi_theta(y) - beta * r - log pi_ref(y)."""

    name = "tb"
    Options = ResidualOptions

    def resolve_options(self, options: ResidualOptions) -> ResidualSettings:
        return with_bound(options, "none", ResidualSettings(options.beta, log_z="learned"))
