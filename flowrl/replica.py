"""Sampling and scoring once per replica, where several processes hold one policy.

The replica's first process samples and scores; the others wait and get the results, so that all of
them train on the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from flowrl.parallel import Parallel
from flowrl.records import Rollout, SampleRequest, Score
from flowrl.rollout import Sampler
from flowrl.rollout.gpu_memory import release_cached
from flowrl.tasks import Task


class ReplicaSampler:
    """A sampler on the replica's first process, for all of it. See `Sampler`. `makes_room`: its
    engine starts and wakes on the GPUs of all these processes."""

    def __init__(
        self, build: Callable[[], Sampler], parallel: Parallel, *, makes_room: bool = False
    ) -> None:
        self._parallel = parallel
        self._makes_room = makes_room
        self._sampler: Sampler | None = None

        def keep() -> None:
            self._sampler = build()

        self._release()
        parallel.once(keep)

    def sample(self, request: SampleRequest) -> list[Rollout]:
        self._release()
        return self._parallel.once(lambda: self._own.sample(request))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """`weights` comes from a collective of the replica, so every process goes through it to the
        end, also where the sampler refuses one."""
        self._release()
        stream = iter(weights)
        failed: list[Exception] = []
        if self._sampler is not None:
            try:
                self._sampler.load_weights(stream, policy_version)
            except Exception as error:  # raised once the others are out of the collective
                failed.append(error)
        for _ in stream:
            pass
        self._parallel.once(lambda: _raise_first(failed))

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()

    def _release(self) -> None:
        """All of them give back first what torch holds in reserve."""
        if self._makes_room:
            release_cached()
            self._parallel.model_barrier()

    @property
    def _own(self) -> Sampler:
        assert self._sampler is not None, "only the first process of a replica samples"
        return self._sampler


class ReplicaTask:
    """A task whose answers are scored by the replica's first process alone. See `Task`."""

    def __init__(self, task: Task, parallel: Parallel) -> None:
        self._task = task
        self._parallel = parallel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return self._parallel.once(lambda: self._task.score(rollouts))


def _raise_first(errors: Sequence[Exception]) -> None:
    if errors:
        raise errors[0]
