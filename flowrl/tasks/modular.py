"""Modular equations: find x and y with a*x + y = c (mod p). Small enough to tabulate the policy.

    prompt  "3 5" (a=3, c=5)        answer  "16" (x=1, y=6; p=7: 3*1 + 6 = 9 = 2, so wrong)

Digits are base 36, one character each. There are p*p prompts, p*p answers to each and p right ones
(one y for every x), so the exact target pi_ref exp(beta r)/Z is a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowrl.config import build_options
from flowrl.records import Prompt, Rollout, Score
from flowrl.schema import require
from flowrl.tasks import Outcome
from flowrl.tasks.splits import Splits, hold_out, random_source

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
Problem = tuple[int, int]  # a, c


@dataclass(frozen=True)
class Options:
    p: int = 7
    """Modulus, 2 to 36; need not be prime."""
    held_out: float = 0.0
    """Share of the prompts kept from training for evaluation. 0: both splits are all prompts."""
    seed: int = 0
    """Seed of the split, of the order of training problems and of the pre-training examples."""

    def __post_init__(self) -> None:
        require(2 <= self.p <= 36, f"task.p must be 2 to 36, got {self.p}; set task.p=7")
        require(
            0 <= self.held_out < 1,
            f"task.held_out must be in [0, 1), got {self.held_out}; set task.held_out=0",
        )


class Modular:
    name = "modular"

    def __init__(self, options: Options) -> None:
        self.options = options
        p = options.p
        self.alphabet: str | None = "".join(sorted(" " + DIGITS[:p]))
        problems = [(a, c) for a in range(p) for c in range(p)]
        train, held = hold_out(problems, _prompt_text, options.held_out, options.seed)
        self._splits: Splits[Problem] = Splits(train, held or train, options.seed)
        self._weights = [(x + 1) ** -1.5 for x in range(p)]

    def prompt(self, split: str, index: int) -> Prompt:
        a, c = problem = self._splits.problem(split, index)
        return Prompt(
            index,
            _prompt_text(problem),
            data={"problem": _prompt_text(problem), "a": a, "c": c},
        )

    def num_prompts(self, split: str) -> int:
        return self._splits.num(split)

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Reward 1 for exactly the two digits of a right answer, else 0."""
        return [
            Score(1.0, True, rollout.text)
            if rollout.text in self.solutions(rollout.prompt)
            else Score(0.0, False)
            for rollout in rollouts
        ]

    def solutions(self, prompt: Prompt) -> frozenset[str]:
        a, c, p = prompt.data["a"], prompt.data["c"], self.options.p
        return frozenset(DIGITS[x] + DIGITS[(c - a * x) % p] for x in range(p))

    def outcomes(self, prompt: Prompt) -> list[Outcome]:
        right = self.solutions(prompt)
        digits = DIGITS[: self.options.p]
        texts = [x + y for x in digits for y in digits]
        return [Outcome(t, 1.0, t) if t in right else Outcome(t, 0.0) for t in texts]

    def example(self, index: int) -> tuple[str, str]:
        """A training prompt and an answer that is right with probability 2/p, twice chance.

            P(x) = (x + 1)^-1.5 / sum,    P(y | x) = 1/p + [y is right] / (p - 1) - 1 / (p (p - 1))

        that is: y is the right one with probability 1/(p - 1), otherwise uniform over all p. For
        p = 7: success 0.286, and the right answers are as uneven as x: exp(entropy) = 4.2 of 7."""
        random = random_source("modular example", self.options.seed, index)
        p = self.options.p
        a, c = problem = self._splits.train[random.randrange(len(self._splits.train))]
        x = random.choices(range(p), self._weights)[0]
        right = random.random() < 1 / (p - 1)
        y = (c - a * x) % p if right else random.randrange(p)
        return _prompt_text(problem), DIGITS[x] + DIGITS[y]

    def close(self) -> None:
        return None


def build(options: dict[str, Any], timeout_s: float) -> Modular:
    """`timeout_s` is not needed: scoring is a table look-up."""
    return Modular(build_options(Options, options, "task"))


def _prompt_text(problem: Problem) -> str:
    a, c = problem
    return f"{DIGITS[a]} {DIGITS[c]}"
