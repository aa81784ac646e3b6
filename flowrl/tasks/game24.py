"""The Game of 24 in three steps, as Tree of Thoughts and Flow of Reasoning play it.

    prompt  "4 5 6 10:"        answer  "10-4=6,5*6=30,30-6=24"

Each step takes two of the numbers that are left and puts their sum, difference, product or quotient
in their place; after three steps 24 must be left. Values are exact fractions, written 8|3. Sums and
products are written with the larger number first, so that a step has one text. All steps of all
problems are known, and with them all solutions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, combinations_with_replacement
from math import gcd
from typing import Any, Literal

from flowrl.config import build_options
from flowrl.records import Prompt
from flowrl.schema import require
from flowrl.tasks.expression import Expression, Operation, form_text, normal_form
from flowrl.tasks.splits import Splits, random_source, stable_hash
from flowrl.tasks.step_task import SEPARATOR, State, StepTask

Number = tuple[int, int]  # numerator, denominator > 0, in lowest terms
Numbers = tuple[Number, ...]  # sorted as tuples: a multiset

TARGET: Number = (24, 1)
STRATA = (2, 6, 21, 61)  # numbers of solutions at which the next stratum of the split begins


@dataclass(frozen=True)
class Options:
    low: int = 1
    """Smallest number."""
    high: int = 13
    """Largest number."""
    min_solutions: int = 4
    """Leave out problems with fewer solutions (ways to reach 24); 1: all solvable ones."""
    solution: Literal["trajectory", "expression", "operations"] = "trajectory"
    """When two right answers are one solution: trajectory (the same steps), expression (the same up
    to commuting and re-associating) or operations (the same operators used)."""
    eval_fraction: float = 0.2
    """Share of the problems held out, alike among problems with few and with many solutions."""
    max_outcomes: int = 4000
    """Exact distances for problems with at most so many answers (the most is 3888); 0: none."""
    seed: int = 0
    """Seed of the split, of the order of training problems and of the pre-training examples."""

    def __post_init__(self) -> None:
        require(
            1 <= self.low <= self.high <= 20,
            "task.low and task.high must satisfy 1 <= low <= high <= 20, got "
            f"{self.low} and {self.high}; set task.low=1 and task.high=13",
        )
        require(
            self.min_solutions >= 1,
            f"task.min_solutions must be >= 1, got {self.min_solutions}; set task.min_solutions=4",
        )
        require(
            0 < self.eval_fraction < 1,
            f"task.eval_fraction must be in (0, 1), got {self.eval_fraction}; "
            "set task.eval_fraction=0.2",
        )
        require(
            self.max_outcomes >= 0,
            f"task.max_outcomes must be >= 0, got {self.max_outcomes}; set task.max_outcomes=4000",
        )


@lru_cache(maxsize=8)
def problem_space(low: int, high: int) -> dict[tuple[int, ...], int]:
    """Every hand of four numbers and in how many ways it reaches 24; computed once per process."""
    memo: dict[Numbers, int] = {}
    hands = combinations_with_replacement(range(low, high + 1), 4)
    return {hand: _num_solutions(tuple((n, 1) for n in hand), memo) for hand in hands}


class Game24(StepTask):
    name = "game24"
    alphabet = "".join(sorted("0123456789+-*/=|,: "))

    def __init__(self, options: Options) -> None:
        super().__init__(options.max_outcomes)
        self.options = options
        counts = problem_space(options.low, options.high)
        kept = {hand: count for hand, count in counts.items() if count >= options.min_solutions}
        train, held = _stratified(kept, options.eval_fraction, options.seed)
        require(
            bool(train and held),
            f"the split must leave problems on both sides, got {len(train)} for training and "
            f"{len(held)} held out; change task.eval_fraction or widen task.low..task.high",
        )
        self._splits: Splits[tuple[int, ...]] = Splits(train, held, options.seed)

    def prompt(self, split: str, index: int) -> Prompt:
        hand = self._splits.problem(split, index)
        return Prompt(index, f"{_key(hand)}:", data={"problem": _key(hand), "numbers": list(hand)})

    def num_prompts(self, split: str) -> int:
        return self._splits.num(split)

    def example(self, index: int) -> tuple[str, str]:
        """A training problem and three legal steps, each uniform over the legal ones."""
        random = random_source("game24 example", self.options.seed, index)
        hand = self._splits.train[random.randrange(len(self._splits.train))]
        return f"{_key(hand)}:", self.random_answer({"numbers": hand}, random)

    def start(self, data: Mapping[str, Any]) -> State:
        return tuple(sorted((n, 1) for n in data["numbers"]))

    def moves(self, state: State) -> dict[str, State]:
        assert isinstance(state, tuple)
        return {_text(step): after for step, after in steps(state)} if len(state) > 1 else {}

    def reward(self, state: State) -> float:
        return float(state == (TARGET,))

    def solution(self, data: Mapping[str, Any], text: str) -> str:
        if self.options.solution == "trajectory":
            return text
        expression = as_expression(data["numbers"], text)
        if self.options.solution == "expression":
            return form_text(normal_form(expression))
        return "".join(sorted(_operators(expression)))


def _stratified(
    counts: Mapping[tuple[int, ...], int], fraction: float, seed: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(train, held out): the same share of every stratum of solution counts; both in hash order."""
    ranked = sorted(counts, key=lambda hand: stable_hash("game24 split", seed, _key(hand)))
    strata: dict[int, list[tuple[int, ...]]] = {}
    for hand in ranked:
        strata.setdefault(bisect_right(STRATA, counts[hand]), []).append(hand)
    held = {hand for hands in strata.values() for hand in hands[: round(fraction * len(hands))]}
    return [h for h in ranked if h not in held], [h for h in ranked if h in held]


