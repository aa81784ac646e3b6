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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from flowrl.models.megatron_optimizer import STATE, PolicyOptimizer
from flowrl.schema import ConfigError


class CheckpointMismatchError(OSError):
    """What was read back is not what was written."""


Described = dict[str, dict[str, Any]]  # by parameter: "param" and moments, with data and place
Parameter = tuple[str, Tensor, Any]  # name on this process, parameter, place in the whole model
REFERENCE = "reference"
PART_ELEMENTS = 1 << 30  # numbers that are read at once, 4 GB in float32; layers stay together


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
    sent = {key: {name: i.data for name, i in entry.items()} for key, entry in written.items()}
    # Of this process alone: Megatron's own queue is a server process, for saving in the background,
    # which outlives a job that is killed.
    filesystem_async._results_queue = queue.Queue()
    writer = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save({"state": written}, str(directory), writer)
    wrong: list[str] = []
    try:
        for key, _, name, found in _read(directory, contents):
            if not torch.equal(sent[key][name], found):
                wrong.append(f"{name} of {key}")  # read on: the others wait for this process
    except (RuntimeError, ValueError, CheckpointingException, CheckpointException) as error:
        raise CheckpointMismatchError(
            f"what was written to {directory} cannot be read back: {str(error).splitlines()[0]}"
        ) from error
    if wrong:
        raise CheckpointMismatchError(
            f"{wrong[0]} reads back differently from how it was written to {directory}"
        )


def load(directory: Path, contents: Contents) -> None:
    """Fills weights, moments and, where given, the reference; the optimizer's step count is the
    caller's to set first. Raises ConfigError if the files hold other parameters."""
    try:
        for _, param, name, found in _read(directory, contents):
            if name == REFERENCE:
                contents.reference[id(param)].copy_(found)
            else:
                contents.optimizer.scatter_state(param, name, found)
    except (CheckpointingException, CheckpointException) as error:
        reason = [line for line in str(error).splitlines() if "Error: " in line] or [str(error)]
        raise ConfigError(
            f"{directory} has other parameters than this run ({reason[-1][:200]}); resume with the "
            "log_z and value_head settings that it was written with"
        ) from error
    contents.optimizer.count_steps()


def _described(contents: Contents) -> Described:
    """Every parameter's state on this process, in host memory, with its place in the whole
    model."""
    group = parallel_state.get_data_parallel_group()
    described: Described = {}
    for key, param, place in _parameters(contents.chunks):
        state = contents.optimizer.gather_state(param, group)
        if id(param) in contents.reference:
            state[REFERENCE] = contents.reference[id(param)].detach().to("cpu", copy=True)
        described[key] = {
            name: make_sharded_optimizer_tensor(place, tensor, name)
            for name, tensor in state.items()
        }
    return described


def _read(directory: Path, contents: Contents) -> Iterator[tuple[str, Tensor, str, Tensor]]:
    """(name of the parameter, parameter, what of it, that as the files have it). In parts, so that
    the host need not hold all of it once more; all processes read as many of them together. Rows of
    a padded vocabulary that no file has are zero."""
    parts = _parts(contents)
    parts += [[]] * (_largest(len(parts)) - len(parts))
    for part in parts:
        wanted: Described = {}
        for (key, param, place), name in part:
            dtype = contents.reference[id(param)].dtype if name == REFERENCE else torch.float32
            room = torch.zeros(param.shape, dtype=dtype)
            wanted.setdefault(key, {})[name] = make_sharded_optimizer_tensor(place, room, name)
        found: Any = dist_checkpointing.load(
            {"state": wanted},
            str(directory),
            validate_access_integrity=False,  # of one part: other ranks may read other layers
        )
        for (key, param, _), name in part:
            yield key, param, name, found["state"][key][name]


def _parts(contents: Contents) -> list[list[tuple[Parameter, str]]]:
    """Moments, weights and reference of parameters. Those of one name in the whole model, which are
    the layers of this process, are read together."""
    together: dict[tuple[str, str], list[tuple[Parameter, str]]] = {}
    for parameter in _parameters(contents.chunks):
        names = [*STATE, REFERENCE] if id(parameter[1]) in contents.reference else STATE
        for name in names:
            together.setdefault((parameter[2].key, name), []).append((parameter, name))
    parts: list[list[tuple[Parameter, str]]] = []
    size = PART_ELEMENTS
    for entries in together.values():
        count = sum(param.numel() for (_, param, _), _ in entries)
        if size + count > PART_ELEMENTS:
            parts.append([])
            size = 0
        parts[-1] += entries
        size += count
    return parts


def _largest(count: int) -> int:
    """Of all processes' counts."""
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, count)
    return max(counts)


def _parameters(chunks: Sequence[Any]) -> Iterator[Parameter]:
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
