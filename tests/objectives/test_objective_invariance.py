"""What must not change a loss: order, split, what stands at masked tokens, units of the reward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_batches import assert_close, evaluate, every_objective, leaf, random_batch

from flowrl.objectives import build, count_totals, loss

VARIANTS = [
    ("flowrl", {"preset": "paper"}),
    ("flowrl", {"preset": "recipe_2025_11"}),
    ("flowrl", {"log_z": "group_mean", "length_norm": False, "reward": "raw"}),
    ("flowrl", {"log_z": "zero"}),
    ("tb", {"bound": "recipe"}),
    ("gflowrl", {"gap_clip": False, "bound": "none"}),
    ("tba", {"kl_coef": 0.5}),
    ("gvpo", {"beta": 2.0}),
    ("kimi_pmd", {"beta": 2.0}),
    ("ftb", {"phi": "shifted_cosh"}),
    ("ftb", {"phi": "huber", "log_z": "learned", "bound": "paper"}),
    ("subtb", {"lam": 1.0}),
    ("grpo", {"aggregation": "token-mean", "kl_coef": 0.0}),
    ("grpo", {"aggregation": "seq-mean-token-sum", "dual_clip": 1.1, "kl_estimator": "k2"}),
    ("grpo", {"kl_placement": "reward_token", "kl_estimator": "k1"}),
    ("grpo", {"kl_ratio_weight": True, "kl_coef": 1.0}),
    ("rloo", {"kl_coef": 0.5, "kl_placement": "loss", "kl_estimator": "k3_straight_through"}),
    ("reinforce", {"advantage": "none", "kl_coef": 0.5, "kl_placement": "reward_token"}),
    ("prorl", {"preset": "v2"}),
    ("ppo", {"gamma": 0.9, "lam": 0.8, "kl_controller": "adaptive"}),
    ("ppo", {"kl_placement": "loss", "kl_estimator": "k3", "value_clip": 0.0}),
    ("trpo", {"critic": True, "lam": 0.9}),
    ("trpo", {"method": "line_search"}),
]
CASES = every_objective(VARIANTS)
SEEDS = st.integers(0, 10_000)
GROUP_SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4).filter(lambda g: max(g) > 1)
few_examples = settings(max_examples=15, deadline=None, derandomize=True)


def prepared(objective, batch):
    batch = objective.prepare(batch.replace(totals=count_totals(batch)))
    if objective.coupling == "group":
        batch = batch.replace(group_log_z=objective.group_statistic(batch))
    return batch


def sum_over_parts(objective, batch, parts, own_totals: bool = False):
    """Loss and gradient of a prepared batch, evaluated part by part."""
    logprobs = leaf(batch.logprobs)
    batch = batch.replace(logprobs=logprobs)
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        piece = batch.select(part)
        if own_totals:
            piece = piece.replace(totals=count_totals(piece))
        total = total + objective.loss(piece)[0]
    total.backward()
    assert logprobs.grad is not None
    return total.detach(), logprobs.grad


@pytest.mark.parametrize(("name", "options"), CASES)
@few_examples
@given(seed=SEEDS, group_sizes=GROUP_SIZES, num_parts=st.integers(1, 4))
def test_split_into_microbatches(name, options, seed, group_sizes, num_parts):
    objective = build(name, options)
    batch = prepared(objective, random_batch(seed, group_sizes))
    order = torch.randperm(batch.num_sequences, generator=torch.Generator().manual_seed(seed))
    whole = sum_over_parts(objective, batch, [torch.arange(batch.num_sequences)])
    split = sum_over_parts(objective, batch, order.tensor_split(min(num_parts, len(order))))
    for part, expected in zip(split, whole, strict=True):
        assert_close(part, expected)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_totals_of_a_microbatch_would_break_the_split(name, options):
    """Negative control, and the released code's defect: scaling by what a micro-batch holds."""
    objective = build(name, {**options, "max_tokens": 6} if name == "dr_grpo" else options)
    batch = prepared(objective, random_batch(8, [4, 3]))
    parts = [torch.arange(2), torch.arange(2, 7)]
    _, whole = sum_over_parts(objective, batch, parts)
    _, scaled = sum_over_parts(objective, batch, parts, own_totals=True)
    averaged = scaled / len(parts)  # the mean of micro-batch means
    assert float((averaged - whole).abs().max()) > 1e-3


