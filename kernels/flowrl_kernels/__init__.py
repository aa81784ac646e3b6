"""Fused operators of FlowRL: from hidden states to log-probs and losses without the logits."""

from flowrl_kernels.linear_logprobs import LinearLogprobs, linear_logprobs
from flowrl_kernels.policy_loss import Objective, PolicyLoss, Rows, linear_policy_loss
from flowrl_kernels.trajectory_balance import TrajectoryBalance, WeightBound, trajectory_balance

__all__ = [
    "LinearLogprobs",
    "Objective",
    "PolicyLoss",
    "Rows",
    "TrajectoryBalance",
    "WeightBound",
    "linear_logprobs",
    "linear_policy_loss",
    "trajectory_balance",
]
