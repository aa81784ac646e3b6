"""Statistics over the members of a group, given back per sequence.

Members are found by `group_ids`, in any order and any group size. All are computed in float64 by
segment sums in a fixed order, so results repeat bit for bit, and returned in the input's dtype.
There the mean of equal float32 numbers is that number: a uniform group deviates by exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_sum(values: Tensor, group_ids: Tensor) -> Tensor:
    """(N,) sum over the sequence's group."""
    _, inverse = torch.unique(group_ids, return_inverse=True)
    order = torch.argsort(inverse, stable=True)
    sums = torch.segment_reduce(
        values.detach().double()[order], "sum", lengths=torch.bincount(inverse)
    )
    return sums[inverse].to(values.dtype)


def group_sizes(group_ids: Tensor) -> Tensor:
    """(N,) int64 number of members of the sequence's group."""
    _, inverse, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    return counts[inverse]


def group_mean(values: Tensor, group_ids: Tensor, include: Tensor | None = None) -> Tensor:
    """(N,) mean over the group's members, or over those in `include` (N,) bool; 0 without any.

    A group of one has its own value as mean."""
    if include is None:
        include = torch.ones_like(group_ids, dtype=torch.bool)
    zero = torch.zeros((), dtype=torch.float64, device=values.device)
    total = group_sum(torch.where(include, values.double(), zero), group_ids)
    count = group_sum(include.double(), group_ids)
    return (total / count.clamp(min=1)).to(values.dtype)


def group_std(values: Tensor, group_ids: Tensor) -> Tensor:
    """(N,) unbiased standard deviation (ddof = 1) over the group; 1 for a group of one."""
    sizes = group_sizes(group_ids)
    wide = values.double()
    deviation = wide - group_mean(wide, group_ids)
    variance = group_sum(deviation.square(), group_ids) / (sizes - 1).clamp(min=1)
    return torch.where(sizes > 1, variance.sqrt(), 1.0).to(values.dtype)


def group_log_mean_exp(values: Tensor, group_ids: Tensor, include: Tensor) -> Tensor:
    """(N,) log of the mean of e^value over the group's members in `include`; 0 without any."""
    wide = torch.where(include, values.detach().double(), -torch.inf)
    _, inverse = torch.unique(group_ids, return_inverse=True)
    order = torch.argsort(inverse, stable=True)
    top = torch.segment_reduce(wide[order], "max", lengths=torch.bincount(inverse))[inverse]
    top = torch.where(torch.isfinite(top), top, 0.0)  # a group without members in `include`
    mean = group_mean((wide - top).exp(), group_ids, include)
    return torch.where(mean > 0, mean.log() + top, 0.0).to(values.dtype)
