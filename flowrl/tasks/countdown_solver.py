"""Every solution of a countdown problem, and every solvable problem of a range. Exact.

An expression over given numbers is one of finitely many normal forms over slots: `forms(slots)`
lists each once (6 over two slots, 68 over three, 1260 over four). They are evaluated as ratios of
int64 over many multisets at a time: numerator and denominator are multilinear in the slots, at most
2^4 * 999^4 here (equal numbers change nothing), so int64 is exact and nothing is ever rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import combinations, combinations_with_replacement, product

import numpy as np
from numpy.typing import NDArray

from flowrl.tasks.expression import Chain, Form, chain, form_text, substitute

Array = NDArray[np.int64]
MAX_NUMBERS = 4
MAX_NUMBER = 999  # with MAX_NUMBERS, the bound that keeps int64 exact
_ROWS = 4096  # multisets evaluated at a time: bounds the memory of shared parts


@cache
def forms(slots: tuple[int, ...]) -> tuple[Form, ...]:
    """All normal forms that use each of the distinct `slots` exactly once."""
    if len(slots) == 1:
        return slots
    return _chains(slots, "+") + _chains(slots, "*")


@cache
def _chains(slots: tuple[int, ...], operator: str) -> tuple[Chain, ...]:
    """Forms whose outermost operator is `operator`: the slots split into blocks, each block a slot
    or a chain of the other operator, and every choice of inverted blocks but all of them."""
    other = "*" if operator == "+" else "+"
    found = []
    for blocks in _partitions(slots):
        if len(blocks) < 2:
            continue
        choices = [block if len(block) == 1 else _chains(block, other) for block in blocks]
        for parts in product(*choices):
            for keep in product((True, False), repeat=len(parts)):
                if any(keep):
                    kept = [part for part, k in zip(parts, keep, strict=True) if k]
                    inverted = [part for part, k in zip(parts, keep, strict=True) if not k]
                    found.append(chain(operator, kept, inverted))
    return tuple(found)


def _partitions(items: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """Set partitions; the order within and between blocks is that of the items."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for mates in combinations(rest, size):
            others = tuple(item for item in rest if item not in mates)
            for blocks in _partitions(others):
                yield [(first, *mates), *blocks]


@cache
def candidate_forms(pattern: tuple[int, ...], exact_use: bool) -> tuple[Form, ...]:
    """Forms over as many slots as `pattern` has: over all of them, or over every non-empty subset.

    pattern[i] is the first slot whose number equals that of slot i, (0, 0, 2) for 4 4 7: forms that
    equal numbers make the same are listed once."""
    slots = tuple(range(len(pattern)))
    found: dict[str, Form] = {}
    for size in [len(slots)] if exact_use else range(1, len(slots) + 1):
        for subset in combinations(slots, size):
            for form in forms(subset):
                merged = substitute(form, pattern)
                found.setdefault(form_text(merged), merged)
    return tuple(found.values())


def _pattern(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(numbers.index(number) for number in numbers)


@lru_cache(maxsize=8192)
def solve(numbers: tuple[int, ...], target: int, exact_use: bool) -> frozenset[str]:
    """Normal forms of all expressions of value `target` that use each number at most once, or with
    `exact_use` exactly once. `numbers` are sorted."""
    columns = [np.array([number], dtype=np.int64) for number in numbers]
    memo: dict[str, tuple[Array, Array]] = {}
    found = set()
    for form in candidate_forms(_pattern(numbers), exact_use):
        numerator, denominator = _ratio(form, columns, memo)
        if denominator[0] != 0 and numerator[0] == target * denominator[0]:
            found.add(form_text(substitute(form, numbers)))
    return frozenset(found)


def solution_counts(
    multisets: Sequence[tuple[int, ...]],  # M, sorted each, all of one pattern
    targets: range,
    exact_use: bool,
) -> NDArray[np.int32]:
    """How many solutions every target has: (M, len(targets))."""
    counts = np.zeros((len(multisets), len(targets)), dtype=np.int32)
    for start in range(0, len(multisets), _ROWS):
        part = np.array(multisets[start : start + _ROWS], dtype=np.int64)  # (m, n)
        columns = list(part.T)
        memo: dict[str, tuple[Array, Array]] = {}
        for form in candidate_forms(_pattern(multisets[0]), exact_use):
            numerator, denominator = _ratio(form, columns, memo)
            divisor = np.where(denominator == 0, 1, denominator)
            quotient = numerator // divisor
            hit = (denominator != 0) & (quotient * divisor == numerator)
            hit &= (quotient >= targets.start) & (quotient < targets.stop)
            rows = np.nonzero(hit)[0]
            counts[start + rows, quotient[rows] - targets.start] += 1
    return counts


def solvable(
    num_numbers: int, numbers: range, targets: range, exact_use: bool, min_solutions: int
) -> list[tuple[tuple[int, ...], int]]:
    """All (multiset, target) with at least `min_solutions` (>= 1) solutions, sorted."""
    by_pattern: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for multiset in combinations_with_replacement(numbers, num_numbers):
        by_pattern.setdefault(_pattern(multiset), []).append(multiset)
    problems = []
    for multisets in by_pattern.values():
        counts = solution_counts(multisets, targets, exact_use)
        for row, column in np.argwhere(counts >= min_solutions):
            problems.append((multisets[row], targets[int(column)]))
    return sorted(problems)


def _ratio(
    form: Form,
    columns: list[Array],  # per slot (M,)
    memo: dict[str, tuple[Array, Array]],  # of chains already evaluated, by text
) -> tuple[Array, Array]:
    """Numerator and denominator (M,) of the form; denominator 0 marks a division by zero in it."""
    if isinstance(form, int):
        return columns[form], np.ones_like(columns[form])
    if form.text in memo:
        return memo[form.text]
    kept = [_ratio(part, columns, memo) for part in form.kept]
    inverted = [_ratio(part, columns, memo) for part in form.inverted]
    if form.operator == "+":
        numerator, denominator = np.zeros_like(columns[0]), np.ones_like(columns[0])
        for sign, terms in ((1, kept), (-1, inverted)):
            for n, d in terms:
                numerator, denominator = numerator * d + sign * n * denominator, denominator * d
    else:
        numerator, denominator = np.ones_like(columns[0]), np.ones_like(columns[0])
        for n, d in kept:
            numerator, denominator = numerator * n, denominator * d
        for n, d in inverted:
            # 1/(n/0) is undefined, not 0/n: the zero must stay in the denominator.
            numerator, denominator = numerator * d, denominator * np.where(d == 0, 0, n)
    memo[form.text] = numerator, denominator
    return numerator, denominator
