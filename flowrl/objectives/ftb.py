"""f-TB: trajectory balance with another convex function in the place of the square.

All have TB's fixed point; off it alpha < 1 lets missing mass cost more and alpha > 1 excess mass.
log Z is the constant that suits the group best (DevGrad), or learned. Source: arXiv:2605.15417;
linex and shifted_cosh: arXiv:2410.02596.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowrl.objectives.phi import Phi, PhiKind
from flowrl.objectives.residual_settings import ResidualOptions, ResidualSettings, with_bound
from flowrl.objectives.squared_residual import SquaredResidual
from flowrl.schema import require


class FTB(SquaredResidual):
    """residual = log Z + log pi_theta(y) - beta * r - log pi_ref(y); loss = mean phi(residual)."""

    name = "ftb"

    @dataclass(frozen=True)
    class Options(ResidualOptions):
        phi: PhiKind = "f_alpha"
        """f_alpha, linex, shifted_cosh, huber or square."""
        alpha: float | None = None
        """Of f_alpha; the paper tries 0.5, 0.75, 1.2 and 2. Unset: 0.5."""
        huber_threshold: float | None = None
        """Of huber: the residual at which the square ends. Unset: 1."""
        log_z: Literal["group_best", "learned"] = "group_best"
        """log Z: group_best (the constant with the least mean loss over the group) or learned."""

        def __post_init__(self) -> None:
            super().__post_init__()
            for name, kind in (("alpha", "f_alpha"), ("huber_threshold", "huber")):
                value = getattr(self, name)
                require(
                    value is None or self.phi == kind,
                    f"objective.{name} has no effect with phi={self.phi}, got {value}; "
                    f"set objective.phi={kind} or leave it out",
                )
            threshold = self.huber_threshold
            require(
                threshold is None or threshold > 0,
                f"objective.huber_threshold must be > 0, got {threshold}; "
                "set objective.huber_threshold=1",
            )
            require(
                self.phi != "huber" or self.log_z == "learned",
                "phi=huber has no best constant in closed form, got log_z=group_best; "
                "set objective.log_z=learned",
            )

    def resolve_options(self, options: Options) -> ResidualSettings:
        phi = Phi(
            options.phi,
            0.5 if options.alpha is None else options.alpha,
            options.huber_threshold or 1.0,
        )
        settings = ResidualSettings(options.beta, log_z=options.log_z, phi=phi)
        return with_bound(options, "none", settings)
