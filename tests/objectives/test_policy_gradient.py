"""The policy-gradient family: identities, clips and KL placements by hand, whitening over ranks."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_batches import (
    assert_close,
    batch_from_rows,
    evaluate,
    leaf,
    random_batch,
    two_groups_of_four,
)

from flowrl.objectives import POLICY_GRADIENTS, build, count_totals
from flowrl.objectives.advantages import whiten
from flowrl.objectives.aggregation import aggregate, aggregate_sequences, sequence_weights
from flowrl.objectives.groups import group_mean
from flowrl.objectives.kl import ESTIMATORS
from flowrl.objectives.surrogate import clipped_surrogate
from flowrl.records import LossBatch

SEEDS = st.integers(0, 10_000)
few_examples = settings(max_examples=15, deadline=None, derandomize=True)


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- identities


@few_examples
@given(seed=SEEDS, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
@pytest.mark.parametrize("eps", [3e-4, 0.1])
def test_gspo_token_is_gspo(eps, seed, sizes):
    batch = random_batch(seed, sizes)
    options = {"clip_eps_low": eps, "clip_eps_high": 1.5 * eps}
    first, first_gradient, _ = evaluate("gspo", batch, **options)
    second, second_gradient, _ = evaluate("gspo_token", batch, **options)
    assert_close(first.loss.detach(), second.loss.detach())
    assert_close(first_gradient, second_gradient)
    assert_close(first.metrics["clip_frac"], second.metrics["clip_frac"])


def test_gspo_gradient_is_that_of_section_one():
    """-A_i s_i / (sequences |y_i|) on every token of an answer that is not clipped."""
    batch = two_groups_of_four()
    assert batch.logprobs is not None
    assert batch.old_logprobs is not None
    _, gradient, _ = evaluate("gspo", batch, clip_eps_low=0.03, clip_eps_high=0.04)
    rows = zip(
        (batch.logprobs - batch.old_logprobs).split(batch.lengths.tolist()),
        gradient.split(batch.lengths.tolist()),
        batch.rewards.tolist(),
        group_mean(batch.rewards, batch.group_ids).tolist(),
        strict=True,
    )
    spread = math.sqrt(1 / 3), 0.5  # of two and of three right answers in four
    branches = set()
    for i, (log_ratio, row, reward, mean) in enumerate(rows):
        advantage = (reward - mean) / (spread[i // 4] + 1e-6)
        ratio = float(log_ratio.mean().exp())
        clipped = ratio > 1.04 if advantage > 0 else ratio < 0.97
        expected = 0.0 if clipped else -advantage * ratio / (8 * len(row))
        assert_close(row, [expected] * len(row))
        branches.add(clipped)
    assert branches == {True, False}


def test_reinforce_is_rloo_without_its_factor():
    batch = random_batch(11, [4, 4])
    _, reinforce, _ = evaluate("reinforce", batch)
    _, rloo, _ = evaluate("rloo", batch)
    assert_close(rloo, reinforce * 4 / 3)
    advantages = batch.rewards - group_mean(batch.rewards, batch.group_ids)
    expected = -advantages.repeat_interleave(batch.lengths) * batch.mask / 8
    assert_close(reinforce, expected)
    _, plain, _ = evaluate("reinforce", batch, advantage="none")
    assert_close(plain, -batch.rewards.repeat_interleave(batch.lengths) * batch.mask / 8)


def test_ppo_and_dapo_differ_in_the_loss_only_where_no_ratio_lies_between_their_ranges():
    batch = two_groups_of_four()
    ppo = {"kl_coef": 0.0, "aggregation": "token-mean", "dual_clip": 3.0}
    first, first_gradient, _ = evaluate("grpo", batch, **ppo)
    second, second_gradient, _ = evaluate("dapo", batch)
    assert_close(first_gradient, second_gradient)
    assert float((first.loss - second.loss).detach().abs()) > 5e-3


def test_ppo_with_group_advantages_is_that_surrogate():
    """The critic only makes advantages: under given ones PPO's policy loss has its golden value."""
    batch = two_groups_of_four()
    advantages = build("grpo").prepare(batch).advantages
    batch = batch.replace(advantages=advantages, totals=count_totals(batch))
    loss, _ = build("ppo").policy_loss(batch)  # pyright: ignore[reportAttributeAccessIssue]
    assert_close(loss, -0.042164, atol=1e-6, rtol=0)


