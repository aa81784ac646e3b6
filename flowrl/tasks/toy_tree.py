"""The toy tree: digits 2 3 5 7 that add up to 12, at most four of them. One prompt, 341 answers.

    prompt  ":"        answer  "75" (7 + 5 = 12, right), "3333" (right), "57" (right), "2" (wrong)

An answer has 0 to 4 digits, so there are 1 + 4 + 16 + 64 + 256 = 341; 24 are right, with 2, 3 or 4
digits. With rollout.max_new_tokens = 4 the tree ends by itself: an answer of four digits is cut
there, without EOS, and no ill-formed answer exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal

from flowrl.config import build_options
from flowrl.records import Prompt, Rollout, Score
from flowrl.tasks import Outcome
from flowrl.tasks.splits import random_source

PROMPT = ":"
DIGITS = "2357"
DEPTH = 4
TOTAL = 12
STOP = 0.2  # chance of each pre-training answer to end before its next digit
WEIGHTS = (0.3, 0.1, 0.4, 0.2)  # of the digits, uneven so that ignoring the reference shows


@dataclass(frozen=True)
class Options:
    reward: Literal["binary", "graded"] = "binary"
    """binary: 1 for a right answer, else 0. graded: also 0.5 for a sum of 11 or 13."""
    seed: int = 0
    """Seed of the pre-training examples."""


class ToyTree:
    name = "toy_tree"
    alphabet: str | None = DIGITS + PROMPT

    def __init__(self, options: Options) -> None:
        self.options = options

    def prompt(self, split: str, index: int) -> Prompt:
        if split not in ("train", "eval") or index < 0 or (split == "eval" and index > 0):
            raise ValueError(f"toy_tree has prompt 0 of eval and any of train, got {split} {index}")
        return Prompt(index, PROMPT, data={"problem": PROMPT})

    def num_prompts(self, split: str) -> int:
        return 1

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        wrong = Outcome("", 0.0)
        found = [self._table.get(rollout.text, wrong) for rollout in rollouts]
        return [Score(o.reward, o.solution is not None, o.solution) for o in found]

    def solutions(self, prompt: Prompt) -> frozenset[str]:
        return frozenset(o.solution for o in self._table.values() if o.solution is not None)

    def outcomes(self, prompt: Prompt) -> list[Outcome]:
        return list(self._table.values())

    @cached_property
    def _table(self) -> dict[str, Outcome]:
        texts = ("".join(t) for size in range(DEPTH + 1) for t in product(DIGITS, repeat=size))
        return {text: self._outcome(text) for text in texts}

    def _outcome(self, text: str) -> Outcome:
        miss = abs(sum(map(int, text)) - TOTAL)
        if miss == 0:
            return Outcome(text, 1.0, text)
        return Outcome(text, 0.5 if miss == 1 and self.options.reward == "graded" else 0.0)

    def example(self, index: int) -> tuple[str, str]:
        """Digits by WEIGHTS until STOP or four: right with probability 0.0566, and the right ones
        uneven, exp(entropy) = 14.8 of 24."""
        random = random_source("toy_tree example", self.options.seed, index)
        answer = ""
        while len(answer) < DEPTH and random.random() >= STOP:
            answer += random.choices(DIGITS, WEIGHTS)[0]
        return PROMPT, answer

    def close(self) -> None:
        return None


def build(options: dict[str, Any], timeout_s: float) -> ToyTree:
    """`timeout_s` is not needed: scoring is a table look-up."""
    return ToyTree(build_options(Options, options, "task"))
