"""Generalised advantages, the value loss and adaptive coefficients, against numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_batches import assert_close, batch_from_rows, evaluate, leaf, random_batch

from flowrl.objectives import build, count_totals
from flowrl.objectives.returns import at_last_token, discounted_to_go, gae

few_examples = settings(max_examples=25, deadline=None, derandomize=True)


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loop_gae(rewards, values, gamma, lam):
    """The recursion of one sequence, last token first."""
    advantages, following, advantage = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        advantage = reward + gamma * following - value + gamma * lam * advantage
        advantages.append(advantage)
        following = value
    return list(reversed(advantages))


def test_gae_by_hand():
    """gamma 0.5, lam 0.5; rewards 0, 0, 1; values 0.2, 0.4, 0.8."""
    batch = batch_from_rows({"logprobs": [[0.0] * 3]}, [1.0], [0])
    advantages, returns = gae(
        double([0.0, 0.0, 1.0]), double([0.2, 0.4, 0.8]), batch, gamma=0.5, lam=0.5
    )
    last = 1 - 0.8
    middle = 0.5 * 0.8 - 0.4 + 0.25 * last
    first = 0.5 * 0.4 - 0.2 + 0.25 * middle
    assert_close(advantages, [first, middle, last])
    assert_close(returns, [first + 0.2, middle + 0.4, last + 0.8])


@few_examples
@given(
    seed=st.integers(0, 10_000),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_gae_is_the_recursion_over_tokens_that_are_not_masked(seed, gamma, lam, sizes):
    batch = random_batch(seed, sizes)
    assert batch.old_values is not None
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(batch.mask.numel(), generator=generator, dtype=torch.float64)
    holes = torch.where(batch.mask, batch.old_values, torch.nan)
    advantages, returns = gae(rewards, holes, batch, gamma, lam)
    lengths = batch.lengths.tolist()
    for r, v, m, a, ret in zip(
        *(x.split(lengths) for x in (rewards, batch.old_values, batch.mask, advantages, returns)),
        strict=True,
    ):
        expected = double(loop_gae(r[m].tolist(), v[m].tolist(), gamma, lam))
        assert_close(a[m], expected)
        assert_close(ret[m], expected + v[m])
        assert (a[~m] == 0).all()


def test_sums_to_go_skip_masked_tokens_and_stop_at_the_end():
    batch = batch_from_rows({"logprobs": [[0.0] * 4, [0.0], [0.0] * 2]}, [7.0, 8.0, 9.0], [0] * 3)
    mask = torch.tensor([True, False, True, True, True, True, False])
    batch = batch.replace(response_mask=mask)
    values = double([1.0, math.nan, 2.0, 4.0, 10.0, 20.0, math.nan])
    assert_close(discounted_to_go(values, 0.5, batch), [1 + 1 + 1, 0, 4, 4, 10, 20, 0])
    assert_close(at_last_token(batch.rewards, batch), [0, 0, 0, 7, 8, 9, 0])


def critic_batch():
    """Two answers of two tokens and one; gamma = lam = 1, so A = what is to come less the value."""
    rows = {
        "logprobs": [[-1.0, -1.0], [-1.0]],
        "old_logprobs": [[-1.0, -1.0], [-1.0]],
        "ref_logprobs": [[-1.1, -0.8], [-1.4]],
        "old_values": [[0.5, 0.0], [1.0]],
        "values": [[1.4, -0.1], [-0.2]],
    }
    return batch_from_rows(rows, [1.0, 2.0], [0, 1])


def test_token_rewards_and_returns():
    """KL 0.1, -0.2 and 0.4 at coefficient 0.5: r = -0.05, 1.1 and 1.8."""
    prepared = build("ppo", {"kl_coef": 0.5}).prepare(critic_batch())
    assert_close(prepared.returns, [1.05, 1.1, 1.8])
    advantages = double([0.55, 1.1, 0.8])
    assert_close(
        prepared.advantages,
        (advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt(),
    )
    whole = build("ppo", {"kl_coef": 0.5, "kl_placement": "reward_sequence"})
    assert_close(whole.prepare(critic_batch()).returns, [1.05, 1.05, 1.8])
    in_loss = build("ppo", {"kl_coef": 0.5, "kl_placement": "loss"})
    assert_close(in_loss.prepare(critic_batch()).returns, [1.0, 1.0, 2.0])


def test_value_loss_by_hand():
    """Errors 0.4, -1.1 and -2.2. Clipped at 0.5, the value 1.4 counts as 1.0 and -0.2 as 0.5: both
    errors are smaller than without the clip, so the clip changes nothing."""
    objective = build("ppo", {"kl_coef": 0.0, "value_coef": 0.25})
    batch = critic_batch()
    batch = objective.prepare(batch.replace(totals=count_totals(batch)))
    values = leaf(batch.values)
    loss, metrics = objective.loss(batch.replace(values=values))
    loss.backward()
    assert_close(metrics["value_loss"], [(0.16 + 1.21) / 2, 4.84])
    assert_close(values.grad, 0.25 / 3 * 2 * double([0.4, -1.1, -2.2]))


@pytest.mark.parametrize(("clip", "loss", "gradient"), [(0.5, 0.25, 0.0), (0.0, 0.04, -0.2)])
def test_value_clip_stops_what_has_moved_far_enough(clip, loss, gradient):
    """From 0 to 0.8 towards a return of 1: with clip 0.5 the clipped error (0.5 - 1)^2 is larger
    than (0.8 - 1)^2 and has no gradient."""
    rows = {"logprobs": [[-1.0]], "old_logprobs": [[-1.0]], "old_values": [[0.0]]}
    batch = batch_from_rows({**rows, "values": [[0.8]]}, [1.0], [0])
    objective = build("ppo", {"kl_coef": 0.0, "value_clip": clip})
    batch = objective.prepare(batch.replace(totals=count_totals(batch)))
    values = leaf(batch.values)
    total, metrics = objective.loss(batch.replace(values=values))
    total.backward()
    assert_close(metrics["value_loss"], [loss])
    assert_close(values.grad, [gradient])


@pytest.mark.parametrize("name", ["ppo", "trpo"])
def test_gradient_in_values(name):
    objective = build(name, {"critic": True} if name == "trpo" else {"lam": 0.9})
    batch = random_batch(4, [3, 2])
    batch = objective.prepare(batch.replace(totals=count_totals(batch)))
    values = leaf(batch.values)

    def value(v):
        return objective.loss(batch.replace(values=v))[0]

    assert torch.autograd.gradcheck(value, (values,), atol=1e-7)
    value(values).backward()
    assert values.grad is not None
    assert float(values.grad.abs().max()) > 1e-3
    assert (values.grad[~batch.mask] == 0).all()


# --- adaptive coefficients


@pytest.mark.parametrize(
    ("target", "factor"),
    [
        # Mean over answers of their token mean of k1: (-0.05 + 0.4) / 2 = 0.175.
        (0.16, 1 + 0.09375 * 2 / 100),
        (0.1, 1 + 0.2 * 2 / 100),
        (1.0, 1 - 0.2 * 2 / 100),
    ],
)
def test_ppo_coefficient_follows_its_target(target, factor):
    options = {"kl_controller": "adaptive", "kl_coef": 0.5, "kl_target": target, "kl_horizon": 100}
    objective = build("ppo", options)
    prepared = objective.prepare(critic_batch())
    assert_close(prepared.returns, [1.05, 1.1, 1.8])  # the coefficient before it moves
    assert objective.state() == pytest.approx({"kl_coef": 0.5 * factor})
    metrics = {"advantage_abs": torch.zeros(2)}
    assert objective.summarize(metrics, prepared)["actor/kl_coef"] == 0.5 * factor

    resumed = build("ppo", options)
    resumed.load_state(objective.state())
    again, expected = resumed.prepare(critic_batch()), objective.prepare(critic_batch())
    assert again.returns is not None
    assert again.returns.tolist() == expected.returns.tolist()  # pyright: ignore
    assert resumed.state() == objective.state()


def test_a_fixed_coefficient_stays():
    objective = build("ppo")
    objective.prepare(critic_batch())
    assert objective.state() == {}
    with pytest.raises(ValueError, match=r"state of ppo must hold \[\], got \['kl_coef'\]"):
        objective.load_state({"kl_coef": 1.0})


@pytest.mark.parametrize(
    ("measured", "expected"), [(0.0151, 6.0), (0.0149, 3.0), (0.0067, 3.0), (0.0066, 1.5)]
)
def test_trpo_penalty_doubles_and_halves(measured, expected):
    objective = build("trpo", {"kl_penalty": 3.0, "max_kl": 0.01})
    objective.after_update(measured)
    assert objective.state() == {"kl_penalty": expected}
    resumed = build("trpo")
    resumed.load_state(objective.state())
    assert resumed.state() == objective.state()


def test_trpo_penalty_comes_back_from_a_long_stillness():
    objective = build("trpo")
    for _ in range(2000):
        objective.after_update(0.0)
    assert objective.state() == {"kl_penalty": 1e-6}
    objective.after_update(1.0)
    assert objective.state() == {"kl_penalty": 2e-6}


def test_trpo_penalty_is_the_kl_of_old_and_new():
    """loss = mean_t(-A rho + c (rho - 1 - log rho)), gradient (-A rho + c (rho - 1)) / tokens."""
    rows = {"old_logprobs": [[-1.0, -1.0], [-1.0]], "logprobs": [[-0.8, -1.3], [-1.0]]}
    batch = batch_from_rows(rows, [2.0, 0.0], [0, 1])
    result, gradient, _ = evaluate("trpo", batch, kl_penalty=3.0)
    up, down, advantage = math.exp(0.2), math.exp(-0.3), 2 / (1 + 1e-6)
    kl = (up - 1 - 0.2) + (down - 1 + 0.3)
    assert_close(result.loss.detach(), (-advantage * (up + down) + 3 * kl) / 3)
    assert_close(result.metrics["kl_old_new"], [kl / 2, 0.0])
    expected = [(-advantage * rho + 3 * (rho - 1)) / 3 for rho in (up, down)]
    assert_close(gradient, [*expected, 0.0])
    assert result.summary["actor/kl_penalty"] == 3.0


def test_trust_regions_of_trpo():
    assert build("trpo").trust_region is None
    search = build("trpo", {"method": "line_search", "max_kl": 0.02, "max_backtracks": 4})
    assert search.trust_region is not None
    assert (search.trust_region.max_kl, search.trust_region.max_backtracks) == (0.02, 4)
    assert search.trust_region.method == "line_search"
    assert search.state() == {}
    solver = build("trpo", {"method": "conjugate_gradient", "damping": 0.5, "cg_iterations": 3})
    assert solver.trust_region is not None
    assert (solver.trust_region.damping, solver.trust_region.cg_iterations) == (0.5, 3)
    with pytest.raises(ValueError, match="grpo adapts nothing"):
        build("grpo").after_update(0.1)