def test_dr_grpo_is_a_constant_times_reinforce_on_policy():
    batch = random_batch(5, [4, 4])
    batch = batch.replace(logprobs=batch.old_logprobs)
    _, reinforce, _ = evaluate("reinforce", batch)
    _, dr_grpo, _ = evaluate("dr_grpo", batch, max_tokens=7)
    assert_close(dr_grpo * 7, reinforce)


def test_all_ratio_objectives_agree_on_policy():
    """At ratio 1 nothing is clipped: with one aggregation the gradient is -A / (S |y|)."""
    batch = random_batch(6, [4, 3])
    batch = batch.replace(logprobs=batch.old_logprobs)
    seq_mean = {"aggregation": "seq-mean-token-mean"}
    _, grpo, _ = evaluate("grpo", batch, kl_coef=0.0)
    for name, options in (
        ("gspo", {}),
        ("gspo_token", {}),
        ("gmpo", {}),
        ("cispo", seq_mean),
        ("dapo", seq_mean),
        ("trpo", seq_mean),
        ("prorl", {"kl_coef": 0.0, **seq_mean}),
    ):
        _, gradient, _ = evaluate(name, batch, **options)
        assert_close(gradient, grpo)


@pytest.mark.parametrize("name", [cls.name for cls in POLICY_GRADIENTS])
def test_a_uniform_batch_moves_nothing(name):
    """Where every member has one reward there is nothing to prefer, unless no baseline is taken
    (whitening then is the baseline), a critic has its own opinion, or the KL pulls."""
    batch = random_batch(7, [4, 4])
    batch = batch.replace(rewards=torch.full((8,), 0.7, dtype=torch.float64))
    options = {} if name in ("rloo_kl", "ppo", "trpo", "disco") else {"kl_coef": 0.0}
    if name == "trpo":
        batch = batch.replace(old_logprobs=batch.logprobs)  # the penalty's gradient is 0 there
    _, gradient, _ = evaluate(name, batch, **options)
    pulled = name in ("rloo_kl", "ppo")
    assert (float(gradient.abs().max()) > 1e-4) == pulled
    assert pulled or float(gradient.abs().max()) < 1e-12


def test_a_uniform_group_is_moved_by_whitening_over_the_step():
    """0 for every estimator that centres by group; REINFORCE++ compares with the whole step."""
    batch = random_batch(7, [4, 4], masked=False)
    right = batch.group_ids == batch.group_ids[0]
    batch = batch.replace(rewards=torch.where(right, 1.0, batch.rewards))
    tokens = right.repeat_interleave(batch.lengths)
    for name, moved in (("grpo", False), ("dapo", False), ("gmpo", False), ("reinforce_pp", True)):
        options = {"kl_coef": 0.0} if name == "grpo" else {}
        _, gradient, _ = evaluate(name, batch, **options)
        assert bool((gradient[tokens] != 0).any()) == moved
        assert bool((gradient[~tokens] != 0).any())


# --- clips


def test_clips_by_hand():
    """Range [0.8, 1.2], dual clip 3; A = 1 at the first four ratios and -2 at the last four."""
    ratio = double([0.5, 1.0, 1.2, 1.5, 0.5, 1.0, 2.0, 4.0]).requires_grad_()
    advantages = double([1.0] * 4 + [-2.0] * 4)
    losses, clipped = clipped_surrogate(ratio, advantages, 0.8, 1.2, 3.0)
    assert_close(losses.detach(), [-0.5, -1.0, -1.2, -1.2, 1.6, 2.0, 4.0, 6.0])
    assert clipped.tolist() == [False] * 3 + [True] + [True, False, False, True]
    losses.sum().backward()
    assert ratio.grad is not None
    assert (ratio.grad == 0).tolist() == clipped.tolist()
    losses, clipped = clipped_surrogate(ratio.detach(), advantages, 0.8, 1.2)
    assert_close(losses[-1], 8.0)
    assert not clipped[-1]


def one_answer(log_ratio: list[float], reward: float) -> LossBatch:
    """Two answers: one with these log-ratios and A = reward, one unmoved with A = 0."""
    old = [-1.0] * len(log_ratio)
    rows = {
        "old_logprobs": [old, [-1.0]],
        "logprobs": [[o + d for o, d in zip(old, log_ratio, strict=True)], [-1.0]],
    }
    batch = batch_from_rows(rows, [reward, 0.0], [0, 1])
    return batch.replace(totals=count_totals(batch))