Step = tuple[Number, str, Number, Number]  # left, operator, right, result


def steps(numbers: Numbers) -> list[tuple[Step, Numbers]]:
    """Every step over two of the numbers, once, and the numbers that it leaves."""
    found: dict[Step, Numbers] = {}
    for i, j in combinations(range(len(numbers)), 2):
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        for step in _steps_of_two(numbers[i], numbers[j]):
            found.setdefault(step, tuple(sorted([*rest, step[3]])))
    return list(found.items())


def _steps_of_two(a: Number, b: Number) -> list[Step]:
    if a[0] * b[1] < b[0] * a[1]:
        a, b = b, a  # a is the larger
    (an, ad), (bn, bd) = a, b
    found = [
        (a, "+", b, _lowest(an * bd + bn * ad, ad * bd)),
        (a, "-", b, _lowest(an * bd - bn * ad, ad * bd)),
        (a, "*", b, _lowest(an * bn, ad * bd)),
    ]
    if bn:
        found.append((a, "/", b, _lowest(an * bd, ad * bn)))
    if a != b:
        found.append((b, "-", a, _lowest(bn * ad - an * bd, ad * bd)))
        if an:
            found.append((b, "/", a, _lowest(bn * ad, bd * an)))
    return found


def _lowest(numerator: int, denominator: int) -> Number:
    if denominator < 0:
        numerator, denominator = -numerator, -denominator
    divisor = gcd(numerator, denominator)
    return numerator // divisor, denominator // divisor


def _num_solutions(numbers: Numbers, memo: dict[Numbers, int]) -> int:
    """Sequences of steps that end at 24, without the texts."""
    if numbers in memo:
        return memo[numbers]
    if len(numbers) == 2:
        count = sum(step[3] == TARGET for step in _steps_of_two(*numbers))
    else:
        count = sum(_num_solutions(after, memo) for _, after in steps(numbers))
    memo[numbers] = count
    return count


def as_expression(numbers: list[int], text: str) -> Expression:
    """The expression that the steps of a legal answer build. Of two equal numbers a step takes the
    one made last."""
    made: list[tuple[Number, Expression]] = [((n, 1), n) for n in numbers]
    for action in text.split(SEPARATOR):
        step = _read(action)
        sides = []
        for wanted in (step[0], step[2]):
            place = max(i for i, (value, _) in enumerate(made) if value == wanted)
            sides.append(made.pop(place)[1])
        made.append((step[3], Operation(step[1], sides[0], sides[1])))
    return made[-1][1]


def _read(action: str) -> Step:
    left_side, result = action.split("=")
    operator_at = next(i for i, c in enumerate(left_side) if i and c in "+-*/")
    left, right = left_side[:operator_at], left_side[operator_at + 1 :]
    return _number(left), left_side[operator_at], _number(right), _number(result)


def _number(text: str) -> Number:
    numerator, _, denominator = text.partition("|")
    return int(numerator), int(denominator or 1)


def _text(step: Step) -> str:
    left, operator, right, result = step
    return f"{_number_text(left)}{operator}{_number_text(right)}={_number_text(result)}"


def _number_text(number: Number) -> str:
    return str(number[0]) if number[1] == 1 else f"{number[0]}|{number[1]}"


def _operators(expression: Expression) -> list[str]:
    if isinstance(expression, int):
        return []
    sides = _operators(expression.left) + _operators(expression.right)
    return [expression.operator, *sides]


def _key(hand: tuple[int, ...]) -> str:
    return " ".join(map(str, hand))


def build(options: dict[str, Any], timeout_s: float) -> Game24:
    """`timeout_s` is not needed: an answer is looked up step by step."""
    return Game24(build_options(Options, options, "task"))
