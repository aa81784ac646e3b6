"""The definition of trajectory_balance: plain differentiable PyTorch, one sequence at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from flowrl_kernels.trajectory_balance.contract import TrajectoryBalance, WeightBound


def trajectory_balance(
    logprobs: Tensor,  # (T,)
    old_logprobs: Tensor | None,  # (T,)
    ref_logprobs: Tensor,  # (T,)
    log_z: Tensor,  # (N,)
    rewards: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (N + 1,)
    *,
    response_mask: Tensor | None,  # (T,)
    beta: float,
    weight_bound: WeightBound | None,
    length_norm: bool,
    scale: float,
) -> TrajectoryBalance:
    loss = (logprobs[:0].sum() + log_z[:0].sum()).clone()  # 0, in the graph
    columns: list[list[Tensor]] = []  # one list a sequence
    offsets = cu_seqlens.tolist()
    for n, (start, stop) in enumerate(pairwise(offsets)):
        keep = torch.ones(stop - start, dtype=torch.bool, device=logprobs.device)
        if response_mask is not None:
            keep = response_mask[start:stop]
        current, ref = logprobs[start:stop][keep], ref_logprobs[start:stop][keep]
        count = keep.sum()
        zero = torch.zeros_like(log_z[n])
        if count == 0:
            columns.append([zero, zero, zero + 1, zero, zero, count])
            continue
        log_weight = zero
        if old_logprobs is not None:
            log_weight = (current - old_logprobs[start:stop][keep]).sum().detach()
        weight = _bounded(log_weight, weight_bound) if old_logprobs is not None else zero + 1
        a, b = (current.mean(), ref.mean()) if length_norm else (current.sum(), ref.sum())
        residual = log_z[n] + a - beta * rewards[n] - b
        loss = loss + scale * weight * residual**2
        columns.append([residual, log_weight, weight, current.mean(), ref.mean(), count])
    stacked = [torch.stack(column).detach() for column in zip(*columns, strict=True)]
    if not stacked:
        stacked = [torch.zeros_like(log_z)] * 5 + [cu_seqlens.diff().long()]
    return TrajectoryBalance(loss, *stacked)


def _bounded(log_weight: Tensor, bound: WeightBound | None) -> Tensor:
    if bound is None:
        return torch.ones_like(log_weight)
    if bound.log_low is not None:
        log_weight = log_weight.clamp(min=bound.log_low)
    if bound.log_high is not None:
        log_weight = log_weight.clamp(max=bound.log_high)
    return log_weight.exp()
