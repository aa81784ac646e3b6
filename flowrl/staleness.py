"""Sampling ahead of training: the next batches are generated while the policy trains.

With rollout.max_staleness = k the batch of step n is drawn from the weights after step n - 1 - k
(those before step 1 where there are none), whatever the clock does: step n + k is asked for when
step n begins, and new weights wait until it is generated. So a run repeats itself, and no rollout
is ever more than k steps old. What is generated but not yet trained on is not saved: a resumed run
generates it again, from the weights it resumes with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from flowrl.experience import Collector, Experience
from flowrl.parallel import Parallel
from flowrl.records import Rollout, SampleRequest
from flowrl.replica import ReplicaSampler
from flowrl.rollout import Sampler


@runtime_checkable
class Interruptible(Protocol):
    def interrupt(self) -> None:
        """Makes a call that another thread waits in fail soon, and for good."""
        ...


class AheadSampler:
    """A sampler whose every call runs in one thread, in the order of the calls. See `Sampler`."""

    def __init__(self, sampler: Sampler, device: torch.device) -> None:
        self.sampler = sampler
        self.policy_version = 0  # of the weights loaded last
        self._ahead: dict[int, tuple[SampleRequest, Future[list[Rollout]]]] = {}
        self._awaited: Future[list[Rollout]] | None = None  # that `sample` waits for

        def choose_device() -> None:  # a thread starts on the first GPU
            if device.type == "cuda":
                torch.cuda.set_device(device)

        self._thread = ThreadPoolExecutor(1, "sampler", initializer=choose_device)

    def prefetch(self, request: SampleRequest) -> None:
        """Starts to generate what `sample` will be asked for later."""
        future = self._thread.submit(self.sampler.sample, request)
        self._ahead[request.step] = (request, future)

    def sample(self, request: SampleRequest) -> list[Rollout]:
        prefetched = self._ahead.pop(request.step, None) if request.stream == "train" else None
        if prefetched is None:
            prefetched = request, self._thread.submit(self.sampler.sample, request)
        asked, self._awaited = prefetched
        assert asked == request, (asked.step, [p.index for p in request.prompts])
        return self._awaited.result()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        self._thread.submit(self.sampler.load_weights, weights, policy_version).result()
        self.policy_version = policy_version

    def close(self) -> None:
        """A generation that nobody will train on is not waited for where it can be ended."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        futures = [self._awaited, *(future for _, future in self._ahead.values())]
        is_busy = any(future is not None and not future.done() for future in futures)
        if is_busy and isinstance(self.sampler, Interruptible):
            self.sampler.interrupt()
        self._thread.shutdown(wait=True)
        self.sampler.close()


class ReplicaAheadSampler(ReplicaSampler):
    """An AheadSampler on the replica's first process, for all of it. Its thread generates while the
    replica trains, and goes through the weights' collectives while that process waits for it."""

    def __init__(
        self, build: Callable[[], Sampler], parallel: Parallel, *, makes_room: bool = False
    ) -> None:
        def ahead() -> Sampler:
            return AheadSampler(build(), parallel.device)

        super().__init__(ahead, parallel, makes_room=makes_room)
        self.policy_version = 0  # of the weights loaded last

    def prefetch(self, request: SampleRequest) -> None:
        """Every process of the replica calls it; the first one starts to generate."""
        if self._parallel.model_rank == 0:
            cast(AheadSampler, self._own).prefetch(request)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        super().load_weights(weights, policy_version)
        self.policy_version = policy_version


class AheadCollector(Collector):
    """A collector that asks its sampler, an AheadSampler or a replica's, for the batches of
    `max_staleness` steps to come."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._asked = 0  # newest step that was asked for

    def collect(self, number: int) -> Experience:
        sampler = self._ahead
        depth, steps = self.config.rollout.max_staleness, self.config.trainer.steps
        size = self.config.batch.prompts_per_step
        for step in range(max(self._asked + 1, number), min(number + depth, steps) + 1):
            first = self.next_prompt + (step - number) * size
            sampler.prefetch(self._request(step, self._share(range(first, first + size))))
            self._asked = step
        experience = super().collect(number)
        return dataclasses.replace(
            experience, metrics={**experience.metrics, **self._staleness(experience.rollouts)}
        )

    @property
    def _ahead(self) -> AheadSampler | ReplicaAheadSampler:
        assert isinstance(self.sampler, AheadSampler | ReplicaAheadSampler)
        return self.sampler

    def _staleness(self, rollouts: list[Rollout]) -> dict[str, float]:
        """rollout/staleness: steps between the weights of the oldest rollout and the newest."""
        oldest = min(r.policy_version for r in rollouts)
        updates = self.config.batch.updates_per_step
        behind = (self._ahead.policy_version - oldest) / updates
        assert behind <= self.config.rollout.max_staleness, (behind, oldest)
        return {"rollout/staleness": behind}
