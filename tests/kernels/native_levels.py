"""The compiled operators, and which of their instruction sets this processor has."""

from __future__ import annotations

import pytest
import torch
from flowrl_kernels import native_library
from head_cases import FUSED

OPERATORS = torch.ops.flowrl_native
needs_library = pytest.mark.skipif("native" not in FUSED, reason=str(native_library.PROBLEM))


def levels() -> list[int]:
    return list(range(OPERATORS.highest_level() + 1)) if "native" in FUSED else []


def levels_with_products() -> list[tuple[int, torch.dtype]]:
    dtypes = (torch.bfloat16, torch.float32)
    return [(i, t) for i in levels() for t in dtypes if has_products(t, i)]


def has_products(dtype: torch.dtype, level: int) -> bool:
    return OPERATORS.has_products(dtype == torch.bfloat16, level)
