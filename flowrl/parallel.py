"""Processes and devices: one `Parallel` record says who this rank is and how to talk to the others.

    torchrun --nproc-per-node 2 -m flowrl train        (gloo on CPU, NCCL on CUDA)

Without torchrun there is one process and every collective returns its argument.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl.schema import ConfigError

TIMEOUT = timedelta(minutes=10)  # longest wait for another rank before the job ends
Value = TypeVar("Value")


@dataclass(frozen=True)
class Parallel:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks. In place where there are several."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Value) -> list[Value]:
        """Every rank's picklable value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value) -> Value:
        """Rank 0's picklable value."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def agree(self, action: Callable[[], Value]) -> Value:
        """The action's result; what it raised on any rank is raised on all, so that none waits for
        one that has gone. Every rank calls it."""
        if self.world_size == 1:
            return action()
        value, error = None, None
        try:
            value = action()
        except (ValueError, RuntimeError, OSError) as raised:
            error = raised
        first = next((e for e in self.gather(error) if e is not None), None)
        if first is not None:
            raise first
        return cast(Value, value)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def share(self, count: int) -> slice:
        """This rank's contiguous share of `count` things; world_size must divide it."""
        size, rest = divmod(count, self.world_size)
        assert rest == 0, (count, self.world_size)
        return slice(self.rank * size, (self.rank + 1) * size)


def start(device: str) -> Parallel:
    """Joins the process group that torchrun announced, if any. Raises ConfigError for a device that
    is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device=cuda, but torch sees no CUDA device; set model.device=auto")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if use_cuda:
        torch.cuda.set_device(local_rank)
    chosen = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=TIMEOUT)
    return Parallel(int(os.environ.get("RANK", 0)), world_size, chosen)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
