"""Golden values in float64, as tables of (name, options, loss, gradients).

The numbers come from central differences of independent implementations of each formula.
"""

from __future__ import annotations

import math

import pytest
import torch
from loss_batches import (
    LENGTHS,
    assert_close,
    evaluate,
    leaf,
    one_group_of_four,
    two_groups_of_four,
)

from flowrl.objectives import build, count_totals, residual_settings
from flowrl.objectives.reinforce import Reinforce
from flowrl.records import to_cu_seqlens

# One group of four; the gradient is that of each token of a row.
BOUND_TABLE = [
    ({"bound": "none"}, 168.476546, [-2.103951, 3.285092, 2.201173, -6.470185]),
    ({"preset": "paper"}, 173.395456, [-2.325225, 3.942111, 1.802168, -6.470185]),
    ({"bound": "paper"}, 173.395456, [-2.325225, 3.942111, 1.802168, -6.470185]),
    ({"preset": "recipe"}, 553.267957, [-2.325225, 32.850925, 1.802168, -6.470185]),
    ({}, 553.267957, [-2.325225, 32.850925, 1.802168, -6.470185]),
    ({"preset": "release"}, 988.633655, [-2.325225, 65.982846, 1.802168, -6.470185]),
    # No token leaves [0.8, 1.28] on the side its reward pushes to, so only the bound matters:
    # 3.285092 * 1.28 and, for the loss, 173.395456 + 0.08 * 13.140370^2 / 4.
    ({"preset": "recipe_2025_11"}, 176.848843, [-2.325225, 4.204918, 1.802168, -6.470185]),
]
RESIDUALS = [-12.623703, 13.140370, 13.207036, -12.940370]
LOG_WEIGHTS = [0.1, 3.0, -0.2, 0.0]

# Two groups of four: loss, sum |g|, sum g, five entries of g, gradient of the two log Z.
ENTRIES = ((0, 0), (1, 3), (3, 2), (5, 4), (6, 2))
TOKEN_MEAN = {"kl_coef": 0.0, "aggregation": "token-mean"}
OBJECTIVE_TABLE = [
    (
        "reinforce", {}, 0.078125, 1.437500, -0.125000,
        [-0.062500, 0.062500, -0.062500, -0.031250, 0.093750], None,
    ),
    (
        "grpo", {**TOKEN_MEAN, "dual_clip": 3.0}, -0.042164, 0.636620, -0.029334,
        [-0.023762, 0.027607, -0.032075, -0.018518, 0.064546], None,
    ),
    (
        "dapo", {}, -0.047693, 0.636620, -0.029334,
        [-0.023762, 0.027607, -0.032075, -0.018518, 0.064546], None,
    ),
    (
        "reinforce_pp", {}, 0.033823, 0.766487, 0.043967,
        [-0.019036, 0.044188, -0.025772, -0.025695, 0.059737], None,
    ),
    (
        "gmpo", {}, 0.040626, 0.824842, 0.040626,
        [-0.032650, 0.021651, -0.026067, -0.012500, 0.059452], None,
    ),
    (
        "rloo", {}, 0.104167, 1.916667, -0.166667,
        [-0.083333, 0.083333, -0.083333, -0.041667, 0.125000], None,
    ),
    (
        "grpo", {"kl_coef": 0.04}, 0.052657, 0.708151, 0.049684,
        [-0.027552, 0.018473, -0.027063, -0.012500, 0.072847], None,
    ),
    (
        "disco", {}, 0.090148, 2.083582, 0.096751,
        [-0.061735, 0.036057, -0.062500, -0.033333, 0.193639], None,
    ),
    (
        "tb", {"beta": 2.0}, 2.794688, 9.962500, -9.112500,
        [-0.500000, 0.050000, -0.487500, -0.525000, -0.087500], [-0.762500, -1.700000],
    ),
    (
        "kimi_pmd", {"beta": 10.0}, 0.224684, 0.289375, -0.027625,
        [-0.013250, 0.012500, -0.012875, -0.006250, 0.018375], None,
    ),
    (
        "flowrl", {"preset": "paper"}, 160.654030, 23.597696, 0.827055,
        [-0.852691, 0.663518, -0.686030, -0.383999, 1.595893], [2.122504, -1.295448],
    ),
]  # fmt: skip


def rows_of(gradient: torch.Tensor, lengths) -> list[torch.Tensor]:
    return list(gradient.split(list(lengths)))


@pytest.mark.parametrize(("options", "loss", "row_gradients"), BOUND_TABLE)
def test_bounds_of_flowrl(options, loss, row_gradients):
    result, gradient, _ = evaluate("flowrl", one_group_of_four(), **options)
    assert_close(result.loss.detach(), loss, atol=1e-6, rtol=0)
    for row, expected in zip(rows_of(gradient, (3, 2, 3, 1)), row_gradients, strict=True):
        assert_close(row, [expected] * row.numel(), atol=1e-6, rtol=0)


def test_parts_of_the_residual():
    result, _, log_z_gradient = evaluate("flowrl", one_group_of_four(), bound="none")
    assert_close(result.metrics["residual"], RESIDUALS, atol=1e-6, rtol=0)
    assert_close(result.metrics["log_weight"], LOG_WEIGHTS)
    assert_close(log_z_gradient, [2 * r / 4 for r in RESIDUALS], atol=1e-6, rtol=0)


