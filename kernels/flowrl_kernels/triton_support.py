"""Whether the Triton backend can take a call. Imports no triton: a machine may lack it."""

from __future__ import annotations

import os
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from flowrl_kernels.backends import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARED_BYTES = 197_152  # the most that a kernel takes (python -m bench aot)


def refusal(call: Call) -> str | None:
    """Why the Triton backend cannot do the call; None if it can."""
    if find_spec("triton") is None:
        return "needs triton, which is not installed (pip install triton)"
    if call.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, not {call.dtype}"
    if call.device.type == "cuda":
        if interpreting():
            return "was asked to interpret (TRITON_INTERPRET=1), which is for tensors on a CPU"
        return _device_problem(call)
    if call.device.type == "cpu" and interpreting():
        return None
    return (
        f"runs on CUDA devices, not on {call.device.type} (its interpreter, for tests, takes CPU "
        "tensors where TRITON_INTERPRET=1 is set before the first import)"
    )


def _device_problem(call: Call) -> str | None:
    major, minor = torch.cuda.get_device_capability(call.device)
    if major < 8:
        return f"needs compute capability 8.0 or newer, not {major}.{minor}"
    shared = torch.cuda.get_device_properties(call.device).shared_memory_per_block_optin
    if call.dtype.itemsize == 2 and shared < SHARED_BYTES:
        return (
            f"keeps {SHARED_BYTES >> 10} KiB of a 16-bit product in shared memory, of which this "
            f"GPU has {shared >> 10} KiB a block: H100, H200 and later ones for data centres do"
        )
    return None


def launch(on: Tensor, kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """On the device of `on`: Triton itself takes the current one, wherever the operands are."""
    with torch.cuda.device(on.device) if on.is_cuda else nullcontext():
        kernel[(programs,)](*arguments, **options)


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
