"""Weights and moments through megatron.core.dist_checkpointing, readable at any other layout.

Megatron's own state of the distributed optimizer is not used: in 0.16.1 its reshardable form is
written wrongly where a rank has several buckets and one is padded, and loading it makes all
parameters share one step counter. Here every parameter's main weight and moments are gathered over
replicas and described like the weight itself, so Megatron cuts and joins them in the same way.
After writing, each process reads its share back and compares it bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor

from flowrl.models.megatron_optimizer import MOMENTS, PolicyOptimizer


class CheckpointMismatchError(OSError):
    """What was read back is not what was written."""


Described = dict[str, dict[str, Any]]  # by parameter: "param" and moments, with data and place


def save(directory: Path, chunks: Sequence[Any], optimizer: PolicyOptimizer) -> None:
    """Writes into an existing directory; every process calls it. Raises CheckpointMismatchError if
    what the disk gives back differs."""
    written = _described(chunks, optimizer)
    writer = TorchDistSaveShardedStrategy("torch_dist", 1, 1)
    dist_checkpointing.save({"state": written}, str(directory), writer)
    found = dist_checkpointing.load({"state": _empty_like(written)}, str(directory))["state"]
    for key, entry in written.items():
        for name, item in entry.items():
            if not torch.equal(item.data, found[key][name]):
                raise CheckpointMismatchError(
                    f"{name} of {key} reads back differently from how it was written to {directory}"
                )


def load(directory: Path, chunks: Sequence[Any], optimizer: PolicyOptimizer) -> None:
    """Fills weights and moments; the optimizer's step count is the caller's to set first."""
    wanted = _empty_like(_described(chunks, optimizer))
    found = dist_checkpointing.load({"state": wanted}, str(directory))["state"]
    for key, param, _ in _parameters(chunks):
        optimizer.scatter_state(param, found[key])


def _described(chunks: Sequence[Any], optimizer: PolicyOptimizer) -> Described:
    """Every parameter's state on this process, with its place in the whole model."""
    group = parallel_state.get_data_parallel_group()
    described: Described = {}
    for key, param, place in _parameters(chunks):
        state = optimizer.gather_state(param, group)
        described[key] = {
            name: make_sharded_optimizer_tensor(place, state[name], name)
            for name in ("param", *MOMENTS)
        }
    return described


def _empty_like(described: Described) -> Described:
    """The same places, to be read into; rows of a padded vocabulary that no file has stay zero."""
    return {
        key: {name: replace(i, data=torch.zeros_like(i.data)) for name, i in entry.items()}
        for key, entry in described.items()
    }


def _parameters(chunks: Sequence[Any]) -> Iterator[tuple[str, Tensor, Any]]:
    """(name on this process, parameter, its place in the whole model); a tied copy is left out,
    for the embedding is there."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for index, chunk in enumerate(chunks):
        described = chunk.module.sharded_state_dict(metadata=metadata)
        by_data = {
            id(item.data): item
            for item in nested_values(described)
            if isinstance(item, ShardedTensor | ShardedTensorFactory)
        }
        for name, param in chunk.module.named_parameters():
            yield f"{index}.{name}", param, by_data[id(param)]
