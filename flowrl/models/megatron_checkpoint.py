"""Weights and moments through megatron.core.dist_checkpointing, readable at any other layout.

Megatron's own state of the distributed optimizer is not used: in 0.16.1 its reshardable form is
written wrongly where a rank has several buckets and one is padded, and loading it makes all
parameters share one step counter. Here every parameter's main weight and moments are gathered over
replicas and described like the weight itself, so Megatron cuts and joins them in the same way.
After writing, each process reads its share back and compares it bit by bit.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from flowrl.models.megatron_optimizer import PolicyOptimizer
from flowrl.schema import ConfigError


class CheckpointMismatchError(OSError):
    """What was read back is not what was written."""


Described = dict[str, dict[str, Any]]  # by parameter: "param" and moments, with data and place


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds of a process: its chunks, their optimizer, and the reference's
    weights by the identity of the policy's parameter, once the reference has been reset."""

    chunks: Sequence[Any]
    optimizer: PolicyOptimizer
    reference: Mapping[int, Tensor]


def save(directory: Path, contents: Contents) -> None:
    """Writes into an existing directory; every process calls it. Raises CheckpointMismatchError if
    what the disk gives back differs."""
    written = _described(contents)
    wanted = _empty_like(written)  # before saving, which changes the descriptions
    sent = {key: {name: i.data for name, i in entry.items()} for key, entry in written.items()}
    # Of this process alone: Megatron's own queue is a server process, for saving in the background,
    # which outlives a job that is killed.
    filesystem_async._results_queue = queue.Queue()
    writer = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save({"state": written}, str(directory), writer)
    try:
        found: Any = dist_checkpointing.load({"state": wanted}, str(directory))
    except (RuntimeError, ValueError, CheckpointingException, CheckpointException) as error:
        raise CheckpointMismatchError(
            f"what was written to {directory} cannot be read back: {str(error).splitlines()[0]}"
        ) from error
    for key, entry in sent.items():
        for name, tensor in entry.items():
            if not torch.equal(tensor, found["state"][key][name]):
                raise CheckpointMismatchError(
                    f"{name} of {key} reads back differently from how it was written to {directory}"
                )


def load(directory: Path, contents: Contents) -> None:
    """Fills weights, moments and, where given, the reference; the optimizer's step count is the
    caller's to set first. Raises ConfigError if the files hold other parameters."""
    wanted = _empty_like(_described(contents))
    try:
        found: Any = dist_checkpointing.load({"state": wanted}, str(directory))
    except (CheckpointingException, CheckpointException) as error:
        reason = [line for line in str(error).splitlines() if "Error: " in line] or [str(error)]
        raise ConfigError(
            f"{directory} has other parameters than this run ({reason[-1][:200]}); resume with the "
            "log_z and value_head settings that it was written with"
        ) from error
    for key, param, _ in _parameters(contents.chunks):
        contents.optimizer.scatter_state(param, found["state"][key])
        if id(param) in contents.reference:
            contents.reference[id(param)].copy_(found["state"][key]["reference"])


def _described(contents: Contents) -> Described:
    """Every parameter's state on this process, with its place in the whole model."""
    group = parallel_state.get_data_parallel_group()
    described: Described = {}
    for key, param, place in _parameters(contents.chunks):
        state = contents.optimizer.gather_state(param, group)
        if id(param) in contents.reference:
            state["reference"] = contents.reference[id(param)].detach().clone()
        described[key] = {
            name: make_sharded_optimizer_tensor(place, tensor, name)
            for name, tensor in state.items()
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
