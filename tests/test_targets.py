"""Fixed points against tables computed elsewhere, and against their own definition."""

import math
from itertools import product

import numpy as np
import pytest

from flowrl import objectives
from flowrl.objectives.base import FixedPoint
from flowrl.targets import Table, expected_zscores, target

ORACLE = Table([0.4, 0.3, 0.2, 0.1], [0.0, 1.0, 1.0, 2.0], [1, 2, 4, 8])


def test_plain_target_is_the_tabular_oracle():
    found = target(FixedPoint(1.0), ORACLE)
    assert found is not None
    assert found.log_z == pytest.approx(0.9155090, abs=1e-7)
    assert found.probabilities == pytest.approx(
        [0.1601251, 0.3264489, 0.2176326, 0.2957934], abs=1e-7
    )


def test_length_normalised_target_is_the_tabular_oracle():
    found = target(FixedPoint(1.0, length_normalised=True), ORACLE)
    assert found is not None
    assert found.log_z == pytest.approx(1.7325969, abs=1e-7)
    assert found.probabilities == pytest.approx(
        [0.0707298, 0.0693100, 0.0106753, 0.8492849], abs=1e-7
    )


def test_one_length_for_all_sharpens_the_reward():
    """With two tokens everywhere the fixed point is that of twice the beta."""
    table = Table(ORACLE.reference, ORACLE.rewards, [2] * 4)
    tilted = target(FixedPoint(1.5, length_normalised=True), table)
    sharp = target(FixedPoint(3.0), table)
    assert tilted is not None
    assert sharp is not None
    assert tilted.probabilities == pytest.approx(sharp.probabilities)


def test_hypergrid_predicted_by_its_squared_reward():
    """16 x 16, coordinates, R0 = 1e-3: the length-normalised form lands on R^2, whose distances to
    R are known: L1 0.7515, KL 0.3169, mode mass 0.6242."""
    from flowrl.metrics import distances
    from flowrl.tasks.hypergrid import Hypergrid, Options

    task = Hypergrid(Options(H=16, R0=1e-3))
    outcomes = task.outcomes(task.prompt("eval", 0))
    assert outcomes is not None
    rewards = [o.reward for o in outcomes]
    table = Table([1 / 256] * 256, rewards, [2] * 256)
    tilted, plain = target(FixedPoint(1.0, True), table), target(FixedPoint(1.0), table)
    assert tilted is not None
    assert plain is not None
    found = distances(tilted.probabilities.tolist(), plain.probabilities.tolist())
    assert found["l1"] == pytest.approx(0.7515, abs=1e-4)
    assert found["kl"] == pytest.approx(0.3169, abs=1e-4)
    modes = [o.solution is not None for o in outcomes]
    assert tilted.probabilities[modes].sum() == pytest.approx(0.6242, abs=1e-4)


def test_expected_zscores_against_enumeration():
    size, success = 4, 0.3
    total, weight = {0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0}
    for group in product((0, 1), repeat=size):
        chance = math.prod(success if r else 1 - success for r in group)
        rewards = np.array(group, dtype=float)
        z = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        total[group[0]] += chance * z[0]
        weight[group[0]] += chance
    high, low = expected_zscores(success, size)
    assert high == pytest.approx(total[1] / weight[1])
    assert low == pytest.approx(total[0] / weight[0])


@pytest.mark.parametrize(("success", "gap"), [(0.5, 1.74), (1.0 - 1e-9, 2.475)])
def test_gap_of_the_zscore_is_the_measured_one(success, gap):
    high, low = expected_zscores(success, 8)
    assert high - low == pytest.approx(gap, abs=0.005)


@pytest.mark.parametrize("length_normalised", [False, True])
def test_zscored_fixed_point_is_consistent_with_its_own_success(length_normalised):
    table = Table([0.5, 0.3, 0.1, 0.1], [0.0, 0.0, 1.0, 1.0], [1, 2, 2, 3])
    point = FixedPoint(1.0, length_normalised, "zscore")
    found = target(point, table, group_size=8)
    assert found is not None
    q = found.probabilities
    assert q.sum() == pytest.approx(1.0)
    high, low = expected_zscores(float(q[2:].sum()), 8)
    scale = np.array(table.lengths if length_normalised else [1] * 4)
    rhat = np.array([low, low, high, high])
    log_z = rhat - (np.log(q) - np.log(table.reference)) / scale
    assert log_z == pytest.approx([log_z[0]] * 4, abs=1e-9)


def test_zscores_of_three_rewards_have_no_known_fixed_point():
    assert target(FixedPoint(1.0, reward="zscore"), ORACLE) is None


def test_uniform_rewards_leave_the_reference():
    table = Table([0.5, 0.5], [1.0, 1.0], [1, 4])
    for point in (FixedPoint(3.0), FixedPoint(3.0, True), FixedPoint(3.0, True, "zscore")):
        found = target(point, table)
        assert found is not None
        assert found.probabilities == pytest.approx([0.5, 0.5])


def test_objectives_declare_their_fixed_points():
    def declared(name, **options):
        return objectives.build(name, options).fixed_point

    assert declared("tb", beta=2.0) == FixedPoint(2.0)
    assert declared("rloo_kl", beta=2.0) == FixedPoint(2.0)
    assert declared("flowrl") == FixedPoint(15.0, True, "zscore")
    assert declared("flowrl", reward="raw", length_norm=False, beta=1.0) == FixedPoint(1.0)
    assert declared("flowrl", log_z="zero") is None
    assert declared("grpo") is None
