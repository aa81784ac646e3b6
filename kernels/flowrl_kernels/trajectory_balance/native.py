"""trajectory_balance in native code (csrc/trajectory_balance_cpu.cpp): each sequence read once.

cuda_kernels.py calls the same with the operator for a GPU, which takes a stream too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowrl_kernels import native_library
from flowrl_kernels.trajectory_balance.contract import TrajectoryBalance, WeightBound
from flowrl_kernels.trajectory_balance.torch_packed import (
    backward,
    keep_gradients,
    outputs_like,
)


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
    operator: Callable[..., tuple[Tensor, ...]] | None = None,  # None: the CPU's
    stream: tuple[int] | tuple[()] = (),
) -> TrajectoryBalance:
    if weight_bound is None:
        low, high = 0.0, 0.0  # log w is held at 0: w = 1
    else:
        low, high = weight_bound.log_low, weight_bound.log_high
    loss, *rest = (operator or torch.ops.flowrl_native.trajectory_balance)(
        logprobs.contiguous(),
        None if old_logprobs is None else old_logprobs.contiguous(),
        ref_logprobs.contiguous(),
        log_z.contiguous(),
        rewards.contiguous(),
        cu_seqlens.long().contiguous(),
        None if response_mask is None else response_mask.contiguous(),
        beta,
        low,
        high,
        length_norm,
        scale,
        *stream,
    )
    return TrajectoryBalance(loss, *(x.detach() for x in rest[:6]))


if native_library.PROBLEM is None:
    torch.library.register_fake("flowrl_native::trajectory_balance", outputs_like)
    torch.library.register_autograd(
        "flowrl_native::trajectory_balance", backward, setup_context=keep_gradients
    )
