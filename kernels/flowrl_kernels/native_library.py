"""The compiled operators of csrc/, as torch.ops.flowrl_native, where this installation has them.

The library lies beside this file; csrc/README.md says how it is built.
"""

from __future__ import annotations

from pathlib import Path

import torch

from flowrl_kernels.backends import Call

LIBRARY = Path(__file__).with_name("_C.abi3.so")
BUILD = "FLOWRL_BUILD_NATIVE=1 pip install --no-build-isolation -e ."
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
"""Instruction sets of the CPU operators, by the number that they go by in csrc/."""


def _load() -> str | None:
    """None, or why there are no native operators."""
    if not LIBRARY.exists():
        return f"is not built in this installation ({BUILD})"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"does not load ({str(error).strip().splitlines()[0]}; build it again: {BUILD})"
    if not hasattr(torch.ops.flowrl_native, "head_forward"):
        return f"was built from older sources (build it again: {BUILD})"
    return None


PROBLEM = _load()


def can_run(call: Call) -> str | None:
    """For all native operators: CPU, and statistics in float32."""
    if call.device.type != "cpu":
        return f"runs on cpu, not on {call.device.type}"
    if call.dtype == torch.float64:
        return "computes in float32 and takes no float64"
    if "fp8" in call.features:
        return "has no FP8 product"
    return PROBLEM


def level() -> str:
    """The instruction set that the native operators use on this processor."""
    return LEVELS[torch.ops.flowrl_native.best_level()]
