"""Order and splits of problems."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flowrl.config import ConfigError
from flowrl.tasks.splits import Splits, hold_out, stable_hash


def test_every_epoch_is_a_permutation_in_another_order():
    splits = Splits(list("abcdefghij"), ["x"], seed=3)
    epochs = ["".join(splits.problem("train", 10 * e + i) for i in range(10)) for e in range(4)]
    assert all(sorted(epoch) == list("abcdefghij") for epoch in epochs)
    assert len(set(epochs)) == 4
    other = Splits(list("abcdefghij"), ["x"], seed=4)
    assert "".join(other.problem("train", i) for i in range(10)) != epochs[0]


def test_order_does_not_depend_on_what_was_asked_before():
    straight, jumping = Splits(range(50), [], 0), Splits(range(50), [], 0)
    expected = [straight.problem("train", i) for i in range(500)]
    assert [jumping.problem("train", i) for i in reversed(range(500))] == expected[::-1]


def test_evaluation_ends_and_unknown_splits_are_refused():
    splits = Splits(["a"], ["x", "y"], 0)
    assert [splits.problem("eval", i) for i in range(2)] == ["x", "y"]
    for split, index in (("eval", 2), ("eval", -1), ("train", -1), ("test", 0)):
        with pytest.raises(ValueError, match=r"got"):
            splits.problem(split, index)


def test_hold_out_ignores_the_order_of_the_problems():
    problems = [str(i) for i in range(200)]
    train, held = hold_out(problems, str, 0.25, 0)
    assert sorted(train + held) == sorted(problems)
    assert 30 < len(held) < 70
    assert hold_out(problems[::-1], str, 0.25, 0) == (train, held)
    assert hold_out(problems, str, 0.0, 0)[1] == []


def test_hold_out_needs_both_sides():
    with pytest.raises(ConfigError, match="got 2 for training and 0 for evaluation"):
        hold_out(["a", "b"], str, 1e-9, 0)
    with pytest.raises(ConfigError, match="got 0 for training"):
        hold_out([], str, 0.0, 0)


def test_hash_is_the_same_in_another_process():
    code = "from flowrl.tasks.splits import stable_hash; print(stable_hash('a', 1))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "1"},  # Python's own hash() of a string differs there
        capture_output=True,
        check=True,
    )
    assert int(other.stdout) == stable_hash("a", 1)
    assert stable_hash("a", 1) != stable_hash("a", "1")
    assert stable_hash("ab", "c") != stable_hash("a", "bc")