@pytest.mark.parametrize(("name", "options"), CASES)
@few_examples
@given(seed=SEEDS, group_sizes=GROUP_SIZES)
def test_order_of_sequences(name, options, seed, group_sizes):
    batch = random_batch(seed, group_sizes)
    order = torch.randperm(batch.num_sequences, generator=torch.Generator().manual_seed(seed))
    result, gradient, _ = evaluate(name, batch, **options)
    shuffled, shuffled_gradient, _ = evaluate(name, batch.select(order), **options)
    assert_close(shuffled.loss.detach(), result.loss.detach())
    for key, value in result.metrics.items():
        assert_close(shuffled.metrics[key], value[order])
    expected = batch.replace(logprobs=gradient).select(order).logprobs
    assert_close(shuffled_gradient, expected)


@pytest.mark.parametrize(("name", "options"), CASES)
@few_examples
@given(seed=SEEDS, group_sizes=GROUP_SIZES)
def test_masked_tokens_may_hold_anything(name, options, seed, group_sizes):
    batch = random_batch(seed, group_sizes)
    result, gradient, _ = evaluate(name, batch, **options)
    holes = {
        field: torch.where(batch.mask, getattr(batch, field), torch.nan)
        for field in ("logprobs", "old_logprobs", "ref_logprobs", "old_values", "values")
    }
    holed, holed_gradient, _ = evaluate(name, batch.replace(**holes), **options)
    assert_close(holed.loss.detach(), result.loss.detach())
    assert_close(holed_gradient, gradient)
    assert (holed_gradient[~batch.mask] == 0).all()
    assert all(torch.isfinite(m).all() for m in holed.metrics.values())
    assert holed.summary == pytest.approx(result.summary)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_nan_that_is_not_masked_reaches_the_loss(name, options):
    batch = random_batch(9, [3, 2], masked=False)
    assert batch.logprobs is not None
    logprobs = batch.logprobs.clone()
    logprobs[1] = torch.nan
    assert torch.isnan(loss(name, batch.replace(logprobs=logprobs), **options).loss)


Z_SCORED = ["grpo", "dapo", "prorl", "gspo", "gspo_token", "gmpo", "cispo", "trpo"]
SHIFT_CHANGES = [
    ("tb", {}),
    ("subtb", {}),
    ("db", {}),
    ("flowrl", {"reward": "raw"}),
    ("reinforce", {"advantage": "none"}),
    ("ppo", {"gamma": 0.9}),
]
SHIFT_LEAVES = [
    ("vargrad", {}),
    ("gflowrl", {}),
    ("tba", {}),
    ("gvpo", {}),
    ("kimi_pmd", {}),
    ("ftb", {"beta": 0.1}),
    ("flowrl", {}),
    ("flowrl", {"reward": "raw", "log_z": "group_mean"}),
    *((name, {}) for name in (*Z_SCORED, "reinforce", "rloo", "rloo_kl", "dr_grpo")),
    *((name, {}) for name in ("reinforce_pp", "reinforce_pp_baseline", "ppo")),
]
DOUBLING_CHANGES = [
    ("vargrad", {}),
    ("gvpo", {}),
    ("kimi_pmd", {}),
    ("ftb", {"beta": 0.5}),
    ("subtb", {}),
    ("rloo", {}),
    ("rloo_kl", {}),
    ("tb", {}),
    ("dr_grpo", {"max_tokens": 6}),
    ("reinforce_pp", {"kl_coef": 1.0}),
]
DOUBLING_LEAVES = [
    ("flowrl", {}),
    *((name, {}) for name in Z_SCORED),
    ("reinforce_pp", {"kl_coef": 0.0}),
    ("reinforce_pp_baseline", {}),
]


