"""Blocks World: move an arm until the blocks stand as wanted, in a limited number of steps.

    prompt  "a cb>ab c 4:"     stacks from bottom to top, now > wanted, and the steps allowed
    answer  "Ubc,Sba"          U unstack b from c, S stack b on a, T take from, D put on the table

An answer is complete when the goal stands or the steps are used up. The steps allowed are those of
a shortest plan and `slack` more: shortest plans are nearly unique, so slack is the room for
diversity. All plans are counted, and exact targets computed, over (blocks, steps left).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flowrl.config import build_options
from flowrl.records import Prompt
from flowrl.schema import require
from flowrl.tasks.splits import Splits, hold_out, random_source
from flowrl.tasks.step_task import State, StepTask

Stacks = tuple[str, ...]  # each from bottom to top, sorted
Arm = str  # the block held, or ""
Blocks = tuple[Stacks, Arm]
Problem = tuple[Stacks, Stacks, int]  # now, wanted, steps of a shortest plan


@dataclass(frozen=True)
class Options:
    num_blocks: int = 3
    """Blocks, 2 to 4."""
    slack: int = 2
    """Steps allowed beyond a shortest plan; even, since the arm is full after every other step."""
    min_steps: int = 2
    """Leave out problems whose shortest plan is shorter."""
    max_steps: int = 8
    """Leave out problems whose shortest plan is longer."""
    partial_credit: float = 0.0
    """Reward of a plan that runs out of steps: this, times the share of blocks that stand where
    they are wanted, on the wanted block or on the table."""
    eval_fraction: float = 0.2
    """Share of the problems held out for evaluation; by a hash of each problem."""
    max_outcomes: int = 4000
    """Exact distances for problems with at most so many answers; 0: none."""
    seed: int = 0
    """Seed of the split, of the order of training problems and of the pre-training examples."""

    def __post_init__(self) -> None:
        require(
            2 <= self.num_blocks <= 4,
            f"task.num_blocks must be 2 to 4, got {self.num_blocks}; set task.num_blocks=3",
        )
        require(
            0 <= self.slack <= 6 and self.slack % 2 == 0,
            f"task.slack must be 0, 2, 4 or 6, got {self.slack}; set task.slack=2",
        )
        require(
            1 <= self.min_steps <= self.max_steps,
            "task.min_steps and task.max_steps must satisfy 1 <= min_steps <= max_steps, got "
            f"{self.min_steps} and {self.max_steps}; set them to 2 and 8",
        )
        require(
            0 <= self.partial_credit < 1,
            f"task.partial_credit must be in [0, 1), got {self.partial_credit}; "
            "set task.partial_credit=0",
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


@lru_cache(maxsize=4)
def problem_space(num_blocks: int) -> tuple[Problem, ...]:
    """All pairs of different arrangements with an empty arm, and how far apart they are."""
    arrangements = sorted(stacks for stacks, arm in reachable(num_blocks) if not arm)
    return tuple(
        (start, goal, distance)
        for start in arrangements
        for goal, distance in sorted(_distances(start).items())
        if goal != start
    )


class BlocksWorld(StepTask):
    name = "blocksworld"
    alphabet = "".join(sorted("abcdTDUS0123456789,: >"))

    def __init__(self, options: Options) -> None:
        super().__init__(options.max_outcomes)
        self.options = options
        problems = [
            problem
            for problem in problem_space(options.num_blocks)
            if options.min_steps <= problem[2] <= options.max_steps
        ]
        train, held = hold_out(problems, self._text, options.eval_fraction, options.seed)
        self._splits: Splits[Problem] = Splits(train, held, options.seed)

    def prompt(self, split: str, index: int) -> Prompt:
        problem = self._splits.problem(split, index)
        data = {"problem": self._text(problem), **self._data(problem)}
        return Prompt(index, self._text(problem), data=data)

    def num_prompts(self, split: str) -> int:
        return self._splits.num(split)

    def example(self, index: int) -> tuple[str, str]:
        """A training problem and legal steps, each uniform, until the goal or the end."""
        random = random_source("blocksworld example", self.options.seed, index)
        problem = self._splits.train[random.randrange(len(self._splits.train))]
        return self._text(problem), self.random_answer(self._data(problem), random)

    def start(self, data: Mapping[str, Any]) -> State:
        return (tuple(data["start"]), ""), tuple(data["goal"]), data["steps"]

    def moves(self, state: State) -> dict[str, State]:
        blocks, goal, steps_left = state  # type: ignore[misc]
        if blocks == (goal, "") or not steps_left:
            return {}
        return {action: (after, goal, steps_left - 1) for action, after in actions(blocks).items()}

    def reward(self, state: State) -> float:
        blocks, goal, _ = state  # type: ignore[misc]
        if blocks == (goal, ""):
            return 1.0
        stacks, arm = blocks
        now, wanted = _supports(stacks), _supports(goal)
        in_place = sum(now.get(block) == below for block, below in wanted.items() if block != arm)
        return self.options.partial_credit * in_place / len(wanted)

    def _data(self, problem: Problem) -> dict[str, Any]:
        start, goal, shortest = problem
        steps = shortest + self.options.slack
        return {"start": list(start), "goal": list(goal), "steps": steps}

    def _text(self, problem: Problem) -> str:
        start, goal, shortest = problem
        return f"{' '.join(start)}>{' '.join(goal)} {shortest + self.options.slack}:"


def actions(blocks: Blocks) -> dict[str, Blocks]:
    """The arm's legal actions, and how the blocks stand after each."""
    stacks, arm = blocks
    found: dict[str, Blocks] = {}
    for stack in stacks:
        rest = tuple(other for other in stacks if other != stack)
        if arm:
            found[f"S{arm}{stack[-1]}"] = (_sorted(*rest, stack + arm), "")
        elif len(stack) == 1:
            found[f"T{stack}"] = (rest, stack)
        else:
            found[f"U{stack[-1]}{stack[-2]}"] = (_sorted(*rest, stack[:-1]), stack[-1])
    if arm:
        found[f"D{arm}"] = (_sorted(*stacks, arm), "")
    return found


def reachable(num_blocks: int) -> set[Blocks]:
    """Every way that the blocks can stand, one of them held or none."""
    return set(_walk((tuple("abcd"[:num_blocks]), "")))


def _distances(start: Stacks) -> dict[Stacks, int]:
    """Steps of a shortest plan to every arrangement with an empty arm."""
    return {stacks: steps for (stacks, arm), steps in _walk((start, "")).items() if not arm}


def _walk(start: Blocks) -> dict[Blocks, int]:
    """Breadth first: every state that can be reached, and in how many steps."""
    distance = {start: 0}
    level = [start]
    while level:
        following = []
        for state in level:
            for after in actions(state).values():
                if after not in distance:
                    distance[after] = distance[state] + 1
                    following.append(after)
        level = following
    return distance


def _supports(stacks: Stacks) -> dict[str, str]:
    """What each block stands on; "" is the table."""
    return {block: stack[i - 1] if i else "" for stack in stacks for i, block in enumerate(stack)}


def _sorted(*stacks: str) -> Stacks:
    return tuple(sorted(stacks))


def build(options: dict[str, Any], timeout_s: float) -> BlocksWorld:
    """`timeout_s` is not needed: an answer is looked up step by step."""
    return BlocksWorld(build_options(Options, options, "task"))
