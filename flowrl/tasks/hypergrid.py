"""The hypergrid of the GFlowNet papers as text: a cell of an H^D grid, rewarded by R(cell).

    R(x) = R0 + 0.5 prod_d 1[|x_d/(H-1) - .5| > .25] + 2 prod_d 1[.3 < |x_d/(H-1) - .5| < .4]

    coordinates   prompt ":"   answer "16"      D digits in base 36: the cell (1, 6)
    increments    prompt ":"   answer "abba"    a step along axis a, b, ...: the cell (2, 2)

The cells that the last product selects are the modes: 2^D blocks, one a corner. The reward is
log R, so at beta = 1 and a uniform reference the target is R / sum R exactly. Many paths of
increments end in one cell; the log-probability of the path under a uniform backward policy is
added to their reward, without which the target would be R times the number of paths.

Source: arXiv:2106.04399, section 4.1, with the constants of its code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Any, Literal

from flowrl.config import build_options
from flowrl.records import Prompt, Rollout, Score
from flowrl.schema import require
from flowrl.tasks import Outcome
from flowrl.tasks.splits import random_source

PROMPT = ":"
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
AXES = "abcdef"
MAX_OUTCOMES = 20_000  # answers that are still listed
Cell = tuple[int, ...]


@dataclass(frozen=True)
class Options:
    H: int = 8
    """Cells along an axis, 2 to 36."""
    D: int = 2
    """Axes, 1 to 6."""
    R0: float = 0.1
    """Reward of the plain; the smaller, the further apart the modes."""
    encoding: Literal["coordinates", "increments"] = "coordinates"
    """An answer is the cell's coordinates, or the steps of a path from the origin to it."""
    reward: Literal["log", "plain"] = "log"
    """log R, to be matched at beta = 1, or R itself, for objectives that maximise."""
    backward: Literal["uniform", "none"] = "uniform"
    """Of increments: the backward policy whose log-probability is added to log R. none: a path is
    rewarded by its cell alone, so a cell's share grows with the number of its paths."""
    seed: int = 0
    """Seed of the pre-training examples."""

    def __post_init__(self) -> None:
        require(2 <= self.H <= 36, f"task.H must be 2 to 36, got {self.H}; set task.H=8")
        require(1 <= self.D <= len(AXES), f"task.D must be 1 to 6, got {self.D}; set task.D=2")
        require(self.R0 > 0, f"task.R0 must be > 0, got {self.R0}; set task.R0=0.1")
        require(
            self.backward == "uniform" or self.encoding == "increments",
            "task.backward=none has no effect with encoding=coordinates, where a cell has one "
            "path; set task.encoding=increments or leave it out",
        )
        require(
            self.encoding == "coordinates" or self.H**self.D <= MAX_OUTCOMES,
            f"task.encoding=increments needs at most {MAX_OUTCOMES} cells, got {self.H}^{self.D}; "
            "set task.encoding=coordinates",
        )
        require(
            self.reward == "log" or self.encoding == "coordinates",
            "task.reward=plain takes no backward policy and needs encoding=coordinates, got "
            f"{self.encoding}; set task.encoding=coordinates or task.reward=log",
        )


