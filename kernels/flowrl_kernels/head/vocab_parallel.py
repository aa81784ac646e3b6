"""From statistics of each rank's vocabulary to those of the whole, with one collective.

Every rank gathers the packed (row_max, sum_exp, target, sum_exp_z) of all ranks, at most 16 bytes a
row and rank, and merges them in rank order. A sum all-reduce would need the maximum first, hence a
second round; the merge needs none, and every rank computes bitwise the same result, so that the
objective, evaluated on each, gives the same loss and the same gradients everywhere.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl_kernels.head import Head, LocalStatistics, RowStatistics


def finish(head: Head, local: LocalStatistics) -> RowStatistics:
    """Statistics of the whole vocabulary; without a group, of the one rank there is."""
    if head.group is None:
        return _finish(local.row_max, local.sum_exp, local.target, local.sum_exp_z)
    fields = [local.row_max, local.sum_exp, local.target]
    if local.sum_exp_z is not None:
        fields.append(local.sum_exp_z)
    packed = torch.stack(fields)  # (3 or 4, n)
    parts = [torch.empty_like(packed) for _ in range(head.group.size())]
    dist.all_gather(parts, packed, group=head.group)
    gathered = torch.stack(parts)  # (ranks, 3 or 4, n)
    maxima, sums, targets = gathered[:, 0], gathered[:, 1], gathered[:, 2]  # (ranks, n)
    row_max = maxima.amax(0)
    # A rank that holds padding only has maximum -inf and sum 0: its shift is put to 0, not -inf.
    shift = (maxima - row_max).where(maxima != float("-inf"), 0)
    sum_exp = (shift.exp() * sums).sum(0)
    sum_exp_z = None
    if local.sum_exp_z is not None:
        sum_exp_z = (shift.exp() * (gathered[:, 3] + sums * shift)).sum(0)
    return _finish(row_max, sum_exp, targets.amax(0), sum_exp_z)


def sum_over_ranks_(head: Head, partial: Tensor) -> Tensor:
    """In place: the sum over ranks of each rank's part, d(hidden) for one."""
    if head.group is not None:
        dist.all_reduce(partial, group=head.group)
    return partial


def _finish(
    row_max: Tensor,  # (n,)
    sum_exp: Tensor,  # (n,)
    target: Tensor,  # (n,)
    sum_exp_z: Tensor | None,  # (n,)
) -> RowStatistics:
    log_sum = sum_exp.log()
    entropy = None if sum_exp_z is None else log_sum - sum_exp_z / sum_exp
    # target <= row_max and log_sum >= 0 bit for bit: never positive, and nothing large cancels.
    return RowStatistics(row_max, log_sum, (target - row_max) - log_sum, entropy)
