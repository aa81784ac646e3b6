"""Packed batches: what predicts what, selection, micro-batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowrl.data.packing import pack, plan_microbatches
from flowrl.records import LossBatch, Prompt, Rollout, ragged_arange, take_segments
from flowrl.schema import ConfigError


def rollout(prompt: list[int], response: list[int]) -> Rollout:
    logprobs = (0.0,) * len(response)
    return Rollout(Prompt(0, "", tuple(prompt)), 0, tuple(response), logprobs, False, 0, "")


def test_hidden_rows_stand_one_before_their_targets():
    batch = pack([rollout([1, 2], [3, 4, 5]), rollout([6], [7])])
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 6]
    assert batch.model_cu_seqlens.tolist() == [0, 4, 5]
    assert batch.targets.tolist() == [3, 4, 5, 7]
    assert batch.cu_seqlens.tolist() == [0, 3, 4]
    assert batch.token_ids[batch.hidden_rows].tolist() == [2, 3, 4, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0]


ragged = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=9)


@given(ragged, st.randoms())
def test_selection_equals_packing_the_selection(sizes, random):
    tokens = iter(range(10_000))
    rollouts = [
        rollout([next(tokens) for _ in range(p)], [next(tokens) for _ in range(r)])
        for p, r in sizes
    ]
    order = random.sample(range(len(rollouts)), random.randint(1, len(rollouts)))
    selected = pack(rollouts).select(torch.tensor(order))
    expected = pack([rollouts[i] for i in order])
    for name in ("token_ids", "model_cu_seqlens", "targets", "cu_seqlens", "hidden_rows"):
        assert torch.equal(getattr(selected, name), getattr(expected, name)), name


@given(ragged, st.integers(10, 30))
def test_microbatches_hold_every_sequence_once_within_the_limit(sizes, limit):
    batch = pack([rollout([0] * p, [0] * r) for p, r in sizes])
    plan = plan_microbatches(batch, limit)
    assert sorted(torch.cat(plan).tolist()) == list(range(len(sizes)))
    for indices in plan:
        assert batch.select(indices).token_ids.numel() <= limit


def test_a_sequence_longer_than_a_microbatch_is_refused():
    batch = pack([rollout([0] * 8, [0] * 5)])
    with pytest.raises(ConfigError, match="set batch.tokens_per_microbatch=12"):
        plan_microbatches(batch, 11)


def test_loss_batch_selects_token_and_sequence_fields():
    batch = LossBatch(
        rewards=torch.tensor([1.0, 2.0]),
        group_ids=torch.tensor([5, 6]),
        cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32),
        logprobs=torch.arange(5.0),
        advantages=torch.arange(5.0) + 10,
        log_z=torch.tensor([0.1, 0.2]),
    )
    part = batch.select(torch.tensor([1]))
    assert part.logprobs is not None
    assert part.advantages is not None
    assert part.log_z is not None
    assert part.logprobs.tolist() == [2.0, 3.0, 4.0]
    assert part.advantages.tolist() == [12.0, 13.0, 14.0]
    assert part.log_z.tolist() == pytest.approx([0.2])
    assert part.cu_seqlens.tolist() == [0, 3]
    per_sequence = batch.replace(advantages=torch.tensor([7.0, 8.0])).select(torch.tensor([1]))
    assert per_sequence.advantages is not None
    assert per_sequence.advantages.tolist() == [8.0]


def test_ragged_helpers():
    assert ragged_arange(torch.tensor([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]
    rows, cu_seqlens = take_segments(torch.tensor([0, 2, 5]), torch.tensor([1, 0]))
    assert rows.tolist() == [2, 3, 4, 0, 1]
    assert cu_seqlens.tolist() == [0, 3, 5]
