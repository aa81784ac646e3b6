"""Countdown: write an expression over given numbers that equals the target.

    prompt  "3 5 7=22:"        answer  "3*5+7"

Each number may be used at most once, or with `exact_use` exactly once: four numbers 1..13, target
24 and `exact_use` give the Game of 24. Only solvable problems exist, answers are read by
`flowrl.tasks.expression`, and all solutions are known (`flowrl.tasks.countdown_solver`), so
distinct solutions and mode coverage are exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from random import Random
from typing import Any

from flowrl.config import build_options
from flowrl.records import Prompt, Rollout, Score
from flowrl.schema import require
from flowrl.tasks import Outcome
from flowrl.tasks.countdown_solver import (
    MAX_NUMBER,
    MAX_NUMBERS,
    candidate_forms,
    solvable,
    solve,
)
from flowrl.tasks.expression import Expression, Operation, read_answer, render, value
from flowrl.tasks.splits import Splits, hold_out, random_source

Problem = tuple[tuple[int, ...], int]  # numbers, sorted, and target

_MAX_WORK = 10**8  # multisets x forms, or multisets x targets: seconds, and under 1 GiB


@dataclass(frozen=True)
class Options:
    num_numbers: int = 3
    """Numbers per problem, 2 to 4."""
    low: int = 1
    """Smallest number."""
    high: int = 9
    """Largest number."""
    target_low: int = 1
    """Smallest target."""
    target_high: int = 99
    """Largest target."""
    exact_use: bool = False
    """Use every number exactly once (Game of 24) instead of at most once. At most once leaves out
    targets that are among the numbers: the answer would be a copy."""
    min_solutions: int = 1
    """Leave out problems with fewer solutions; more of them leave more room for diversity."""
    eval_fraction: float = 0.1
    """Share of the problems held out for evaluation; by a hash of each problem. 0: none."""
    seed: int = 0
    """Seed of the split, of the order of training problems and of the pre-training examples."""

    def __post_init__(self) -> None:
        require(
            2 <= self.num_numbers <= MAX_NUMBERS,
            f"task.num_numbers must be 2 to {MAX_NUMBERS}, got {self.num_numbers}; "
            "set task.num_numbers=3",
        )
        require(
            1 <= self.low <= self.high <= MAX_NUMBER,
            f"task.low and task.high must satisfy 1 <= low <= high <= {MAX_NUMBER}, got {self.low} "
            f"and {self.high}; set task.low=1 and task.high=9",
        )
        require(
            0 <= self.target_low <= self.target_high <= 9999,
            "task.target_low and task.target_high must satisfy 0 <= target_low <= target_high <= "
            f"9999, got {self.target_low} and {self.target_high}; set them to 1 and 99",
        )
        require(
            self.min_solutions >= 1,
            f"task.min_solutions must be >= 1, got {self.min_solutions}; set task.min_solutions=1",
        )
        require(
            0 <= self.eval_fraction < 1,
            f"task.eval_fraction must be in [0, 1), got {self.eval_fraction}; "
            "set task.eval_fraction=0.1",
        )
        multisets = comb(self.high - self.low + self.num_numbers, self.num_numbers)
        num_forms = len(candidate_forms(tuple(range(self.num_numbers)), self.exact_use))
        work = max(num_forms, self.target_high - self.target_low + 1)
        require(
            multisets * work <= _MAX_WORK,
            f"task.low..task.high must leave at most {_MAX_WORK // work} multisets to enumerate, "
            f"got {multisets}; lower task.high or task.num_numbers",
        )


@lru_cache(maxsize=8)
def problem_space(options: Options) -> tuple[Problem, ...]:
    """All problems of these options, sorted; computed once per process."""
    found = solvable(
        options.num_numbers,
        range(options.low, options.high + 1),
        range(options.target_low, options.target_high + 1),
        options.exact_use,
        options.min_solutions,
    )
    return tuple((n, t) for n, t in found if options.exact_use or t not in n)


class Countdown:
    name = "countdown"
    alphabet: str | None = "".join(sorted("0123456789+-*/() =:"))

    def __init__(self, options: Options) -> None:
        self.options = options
        problems = problem_space(options)
        train, held = hold_out(problems, _problem_key, options.eval_fraction, options.seed)
        self._splits: Splits[Problem] = Splits(train, held, options.seed)

    def prompt(self, split: str, index: int) -> Prompt:
        numbers, target = problem = self._splits.problem(split, index)
        data = {"problem": _problem_key(problem), "numbers": list(numbers), "target": target}
        return Prompt(index, _prompt_text(problem), data=data)

    def num_prompts(self, split: str) -> int:
        return self._splits.num(split)

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Reward 1 for a right answer, else 0. Any text is an answer, most are wrong ones."""
        return [self._score(rollout.prompt, rollout.text) for rollout in rollouts]

    def _score(self, prompt: Prompt, text: str) -> Score:
        answer = read_answer(text)
        if answer is None or answer.value != prompt.data["target"]:
            return Score(0.0, False)
        used, given = Counter(answer.numbers), Counter(prompt.data["numbers"])
        allowed = used == given if self.options.exact_use else used <= given
        return Score(1.0, True, answer.form) if allowed else Score(0.0, False)

    def solutions(self, prompt: Prompt) -> frozenset[str]:
        numbers = tuple(prompt.data["numbers"])
        return solve(numbers, prompt.data["target"], self.options.exact_use)

    def outcomes(self, prompt: Prompt) -> list[Outcome] | None:
        return None

    def example(self, index: int) -> tuple[str, str]:
        """A training problem and a random expression over its numbers that has a value.

        How many numbers it uses is uniform over 2..n (all of them with `exact_use`), which ones and
        their order is uniform; the tree splits them at a uniform place and its operators are
        uniform. Divisions by zero are redrawn. The target plays no part."""
        random = random_source("countdown example", self.options.seed, index)
        problem = self._splits.train[random.randrange(len(self._splits.train))]
        numbers, _ = problem
        while True:
            least = len(numbers) if self.options.exact_use else 2
            used = random.sample(numbers, random.randint(least, len(numbers)))
            expression = _random_expression(used, random)
            if value(expression) is not None:
                return _prompt_text(problem), render(expression)

    def close(self) -> None:
        return None


def build(options: dict[str, Any], timeout_s: float) -> Countdown:
    """`timeout_s` is not needed: reading an answer is bounded."""
    return Countdown(build_options(Options, options, "task"))


def _problem_key(problem: Problem) -> str:
    numbers, target = problem
    return f"{' '.join(map(str, numbers))}={target}"


def _prompt_text(problem: Problem) -> str:
    return f"{_problem_key(problem)}:"


def _random_expression(numbers: Sequence[int], random: Random) -> Expression:
    if len(numbers) == 1:
        return numbers[0]
    cut = random.randint(1, len(numbers) - 1)
    operator = random.choice("+-*/")
    left = _random_expression(numbers[:cut], random)
    return Operation(operator, left, _random_expression(numbers[cut:], random))
