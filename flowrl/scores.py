"""What a task says of answers, checked before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from flowrl.records import Rollout, Score
from flowrl.schema import ConfigError


class Scorer(Protocol):
    name: str

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]: ...


def score_all(task: Scorer, rollouts: Sequence[Rollout]) -> list[Score]:
    """`task.score`, each reward a finite float and `correct` a bool; a reward that is none is a
    failure of the scorer. Raises ConfigError for another number of scores than of rollouts."""
    scores = task.score(rollouts)
    if not isinstance(scores, Sequence) or len(scores) != len(rollouts):
        what = f"{len(scores)} scores" if isinstance(scores, Sequence) else repr(scores)[:60]
        raise ConfigError(
            f"score() of task {task.name} gave {what} for {len(rollouts)} rollouts; return a list "
            "with one for each, in order"
        )
    return [_checked(score) for score in scores]


def _checked(score: Score) -> Score:
    try:
        reward = float(score.reward)
    except (TypeError, ValueError):
        reward = math.nan
    if not math.isfinite(reward):
        return Score(0.0, False, error=score.error or f"the reward is {score.reward}")
    return Score(reward, bool(score.correct), score.solution, score.error)
