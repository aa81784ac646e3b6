"""Whether the CUDA backend can take a call: kernels for Hopper, in the native library where it was
built with nvcc and CUTLASS."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_kernels import native_library
from flowrl_kernels.backends import Call

BUILD = f"with nvcc on the PATH: pip install --no-deps nvidia-cutlass && {native_library.BUILD}"
CAPABILITY = (9, 0)


def build_problem() -> str | None:
    """Why this installation has no CUDA operators; None if it has them."""
    if native_library.PROBLEM is not None:
        return native_library.PROBLEM
    if not hasattr(torch.ops.flowrl_cuda, "tile_columns"):
        return (
            "is not in the native library of this installation, which was built without nvcc or "
            f"without CUTLASS ({BUILD})"
        )
    return None


def refusal(call: Call) -> str | None:
    """For the operators of the output layer."""
    problem = _device_problem(call)
    if problem is not None:
        return problem
    if call.dtype != torch.bfloat16:
        return f"takes bfloat16, not {call.dtype}"
    multiple = 16 if "fp8" in call.features else 8
    if call.dim is not None and call.dim % multiple:
        return (
            f"needs hidden and weight with a multiple of {multiple} columns (rows of whole 16 "
            f"bytes), not {call.dim}: pad both with zeros"
        )
    return None


def balance_refusal(call: Call) -> str | None:
    """For trajectory_balance."""
    if call.dtype != torch.float32:
        return f"takes float32 log-probs, not {call.dtype}"
    return _device_problem(call)


def stream_of(tensor: Tensor) -> int:
    """The current stream of the tensor's device, as the operators take it."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _device_problem(call: Call) -> str | None:
    if call.device.type != "cuda":
        return f"runs on CUDA devices of compute capability 9.0, not on {call.device.type}"
    problem = build_problem()
    if problem is not None:
        return problem
    capability = torch.cuda.get_device_capability(call.device)
    if capability != CAPABILITY:
        found = ".".join(map(str, capability))
        return f"needs compute capability 9.0 (H100, H200), not {found}"
    return None
