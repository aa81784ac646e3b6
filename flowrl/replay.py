"""Groups of earlier steps, kept to be trained on again by objectives that are valid off-policy."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flowrl.records import Prompt, Rollout, Score


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, with their scores."""

    rollouts: tuple[Rollout, ...]
    scores: tuple[Score, ...]

    @property
    def index(self) -> int:
        return self.rollouts[0].prompt.index

    @property
    def is_uniform(self) -> bool:
        """All members have one reward: nothing to prefer."""
        return len({score.reward for score in self.scores}) == 1


@dataclass
class ReplayBuffer:
    """First in, first out. The same on every rank, and a function of what was added."""

    capacity: int
    priority: Literal["uniform", "recent", "reward"]
    seed: int
    groups: list[Group] = field(default_factory=list)

    def add(self, groups: Sequence[Group]) -> None:
        self.groups = [*self.groups, *groups][-self.capacity :]

    def draw(self, step: int, count: int) -> list[Group]:
        """At most `count` different groups, a function of (seed, step) and the content.

        priority "reward" takes them in proportion to exp(mean reward), without replacement (the
        largest of log weight + Gumbel noise)."""
        if self.priority == "recent":
            return self.groups[::-1][:count]
        noise = random.Random(f"replay {self.seed} {step}")
        keys = []
        for group in self.groups:
            rewards = [score.reward for score in group.scores]
            weight = sum(rewards) / len(rewards) if self.priority == "reward" else 0.0
            keys.append(weight - math.log(-math.log(noise.random() or 0.5)))
        order = sorted(range(len(keys)), key=lambda i: (-keys[i], i))
        return [self.groups[i] for i in order[:count]]

    def save(self, path: Path) -> None:
        rows = (json.dumps(dataclasses.asdict(group)) for group in self.groups)
        path.write_text("".join(row + "\n" for row in rows))

    def load(self, path: Path) -> None:
        self.groups = [_group(json.loads(line)) for line in path.read_text().splitlines()]


def _group(row: dict) -> Group:
    rollouts = []
    for fields in row["rollouts"]:
        lists = {name: tuple(fields["prompt"][name]) for name in ("token_ids", "messages")}
        prompt = Prompt(**{**fields["prompt"], **lists})
        lists = {name: tuple(fields[name]) for name in ("response_ids", "rollout_logprobs")}
        rollouts.append(Rollout(**{**fields, "prompt": prompt, **lists}))
    return Group(tuple(rollouts), tuple(Score(**score) for score in row["scores"]))