@pytest.mark.parametrize(
    ("reward", "kept"), [(2.0, [-1.0, -0.5, 0.1, 0.4]), (-2.0, [-0.4, -0.4, 0.1, 0.9])]
)
def test_gmpo_clips_on_one_side(reward, kept):
    """A > 0: log-ratios at most 0.4; A < 0: at least -0.4. Two sequences, so loss / 2."""
    batch = one_answer([-1.0, -0.5, 0.1, 0.9], reward)
    result, gradient, _ = evaluate("gmpo", batch)
    geometric = math.exp(sum(kept) / 4)
    advantage = reward / (1 + 1e-6)
    assert_close(result.loss.detach(), -advantage * geometric / 2)
    moved = [a == b for a, b in zip(kept, [-1.0, -0.5, 0.1, 0.9], strict=True)]
    expected = [-advantage * geometric / (2 * 4) * m for m in moved]
    assert_close(gradient[:4], expected)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    batch = one_answer([-1.0, 0.1, 0.9], 2.0)
    _, gradient, _ = evaluate("cispo", batch)
    weights = [0.8, math.exp(0.1), 1.28]
    assert_close(gradient[:3], [-2.0 / (1 + 1e-6) * w / 4 for w in weights])
    _, ppo, _ = evaluate("dapo", batch)
    assert float(ppo[2]) == 0.0


# --- the KL


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        ("k1", 0.3, 1.0),
        ("k2", 0.045, 0.3),
        ("k3", math.exp(-0.3) - 1 + 0.3, 1 - math.exp(-0.3)),
        ("k3_straight_through", math.exp(-0.3) - 1 + 0.3, 0.3),
    ],
)
def test_estimators_by_hand(estimator, value, gradient):
    log_ratio = double([0.3]).requires_grad_()
    result = ESTIMATORS[estimator](log_ratio)
    result.sum().backward()
    assert_close(result.detach(), [value])
    assert_close(log_ratio.grad, [gradient])


def test_k3_of_a_lost_token_is_finite():
    assert torch.isfinite(ESTIMATORS["k3"](torch.tensor([-1e4, 1e4]))).all()


def test_the_weighted_k3_has_the_gradient_of_the_reverse_kl():
    """rho * log(pi / pi_ref), whatever the old policy (DeepSeek-V3.2)."""
    batch = random_batch(21, [3, 2])
    options = {"kl_coef": 1.0, "kl_ratio_weight": True, "aggregation": "token-sum"}
    _, whole, _ = evaluate("grpo", batch, **options)
    _, policy, _ = evaluate("grpo", batch, kl_coef=0.0, aggregation="token-sum")
    assert batch.old_logprobs is not None
    assert batch.ref_logprobs is not None
    assert batch.logprobs is not None
    ratio = (batch.logprobs - batch.old_logprobs).exp()
    expected = ratio * (batch.logprobs - batch.ref_logprobs) * batch.mask
    assert_close(whole - policy, expected)


def test_placements_by_hand():
    """One answer of three tokens, KL 0.1, -0.2, 0.4 per token, coefficient 2, reward 1."""
    rows = {
        "logprobs": [[-1.0, -1.0, -1.0]],
        "old_logprobs": [[-1.0, -1.0, -1.0]],
        "ref_logprobs": [[-1.1, -0.8, -1.4]],
    }
    batch = batch_from_rows(rows, [1.0], [0])
    options = {"advantage": "none", "kl_coef": 2.0}

    def advantages(**placement):
        return build("reinforce", {**options, **placement}).prepare(batch).advantages

    assert_close(advantages(), [1 - 2 * 0.3])
    assert_close(advantages(kl_placement="reward_token"), [1 - 2 * 0.3, 1 - 2 * 0.2, 1 - 2 * 0.4])
    assert_close(advantages(kl_placement="loss"), [1.0])
    result, gradient, _ = evaluate(
        "reinforce", batch, **options, kl_placement="loss", kl_estimator="k2"
    )
    assert_close(gradient, [-1 + 2 * 0.1, -1 - 2 * 0.2, -1 + 2 * 0.4])
    assert_close(result.metrics["kl_loss"], [(0.01 + 0.04 + 0.16) / 6])


# --- weights of the sampler


