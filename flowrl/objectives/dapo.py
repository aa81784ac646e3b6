"""DAPO: a wider upper clip, every token of the batch weighted alike, no KL, no uniform groups.

Clip-higher, dual clip and the token mean stand here; dynamic sampling and the soft punishment of
overlong answers are parts of the loop that it switches on. Source: arXiv:2503.14476; the bound of
the dual clip is verl's.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from flowrl.objectives.surrogate import Surrogate, SurrogateOptions


class DAPO(Surrogate):
    """The clipped surrogate of z-scored rewards with range [0.8, 1.28]."""

    name = "dapo"
    loop_defaults = MappingProxyType(
        {"dynamic_sampling": True, "overlong_buffer": 0.2}  # 4096 of 20480 tokens
    )

    @dataclass(frozen=True)
    class Options(SurrogateOptions):
        clip_eps_high: float = 0.28
        """Ratios above 1 + eps give no gradient where the advantage is positive."""
        dual_clip: float = 10.0
        """Ratios above this give no gradient where the advantage is negative; 0: no such bound."""
