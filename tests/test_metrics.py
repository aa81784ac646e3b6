"""Metric definitions on cases computed by hand."""

import math

import pytest
import torch

from flowrl.metrics import (
    distances,
    length_metrics,
    mismatch_metrics,
    mismatch_rows,
    pass_at_k,
    reward_metrics,
    segment_sum,
)
from flowrl.records import LossBatch


def test_reward_metrics_by_hand():
    found = reward_metrics(torch.tensor([1.0, 0.0, 1.0, 1.0]), group_size=2)
    assert found["reward/mean"] == 0.75
    assert found["reward/std"] == pytest.approx(math.sqrt(0.75 * 0.25))  # over all sequences
    assert found["reward/zero_std_frac"] == 0.5


def test_length_metrics_by_hand():
    found = length_metrics(torch.tensor([2, 4]), torch.tensor([True, False]))
    assert list(found.values()) == [3.0, 4.0, 0.5]


def test_mismatch_by_hand():
    batch = LossBatch(
        rewards=torch.zeros(2),
        group_ids=torch.zeros(2),
        cu_seqlens=torch.tensor([0, 2, 3], dtype=torch.int32),
        rollout_logprobs=torch.tensor([-1.0, -2.0, -3.0]),
        response_mask=torch.tensor([True, True, True]),
    )
    trainer = torch.tensor([-1.5, -2.0, -2.0])
    found = mismatch_metrics(mismatch_rows(batch, trainer))
    assert found["mismatch/logp_abs_diff"] == pytest.approx(1.5 / 3)
    assert found["mismatch/kl"] == pytest.approx(-0.5 / 3)
    assert found["mismatch/max_ratio"] == pytest.approx(math.e)
    w = [math.exp(-0.5), math.exp(1.0)]
    assert found["mismatch/ess"] == pytest.approx(sum(w) ** 2 / (2 * sum(x * x for x in w)))


def test_masked_tokens_do_not_count_in_the_mismatch():
    batch = LossBatch(
        rewards=torch.zeros(1),
        group_ids=torch.zeros(1),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
        rollout_logprobs=torch.tensor([-1.0, float("nan")]),
        response_mask=torch.tensor([True, False]),
    )
    found = mismatch_metrics(mismatch_rows(batch, torch.tensor([-1.25, -9.0])))
    assert found["mismatch/logp_abs_diff"] == pytest.approx(0.25)


def test_segment_sum_takes_empty_segments():
    cu_seqlens = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    assert segment_sum(torch.tensor([1.0, 2.0, 4.0]), cu_seqlens).tolist() == [3.0, 0.0, 4.0]


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(4, 0, 2, 0.0), (4, 4, 1, 1.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 1 - 1 / 6)],
)
def test_pass_at_k_by_hand(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected)


def test_distances_by_hand():
    found = distances([0.5, 0.25], [0.5, 0.5])  # a quarter of the mass is on ill-formed text
    assert found["l1"] == pytest.approx(0.5)
    assert found["kl_from"] == pytest.approx(0.5 * math.log(2))
    assert found["kl"] == pytest.approx(2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))
    same = distances([0.2, 0.8], [0.2, 0.8])
    assert all(abs(value) < 1e-12 for value in same.values())
    apart = distances([1.0, 0.0], [0.0, 1.0])
    assert apart["l1"] == pytest.approx(2.0)
    assert apart["jsd"] == pytest.approx(math.log(2))
