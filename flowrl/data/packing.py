"""Packing: rollouts to one row of tokens, and its division into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowrl.records import PackedBatch, Rollout, to_cu_seqlens
from flowrl.schema import ConfigError


def pack(rollouts: Sequence[Rollout]) -> PackedBatch:
    """N rollouts as one packed batch, in order."""
    tokens: list[int] = []
    targets: list[int] = []
    for rollout in rollouts:
        tokens.extend((*rollout.prompt.token_ids, *rollout.response_ids)[:-1])
        targets.extend(rollout.response_ids)
    prompt_lengths = torch.tensor([len(r.prompt.token_ids) for r in rollouts], dtype=torch.int32)
    lengths = torch.tensor([len(r.response_ids) for r in rollouts], dtype=torch.int32)
    return PackedBatch(
        token_ids=torch.tensor(tokens, dtype=torch.int64),
        model_cu_seqlens=to_cu_seqlens(prompt_lengths + lengths - 1),
        prompt_lengths=prompt_lengths,
        targets=torch.tensor(targets, dtype=torch.int64),
        cu_seqlens=to_cu_seqlens(lengths),
    )


def plan_microbatches(batch: PackedBatch, max_tokens: int) -> list[Tensor]:
    """Indices (n,) of the sequences of each micro-batch: every sequence once, at most `max_tokens`
    packed tokens together, neighbours alike in length so that attention wastes little.

    Raises ConfigError if one sequence alone is longer."""
    lengths = batch.model_cu_seqlens.diff().tolist()
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise ConfigError(
            f"batch.tokens_per_microbatch must hold the longest sequence, got {max_tokens} and "
            f"{longest} tokens; set batch.tokens_per_microbatch={longest}"
        )
    plans: list[list[int]] = []
    used = max_tokens + 1
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if used + lengths[index] > max_tokens:
            plans.append([])
            used = 0
        plans[-1].append(index)
        used += lengths[index]
    return [torch.tensor(plan, dtype=torch.int64) for plan in plans]
