"""Advantage estimators: rewards (N,) and group_ids (N,) to advantages (N,).

A group of one has nothing to compare with: its mean counts as 0 and its std as 1, so the advantage
is the reward (as in verl).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.objectives.groups import group_mean, group_sizes, group_std

ZSCORE_EPS = 1e-6


def centred(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """r_i - mean_G(r)."""
    wide = rewards.double()
    alone = group_sizes(group_ids) == 1
    return torch.where(alone, wide, wide - group_mean(wide, group_ids)).to(rewards.dtype)


def leave_one_out(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """r_i - mean of the others = (r_i - mean_G(r)) * G / (G - 1). Source: arXiv:2402.14740."""
    sizes = group_sizes(group_ids).double()
    factor = torch.where(sizes > 1, sizes / (sizes - 1).clamp(min=1), 1.0)
    return (centred(rewards.double(), group_ids) * factor).to(rewards.dtype)


def zscore(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """(r_i - mean_G(r)) / (std_G(r) + 1e-6), unbiased std. Source: arXiv:2402.03300,
    section 4.1.2; epsilon and ddof as in verl. A uniform group gives 0."""
    wide = rewards.double()
    scaled = centred(wide, group_ids) / (group_std(wide, group_ids) + ZSCORE_EPS)
    return scaled.to(rewards.dtype)