def test_weights_of_sequences_are_means_over_their_tokens():
    mask = torch.tensor([True, True, False, True, False, False])
    batch = batch_from_rows(
        {"logprobs": [[0.0, 0.0, 0.0], [0.0], [0.0, 0.0]]}, [0, 0, 0], [0, 0, 0]
    )
    batch = batch.replace(response_mask=mask, totals=count_totals(batch))
    assert_close(sequence_weights(batch), [1.0, 1.0, 0.0])
    weighted = batch.replace(rollout_weights=double([0.5, 1.5, math.nan, 2.0, 3.0, math.nan]))
    assert_close(sequence_weights(weighted), [1.0, 2.0, 0.0])
    assert_close(aggregate_sequences(double([1.0, 10.0, 100.0]), weighted), 21 / 3)
    losses = double([1.0, 2.0, 0.0, 4.0, 0.0, 0.0])
    assert_close(aggregate(losses, "token-sum", weighted), 0.5 + 3.0 + 8.0)


@pytest.mark.parametrize("name", [cls.name for cls in POLICY_GRADIENTS])
def test_one_weight_for_all_tokens_scales_the_loss(name):
    """And so the loss of every member sees the weights."""
    batch = random_batch(8, [4, 3])
    result, gradient, _ = evaluate(name, batch)
    assert batch.logprobs is not None
    half = torch.where(batch.mask, 0.5, torch.nan).double()
    weighted, weighted_gradient, _ = evaluate(name, batch.replace(rollout_weights=half))
    assert_close(weighted.loss.detach(), result.loss.detach() / 2)
    assert_close(weighted_gradient, gradient / 2)


# --- over ranks


def on_two_ranks(objective, shares):
    """What `prepare` gives each of two ranks whose all-reduce adds up, in place."""
    barrier = Barrier(2, timeout=30)
    slots: list[torch.Tensor] = [torch.empty(0)] * 2

    def rank(index):
        def all_reduce(tensor):
            slots[index] = tensor.clone()
            barrier.wait()
            tensor.copy_(slots[0] + slots[1])
            barrier.wait()
            return tensor

        return objective(index).prepare(shares[index], all_reduce)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, range(2)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((cls.name, {}) for cls in POLICY_GRADIENTS),
        ("ppo", {"kl_controller": "adaptive"}),
        ("trpo", {"critic": True}),
    ],
)
def test_two_ranks_are_one_batch(name, options):
    batch = random_batch(9, [4, 2, 3])
    groups = batch.group_ids.unique()
    first = torch.isin(batch.group_ids, groups[:1]).nonzero().flatten()
    second = torch.isin(batch.group_ids, groups[1:]).nonzero().flatten()
    whole = build(name, options)
    expected = whole.prepare(batch)
    built = [build(name, options) for _ in range(2)]
    shares = [batch.select(first), batch.select(second)]
    found = on_two_ranks(lambda index: built[index], shares)
    for indices, share in zip((first, second), found, strict=True):
        assert_close(share.advantages, expected.select(indices).advantages)
        if expected.returns is not None:
            assert_close(share.returns, expected.select(indices).returns)
    for objective in built:
        assert objective.state() == pytest.approx(whole.state(), rel=1e-12)
    if name == "reinforce_pp":  # the control: a rank on its own whitens otherwise
        alone = build(name, options).prepare(shares[0])
        assert alone.advantages is not None
        assert float((alone.advantages - found[0].advantages).abs().max()) > 0.01


def test_whitening_by_hand():
    mask = torch.tensor([True, False, True, True])
    values = double([1.0, math.nan, 2.0, 6.0])
    whitened = whiten(values, mask, lambda t: t)
    deviation = double([-2.0, 0.0, -1.0, 3.0])
    assert_close(whitened, deviation / math.sqrt(7 + 1e-8))
    assert whiten(double([5.0]), torch.tensor([True]), lambda t: t).tolist() == [0.0]


def test_values_of_another_dtype_keep_it():
    batch = random_batch(3, [4])
    low = batch.replace(
        **{n: getattr(batch, n).float() for n in ("rewards", "old_values", "old_logprobs")},
        ref_logprobs=leaf(batch.ref_logprobs).detach().float(),
    )
    prepared = build("ppo").prepare(low)
    assert prepared.advantages is not None
    assert prepared.advantages.dtype == torch.float32
