"""Which problem stands where: splits that do not depend on order, and an order for every epoch.

All of it is a function of the seed and of the problems themselves, the same on every machine and in
every process; nothing here uses Python's salted `hash`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from random import Random
from typing import Generic, TypeVar

from flowrl.config import ConfigError

Problem = TypeVar("Problem")


def stable_hash(*parts: str | int) -> int:
    """64 bits that depend on the parts and their types only."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def random_source(*parts: str | int) -> Random:
    """A random generator keyed by the parts: the same parts give the same draws."""
    return Random(stable_hash(*parts))


def hold_out(
    problems: Iterable[Problem],
    key: Callable[[Problem], str],
    fraction: float,
    seed: int,
) -> tuple[list[Problem], list[Problem]]:
    """(train, eval). A problem is held out when the hash of its key falls below `fraction` of the
    range, so that it stays on its side when other problems come or go. Evaluation problems stand in
    hash order: the first n are a random sample. Raises ConfigError if a side comes out empty."""
    keyed = [(stable_hash("split", seed, key(problem)), problem) for problem in problems]
    ranked = sorted(keyed, key=lambda pair: pair[0])
    limit = int(fraction * 2**64)
    train = [problem for rank, problem in ranked if rank >= limit]
    held = [problem for rank, problem in ranked if rank < limit]
    if not train or (fraction > 0 and not held):
        raise ConfigError(
            f"holding out {fraction} of {len(ranked)} problems must leave some on both sides, got "
            f"{len(train)} for training and {len(held)} for evaluation; change the fraction or the "
            "task's range"
        )
    return train, held


class Splits(Generic[Problem]):
    """Train and evaluation problems by index. Training is endless: index i is problem i mod n of
    epoch i div n, and every epoch has its own order. Evaluation keeps the order given."""

    def __init__(self, train: Sequence[Problem], held: Sequence[Problem], seed: int) -> None:
        self.train = train
        self.held = held
        self._seed = seed

    def num(self, split: str) -> int:
        return len(self._problems(split))

    def problem(self, split: str, index: int) -> Problem:
        """Raises ValueError for an unknown split or an index outside the split."""
        problems = self._problems(split)
        last = "" if split == "train" else f" and < {len(problems)}"
        if index < 0 or (split == "eval" and index >= len(problems)):
            raise ValueError(f"index of a problem of {split!r} must be >= 0{last}, got {index}")
        if split == "eval":
            return problems[index]
        epoch, offset = divmod(index, len(problems))
        return problems[_order(len(problems), self._seed, epoch)[offset]]

    def _problems(self, split: str) -> Sequence[Problem]:
        if split not in ("train", "eval"):
            raise ValueError(f"split must be train or eval, got {split!r}")
        return self.train if split == "train" else self.held


@lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of range(size). By sorted hashes: stable across Python versions."""
    return tuple(sorted(range(size), key=lambda i: stable_hash("order", seed, epoch, i)))
