"""The squared-residual family: its members by their own definitions, and fused against plain."""

from __future__ import annotations

import pytest
import torch
from loss_batches import assert_close, evaluate, leaf, random_batch, two_groups_of_four

from flowrl.objectives import build, count_totals, residual_loss
from flowrl.objectives.groups import group_mean
from flowrl.objectives.phi import MAX_EXPONENT, Phi
from flowrl.objectives.squared_residual import SquaredResidual

FUSED = [
    ("flowrl", {"preset": "paper"}),
    ("flowrl", {"preset": "recipe_2025_11"}),
    ("flowrl", {"bound": "none", "log_z": "mean_reward"}),
    ("tb", {"bound": "release"}),
    ("vargrad", {}),
    ("gvpo", {"beta": 2.0}),
    ("kimi_pmd", {"beta": 2.0, "bound": "recipe"}),
]
PHIS = [
    Phi("square"),
    Phi("f_alpha", alpha=0.5),
    Phi("f_alpha", alpha=1.0),
    Phi("f_alpha", alpha=2.0),
    Phi("linex"),
    Phi("shifted_cosh"),
    Phi("huber", threshold=0.7),
]


def segments(batch, values: torch.Tensor) -> torch.Tensor:
    return torch.segment_reduce(values, "sum", lengths=batch.lengths)


def prepared(objective, batch):
    batch = objective.prepare(batch.replace(totals=count_totals(batch)))
    if objective.coupling == "group":
        batch = batch.replace(group_log_z=objective.group_statistic(batch))
    return batch


@pytest.mark.parametrize(("name", "options"), FUSED)
def test_the_fused_operator_gives_what_plain_pytorch_gives(name, options):
    objective = build(name, options)
    assert isinstance(objective, SquaredResidual)
    batch = prepared(objective, random_batch(21, [4, 3, 1]))
    results = []
    for evaluated in (residual_loss.evaluate, residual_loss.plain):
        logprobs, log_z = leaf(batch.logprobs), leaf(objective._log_z(batch))
        current = batch.replace(logprobs=logprobs)
        arguments = (objective.settings, current, log_z, objective._mask(current))
        backend = (None,) if evaluated is residual_loss.evaluate else ()
        found = evaluated(*arguments, *backend)
        found.loss.backward()
        results.append((*found, logprobs.grad, log_z.grad))
    for fused, plain in zip(*results, strict=True):
        assert_close(fused.double(), plain.double())


@pytest.mark.parametrize(
    ("name", "options"), [("flowrl", {"log_z": "group_mean_old"}), ("gflowrl", {"gap_clip": False})]
)
def test_a_backend_for_gpus_prepares_a_batch_on_the_cpu(name, options):
    """A whole step is prepared there, whatever computes the losses."""
    batch = random_batch(21, [4, 3, 1])
    batch = batch.replace(totals=count_totals(batch))
    found = build(name, options, backend="triton").prepare(batch).group_log_z
    expected = build(name, options).prepare(batch).group_log_z
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


def test_tba_is_vargrad_with_inverse_kl_coef():
    batch = random_batch(13, [4, 4])
    tba, tba_gradient, _ = evaluate("tba", batch, kl_coef=0.5)
    vargrad, gradient, _ = evaluate("vargrad", batch, beta=2.0)
    assert_close(tba.loss.detach(), vargrad.loss.detach())
    assert_close(tba_gradient, gradient)


def test_gvpo_by_its_definition():
    """Mean over prompts of 1 / (2 (G - 1)) sum_i (b (D_i - mean D) - (r_i - mean r))^2, b = 0.1."""
    batch = two_groups_of_four()
    logprobs = leaf(batch.logprobs)
    assert batch.old_logprobs is not None
    moved = segments(batch, logprobs - batch.old_logprobs).view(2, 4)
    rewards = batch.rewards.view(2, 4)
    misses = 0.1 * (moved - moved.mean(1, keepdim=True)) - (rewards - rewards.mean(1, keepdim=True))
    expected = (misses.square().sum(1) / (2 * 3)).mean()
    expected.backward()
    result, gradient, _ = evaluate("gvpo", batch, beta=10.0)
    assert_close(result.loss.detach(), expected.detach())
    assert_close(gradient, logprobs.grad)


def test_gflowrl_at_the_old_policy_is_vargrad_with_clipped_residuals():
    batch = random_batch(14, [5, 4])
    batch = batch.replace(logprobs=batch.old_logprobs)
    options = {"beta": 0.7}
    vargrad, gradient, _ = evaluate("vargrad", batch, **options)
    _, free_gradient, _ = evaluate("gflowrl", batch, gap_clip=False, **options)
    assert_close(free_gradient, gradient)
    clipped, clipped_gradient, _ = evaluate("gflowrl", batch, **options)
    expected = vargrad.metrics["residual"].clamp(-0.2, 0.28)
    assert_close(clipped.metrics["residual"], expected)
    assert sorted({-0.2, 0.28} & set(clipped.metrics["residual"].tolist())) == [-0.2, 0.28]
    per_token = (2 * expected / batch.num_sequences).repeat_interleave(batch.lengths)
    assert_close(clipped_gradient, torch.where(batch.mask, per_token, 0.0))


