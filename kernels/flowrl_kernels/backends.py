"""Which backend of which operator can run here, and which one a call gets.

A backend plugs in by registering one function per operator, with the operator's whole signature:

    @register("linear_logprobs", "triton", can_run)
    def linear_logprobs(hidden, weight, targets, **options): ...

`can_run(call)` answers None, or the reason why this backend cannot do that call. Nothing falls
back: a named backend that cannot run raises, and says what can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BACKENDS = ("native", "torch", "triton", "cuda", "reference")
"""The order in which an unnamed backend is picked. triton and cuda move to the front once they have
run on a GPU: until then torch comes before them."""
ONLY_BY_NAME = frozenset({"cuda"})
"""Never picked unnamed, not even where nothing else can run the call: has never run on a GPU."""


@dataclass(frozen=True)
class Call:
    """What a backend needs to know about a call before it accepts it."""

    device: torch.device
    dtype: torch.dtype
    features: frozenset[str] = frozenset()
    """Of "group" (sharded vocabulary), "fp8", "entropy" and "main_grad": the ones in use."""
    dim: int | None = None
    """Columns of hidden and weight; None where the operator has neither."""


CanRun = Callable[[Call], str | None]


@dataclass(frozen=True)
class Implementation:
    operator: str
    backend: str
    run: Callable[..., Any]
    can_run: CanRun


_registry: dict[str, dict[str, Implementation]] = {}


def register(
    operator: str, backend: str, can_run: CanRun
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: makes a function the implementation of `operator` by `backend`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")

    def add(run: Callable[..., Any]) -> Callable[..., Any]:
        implementations = _registry.setdefault(operator, {})
        if backend in implementations:
            raise ValueError(
                f"each backend registers an operator once, got a second {backend!r} for "
                f"{operator}; remove one"
            )
        implementations[backend] = Implementation(operator, backend, run, can_run)
        return run

    return add


def available(device: torch.device | str | None = None) -> list[str]:
    """Backends, best first, with which some operator runs on `device` on float32 tensors.

    None: on any device of this machine."""
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    devices = [torch.device(d) for d in (here if device is None else [device])]
    devices = [d for d in devices if d.type in here]
    calls = [Call(d, torch.float32) for d in devices]
    return [
        name
        for name in BACKENDS
        if any(
            implementations[name].can_run(call) is None
            for implementations in _registry.values()
            if name in implementations
            for call in calls
        )
    ]


def implemented(operator: str) -> list[str]:
    """Backends that have `operator` in this installation, best first, able to run or not."""
    return [name for name in BACKENDS if name in _registry[operator]]


def resolve(operator: str, backend: str | None, call: Call) -> Implementation:
    """The implementation of `operator` that `call` gets: `backend`, or the best that can run and is
    picked unnamed.

    Raises ValueError for an unknown backend, and for one that cannot run: why, and what can."""
    implementations = _registry[operator]
    candidates = implemented(operator) if backend is None else [backend]
    for name in candidates:
        if backend is None and name in ONLY_BY_NAME:
            continue
        if name in implementations and implementations[name].can_run(call) is None:
            return implementations[name]
    refusals = {name: item.can_run(call) for name, item in implementations.items()}
    if backend is None:
        by_name = "runs only where it is named"
        why = "; ".join(f"{name}: {reason or by_name}" for name, reason in refusals.items())
        raise ValueError(f"no backend of {operator} can run this call ({why})")
    if backend not in BACKENDS:
        why = f"must be one of {', '.join(BACKENDS)}"
    else:
        why = refusals.get(backend) or f"does not implement {operator} in this installation"
    able = [name for name in BACKENDS if name in refusals and refusals[name] is None]
    choice = f"backend={able[0]!r}" if able else "no backend can: change the call"
    raise ValueError(f"{operator}: backend {backend!r} {why}; use {choice}")
