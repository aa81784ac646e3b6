"""Processes and devices: one `Parallel` record says who this rank is and how to talk to the others.

    torchrun --nproc-per-node 2 -m flowrl train        (gloo on CPU, NCCL on CUDA)

Without torchrun there is one process and every collective returns its argument.

A replica is the processes that hold one copy of the policy: one, or with Megatron
tensor * pipeline. A trainer need not know how many: all processes of a replica see the same data
and get the same results. Who takes part:

    replicas                       rank, world_size, share, all_reduce, gather, gather_to_main
    the processes of one replica   model_rank, model_size, once, model_barrier
    all processes                  num_processes, is_main, gather_all, broadcast, agree
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl.parallel_config import ParallelConfig
from flowrl.schema import ConfigError

WAIT_S = 1800.0  # longest wait for another rank before the job ends, if its engine has no more
MARGIN_S = 60.0  # beyond what its engine may take
ANNOUNCED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # by torchrun or the like, to each process
Value = TypeVar("Value")


@dataclass(frozen=True)
class Parallel:
    rank: int  # of this replica
    world_size: int  # replicas
    device: torch.device
    model_rank: int = 0  # of this process in its replica
    model_size: int = 1  # processes of a replica
    data_group: Any = None  # the processes in this one's place in every replica; None: all
    model_group: Any = None  # this replica's processes; None: itself alone

    @property
    def is_main(self) -> bool:
        return self.rank == 0 and self.model_rank == 0

    @property
    def num_processes(self) -> int:
        return self.world_size * self.model_size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over replicas. In place where there are several."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def gather(self, value: Value) -> list[Value]:
        """Every replica's picklable value, in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.data_group)
        return values

    def gather_to_main(self, value: Value) -> list[Value]:
        """Every replica's picklable value, in rank order, on the main process; elsewhere none."""
        if self.model_rank:
            return []
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size if self.is_main else []
        dist.gather_object(value, values or None, group=self.data_group, group_dst=0)
        return values

    def gather_all(self, value: Value) -> list[Value]:
        """Every process's picklable value, on every process."""
        if self.num_processes == 1:
            return [value]
        values: list[Any] = [None] * self.num_processes
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value) -> Value:
        """The main process's picklable value, on every process."""
        if self.num_processes == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def once(self, action: Callable[[], Value]) -> Value:
        """The action's result on the replica's first process, on all of the replica; what it raised
        there is raised on all. Only that process runs it."""
        if self.model_size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.model_rank == 0:
            outcome = list(_attempt(action))
        dist.broadcast_object_list(outcome, group=self.model_group, group_src=0)
        value, error = outcome
        if error is not None:
            raise error
        return value

    def agree(self, action: Callable[[], Value]) -> Value:
        """The action's result; what it raised on any process is raised on all, so that none waits
        for one that has gone. Every process calls it."""
        if self.num_processes == 1:
            return action()
        value, error = _attempt(action)
        first = next((e for e in self.gather_all(error) if e is not None), None)
        if first is not None:
            raise first
        return cast(Value, value)

    def model_barrier(self) -> None:
        """Waits for the other processes of this replica."""
        if self.model_size > 1:
            dist.barrier(group=self.model_group)

    def share(self, count: int) -> slice:
        """This replica's contiguous share of `count` things; world_size must divide it."""
        size, rest = divmod(count, self.world_size)
        assert rest == 0, (count, self.world_size)
        return slice(self.rank * size, (self.rank + 1) * size)


def _attempt(action: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    try:
        return action(), None
    except Exception as raised:  # whoever calls it raises it, on all ranks
        return None, raised


def start(
    device: str, layout: ParallelConfig | None = None, engine_wait_s: float = 0.0
) -> Parallel:
    """Joins the process group that torchrun announced, if any; `engine_wait_s` is the longest that
    one rank may wait for its engine while the others wait for it. Raises ConfigError for a device
    that is not there, and for processes that do not make whole replicas."""
    layout = layout or ParallelConfig()
    timeout = longest_wait(engine_wait_s)
    check_device(device)
    use_cuda = device != "cpu" and torch.cuda.is_available()
    local_rank = _announced("LOCAL_RANK", 0)
    count = num_processes()
    missing = [name for name in ANNOUNCED if count > 1 and name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {count}, and {', '.join(missing)} not set; start the processes with "
            "torchrun, or take WORLD_SIZE out of the environment for a single one"
        )
    layout.replicas(count)
    chosen = torch.device("cpu")
    if use_cuda:
        chosen = torch.device("cuda", _own_gpu(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(chosen)
    if count > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=timeout)
    return place(_announced("RANK", 0), count, layout, chosen, timeout)


def check_device(device: str) -> None:
    """Raises ConfigError for model.device=cuda where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device=cuda, but torch sees no CUDA device; set model.device=auto")


def _own_gpu(local_rank: int, visible: int) -> int:
    """Raises ConfigError where a process sees GPUs, but not its own. A single one is taken for its
    own: some launchers show each process no other; NCCL refuses two processes on one."""
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise ConfigError(
            f"process {local_rank} of this node has no GPU, {visible} are visible; start at most "
            "as many with torchrun --nproc-per-node"
        )
    return local_rank


def longest_wait(engine_wait_s: float) -> timedelta:
    """For another rank, which may wait so long for its engine."""
    return timedelta(seconds=max(WAIT_S, engine_wait_s + MARGIN_S))


def num_processes() -> int:
    """Processes that torchrun started, over all nodes; 1 without it."""
    return _announced("WORLD_SIZE", 1)


def _announced(name: str, default: int) -> int:
    """A number that the launcher put into the environment. Raises ConfigError for no number."""
    text = os.environ.get(name, "")
    if text and not text.isdigit():
        raise ConfigError(f"{name} in the environment must be a number, got {text!r}; unset it")
    return int(text) if text else default


def place(
    process: int,
    count: int,
    layout: ParallelConfig,
    device: torch.device,
    timeout: timedelta = timedelta(seconds=WAIT_S),
) -> Parallel:
    """The record of one process; every process calls it. Megatron's order: tensor ranks are
    neighbours, then replicas, then stages."""
    replicas = layout.replicas(count)
    if layout.model_size == 1:
        return Parallel(process, count, device)
    tensor, pipeline = layout.tensor, layout.pipeline
    tensor_rank, rest = process % tensor, process // tensor
    replica, stage = rest % replicas, rest // replicas

    def number(tensor_rank: int, replica: int, stage: int) -> int:
        return tensor_rank + tensor * (replica + replicas * stage)

    same_place = [
        [number(t, r, s) for r in range(replicas)] for s in range(pipeline) for t in range(tensor)
    ]
    same_replica = [
        [number(t, r, s) for s in range(pipeline) for t in range(tensor)] for r in range(replicas)
    ]
    return Parallel(
        rank=replica,
        world_size=replicas,
        device=device,
        model_rank=tensor_rank + tensor * stage,
        model_size=layout.model_size,
        data_group=_own_group(same_place, process, timeout),
        model_group=_own_group(same_replica, process, timeout),
    )


def _own_group(groups: list[list[int]], process: int, timeout: timedelta) -> Any:
    """The one of these disjoint groups that this process is in; every process makes them all."""
    made = [(ranks, dist.new_group(ranks, timeout=timeout)) for ranks in groups]
    return next(group for ranks, group in made if process in ranks)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends a process that was one of several, without the interpreter's own end. A gloo thread that
    still holds the last collective's tensor asks for the interpreter, and aborts the process when
    that is gone: without this, one in four that end right after a collective (torch 2.13)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
