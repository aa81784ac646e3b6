"""Sub-trajectory and detailed balance: by hand, and linear sums against all pairs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_batches import assert_close, batch_from_rows, evaluate, leaf, random_batch

from flowrl.objectives import loss
from flowrl.objectives.returns import discounted_sums
from flowrl.records import ragged_arange


def by_hand_batch():
    """One sequence of two tokens: d = (0.2, -0.5), V = (1, 0.4), beta r = 2 * 0.3, so that
    u = (1, 0.4 - 0.2, 0.6 + 0.3) = (1, 0.2, 0.9)."""
    rows = {"logprobs": [[-0.8, -1.5]], "ref_logprobs": [[-1.0, -1.0]]}
    batch = batch_from_rows(rows, [0.3], [0])
    return batch.replace(values=torch.tensor([1.0, 0.4], dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("db", {}, (0.64 + 0.49) / 2),
        ("subtb", {"lam": 1.0}, (0.64 + 0.49 + 0.01) / 3),
        ("subtb", {"lam": 0.5}, (0.5 * (0.64 + 0.49) + 0.25 * 0.01) / 1.25),
    ],
)
def test_by_hand(name, options, expected):
    result = loss(name, by_hand_batch(), beta=2.0, **options)
    assert_close(result.loss, expected)
    assert_close(result.metrics["residual"], [0.1])  # TB: 1 + 0.2 - 0.5 - 0.6


def all_pairs(batch, beta: float, lam: float) -> torch.Tensor:
    """The definition, sequence by sequence, over every pair of states."""
    total = torch.zeros((), dtype=torch.float64)
    for n, (start, stop) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        keep = batch.mask[start:stop]
        moves = (batch.logprobs - batch.ref_logprobs)[start:stop][keep]
        flows = [*batch.values[start:stop][keep], beta * batch.rewards[n]]
        states = range(len(flows))
        weighted = torch.zeros((), dtype=torch.float64)
        weights = 0.0
        for i in states:
            for j in states[i + 1 :]:
                miss = flows[i] + moves[i:j].sum() - flows[j]
                weighted = weighted + lam ** (j - i) * miss.square()
                weights += lam ** (j - i)
        total = total + weighted / weights
    return total / batch.num_sequences


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    lam=st.sampled_from([1.0, 0.9, 0.3]),
    group_sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_linear_sums_are_the_sums_over_all_pairs(seed, lam, group_sizes):
    batch = random_batch(seed, group_sizes)
    leaves = (leaf(batch.logprobs), leaf(batch.values))
    batch = batch.replace(logprobs=leaves[0], values=leaves[1])
    fast = loss("subtb", batch, beta=1.5, lam=lam).loss
    slow = all_pairs(batch, 1.5, lam)
    assert_close(fast.detach(), slow.detach())
    gradients = zip(
        torch.autograd.grad(fast, leaves), torch.autograd.grad(slow, leaves), strict=True
    )
    for found, expected in gradients:
        assert_close(found, expected, atol=1e-11)


def test_a_long_sequence_with_a_large_offset_keeps_its_digits():
    """u near 1e6 with differences of 1: squares are taken after the mean is gone."""
    length = 3000
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(length, generator=generator, dtype=torch.float64)
    rows = {"logprobs": [moves.tolist()], "ref_logprobs": [[0.0] * length]}
    batch = batch_from_rows(rows, [1e6], [0])
    values = torch.randn(length, generator=generator).double()
    batch = batch.replace(values=1e6 + values)
    near = batch.replace(values=values, rewards=batch.rewards - 1e6)
    for lam in (0.9, 1.0):
        far_loss, near_loss = (loss("subtb", b, beta=1.0, lam=lam).loss for b in (batch, near))
        assert_close(far_loss, near_loss, rtol=1e-7)


def test_subtb_without_decay_is_the_variance_along_time():
    batch = random_batch(1, [3], masked=False)
    assert batch.logprobs is not None
    assert batch.values is not None
    assert batch.ref_logprobs is not None
    total = 0.0
    for n, (start, stop) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        moves = (batch.logprobs - batch.ref_logprobs)[start:stop]
        before = moves.cumsum(0) - moves
        end = (3.0 * batch.rewards[n] - moves.sum()).reshape(1)
        u = torch.cat([batch.values[start:stop] - before, end])
        total += 2 * float(u.var(correction=1))  # n^2 Var / (n (n - 1) / 2)
    assert_close(loss("subtb", batch, lam=1.0).loss, total / 3)


def test_little_lambda_is_detailed_balance():
    batch = random_batch(2, [4, 3])
    _, db, _ = evaluate("db", batch)
    _, near, _ = evaluate("subtb", batch, lam=1e-9)
    assert_close(near, db, atol=1e-6)
    _, far, _ = evaluate("subtb", batch, lam=0.9)
    assert float((far - db).abs().max()) > 1e-2


def test_one_token_makes_subtb_trajectory_balance():
    """With V_0 as log Z the only sub-trajectory is the whole."""
    rows = {"logprobs": [[-0.8], [-0.1]], "ref_logprobs": [[-1.0], [-2.0]]}
    batch = batch_from_rows(rows, [0.3, 1.0], [0, 1])
    flows = torch.tensor([0.7, -0.4], dtype=torch.float64)
    expected = loss("tb", batch.replace(log_z=flows), beta=2.0).loss
    assert_close(loss("subtb", batch.replace(values=flows), beta=2.0).loss, expected)
    assert_close(loss("db", batch.replace(values=flows), beta=2.0).loss, expected)


def test_discounted_sums_stay_inside_their_segments():
    position = ragged_arange(torch.tensor([1, 4, 2]))
    values = torch.tensor([[5.0, 1.0, 2.0, 3.0, 4.0, 7.0, 9.0]], dtype=torch.float64)
    expected = [[0.0, 0.0, 0.5, 1.25, 2.125, 0.0, 3.5]]
    assert_close(discounted_sums(values, position, 0.5), expected)


def test_a_broken_sequence_leaves_the_others_alone():
    """One NaN log-prob is the fault of its own sequence only."""
    batch = random_batch(3, [4], masked=False)
    assert batch.logprobs is not None
    logprobs = batch.logprobs.clone()
    logprobs[int(batch.cu_seqlens[1])] = torch.nan
    metrics = loss("subtb", batch.replace(logprobs=logprobs)).metrics
    assert torch.isnan(metrics["imbalance"]).tolist() == [False, True, False, False]