class Hypergrid:
    name = "hypergrid"

    def __init__(self, options: Options) -> None:
        self.options = options
        letters = DIGITS[: options.H] if self._by_coordinates else AXES[: options.D]
        self.alphabet: str | None = letters + PROMPT

    @property
    def _by_coordinates(self) -> bool:
        return self.options.encoding == "coordinates"

    def prompt(self, split: str, index: int) -> Prompt:
        if split not in ("train", "eval") or index < 0 or (split == "eval" and index > 0):
            raise ValueError(
                f"hypergrid has prompt 0 of eval and any of train, got {split} {index}"
            )
        return Prompt(index, PROMPT, data={"problem": PROMPT})

    def num_prompts(self, split: str) -> int:
        return 1

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """A text that names no cell gets the reward of the least cell, and is wrong."""
        return [self._score(rollout.text) for rollout in rollouts]

    def _score(self, text: str) -> Score:
        cell = self._cell(text)
        if cell is None:
            return Score(self._worst, False)
        mode = self._mode(cell)
        return Score(self._reward(text, cell), mode is not None, mode)

    def solutions(self, prompt: Prompt) -> frozenset[str] | None:
        """The modes, named by corner: "00", "01", "10", "11"; None of a grid without any."""
        corners = {"0", "1"} if any(map(self._in_mode, range(self.options.H))) else set()
        return frozenset("".join(c) for c in product(corners, repeat=self.options.D)) or None

    def outcomes(self, prompt: Prompt) -> list[Outcome] | None:
        """Every cell, or every path; None past MAX_OUTCOMES."""
        if self._num_outcomes > MAX_OUTCOMES:
            return None
        return [
            Outcome(text, self._reward(text, cell), self._mode(cell))
            for cell in product(range(self.options.H), repeat=self.options.D)
            for text in self._texts(cell)
        ]

    def example(self, index: int) -> tuple[str, str]:
        """A cell, or a path, drawn uniformly from all: then the target is exact in R."""
        random = random_source("hypergrid example", self.options.seed, index)
        H, D = self.options.H, self.options.D
        if self._by_coordinates:
            return PROMPT, "".join(DIGITS[random.randrange(H)] for _ in range(D))
        cells = list(self._num_paths)
        cell = random.choices(cells, [self._num_paths[c] for c in cells])[0]
        steps = [AXES[d] for d, x in enumerate(cell) for _ in range(x)]
        random.shuffle(steps)
        return PROMPT, "".join(steps)

    def close(self) -> None:
        return None

    # --- cells

    def _cell(self, text: str) -> Cell | None:
        """The cell that a text names, or None."""
        H, D = self.options.H, self.options.D
        if self._by_coordinates:
            cell = tuple(DIGITS.find(c) for c in text[: D + 1])
            return cell if len(cell) == D and all(0 <= x < H for x in cell) else None
        if len(text) > D * (H - 1) or set(text) - set(AXES[:D]):
            return None
        cell = tuple(text.count(axis) for axis in AXES[:D])
        return cell if max(cell) < H else None

    def _texts(self, cell: Cell) -> Iterator[str]:
        if self._by_coordinates:
            yield "".join(DIGITS[x] for x in cell)
            return
        yield from _paths(cell)

    def plain_reward(self, cell: Cell) -> float:
        """R, with integer membership: in floats x/(H-1) - .5 = .3 falls on either side."""
        far = all(4 * self._off(x) > 2 * (self.options.H - 1) for x in cell)
        return self.options.R0 + 0.5 * far + 2.0 * all(map(self._in_mode, cell))

    def _off(self, x: int) -> int:
        """2 (H - 1) |x / (H - 1) - .5|."""
        return abs(2 * x - (self.options.H - 1))

    def _in_mode(self, x: int) -> bool:
        return 6 * (self.options.H - 1) < 10 * self._off(x) < 8 * (self.options.H - 1)

    def _mode(self, cell: Cell) -> str | None:
        if not all(map(self._in_mode, cell)):
            return None
        return "".join("1" if 2 * x > self.options.H - 1 else "0" for x in cell)

    def _reward(self, text: str, cell: Cell) -> float:
        plain = self.plain_reward(cell)
        if self.options.reward == "plain":
            return plain
        backward = 0.0
        if not self._by_coordinates and self.options.backward == "uniform":
            backward = log_backward(text)
        return math.log(plain) + backward

    @property
    def _worst(self) -> float:
        if self.options.reward == "plain":
            return 0.0
        steps = 0 if self._by_coordinates else self.options.D * (self.options.H - 1)
        return math.log(self.options.R0) - steps * math.log(self.options.D)

    @cached_property
    def _num_paths(self) -> dict[Cell, int]:
        cells = product(range(self.options.H), repeat=self.options.D)
        return {cell: _multinomial(cell) for cell in cells}

    @property
    def _num_outcomes(self) -> int:
        if self._by_coordinates:
            return self.options.H**self.options.D
        return sum(self._num_paths.values())


def log_backward(path: str) -> float:
    """log P_B of a path under the uniform backward policy: a cell's parents are as many as it has
    coordinates above 0, and each is as likely."""
    seen: set[str] = set()
    total = 0.0
    for step in path:
        seen.add(step)
        total -= math.log(len(seen))
    return total


@cache
def _paths(cell: Cell) -> tuple[str, ...]:
    """All words with cell[d] letters of axis d, by their last step."""
    if not any(cell):
        return ("",)
    return tuple(
        path + AXES[d]
        for d, x in enumerate(cell)
        if x
        for path in _paths((*cell[:d], x - 1, *cell[d + 1 :]))
    )


def _multinomial(cell: Cell) -> int:
    return math.factorial(sum(cell)) // math.prod(map(math.factorial, cell))


def build(options: dict[str, Any], timeout_s: float) -> Hypergrid:
    """`timeout_s` is not needed: scoring is arithmetic."""
    return Hypergrid(build_options(Options, options, "task"))
