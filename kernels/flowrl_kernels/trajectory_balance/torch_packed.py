"""trajectory_balance over all sequences at once, with its gradients in closed form.

    dloss/dlog_z_n    = 2 scale w_n residual_n
    dloss/dlogprobs_t = dloss/dlog_z_n / num_tokens_n     (without the division if not length_norm)

Sums over tokens run in float64: log w adds up thousands of small differences, and (T,) is small.
"""

from __future__ import annotations

from typing import Any

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
    if weight_bound is None:
        low, high = 0.0, 0.0  # log w is held at 0: w = 1
    else:
        low, high = weight_bound.log_low, weight_bound.log_high
    outputs = _trajectory_balance(
        logprobs,
        old_logprobs,
        ref_logprobs,
        log_z,
        rewards,
        cu_seqlens,
        response_mask,
        beta,
        low,
        high,
        length_norm,
        scale,
    )
    loss, *per_sequence = outputs[:7]
    return TrajectoryBalance(loss, *(x.detach() for x in per_sequence))


@torch.library.custom_op("flowrl_kernels::trajectory_balance", mutates_args=())
def _trajectory_balance(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor,
    log_z: Tensor,
    rewards: Tensor,
    cu_seqlens: Tensor,
    response_mask: Tensor | None,
    beta: float,
    log_low: float | None,
    log_high: float | None,
    length_norm: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """TrajectoryBalance's fields, then d(loss) of logprobs (T,) and log_z (N,)."""
    offsets = cu_seqlens.long()
    dtype = logprobs.dtype

    def segment_sums(per_token: Tensor) -> Tensor:  # (T,) -> (N,) float64
        if response_mask is not None:
            per_token = per_token.where(response_mask, 0)
        return torch.segment_reduce(per_token.double(), "sum", offsets=offsets)

    num_tokens = segment_sums(torch.ones_like(logprobs))
    counted = num_tokens > 0
    divisor = num_tokens.clamp(min=1)
    sum_current, sum_ref = segment_sums(logprobs), segment_sums(ref_logprobs)
    mean_current, mean_ref = sum_current / divisor, sum_ref / divisor
    a, b = (mean_current, mean_ref) if length_norm else (sum_current, sum_ref)
    residual = (log_z + a - beta * rewards.double() - b).where(counted, 0)
    log_weight = torch.zeros_like(residual)
    weight = torch.ones_like(residual)
    if old_logprobs is not None:
        log_weight = segment_sums(logprobs.double() - old_logprobs)
        bounded = log_weight
        if log_low is not None:
            bounded = bounded.clamp(min=log_low)
        if log_high is not None:
            bounded = bounded.clamp(max=log_high)
        weight = bounded.exp().where(counted, 1)
    loss = scale * (weight * residual.square()).sum()
    dlog_z = 2 * scale * weight * residual
    per_token = dlog_z / divisor if length_norm else dlog_z
    dlogprobs = per_token.repeat_interleave(offsets.diff(), output_size=logprobs.shape[0])
    if response_mask is not None:
        dlogprobs = dlogprobs.where(response_mask, 0)
    return (
        loss.to(dtype),
        residual.to(dtype),
        log_weight.to(dtype),
        weight.to(dtype),
        mean_current.to(dtype),
        mean_ref.to(dtype),
        num_tokens.long(),
        dlogprobs.to(dtype),
        dlog_z.to(dtype),
    )


@_trajectory_balance.register_fake
def outputs_like(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor,
    log_z: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised tensors in the place of the operator's nine outputs."""
    a, b, c, d, e = (logprobs.new_empty(log_z.shape) for _ in range(5))
    num_tokens = log_z.new_empty(log_z.shape, dtype=torch.int64)
    dlogprobs, dlog_z = logprobs.new_empty(logprobs.shape), log_z.new_empty(log_z.shape)
    return logprobs.new_empty(()), a, b, c, d, e, num_tokens, dlogprobs, dlog_z


def keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[7:])
    ctx.mark_non_differentiable(*output[1:])


def backward(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dlogprobs, dlog_z = ctx.saved_tensors
    return (dloss * dlogprobs, None, None, dloss * dlog_z, *([None] * 8))


_trajectory_balance.register_autograd(backward, setup_context=keep_gradients)
