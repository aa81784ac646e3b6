"""Argument checks of the operators: one error format (requirement, value, remedy)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

IGNORE_INDEX = -100  # target of a row that takes no part
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def require(condition: bool, requirement: str, got: object, remedy: str) -> None:
    """ValueError `requirement, got ...; remedy` unless `condition`."""
    if not condition:
        raise ValueError(f"{requirement}, got {got}; {remedy}")


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def valid_columns(weight: Tensor, vocab_start: int, vocab_size: int | None) -> int:
    """How many rows of this rank's `weight` (V_local, D) are true vocabulary, not padding."""
    rows = weight.shape[0]
    return rows if vocab_size is None else min(max(vocab_size - vocab_start, 0), rows)


def check_head(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V_local, D)
    targets: Tensor,  # (T,)
    *,
    temperature: float,
    entropy: str,
    max_logits_bytes: int | None,
) -> None:
    """Shapes, dtypes, devices and options that both linear operators share."""
    require(
        hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1],
        "hidden must be (T, D) and weight (V_local, D)",
        f"{tuple(hidden.shape)} and {tuple(weight.shape)}",
        "flatten the batch to rows",
    )
    require(
        targets.shape == hidden.shape[:1] and targets.dtype == torch.int64,
        f"targets must be int64 of shape ({hidden.shape[0]},)",
        f"{targets.dtype} {tuple(targets.shape)}",
        "give one target per row of hidden",
    )
    require(
        hidden.dtype == weight.dtype and hidden.dtype in DTYPES,
        "hidden and weight must share a dtype of float32, float64, bfloat16, float16",
        f"{hidden.dtype} and {weight.dtype}",
        "cast one of them",
    )
    check_one_device(hidden=hidden, weight=weight, targets=targets)
    require(
        math.isfinite(temperature) and temperature > 0,
        "temperature must be positive and finite",
        temperature,
        "use temperature=1.0 for plain logits",
    )
    require(
        entropy in ("none", "metric", "grad"),
        "entropy must be 'none', 'metric' or 'grad'",
        repr(entropy),
        "use entropy='none'",
    )
    require(
        max_logits_bytes is None or max_logits_bytes > 0,
        "max_logits_bytes must be positive",
        max_logits_bytes,
        "use None for the default",
    )


def check_vocabulary(
    weight: Tensor,  # (V_local, D)
    targets: Tensor,  # (T,)
    vocab_start: int,
    vocab_size: int | None,
    group: ProcessGroup | None,
) -> None:
    """Targets lie in the vocabulary, and the shard in it is told apart from a whole one.

    Without `vocab_size`, shards are taken to be of equal size and without padding."""
    world = 1 if group is None else group.size()
    require(
        vocab_start >= 0 and (vocab_start == 0 or group is not None),
        "vocab_start must be 0 unless group shards the vocabulary",
        vocab_start,
        "pass the tensor-parallel group",
    )
    size = weight.shape[0] * world if vocab_size is None else vocab_size
    require(
        vocab_size is None or 0 < vocab_size <= weight.shape[0] or group is not None,
        f"vocab_size must be in [1, {weight.shape[0]}], the rows of weight",
        vocab_size,
        "pass the true vocabulary size, or None without padding",
    )
    if targets.numel() == 0:
        return
    bad = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= size))
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        require(
            False,
            f"targets must be {IGNORE_INDEX} or in [0, {size})",
            f"{int(targets[row])} at row {row}",
            f"mask the row with {IGNORE_INDEX}",
        )


def check_cu_seqlens(cu_seqlens: Tensor, num_rows: int) -> list[int]:
    """The offsets as integers. They start at 0, never fall, and end at the number of rows."""
    require(
        cu_seqlens.ndim == 1
        and cu_seqlens.numel() >= 1
        and cu_seqlens.dtype in (torch.int32, torch.int64),
        "cu_seqlens must be (N + 1,) int32 or int64",
        f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}",
        "pass [0, cumulative lengths]",
    )
    offsets: list[int] = cu_seqlens.tolist()
    require(
        offsets[0] == 0 and offsets[-1] == num_rows and all(a <= b for a, b in pairwise(offsets)),
        f"cu_seqlens must rise from 0 to the {num_rows} rows",
        offsets if len(offsets) <= 8 else f"{offsets[:4]} ... {offsets[-4:]}",
        "pass [0, cumulative lengths]",
    )
    return offsets


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    require(
        tuple(tensor.shape) == tuple(shape),
        f"{name} must have shape {tuple(shape)}",
        tuple(tensor.shape),
        "check that it belongs to this batch",
    )


def check_one_device(**tensors: Tensor | None) -> None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    require(
        len(set(devices.values())) <= 1,
        "all tensors must be on one device",
        ", ".join(f"{name} on {device}" for name, device in devices.items()),
        "move them",
    )