def test_gflowrl_adds_the_move_since_the_old_policy_to_a_fixed_gap():
    batch = random_batch(15, [4, 3], masked=False)
    result, _, _ = evaluate("gflowrl", batch, beta=0.7)
    assert batch.old_logprobs is not None
    at_old, _, _ = evaluate("gflowrl", batch.replace(logprobs=batch.old_logprobs), beta=0.7)
    assert batch.logprobs is not None
    moved = segments(batch, batch.logprobs - batch.old_logprobs)
    assert_close(result.metrics["residual"], at_old.metrics["residual"] + moved)
    assert_close(result.metrics["log_z"], at_old.metrics["log_z"])
    assert_close(result.metrics["importance_weight"], moved.exp().clamp(max=1.2))


def test_ftb_contains_vargrad():
    batch = random_batch(16, [4, 3])
    vargrad, gradient, _ = evaluate("vargrad", batch, beta=0.7)
    square, square_gradient, _ = evaluate("ftb", batch, beta=0.7, phi="square")
    assert_close(square.loss.detach(), vargrad.loss.detach())
    assert_close(square_gradient, gradient)
    _, half, _ = evaluate("ftb", batch, beta=0.7, alpha=1.0)
    assert_close(half, gradient / 2)
    _, alpha_2, _ = evaluate("ftb", batch, beta=0.7, alpha=2.0)
    _, linex, _ = evaluate("ftb", batch, beta=0.7, phi="linex")
    assert_close(alpha_2, linex)


def test_f_alpha_by_its_published_form():
    d = torch.tensor([-1.5, 0.0, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    for a in (0.5, 0.75, 1.2, 2.0):
        value = Phi("f_alpha", alpha=a)(d)
        published = ((a - 1) * d).exp() / (a - 1) ** 2 - d / (a - 1) - 1 / (a - 1) ** 2
        assert_close(value.detach(), published.detach(), atol=1e-12)
        (slope,) = torch.autograd.grad(value.sum(), d)
        assert_close(slope, (((a - 1) * d).exp() - 1).detach() / (a - 1))


@pytest.mark.parametrize("phi", PHIS)
def test_phi_is_convex_with_its_minimum_at_zero_far_out_too(phi):
    d = (torch.arange(-400, 401, dtype=torch.float64) / 10).requires_grad_()
    value = phi(d)
    (slope,) = torch.autograd.grad(value.sum(), d)
    assert torch.isfinite(value).all()
    assert float(value.detach().min()) == float(value[400].detach()) == 0.0
    assert (slope.diff() >= -1e-9 * slope[1:].abs()).all()
    assert (slope[d > 0.1] > 0).all()
    assert (slope[d < -0.1] < 0).all()
    single = phi(torch.full((1,), 1e4))
    assert torch.isfinite(single).all(), "float32 far beyond MAX_EXPONENT"


def test_a_clamped_exponent_would_lose_the_slope():
    """Negative control: e^clamp(x) - 1 - x falls again beyond the clamp."""
    d = torch.tensor([MAX_EXPONENT + 1], dtype=torch.float64, requires_grad=True)
    clamped = torch.expm1(d.clamp(max=MAX_EXPONENT)) - d
    assert float(torch.autograd.grad(clamped.sum(), d)[0]) < 0


@pytest.mark.parametrize("phi", PHIS[:-1])
def test_the_best_constant_has_the_least_mean_of_its_group(phi):
    residual = torch.randn(9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    groups = torch.tensor([5, 5, 2, 5, 2, 2, 2, 5, 9])
    include = torch.ones(9, dtype=torch.bool)
    include[3] = include[8] = False
    constant = leaf(phi.best_constant(residual, groups, include))
    mean = group_mean(residual, groups, include)
    assert float(constant[8].detach()) == 0.0  # a group without a member that counts
    for group in (5, 2):
        members = (groups == group) & include
        value = phi(residual[members] + constant[members]).sum()
        slope = torch.autograd.grad(value, constant)[0].sum()
        assert abs(float(slope)) < 1e-12
        if phi.kind not in ("square",) and phi.alpha != 1.0:
            assert float((constant + mean)[members].detach().abs().max()) > 1e-3
    assert len(set(constant[groups == 5].tolist())) == 1


@pytest.mark.parametrize("name", ["tb", "vargrad", "flowrl", "gflowrl", "subtb", "db"])
def test_the_samplers_correction_multiplies_the_weight_alone(name):
    """Ratios of whole sequences: 1.5, 2, 0 (dropped), 1 ..."""
    batch = random_batch(17, [3, 3], masked=False)
    plain, _, _ = evaluate(name, batch)
    starts = batch.cu_seqlens.long()
    factors = torch.tensor([1.5, 2.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    weights = factors.repeat_interleave(batch.lengths)
    batch = batch.replace(rollout_factors=factors)
    corrected, gradient, _ = evaluate(name, batch.replace(rollout_weights=weights))
    assert_close(corrected.metrics["residual"], plain.metrics["residual"])
    weight = plain.metrics["importance_weight"]
    assert_close(corrected.metrics["importance_weight"], weight * factors)
    assert (gradient[starts[2] : starts[3]] == 0).all()
    batch = batch.replace(rollout_factors=None)
    ones, ones_gradient, _ = evaluate(name, batch.replace(rollout_weights=0 * weights + 1))
    _, plain_gradient, _ = evaluate(name, batch)
    assert_close(ones.loss.detach(), plain.loss.detach())
    assert_close(ones_gradient, plain_gradient)
    assert float((gradient - plain_gradient).abs().max()) > 1e-3
