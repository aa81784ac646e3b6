"""trajectory_balance on Hopper (csrc/trajectory_balance.cu): a block a sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl_kernels import cuda_support
from flowrl_kernels.trajectory_balance import native
from flowrl_kernels.trajectory_balance.contract import TrajectoryBalance
from flowrl_kernels.trajectory_balance.torch_packed import (
    backward,
    keep_gradients,
    outputs_like,
)


def trajectory_balance(
    logprobs: Tensor,  # (T,)
    *args: Any,
    **options: Any,
) -> TrajectoryBalance:
    with torch.cuda.device(logprobs.device):
        return native.trajectory_balance(
            logprobs,
            *args,
            operator=torch.ops.flowrl_cuda.trajectory_balance,
            stream=(cuda_support.stream_of(logprobs),),
            **options,
        )


def _backward(ctx: Any, dloss: Tensor, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*backward(ctx, dloss, *rest), None)  # the stream


if cuda_support.build_problem() is None:
    torch.library.register_fake("flowrl_cuda::trajectory_balance", outputs_like)
    torch.library.register_autograd(
        "flowrl_cuda::trajectory_balance", _backward, setup_context=keep_gradients
    )
