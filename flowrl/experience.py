"""What a step trains on: prompts are taken from the stream, sampled and scored; where [loop] says
so, groups without a difference are left out and earlier ones come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from flowrl import metrics as measure
from flowrl.config import Config
from flowrl.data.prompts import encode_prompts
from flowrl.loop_config import LoopConfig
from flowrl.parallel import Parallel
from flowrl.records import Actions, Rollout, SampleRequest, Score
from flowrl.replay import Group, ReplayBuffer
from flowrl.rollout import Sampler
from flowrl.scores import score_all
from flowrl.tasks import Task

Item = TypeVar("Item")
REPLAY_FILE = "replay.jsonl"


@dataclass(frozen=True)
class Expansion:
    """The legal actions of the states that trajectories visit, as sequences of their own."""

    sequences: list[Rollout]
    owners: list[int]  # the trajectory of each
    actions: Actions


@dataclass(frozen=True)
class Experience:
    """This rank's share of a step: whole groups, update by update."""

    rollouts: list[Rollout]
    scores: list[Score]
    metrics: dict[str, float] = field(default_factory=dict)  # of all ranks
    expansion: Expansion | None = None

    @property
    def sequences(self) -> list[Rollout]:
        """What the loss is a sum over: the rollouts, or what they were expanded to."""
        return self.rollouts if self.expansion is None else self.expansion.sequences

    @property
    def sequence_scores(self) -> list[Score]:
        if self.expansion is None:
            return self.scores
        return [self.scores[owner] for owner in self.expansion.owners]


