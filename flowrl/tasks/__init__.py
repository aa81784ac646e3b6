"""Tasks: where prompts come from, how answers are scored and, where known, all right answers.

A task is one file with an `Options` dataclass and a class that follows `Task`. Shipped ones are found
by name; a user's own by the path of its file (`--task.name path/to/my_task.py`), which must define
`build(options: dict) -> Task`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flowrl.records import Prompt, Rollout, Score


@dataclass(frozen=True)
class Outcome:
    """One well-formed answer to a prompt and its reward, for exact targets."""

    text: str
    reward: float


class Task(Protocol):
    """What the trainer asks of a task. Everything random is a function of the arguments."""

    name: str
    alphabet: str | None
    """Characters of prompts and answers, for the base model's tokenizer; None: needs model.path."""

    def prompt(self, split: str, index: int) -> Prompt:
        """The index-th problem of `split` ("train" or "eval"), without token ids.

        Training streams are endless: an index past the end starts the next epoch, in another order.
        The two splits never share a problem, unless the user's files do."""
        ...

    def num_prompts(self, split: str) -> int:
        """Distinct problems in `split`."""
        ...

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Rewards, in order. A scorer that fails sets Score.error; it never passes for a reward."""
        ...

    def solutions(self, prompt: Prompt) -> frozenset[str] | None:
        """Canonical forms of all right answers, or None where they cannot be enumerated."""
        ...

    def outcomes(self, prompt: Prompt) -> list[Outcome] | None:
        """Every well-formed answer with its reward, where few enough to score; otherwise None."""
        ...

    def example(self, index: int) -> tuple[str, str] | None:
        """The index-th pre-training pair (prompt text, well-formed answer, right only by chance),
        from training problems only; None where the task has no base model of its own."""
        ...

    def close(self) -> None:
        """Ends the task's processes, if it has any."""
        ...


def build_task(name: str, options: dict[str, Any], timeout_s: float) -> Task:
    """The task called `name`, with checked options. Raises ConfigError with the nearest name."""
    raise NotImplementedError