def assert_golden(value, gradient, loss, l1, total, entries):
    starts = to_cu_seqlens(torch.tensor(LENGTHS))
    assert_close(value.detach(), loss, atol=1e-6, rtol=0)
    assert_close(gradient.abs().sum(), l1, atol=1e-6, rtol=0)
    assert_close(gradient.sum(), total, atol=1e-6, rtol=0)
    picked = [gradient[int(starts[i]) + t] for i, t in ENTRIES]
    assert_close(torch.stack(picked), entries, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "loss", "l1", "total", "entries", "z"), OBJECTIVE_TABLE
)
def test_objectives(name, options, loss, l1, total, entries, z):
    result, gradient, log_z_gradient = evaluate(name, two_groups_of_four(), **options)
    assert_golden(result.loss, gradient, loss, l1, total, entries)
    if z is None:
        assert log_z_gradient is None
    else:
        assert log_z_gradient is not None
        assert_close(log_z_gradient.view(2, 4).sum(1), z, atol=1e-6, rtol=0)


def test_weights_of_the_sampler_multiply_token_losses():
    """DAPO with pi_old / pi_rollout where that is in [0.95, 1.05] and 0 elsewhere (IcePop)."""
    batch = two_groups_of_four()
    assert batch.old_logprobs is not None
    assert batch.rollout_logprobs is not None
    mu = (batch.old_logprobs - batch.rollout_logprobs).exp()
    weights = torch.where((mu >= 0.95) & (mu <= 1.05), mu, 0.0)
    result, gradient, _ = evaluate("dapo", batch.replace(rollout_weights=weights))
    entries = [0.0, 0.026926, 0.0, 0.0, 0.0]
    assert_golden(result.loss, gradient, -0.070105, 0.305733, 0.017359, entries)


@pytest.mark.parametrize("shape", ["sequence", "token"])
def test_advantages_of_any_origin(shape):
    """0.1 for right and -1 for wrong answers (W-REINFORCE, arXiv:2506.01347), per sequence or per
    token, under the surrogate whose row above is the second."""
    batch = two_groups_of_four()
    advantages = torch.where(batch.rewards > 0, 0.1, -1.0).double()
    if shape == "token":
        advantages = advantages.repeat_interleave(batch.lengths)
    logprobs = leaf(batch.logprobs)
    batch = batch.replace(advantages=advantages, logprobs=logprobs, totals=count_totals(batch))
    value, _ = build("grpo", {**TOKEN_MEAN, "dual_clip": 3.0}).loss(batch)
    value.backward()
    entries = [-0.002744, 0.031878, -0.003704, -0.003704, 0.043031]
    assert_golden(value, logprobs.grad, 0.285880, 0.344053, 0.239954, entries)


def test_policy_mirror_descent_of_tokens():
    """DRO in verl's form, mean_t -(A log pi - (log pi - log pi_old)^2 / 2): REINFORCE's parts with
    k2 towards the old policy."""
    batch = two_groups_of_four()
    logprobs = leaf(batch.logprobs)
    batch = batch.replace(
        logprobs=logprobs, ref_logprobs=batch.old_logprobs, totals=count_totals(batch)
    )
    objective = build("reinforce", {"kl_coef": 1.0, "kl_estimator": "k2", "kl_placement": "loss"})
    assert isinstance(objective, Reinforce)
    objective.aggregation = "token-mean"
    value, _ = objective.loss(objective.prepare(batch))
    value.backward()
    entries = [-0.029630, 0.012963, -0.018519, -0.009259, 0.033333]
    assert_golden(value, logprobs.grad, 0.046065, 0.450000, -0.042593, entries)


def test_the_paper_row_sees_a_weight_that_is_computed_and_not_used(monkeypatch):
    """Negative control: the released code's defect, multiplying by the raw weight."""
    monkeypatch.setitem(residual_settings.BOUNDS, "paper", residual_settings.BOUNDS["release"])
    result, _, _ = evaluate("flowrl", one_group_of_four(), preset="paper")
    assert abs(float(result.loss.detach()) - 173.395456) > 100


def test_token_mask_drops_tokens_that_the_reward_pushes_out():
    """Row 1 has rhat < 0 and row 3 rhat > 0: a ratio below 0.8 and one above 1.28 are dropped from
    the means and from log w; the same ratios on the other rows are kept."""
    batch = one_group_of_four()
    assert batch.logprobs is not None
    log_ratio = torch.tensor([-0.3, 0.0, 0.0, -0.3, 0.1, 0.3, 0.0, 0.0, 0.3], dtype=torch.float64)
    batch = batch.replace(old_logprobs=batch.logprobs - log_ratio)
    result, gradient, _ = evaluate("flowrl", batch, preset="recipe_2025_11")

    rhat = 0.8660247  # of +-1 in this group
    residual_1 = 0.25 - 0.1 + 15 * rhat + 0.4  # only the second token of row 1 is left
    assert_close(result.metrics["residual"][1], residual_1, atol=1e-5, rtol=0)
    assert_close(result.metrics["log_weight"], [-0.3, 0.1, 0.3, 0.0])
    assert_close(result.metrics["masked_token_frac"], [0.0, 0.5, 0.0, 1.0])
    assert_close(gradient[3:5], [0.0, 2 * math.exp(0.1) * residual_1 / 4], atol=1e-5, rtol=0)
    assert float(gradient[8]) == 0.0  # all of row 3 is dropped
    unmasked, _, _ = evaluate("flowrl", batch, preset="recipe_2025_11", token_mask=False)
    assert abs(float(unmasked.metrics["residual"][1]) - residual_1) > 0.05
