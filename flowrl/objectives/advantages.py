"""Advantage estimators: rewards (N,) and group_ids (N,) to advantages (N,), and whitening.

A group of one has nothing to compare with: its mean counts as 0 and its std as 1, so the advantage
is the reward (as in verl).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from flowrl.objectives.base import AllReduce
from flowrl.objectives.groups import group_mean, group_sizes, group_std

ZSCORE_EPS = 1e-6
WHITEN_EPS = 1e-8


def raw(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """r_i: no baseline."""
    return rewards


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


Advantage = Literal["none", "mean", "leave_one_out", "zscore"]

ADVANTAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": raw,
    "mean": centred,
    "leave_one_out": leave_one_out,
    "zscore": zscore,
}
"""By what the reward is compared with."""


def whiten(values: Tensor, mask: Tensor, all_reduce: AllReduce) -> Tensor:
    """(T,) (a - mean) / sqrt(var + 1e-8) over the tokens of all ranks, unbiased var.

    Every token counts once, so long answers weigh more in mean and var. Masked tokens are left out
    and get 0; a single token gives 0. Source: arXiv:2501.03262; epsilon and Bessel's correction as
    in verl."""
    kept = values.double()[mask]
    # The reduced tensor may be the argument, changed in place: made anew for each call.
    total, count = all_reduce(torch.stack([kept.sum(), kept.new_tensor(kept.numel())])).tolist()
    deviation = kept - total / max(count, 1)
    squares = float(all_reduce(deviation.square().sum()))
    scale = (squares / max(count - 1, 1) + WHITEN_EPS) ** 0.5
    whitened = torch.zeros_like(values, dtype=torch.float64)
    whitened[mask] = deviation / scale
    return whitened.to(values.dtype)