class Collector:
    """Groups for one step after another. Where the stream stands, and the replay buffer, are its
    state: `state` and `save` give what a resume needs."""

    def __init__(
        self,
        config: Config,
        parallel: Parallel,
        task: Task,
        tokenizer: Any,
        sampler: Sampler,
        watch: Callable[[str], AbstractContextManager[None]],
        expand: Callable[[Experience], Experience] = lambda experience: experience,
    ) -> None:
        self.config = config
        self.parallel = parallel
        self.task = task
        self.tokenizer = tokenizer
        self.sampler = sampler
        self.watch = watch
        self.expand = expand
        self.next_prompt = 0  # position in the task's training stream
        self.generated_tokens = 0  # on this rank, since `take_generated`
        loop = config.loop
        self.buffer = None
        if loop.replay_fraction:
            assert loop.replay_capacity is not None, "assembly.resolve fills it"
            assert loop.replay_priority is not None
            self.buffer = ReplayBuffer(loop.replay_capacity, loop.replay_priority, config.seed)

    def collect(self, number: int) -> Experience:
        """The experience of step `number` (1, 2, ...); every rank calls it."""
        return self.expand(self._collect(number))

    def _collect(self, number: int) -> Experience:
        count = self.config.batch.prompts_per_step
        if not self.config.loop.shares_groups:
            groups, errors = self._sample(number, self._share(self._take(count)))
            self._check_errors(errors, len(groups))
            return _experience(groups)
        replayed = self._replayed(number, count)
        fresh, metrics = self._fresh(number, count - len(replayed))
        if self.buffer is not None:
            self.buffer.add(fresh)
            metrics["reward/replayed_frac"] = len(replayed) / count
        return _experience(self._share([*fresh, *replayed]), metrics)

    # --- the stream

    def _take(self, count: int) -> list[int]:
        first, self.next_prompt = self.next_prompt, self.next_prompt + count
        return list(range(first, first + count))

    def _share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's share of every update of the step, update by update."""
        size = self.config.batch.prompts_per_update
        share = self.parallel.share(size)
        starts = range(0, len(items), size)
        return [item for start in starts for item in items[start : start + size][share]]

    def _sample(self, number: int, indices: Sequence[int]) -> tuple[list[Group], list[str]]:
        """Groups of the prompts at `indices`, and what scorers reported as errors."""
        if not indices:
            return [], []
        size = self.config.batch.group_size
        with self.watch("generate"):
            rollouts = self.sampler.sample(self._request(number, indices))
        self.generated_tokens += sum(len(rollout.response_ids) for rollout in rollouts)
        with self.watch("reward"):
            scores = score_all(self.task, rollouts)
        groups = [
            Group(tuple(rollouts[start : start + size]), tuple(scores[start : start + size]))
            for start in range(0, len(rollouts), size)
        ]
        return groups, [s.error for s in scores if s.error]

    def take_generated(self) -> int:
        """Response tokens that this rank sampled since the last call, kept in the step or not."""
        taken, self.generated_tokens = self.generated_tokens, 0
        return taken

    def _request(self, number: int, indices: Sequence[int]) -> SampleRequest:
        prompts = encode_prompts(
            [self.task.prompt("train", index) for index in indices],
            self.tokenizer,
            self.config.rollout.max_prompt_tokens,
        )
        return SampleRequest(
            prompts=prompts,
            group_size=self.config.batch.group_size,
            max_new_tokens=self.config.rollout.max_new_tokens,
            temperature=self.config.rollout.temperature,
            top_p=1.0,
            seed=self.config.seed,
            step=number,
        )

    def _check_errors(self, errors: Sequence[str], num_groups: int) -> None:
        counts = torch.tensor([len(errors), num_groups * self.config.batch.group_size]).double()
        totals = self.parallel.all_reduce(counts)
        limit = self.config.reward.max_error_rate
        measure.error_rate(float(totals[0]), float(totals[1]), errors, limit)

    # --- groups of all ranks

    def _replayed(self, number: int, count: int) -> list[Group]:
        if self.buffer is None:
            return []
        return self.buffer.draw(number, int(count * (self.config.loop.replay_fraction or 0)))

    def _fresh(self, number: int, count: int) -> tuple[list[Group], dict[str, float]]:
        """`count` new groups in the order of the stream, alike on every rank."""
        if not self.config.loop.dynamic_sampling:
            return self._gather(number, self._take(count)), {}
        kept: list[Group] = []
        left_out: list[Group] = []
        rewards: list[float] = []
        rounds = 0
        while len(kept) < count and rounds < self.config.loop.max_sampling_rounds:
            for group in self._gather(number, self._take(count)):
                (left_out if group.is_uniform else kept).append(group)
                rewards += [score.reward for score in group.scores]
            rounds += 1
        filled = max(0, count - len(kept))
        metrics = {
            "reward/generated_mean": sum(rewards) / len(rewards),
            "reward/kept_frac": len(kept) / (len(kept) + len(left_out)),
            "reward/filled_frac": filled / count,
            "reward/sampling_rounds": float(rounds),
        }
        return [*kept[:count], *left_out[:filled]], metrics

    def _gather(self, number: int, indices: Sequence[int]) -> list[Group]:
        mine = indices[self.parallel.rank :: self.parallel.world_size]
        groups, errors = self._sample(number, mine)
        self._check_errors(errors, len(groups))
        shares = self.parallel.gather(groups)
        return sorted((group for share in shares for group in share), key=lambda g: g.index)

    # --- state

    def state(self) -> dict[str, Any]:
        return {"next_prompt": self.next_prompt}

    def save(self, directory: Path) -> None:
        """The replay buffer's file, by rank 0: every rank's buffer is the same."""
        if self.buffer is not None and self.parallel.is_main:
            self.buffer.save(directory / REPLAY_FILE)

    def load(self, state: Mapping[str, Any], directory: Path) -> None:
        self.next_prompt = state["next_prompt"]
        if self.buffer is not None:
            self.buffer.load(directory / REPLAY_FILE)


def _experience(groups: Sequence[Group], metrics: dict[str, float] | None = None) -> Experience:
    return Experience(
        [rollout for group in groups for rollout in group.rollouts],
        [score for group in groups for score in group.scores],
        metrics or {},
    )


def shaped_rewards(
    rewards: Tensor,  # (N,) the task's own
    lengths: Tensor,  # (N,) response tokens, EOS included
    truncated: Tensor,  # (N,) bool
    loop: LoopConfig,
    max_new_tokens: int,
    step: int = 1,
) -> Tensor:  # (N,)
    """Rewards after what [loop] does to truncated and overlong responses, and its scale at `step`.

    buffer B = overlong_buffer * max_new_tokens:  r += penalty * min(0, (max - B - length) / B)
    Sources: DAPO, arXiv:2503.14476, eq. 13; the truncation rule: ProRL v2 (docs/loop.md)."""
    keep, buffer = loop.truncated_reward, loop.overlong_buffer
    assert keep is not None, "assembly.resolve fills it"
    replaced = rewards * keep if keep >= 0 else torch.full_like(rewards, keep)
    shaped = torch.where(truncated, replaced, rewards)
    if buffer:
        size = buffer * max_new_tokens
        over = (max_new_tokens - size - lengths) / size
        shaped = shaped + loop.overlong_penalty * over.clamp(max=0.0).to(shaped.dtype)
    return shaped * loop.reward_scale(step)
