"""Inputs of the two linear operators, and instruments that watch what they compute."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from flowrl_kernels import backends, linear_logprobs
from flowrl_kernels.head.native_kernels import NativeHead
from flowrl_kernels.head.torch_kernels import TorchHead
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HEADS: dict[str, Any] = {"native": NativeHead, "torch": TorchHead}
FUSED = [name for name in backends.available("cpu") if name in HEADS]
"""Backends that can run here, judged by the same tests."""


def backends_for(dtype: torch.dtype) -> list[str]:
    """Those of FUSED that take `dtype`."""
    return [name for name in FUSED if name == "torch" or dtype != torch.float64]


@dataclass
class Case:
    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (T,)

    def to(self, dtype: torch.dtype) -> Case:
        """Fresh leaves that require grad."""
        return Case(
            self.hidden.detach().to(dtype).requires_grad_(),
            self.weight.detach().to(dtype).requires_grad_(),
            self.targets,
        )


def make_case(
    num_rows: int, vocab: int, dim: int = 16, *, seed: int = 0, masked: float = 0.2, size: float = 1
) -> Case:
    """Logits of standard deviation `size`; about `masked` of the rows are masked. Values are exact
    in bfloat16, so that every precision starts from the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, dim, generator=generator) * size / dim**0.5
    weight = torch.randn(vocab, dim, generator=generator)
    targets = torch.randint(vocab, (num_rows,), generator=generator)
    targets[torch.rand(num_rows, generator=generator) < masked] = -100
    return Case(hidden.bfloat16().float(), weight.bfloat16().float(), targets)


def outputs_and_gradients(case: Case, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """logprobs, lse, entropy, and the gradients of a fixed random combination of them."""
    case = case.to(dtype)
    result = linear_logprobs(case.hidden, case.weight, case.targets, entropy="grad", **options)
    combine(result._asdict()).backward()
    assert case.hidden.grad is not None
    assert case.weight.grad is not None
    return {
        **{name: x.detach() for name, x in result._asdict().items()},
        "dhidden": case.hidden.grad,
        "dweight": case.weight.grad,
    }


def combine(outputs: dict[str, Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64)
    for x in outputs.values():
        factors = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        total = total + (x.double().cpu() * factors).sum()
    return total


def leave_ranks() -> NoReturn:
    """Ends a rank that has written its results (see flowrl.parallel.leave)."""
    os._exit(0)


class Watch(TorchDispatchMode):
    """Counts matrix products and remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.largest = 0
        self.numels: dict[torch.dtype, int] = {}  # the largest of each dtype

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] in ("mm", "addmm", "addmm_", "bmm"):
            self.products += 1
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                known = self.numels.get(tensor.dtype, 0)
                self.numels[tensor.dtype] = max(known, tensor.numel())
        return result
