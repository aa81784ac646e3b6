"""Tasks whose answers are sequences of legal actions: exact enumeration, parents and log Z.

    answer  "10-4=6,5*6=30,30-6=24"        actions, joined by commas

A state is a hashable value that knows how far it is (depth or steps left), so that states form a
graph without cycles. A task gives `start`, `moves` and `reward`; all else follows: which texts are
answers, all of them with their rewards, how many ways lead into a state (for a backward policy),
and log Z by dynamic programming over states.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from random import Random
from typing import Any

from flowrl.records import Prompt, Rollout, Score
from flowrl.tasks import Outcome

MAX_TEXT = 400  # characters of an answer that are looked at
SEPARATOR = ","
State = Hashable


class StepTask(ABC):
    """See `flowrl.tasks.Task` for what the trainer asks of it, `legal_actions` and `num_parents`
    for what a policy over legal actions asks."""

    name: str
    alphabet: str | None

    def __init__(self, max_outcomes: int) -> None:
        self.max_outcomes = max_outcomes
        self._moves = lru_cache(maxsize=1 << 14)(self.moves)
        self._parents = lru_cache(maxsize=64)(self._count_parents)
        self._sizes = lru_cache(maxsize=1 << 12)(self._count)

    @abstractmethod
    def start(self, data: Mapping[str, Any]) -> State:
        """The state before the first action, from a prompt's data."""

    @abstractmethod
    def moves(self, state: State) -> dict[str, State]:
        """The legal actions of a state and where each leads; none where the answer is complete."""

    @abstractmethod
    def reward(self, state: State) -> float:
        """Of a state without moves; 1 for a right answer, less for others."""

    def solution(self, data: Mapping[str, Any], text: str) -> str:
        """The form under which a right answer is counted: the text itself."""
        return text

    # --- for a policy over legal actions

    def legal_actions(self, prompt: Prompt, partial_text: str) -> list[str]:
        """Texts that continue `partial_text`, in a fixed order; none where it is complete.

        Raises ValueError where `partial_text` is not made of legal actions."""
        prefix = SEPARATOR if partial_text else ""
        return [prefix + action for action in self._moves(self._state(prompt, partial_text))]

    def num_parents(self, prompt: Prompt, partial_text: str) -> int:
        """How many (state, action) pairs lead into the state after `partial_text`, over all states
        that the prompt's start can reach; 0 for the start itself."""
        parents = self._parents(self.start(prompt.data))
        return parents[self._state(prompt, partial_text)]

    def _state(self, prompt: Prompt, text: str) -> State:
        state = self.walk(prompt.data, text)
        if state is None:
            raise ValueError(
                f"partial_text must be legal actions of prompt {prompt.text!r}, got {text!r}; "
                "build it from what legal_actions gave"
            )
        return state

    def walk(self, data: Mapping[str, Any], text: str) -> State | None:
        """The state after the actions of `text`, or None where one of them is not legal."""
        state = self.start(data)
        if len(text) > MAX_TEXT:
            return None
        for action in text.split(SEPARATOR) if text else []:
            after = self._moves(state).get(action)
            if after is None:
                return None
            state = after
        return state

    # --- what the trainer asks

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """The reward of a complete answer; 0 for any other text."""
        return [self._score(rollout.prompt, rollout.text) for rollout in rollouts]

    def _score(self, prompt: Prompt, text: str) -> Score:
        state = self.walk(prompt.data, text)
        if state is None or self._moves(state):
            return Score(0.0, False)
        reward = self.reward(state)
        right = reward == 1
        return Score(reward, right, self.solution(prompt.data, text) if right else None)

    def solutions(self, prompt: Prompt) -> frozenset[str]:
        """Of all right answers."""
        found = self._answers(self.start(prompt.data), only_right=True)
        return frozenset(self.solution(prompt.data, text) for text, _ in found)

    def outcomes(self, prompt: Prompt) -> list[Outcome] | None:
        """Every complete answer with its reward; None where there are more than `max_outcomes`."""
        start = self.start(prompt.data)
        if self._sizes(start)[0] > self.max_outcomes:
            return None
        answers = self._answers(start, only_right=False)
        return [
            Outcome(text, reward, self.solution(prompt.data, text) if reward == 1 else None)
            for text, reward in answers
        ]

    def close(self) -> None:
        return None

    # --- exact

    def num_answers(self, data: Mapping[str, Any]) -> tuple[int, int]:
        """How many complete answers there are, and how many of them are right."""
        return self._sizes(self.start(data))

    def log_partition(self, prompt: Prompt, beta: float) -> float:
        """log E exp(beta r) of complete answers, each action uniform over the legal ones."""

        @cache
        def value(state: State) -> float:
            moves = self._moves(state)
            if not moves:
                return math.exp(beta * self.reward(state))
            return sum(value(after) for after in moves.values()) / len(moves)

        return math.log(value(self.start(prompt.data)))

    def random_answer(self, data: Mapping[str, Any], random: Random) -> str:
        """A complete answer, each action uniform over the legal ones."""
        state, actions = self.start(data), []
        while moves := self._moves(state):
            action = random.choice(list(moves))
            actions.append(action)
            state = moves[action]
        return SEPARATOR.join(actions)

    def _answers(
        self, state: State, only_right: bool, text: str = ""
    ) -> Iterator[tuple[str, float]]:
        """(text, reward) of the complete answers below `state`; branches without a right one are
        passed over where only those are asked for."""
        if only_right and not self._sizes(state)[1]:
            return
        moves = self._moves(state)
        if not moves:
            yield text, self.reward(state)
        for action, after in moves.items():
            yield from self._answers(
                after, only_right, text + SEPARATOR + action if text else action
            )

    def _count(self, state: State) -> tuple[int, int]:
        moves = self._moves(state)
        if not moves:
            return 1, int(self.reward(state) == 1)
        sizes = [self._sizes(after) for after in moves.values()]
        return sum(size[0] for size in sizes), sum(size[1] for size in sizes)

    def _count_parents(self, start: State) -> Counter[State]:
        parents: Counter[State] = Counter()
        level = {start}
        while level:
            edges = Counter(after for state in level for after in self._moves(state).values())
            parents.update(edges)
            level = set(edges)
        return parents
