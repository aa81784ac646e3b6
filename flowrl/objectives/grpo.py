"""GRPO in the paper's form: clipped token ratios, z-scored rewards, k3 penalty in the loss.

With aggregation=token-mean and kl_coef=0 it is what verl and TRL call GRPO.
Source: arXiv:2402.03300, eq. 3-4.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowrl.objectives.aggregation import Aggregation
from flowrl.objectives.surrogate import Surrogate, SurrogateOptions


class GRPO(Surrogate):
    """The clipped surrogate of A_i = (r_i - mean_G(r)) / std_G(r), averaged answer by answer."""

    name = "grpo"

    @dataclass(frozen=True)
    class Options(SurrogateOptions):
        kl_coef: float = 0.04
        """Coefficient of the KL penalty towards pi_ref (DeepSeekMath: 0.04); 0: none."""
        aggregation: Aggregation = "seq-mean-token-mean"
        """How tokens are weighted: seq-mean-token-mean (the paper), token-mean, seq-mean-token-sum,
        seq-mean-token-sum-norm or token-sum."""
