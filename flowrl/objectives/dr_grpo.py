"""Dr. GRPO: GRPO without division by the group's spread and by the answer's length.

Both make the gradient biased, towards questions that are nearly all right or wrong and towards
short right and long wrong answers. Source: arXiv:2503.20783.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowrl.objectives.aggregation import Aggregation
from flowrl.objectives.surrogate import Surrogate, SurrogateOptions


class DrGRPO(Surrogate):
    """The clipped surrogate of A_i = r_i - mean_G(r), summed over tokens, divided by a constant."""

    name = "dr_grpo"
    advantage = "mean"

    @dataclass(frozen=True)
    class Options(SurrogateOptions):
        aggregation: Aggregation = "seq-mean-token-sum-norm"
        """How tokens are weighted: seq-mean-token-sum-norm (the paper), token-mean,
        seq-mean-token-mean, seq-mean-token-sum or token-sum."""
