"""Whether the Triton backend can take a call. Imports no triton: a machine may lack it."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from flowrl_kernels.backends import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(call: Call) -> str | None:
    """Why the Triton backend cannot do the call; None if it can."""
    if find_spec("triton") is None:
        return "needs triton, which is not installed (pip install triton)"
    if call.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, not {call.dtype}"
    if call.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(call.device)
        if interpreting():
            return "was asked to interpret (TRITON_INTERPRET=1), which is for tensors on a CPU"
        return None if major >= 8 else f"needs compute capability 8.0 or newer, not {major}.{minor}"
    if call.device.type == "cpu" and interpreting():
        return None
    return (
        f"runs on CUDA devices, not on {call.device.type} (its interpreter, for tests, takes CPU "
        "tensors where TRITON_INTERPRET=1 is set before the first import)"
    )


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
