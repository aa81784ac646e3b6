"""megatron-core 0.16.1 on a CPU: what it says about CUDA, answered for the CPU while a block runs.

    with on_cpu(device):
        model(...)

Megatron names CUDA in literals (`device="cuda"`, `.cuda()`, `torch.cuda.current_device()`). Inside
the block those mean the CPU; after it torch is as before. For another device it does nothing, and
inside another block neither.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_active = False


# What megatron-core says at every start of its own doings; none of it is about a run.
NOISE = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
    "When using async grad allreduce",
    "When using sequence parallelism",
    r"`torch\.distributed\.\w+` is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
)


def silence_megatron() -> None:
    """Before megatron is imported."""
    for message in NOISE:
        for category in (UserWarning, FutureWarning):
            warnings.filterwarnings("ignore", message=message, category=category)


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites literals in calls of torch functions."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        out = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(
            out, str
        ):  # compared with torch.cuda.FloatTensor
            return out.replace("torch.", "torch.cuda.", 1)
        return out


@contextmanager
def on_cpu(device: torch.device) -> Iterator[None]:
    global _active
    if device.type != "cpu" or _active:
        yield
        return
    saved = []
    _active = True
    try:
        for owner, name, replacement in _replacements():
            saved.append((owner, name, vars(owner)[name]))
            setattr(owner, name, replacement)
        with _CudaMeansCpu():
            yield
    finally:
        _active = False
        for owner, name, original in reversed(saved):
            setattr(owner, name, original)


def _replacements() -> list[tuple[Any, str, Any]]:
    from megatron.core.tensor_parallel import random as megatron_random

    recompute = megatron_random.CheckpointFunction.backward

    def recompute_on_cpu(ctx: Any, *grads: Any) -> Any:
        # Torch function modes are off inside autograd's backward: entered again for recomputation.
        with _CudaMeansCpu():
            return recompute(ctx, *grads)

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    return [
        (torch.cuda, "current_device", lambda: CPU),
        (torch.cuda, "synchronize", lambda *_, **__: None),
        (torch.cuda, "get_rng_state", get_state),
        (torch.cuda, "set_rng_state", set_state),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (megatron_random, "_get_cuda_rng_state", get_state),
        (megatron_random, "_set_cuda_rng_state", set_state),
        (megatron_random.CheckpointFunction, "backward", staticmethod(recompute_on_cpu)),
    ]
