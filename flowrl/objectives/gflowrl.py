"""GFlowRL: the residual at the old policy is clipped, and the policy's move since is added.

    gap_i  = clip(mean_G(beta r + log pi_ref - log pi_old) - that of i, -0.2, 0.28)
    loss   = mean_i min(w_i, 1.2) (gap_i + log pi_theta - log pi_old)^2

In the sum form, whose fixed point is pi_ref exp(beta r) / Z; the paper divides by the length inside
the gap but not inside the mean. No partition head. Source: arXiv:2607.13394.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowrl.objectives.residual_settings import ResidualOptions, ResidualSettings, with_bound
from flowrl.objectives.squared_residual import SquaredResidual
from flowrl.schema import require


class GFlowRL(SquaredResidual):
    """residual = clip(log Z_old + log pi_old - beta * r - log pi_ref) + log pi_theta - log pi_old,
    all of the whole sequence."""

    name = "gflowrl"

    @dataclass(frozen=True)
    class Options(ResidualOptions):
        beta: float = 8.0
        """Inverse temperature of the target pi_ref exp(beta r) / Z (the paper: 8)."""
        gap_clip: bool = True
        """Clip the residual's value at the old policy."""
        gap_clip_low: float = 0.2
        """The gap is at least minus this."""
        gap_clip_high: float = 0.28
        """The gap is at most this."""

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("gap_clip_low", "gap_clip_high"):
                value, dotted = getattr(self, name), f"objective.{name}"
                require(value > 0, f"{dotted} must be > 0, got {value}; set {dotted}=0.2")
            defaults = (GFlowRL.Options.gap_clip_low, GFlowRL.Options.gap_clip_high)
            require(
                self.gap_clip or (self.gap_clip_low, self.gap_clip_high) == defaults,
                "objective.gap_clip_low and gap_clip_high have no effect with gap_clip=false; "
                "leave them out",
            )

    def resolve_options(self, options: Options) -> ResidualSettings:
        clip = (options.gap_clip_low, options.gap_clip_high) if options.gap_clip else None
        settings = ResidualSettings(options.beta, log_z="group_mean_old", gap_clip=clip)
        return with_bound(options, "gflowrl", settings)
