"""Chunks of whole sequences: what one evaluation of the objective sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl_kernels.checks import IGNORE_INDEX


@dataclass(frozen=True)
class Chunk:
    sequences: slice
    tokens: slice
    num_counted: int  # rows that are not masked


def plan(targets: Tensor, cu_seqlens: Tensor, most_rows: int) -> list[Chunk]:
    """The batch in order, each chunk with as many sequences as have `most_rows` counted rows or
    fewer.

    A sequence with more is a chunk of its own. There is always a chunk, if an empty one, so that
    the objective names its metrics."""
    counted = torch.zeros(targets.numel() + 1, dtype=torch.int64, device=targets.device)
    torch.cumsum(targets != IGNORE_INDEX, 0, out=counted[1:])
    before: list[int] = counted[cu_seqlens.long()].tolist()  # counted rows ahead of each sequence
    offsets: list[int] = cu_seqlens.tolist()
    num_sequences = len(offsets) - 1
    chunks, first = [], 0
    while first < num_sequences or not chunks:
        last = min(first + 1, num_sequences)
        while last < num_sequences and before[last + 1] - before[first] <= most_rows:
            last += 1
        tokens = slice(offsets[first], offsets[last])
        chunks.append(Chunk(slice(first, last), tokens, before[last] - before[first]))
        first = last
    return chunks
