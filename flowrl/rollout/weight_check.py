"""Whether weights arrived: checksums of the same columns on the trainer's and the engine's side.

An engine may keep a weight in a packed form that nobody can read (vLLM's linear layers on a CPU).
Its columns still come out bit for bit when the layer is applied to unit vectors: every other term
of the sum is an exact 0. So a matrix is compared by columns, all of them where there are few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowrl.rollout.engine_protocol import WeightSyncError
from flowrl.weights import checksum

ALL_COLUMNS = 256  # matrices up to this width are compared whole
SOME_COLUMNS = 64  # of wider ones, others each time that it is their turn


@dataclass(frozen=True)
class Report:
    """What one worker of the engine holds of a tensor: rows row_start .. row_start + rows, and of
    the sampled columns those at `positions` (None: all)."""

    name: str
    row_start: int
    rows: int
    positions: Sequence[int] | None
    checksum: int


def columns(width: int, lap: int) -> Tensor:
    """The columns that are compared once all matrices have had `lap` turns, ascending."""
    if width <= ALL_COLUMNS:
        return torch.arange(width)
    return ((torch.arange(SOME_COLUMNS) * width // SOME_COLUMNS + lap) % width).sort().values


def sampled(tensor: Tensor, lap: int) -> Tensor:
    """The part of a tensor that is compared: (rows, columns) of a matrix, else (n, 1)."""
    if tensor.ndim != 2:
        return tensor.reshape(-1, 1)
    return tensor[:, columns(tensor.shape[1], lap).to(tensor.device)]


def fingerprint(values: Tensor) -> int:
    """checksum of the values, with -0 and subnormal numbers taken as 0: a matrix product gives
    those back as 0."""
    tiny = torch.finfo(values.dtype).tiny
    return checksum(torch.where(values.abs() < tiny, 0.0, values).to(values.dtype).contiguous())


def compare(sent: Mapping[str, Tensor], reports: Sequence[Mapping[str, Any]], version: int) -> int:
    """`sent` holds `sampled` tensors as they were sent. Returns how many of them were compared.

    Raises WeightSyncError for a difference, and if nothing could be compared."""
    wrong, seen = [], set()
    for report in (Report(**r) for r in reports):
        values = sent[report.name][report.row_start : report.row_start + report.rows]
        if report.positions is not None:
            values = values[:, list(report.positions)]
        seen.add(report.name)
        if values.shape[0] != report.rows or fingerprint(values) != report.checksum:
            wrong.append(report.name)
    if wrong:
        names = sorted(set(wrong))
        raise WeightSyncError(
            f"{len(names)} of {len(seen)} compared weights of version {version} are not in the "
            f"engine as they were sent, {names[0]} for one; the rollouts would be another "
            "policy's: see the engine's log, and set rollout.sync_transport=files"
        )
    if sent and not seen:
        raise WeightSyncError(
            f"none of {len(sent)} weights of version {version} can be read back from the engine; "
            "raise rollout.sync_checked_tensors"
        )
    return len(seen)
