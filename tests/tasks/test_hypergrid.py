"""The hypergrid: masses known from the literature's constants, both encodings, the path counts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from flowrl.config import ConfigError
from flowrl.records import Rollout
from flowrl.tasks.hypergrid import Hypergrid, Options, build, log_backward


def target(task: Hypergrid) -> tuple[np.ndarray, list[str | None]]:
    """exp(reward) normalised: the target at beta = 1 and a uniform reference."""
    outcomes = task.outcomes(task.prompt("eval", 0))
    assert outcomes is not None
    weight = np.exp([o.reward for o in outcomes])
    return weight / weight.sum(), [o.solution for o in outcomes]


@pytest.mark.parametrize(
    ("H", "D", "R0", "mass", "entropy", "cells"),
    [
        (8, 2, 0.1, 0.464, 3.32, 4),
        (8, 3, 0.01, 0.378, None, 8),
        (8, 4, 1e-3, 0.244, None, 16),
        (16, 2, 1e-3, 0.2485, 4.016, 4),
    ],
)
def test_mode_mass_and_entropy_are_the_known_ones(H, D, R0, mass, entropy, cells):
    task = Hypergrid(Options(H=H, D=D, R0=R0))
    p, modes = target(task)
    held = [m for m in modes if m is not None]
    assert len(held) == cells
    assert set(held) == task.solutions(task.prompt("eval", 0))
    found = sum(p[i] for i, m in enumerate(modes) if m is not None)
    assert found == pytest.approx(mass, abs=5e-4 if H == 8 else 5e-5)
    if entropy is not None:
        assert -(p * np.log(p)).sum() == pytest.approx(entropy, abs=5e-3)


def test_membership_is_decided_in_integers():
    """At H = 16, x = 3 lies exactly on .3 and is outside; float64 has it inside: 9 cells."""
    task = Hypergrid(Options(H=16))
    inside = [x for x in range(16) if task._in_mode(x)]
    assert inside == [2, 13]
    floats = [x for x in range(16) if 0.3 < abs(x / 15 - 0.5) < 0.4]
    assert floats != inside


def test_rewards_by_hand():
    task = Hypergrid(Options(H=8, D=2, R0=0.1))
    assert task.plain_reward((3, 3)) == pytest.approx(0.1)
    assert task.plain_reward((0, 7)) == pytest.approx(0.6)
    assert task.plain_reward((1, 6)) == pytest.approx(2.6)
    (score,) = task.score([Rollout(task.prompt("eval", 0), 0, (), (), False, 0, "16")])
    assert (score.reward, score.correct, score.solution) == (math.log(2.6), True, "01")


@pytest.mark.parametrize("text", ["", "1", "161", "9a", ":1", "\uff11\uff16"])
def test_a_text_that_names_no_cell_is_worst(text):
    task = Hypergrid(Options(H=8))
    (score,) = task.score([Rollout(task.prompt("eval", 0), 0, (), (), False, 0, text)])
    assert (score.reward, score.correct) == (math.log(0.1), False)
    plain = Hypergrid(Options(H=8, reward="plain"))
    (score,) = plain.score([Rollout(task.prompt("eval", 0), 0, (), (), False, 0, text)])
    assert score.reward == 0.0


def cell_masses(task: Hypergrid) -> dict[tuple[int, ...], float]:
    """Of the target, summed over the paths of a cell."""
    outcomes = task.outcomes(task.prompt("eval", 0))
    assert outcomes is not None
    p, _ = target(task)
    masses: dict[tuple[int, ...], float] = defaultdict(float)
    for outcome, mass in zip(outcomes, p, strict=True):
        masses[tuple(outcome.text.count(axis) for axis in "ab")] += mass
    return masses


def test_the_backward_policy_makes_paths_match_the_cells_reward():
    """With it a cell's mass is R / sum R; without, R times its number of paths."""
    shape = {"H": 5, "D": 2, "R0": 0.1, "encoding": "increments"}
    task = Hypergrid(Options(**shape))
    cells = cell_masses(task)
    rewards = {cell: task.plain_reward(cell) for cell in cells}
    assert len(cells) == 25
    for cell, mass in cells.items():
        assert mass == pytest.approx(rewards[cell] / sum(rewards.values()))
    without = cell_masses(Hypergrid(Options(**shape, backward="none")))
    paths = {cell: math.comb(sum(cell), cell[0]) for cell in cells}
    total = sum(rewards[c] * paths[c] for c in cells)
    for cell, mass in without.items():
        assert mass == pytest.approx(rewards[cell] * paths[cell] / total)
    assert abs(without[4, 4] - cells[4, 4]) > 0.05


def test_log_backward_by_hand():
    assert log_backward("") == 0.0
    assert log_backward("aa") == 0.0  # one parent each
    assert log_backward("aba") == pytest.approx(-2 * math.log(2))


@pytest.mark.parametrize("encoding", ["coordinates", "increments"])
def test_examples_are_uniform_over_answers(encoding):
    task = Hypergrid(Options(H=3, D=2, encoding=encoding))
    outcomes = task.outcomes(task.prompt("eval", 0))
    assert outcomes is not None
    count = Counter(task.example(i)[1] for i in range(4000))
    assert set(count) == {o.text for o in outcomes}
    expected = 4000 / len(outcomes)
    assert sum((n - expected) ** 2 / expected for n in count.values()) < 2.5 * len(outcomes)
    assert all(set(text) <= set(task.alphabet or "") for text in count)


def test_outcomes_are_listed_only_where_they_are_few():
    task = Hypergrid(Options(H=36, D=3))
    assert task.outcomes(task.prompt("eval", 0)) is None
    assert len(task.solutions(task.prompt("eval", 0)) or ()) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"H": 1}, "task.H must be 2 to 36"),
        ({"R0": 0.0}, "task.R0 must be > 0"),
        ({"backward": "none"}, "has no effect with encoding=coordinates"),
        ({"reward": "plain", "encoding": "increments"}, "needs encoding=coordinates"),
        ({"H": 36, "D": 4, "encoding": "increments"}, "at most 20000 cells"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(options, 1.0)