def change_of_gradient(name, options, batch, rewards) -> float:
    _, before, _ = evaluate(name, batch, **options)
    _, after, _ = evaluate(name, batch.replace(rewards=rewards), **options)
    return float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize(("name", "options"), SHIFT_LEAVES)
@few_examples
@given(seed=SEEDS, shift=st.floats(-5, 5))
def test_shift_of_rewards(name, options, seed, shift):
    batch = random_batch(seed, [4, 2, 3])
    assert change_of_gradient(name, options, batch, batch.rewards + shift) < 1e-9


@pytest.mark.parametrize(("name", "options"), DOUBLING_LEAVES)
@few_examples
@given(seed=SEEDS)
def test_scale_of_rewards(name, options, seed):
    """Up to the epsilon of the z-score, 1e-6 relative to the spread of a group."""
    batch = random_batch(seed, [4, 5, 3])
    assert change_of_gradient(name, options, batch, batch.rewards * 2) < 1e-3


@pytest.mark.parametrize(("name", "options"), SHIFT_CHANGES)
def test_shift_matters_where_nothing_is_centred(name, options):
    batch = random_batch(1, [4, 2, 3])
    assert change_of_gradient(name, options, batch, batch.rewards + 1) > 0.01


@pytest.mark.parametrize(("name", "options"), DOUBLING_CHANGES)
def test_scale_matters_where_nothing_is_divided(name, options):
    batch = random_batch(1, [4, 2, 3])
    assert change_of_gradient(name, options, batch, batch.rewards * 2) > 0.01


NO_OLD_PASS = [case for case in CASES if "old_pass" not in build(*case).needs]


@pytest.mark.parametrize(("name", "options"), NO_OLD_PASS)
def test_a_skipped_old_pass_is_a_ratio_of_one(name, options):
    batch = random_batch(2, [3, 3])
    explicit, explicit_gradient, _ = evaluate(
        name, batch.replace(old_logprobs=batch.logprobs), **options
    )
    skipped, skipped_gradient, _ = evaluate(name, batch.replace(old_logprobs=None), **options)
    assert_close(skipped.loss.detach(), explicit.loss.detach())
    assert_close(skipped_gradient, explicit_gradient)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_sequence_without_tokens_has_no_share(name, options):
    """As when truncated answers are masked: its term is 0 and its group's log Z leaves it out."""
    batch = random_batch(3, [3, 2])
    mask = batch.mask.clone()
    mask[: int(batch.lengths[0])] = False
    result, gradient, _ = evaluate(name, batch.replace(response_mask=mask), **options)
    assert torch.isfinite(result.loss)
    assert (gradient[: int(batch.lengths[0])] == 0).all()
    if name == "vargrad":
        group = batch.group_ids == batch.group_ids[0]
        group[0] = False
        assert abs(float(result.metrics["residual"][group].sum())) < 1e-12


@pytest.mark.parametrize(("name", "options"), CASES)
def test_float32_follows_float64(name, options):
    batch = random_batch(4, [4, 4])
    result, gradient, _ = evaluate(name, batch, **options)
    single = {
        field: getattr(batch, field).float()
        for field in (
            "logprobs", "old_logprobs", "ref_logprobs", "old_values", "values", "rewards", "log_z"
        )
    }  # fmt: skip
    low, low_gradient, _ = evaluate(name, batch.replace(**single), **options)
    assert low.loss.dtype == torch.float32
    assert_close(low.loss.detach(), result.loss.detach(), atol=1e-5, rtol=1e-4)
    assert_close(low_gradient, gradient, atol=1e-5, rtol=1e-4)
