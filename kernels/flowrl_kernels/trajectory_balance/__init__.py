"""The trajectory-balance loss of packed log-probs, with its gradients.

`reference.py` is the definition, `torch_packed.py` the same over all sequences at once,
`triton_kernels.py` in one launch, `native.py` and `cuda_kernels.py` in csrc/.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl_kernels import backends, checks, cuda_support, native_library, triton_support
from flowrl_kernels.trajectory_balance import cuda_kernels, native, reference, torch_packed
from flowrl_kernels.trajectory_balance.contract import TrajectoryBalance, WeightBound

__all__ = ["TrajectoryBalance", "WeightBound", "trajectory_balance"]


def trajectory_balance(
    logprobs: Tensor,  # (T,) current policy
    old_logprobs: Tensor | None,  # (T,) None: on-policy
    ref_logprobs: Tensor,  # (T,)
    log_z: Tensor,  # (N,)
    rewards: Tensor,  # (N,) prepared
    cu_seqlens: Tensor,  # (N + 1,) int32
    *,
    response_mask: Tensor | None = None,  # (T,) bool
    beta: float,
    weight_bound: WeightBound | None,
    length_norm: bool = True,
    scale: float = 1.0,
    backend: str | None = None,
) -> TrajectoryBalance:
    """Importance-weighted squared trajectory-balance residual, summed over sequences.

        residual_n   = log_z_n + mean_t(logprobs) - beta * rewards_n - mean_t(ref_logprobs)
        log_weight_n = sum_t(logprobs - old_logprobs)
        w_n          = exp(clamp(log_weight_n, log low, log high))
        loss         = scale * sum_n  w_n * residual_n ** 2

    Means and sums run over the counted tokens of a sequence; length_norm=False has sums in the
    place of the means. w_n carries no gradient; weight_bound=None makes it 1, and so does
    old_logprobs=None, whose log_weight is 0. Differentiable in logprobs and log_z; the rest are
    constants. Statistics are float32, float64 for float64 log-probs. A sequence with no counted
    token contributes 0. What stands at tokens that do not count is never read, NaN included.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for a backend that cannot
    run. Source: arXiv:2509.15207, eq. 6-7; bounds in docs/math.md.
    """
    _check(logprobs, old_logprobs, ref_logprobs, log_z, rewards, cu_seqlens, response_mask)
    dtype = logprobs.dtype
    call = backends.Call(logprobs.device, dtype)
    return backends.resolve("trajectory_balance", backend, call).run(
        logprobs,
        None if old_logprobs is None else old_logprobs.detach().to(dtype),
        ref_logprobs.detach().to(dtype),
        log_z.to(dtype),
        rewards.detach().to(dtype),
        cu_seqlens,
        response_mask=response_mask,
        beta=float(beta),
        weight_bound=weight_bound,
        length_norm=length_norm,
        scale=float(scale),
    )


def _check(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor,
    log_z: Tensor,
    rewards: Tensor,
    cu_seqlens: Tensor,
    response_mask: Tensor | None,
) -> None:
    checks.require(
        logprobs.ndim == 1 and logprobs.dtype in (torch.float32, torch.float64),
        "logprobs must be (T,) float32 or float64",
        f"{logprobs.dtype} {tuple(logprobs.shape)}",
        "keep log-probs in float32",
    )
    num_sequences = len(checks.check_cu_seqlens(cu_seqlens, logprobs.shape[0])) - 1
    per_token = {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "response_mask": response_mask,
    }
    for name, tensor in per_token.items():
        if tensor is not None:
            checks.check_shape(name, tensor, logprobs.shape)
    checks.check_shape("log_z", log_z, (num_sequences,))
    checks.check_shape("rewards", rewards, (num_sequences,))
    checks.require(
        response_mask is None or response_mask.dtype == torch.bool,
        "response_mask must be bool",
        response_mask.dtype if response_mask is not None else None,
        "compare with 0",
    )
    checks.check_one_device(
        logprobs=logprobs, log_z=log_z, rewards=rewards, cu_seqlens=cu_seqlens, **per_token
    )


def _can_run(call: backends.Call) -> str | None:
    return None


def _triton_can_run(call: backends.Call) -> str | None:
    if call.dtype != torch.float32:
        return f"takes float32 log-probs, not {call.dtype}"
    return triton_support.refusal(call)


def _triton(*args: Any, **options: Any) -> TrajectoryBalance:
    from flowrl_kernels.trajectory_balance import triton_kernels  # a machine may lack triton

    return triton_kernels.trajectory_balance(*args, **options)


backends.register("trajectory_balance", "triton", _triton_can_run)(_triton)
backends.register("trajectory_balance", "reference", _can_run)(reference.trajectory_balance)
backends.register("trajectory_balance", "torch", _can_run)(torch_packed.trajectory_balance)
backends.register("trajectory_balance", "native", native_library.can_run)(native.trajectory_balance)
backends.register("trajectory_balance", "cuda", cuda_support.balance_refusal)(
    cuda_kernels.trajectory_balance
)
