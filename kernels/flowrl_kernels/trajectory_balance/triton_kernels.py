"""trajectory_balance in one launch: one program a sequence, the last to finish adds up the loss.

Sums over tokens run in float64, as in torch_packed.py: log w adds up thousands of small
differences, and the kernel waits for memory in any case. The terms of the loss are added by the
program that finishes last, in the order of the sequences: the loss repeats bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowrl_kernels.trajectory_balance.contract import TrajectoryBalance, WeightBound
from flowrl_kernels.trajectory_balance.torch_packed import backward, keep_gradients, outputs_like
from flowrl_kernels.triton_support import interpreting, launch

BLOCK_TOKENS = 1024
BLOCK_SEQUENCES = 256


@triton.jit
def _trajectory_balance_kernel(
    logprobs_ptr,  # (T,)
    old_ptr,  # (T,) HAS_OLD only
    ref_ptr,  # (T,)
    log_z_ptr,  # (N,)
    rewards_ptr,  # (N,)
    cu_seqlens_ptr,  # (N + 1,)
    mask_ptr,  # (T,) uint8, HAS_MASK only
    loss_ptr,  # ()
    residual_ptr,  # (N,)
    log_weight_ptr,  # (N,)
    weight_ptr,  # (N,)
    mean_logprob_ptr,  # (N,)
    mean_ref_ptr,  # (N,)
    num_tokens_ptr,  # (N,) int64
    dlogprobs_ptr,  # (T,)
    dlog_z_ptr,  # (N,)
    terms_ptr,  # (N,) float64 scratch
    arrived_ptr,  # () int32, 0 at launch
    beta,
    log_low,
    log_high,
    scale,
    HAS_OLD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    LENGTH_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0)
    num_sequences = tl.num_programs(0)
    start = tl.load(cu_seqlens_ptr + n).to(tl.int64)
    stop = tl.load(cu_seqlens_ptr + n + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int64)
    current = tl.zeros((BLOCK,), tl.float64)
    ref = tl.zeros((BLOCK,), tl.float64)
    ratio = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, stop, BLOCK):
        tokens = first + lanes
        keep = tokens < stop
        if HAS_MASK:
            keep = keep & (tl.load(mask_ptr + tokens, mask=keep, other=0) != 0)
        x = tl.load(logprobs_ptr + tokens, mask=keep, other=0.0).to(tl.float64)
        count += keep.to(tl.int64)
        current += x
        ref += tl.load(ref_ptr + tokens, mask=keep, other=0.0).to(tl.float64)
        if HAS_OLD:
            ratio += x - tl.load(old_ptr + tokens, mask=keep, other=0.0).to(tl.float64)
    num_tokens = tl.sum(count, 0)
    divisor = tl.maximum(num_tokens, 1).to(tl.float64)
    sum_current, sum_ref = tl.sum(current, 0), tl.sum(ref, 0)
    difference = sum_current - sum_ref
    if LENGTH_NORM:
        difference = difference / divisor
    log_z = tl.load(log_z_ptr + n).to(tl.float64)
    reward = tl.load(rewards_ptr + n).to(tl.float64)
    residual = tl.where(num_tokens > 0, log_z + difference - beta * reward, 0.0)
    log_weight = tl.sum(ratio, 0)  # 0 without old log-probs
    weight = divisor * 0 + 1
    if HAS_OLD:
        bounded = log_weight
        # where(), not minimum(): NaN goes through as it does in torch.clamp.
        if HAS_LOW:
            bounded = tl.where(bounded < log_low, log_low, bounded)
        if HAS_HIGH:
            bounded = tl.where(bounded > log_high, log_high, bounded)
        weight = tl.where(num_tokens > 0, tl.exp(bounded), 1.0)
    dlog_z = 2 * scale * weight * residual
    per_token = dlog_z / divisor if LENGTH_NORM else dlog_z
    tl.store(residual_ptr + n, residual.to(tl.float32))
    tl.store(log_weight_ptr + n, log_weight.to(tl.float32))
    tl.store(weight_ptr + n, weight.to(tl.float32))
    tl.store(mean_logprob_ptr + n, (sum_current / divisor).to(tl.float32))
    tl.store(mean_ref_ptr + n, (sum_ref / divisor).to(tl.float32))
    tl.store(num_tokens_ptr + n, num_tokens)
    tl.store(dlog_z_ptr + n, dlog_z.to(tl.float32))
    for first in range(start, stop, BLOCK):
        tokens = first + lanes
        in_sequence = tokens < stop
        gradient = tl.zeros((BLOCK,), tl.float32) + per_token.to(tl.float32)
        if HAS_MASK:
            keep = tl.load(mask_ptr + tokens, mask=in_sequence, other=0) != 0
            gradient = tl.where(keep, gradient, 0.0)
        tl.store(dlogprobs_ptr + tokens, gradient, mask=in_sequence)
    tl.store(terms_ptr + n, scale * weight * residual * residual)
    tl.debug_barrier()  # the term is written before the arrival is counted
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == num_sequences - 1:
        total = tl.zeros((BLOCK_N,), tl.float64)
        for first_term in range(0, num_sequences, BLOCK_N):
            sequences = first_term + tl.arange(0, BLOCK_N)
            # .cg: from L2, where the other programs' terms are
            total += tl.load(
                terms_ptr + sequences,
                mask=sequences < num_sequences,
                other=0.0,
                cache_modifier=".cg",
            )
        tl.store(loss_ptr, tl.sum(total, 0).to(tl.float32))


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
    outputs = trajectory_balance_triton(
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


@torch.library.custom_op("flowrl_kernels::trajectory_balance_triton", mutates_args=())
def trajectory_balance_triton(
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
    outputs = outputs_like(logprobs, old_logprobs, ref_logprobs, log_z)
    num_sequences = log_z.shape[0]
    if num_sequences == 0:
        outputs[0].zero_()
        return outputs
    mask = None if response_mask is None else response_mask.contiguous().view(torch.uint8)
    terms = logprobs.new_empty(num_sequences, dtype=torch.float64)
    arrived = cu_seqlens.new_zeros(1, dtype=torch.int32)
    launch(
        logprobs,
        _trajectory_balance_kernel,
        num_sequences,
        logprobs.contiguous(),
        None if old_logprobs is None else old_logprobs.contiguous(),
        ref_logprobs.contiguous(),
        log_z.contiguous(),
        rewards.contiguous(),
        cu_seqlens.contiguous(),
        mask,
        *outputs,
        terms,
        arrived,
        beta,
        0.0 if log_low is None else log_low,
        0.0 if log_high is None else log_high,
        scale,
        HAS_OLD=old_logprobs is not None,
        HAS_MASK=mask is not None,
        HAS_LOW=log_low is not None,
        HAS_HIGH=log_high is not None,
        LENGTH_NORM=length_norm,
        BLOCK=16 if interpreting() else BLOCK_TOKENS,
        BLOCK_N=4 if interpreting() else BLOCK_SEQUENCES,
        num_warps=4,
    )
    return outputs


trajectory_balance_triton.register_fake(outputs_like)
trajectory_balance_triton.register_autograd(backward, setup_context=keep_gradients)
