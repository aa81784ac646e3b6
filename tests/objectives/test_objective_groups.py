"""Group statistics and advantages: hand-computed cases, ragged groups, uniform groups, singles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from loss_batches import assert_close

from flowrl.objectives.advantages import centred, leave_one_out, zscore
from flowrl.objectives.groups import group_mean, group_sizes, group_std, group_sum

# k of 8 members are right: rhat of a right and of a wrong one.
RHAT_OF_EIGHT = [
    (1, 2.474870, -0.353553),
    (2, 1.620183, -0.540061),
    (3, 1.207614, -0.724568),
    (4, 0.935413, -0.935413),
]


@pytest.mark.parametrize(("k", "right", "wrong"), RHAT_OF_EIGHT)
@pytest.mark.parametrize("values", [(1.0, -1.0), (1.0, 0.0)])
def test_zscore_of_eight(k, right, wrong, values):
    rewards = torch.tensor([values[0]] * k + [values[1]] * (8 - k), dtype=torch.float64)
    expected = [right] * k + [wrong] * (8 - k)
    # The table is for +-1; with 1 / 0 the spread halves and epsilon counts double.
    assert_close(zscore(rewards, torch.zeros(8, dtype=torch.long)), expected, atol=6e-6, rtol=0)


IDS = torch.tensor([5, -2, 5, 9, 5, -2])  # groups of three, two and one, interleaved
VALUES = torch.tensor([1.0, 4.0, 2.0, 7.0, 6.0, 10.0], dtype=torch.float64)


def test_statistics_of_interleaved_groups():
    assert_close(group_sum(VALUES, IDS), [9, 14, 9, 7, 9, 14])
    assert_close(group_mean(VALUES, IDS), [3, 7, 3, 7, 3, 7])
    assert group_sizes(IDS).tolist() == [3, 2, 3, 1, 3, 2]
    spread = [np.std([1, 2, 6], ddof=1), np.std([4, 10], ddof=1)]
    assert_close(group_std(VALUES, IDS), [spread[0], spread[1], spread[0], 1, spread[0], spread[1]])


def test_mean_over_some_members():
    include = torch.tensor([True, False, False, False, True, True])
    assert_close(group_mean(VALUES, IDS, include), [3.5, 10, 3.5, 0, 3.5, 10])


def test_advantages_of_interleaved_groups():
    assert_close(centred(VALUES, IDS), [-2, -3, -1, 7, 3, 3])
    others = [4, 10, 3.5, 0, 1.5, 4]  # a group of one: no baseline
    assert_close(leave_one_out(VALUES, IDS), VALUES - torch.tensor(others, dtype=torch.float64))
    assert_close(zscore(VALUES, IDS)[3], 7 / (1 + 1e-6))


def test_uniform_groups_give_exactly_zero_in_float32():
    ids = torch.zeros(7, dtype=torch.long)
    rewards = torch.full((7,), 0.1)
    assert zscore(rewards, ids).tolist() == [0.0] * 7
    assert leave_one_out(rewards, ids).tolist() == [0.0] * 7
    naive = (rewards - rewards.sum() / 7) / (rewards.std() + 1e-6)
    assert float(naive.abs().max()) > 1e-3  # the control: the textbook form does not


def test_results_keep_the_dtype_of_the_rewards():
    assert zscore(VALUES.float(), IDS).dtype == torch.float32
    assert_close(zscore(VALUES.float(), IDS), zscore(VALUES, IDS), atol=1e-6)
