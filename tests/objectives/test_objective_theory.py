"""Fixed points and identities, on a tabular policy over four answers or on packed batches."""

from __future__ import annotations

import pytest
import torch
from loss_batches import assert_close, evaluate, random_batch, two_groups_of_four

from flowrl.objectives import build, count_totals
from flowrl.objectives.groups import group_mean
from flowrl.records import LossBatch, to_cu_seqlens

REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([0.0, 1.0, 1.0, 2.0], dtype=torch.float64)
LOG_Z = 0.9155090
TARGET = torch.tensor([0.1601251, 0.3264489, 0.2176326, 0.2957934], dtype=torch.float64)
LENGTHS = torch.tensor([1, 2, 4, 8])
TILTED_LOG_Z = 1.7325969
TILTED = torch.tensor([0.0707298, 0.0693100, 0.0106753, 0.8492849], dtype=torch.float64)


def all_answers(log_policy: torch.Tensor, log_z: float, lengths=None) -> LossBatch:
    """Every answer once, its log-prob spread evenly over its tokens; on-policy."""
    lengths = torch.ones(4, dtype=torch.long) if lengths is None else lengths

    def spread(values: torch.Tensor) -> torch.Tensor:
        return (values / lengths).repeat_interleave(lengths)

    batch = LossBatch(
        rewards=REWARDS,
        group_ids=torch.zeros(4, dtype=torch.long),
        cu_seqlens=to_cu_seqlens(lengths),
        logprobs=spread(log_policy),
        ref_logprobs=spread(REF.log()),
        log_z=torch.full((4,), log_z, dtype=torch.float64),
    )
    return batch.replace(totals=count_totals(batch))


def expected_loss(name: str, batch: LossBatch, probabilities: torch.Tensor, **options):
    """E over y of the objective, as the sampler would give it: y without gradient."""
    objective = build(name, options)
    batch = objective.prepare(batch)
    terms = [objective.loss(batch.select(torch.tensor([i])))[0] * 4 for i in range(4)]
    return (torch.stack(terms) * probabilities.detach()).sum()


def test_target_has_zero_residual_and_no_gradient():
    result, gradient, log_z_gradient = evaluate("tb", all_answers(TARGET.log(), LOG_Z), beta=1.0)
    assert float(result.metrics["residual"].abs().max()) < 1e-6
    assert float(gradient.abs().max()) < 1e-6
    assert log_z_gradient is not None
    assert float(log_z_gradient.abs().max()) < 1e-6


def test_length_norm_moves_the_fixed_point():
    options = {"beta": 1.0, "reward": "raw", "bound": "none"}
    tilted = all_answers(TILTED.log(), TILTED_LOG_Z, LENGTHS)
    result, _, _ = evaluate("flowrl", tilted, **options)
    assert float(result.metrics["residual"].abs().max()) < 1e-5
    plain, _, _ = evaluate("flowrl", tilted, **options, length_norm=False)
    assert float(plain.metrics["residual"].abs().max()) > 0.5
    straight = all_answers(TARGET.log(), LOG_Z, LENGTHS)
    result, _, _ = evaluate("flowrl", straight, **options, length_norm=False)
    assert float(result.metrics["residual"].abs().max()) < 1e-6


@pytest.mark.parametrize("log_z", [0.5, 0.0, -3.0])
def test_kl_gradient_is_half_the_tb_gradient_for_any_log_z(log_z):
    logits = torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=torch.float64, requires_grad=True)
    log_policy = logits.log_softmax(0)
    loss = expected_loss("tb", all_answers(log_policy, log_z), log_policy.exp(), beta=1.0)
    (tb_gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kl = (log_policy.exp() * (log_policy - TARGET.log())).sum()
    (kl_gradient,) = torch.autograd.grad(kl, logits)
    assert_close(kl_gradient, [0.1020615, -0.1183223, 0.0909089, -0.0746481], atol=1e-6, rtol=0)
    assert_close(tb_gradient / 2, kl_gradient, atol=1e-6, rtol=0)


def test_best_log_z_of_the_reference_policy():
    """Least squares: log Z_true - KL(pi || target) = 0.7, where the gradient in log Z vanishes."""
    log_z = torch.full((4,), 0.7, dtype=torch.float64, requires_grad=True)
    batch = all_answers(REF.log(), 0.0).replace(log_z=log_z)
    expected_loss("tb", batch, REF, beta=1.0).backward()
    assert log_z.grad is not None
    assert abs(float(log_z.grad.sum())) < 1e-12
    assert float(log_z.grad.abs().max()) > 0.1
    assert_close(LOG_Z - float((REF * (REF / TARGET).log()).sum()), 0.7, atol=1e-6)


def test_rloo_is_reinforce_times_g_over_g_minus_one():
    """Of REINFORCE with a group-mean baseline: loss 0.078125, sum |g| 1.4375 on this batch."""
    result, gradient, _ = evaluate("rloo", two_groups_of_four())
    assert_close(result.loss.detach(), 0.078125 * 4 / 3, atol=1e-6, rtol=0)
    assert_close(gradient.abs().sum(), 1.4375 * 4 / 3, atol=1e-6, rtol=0)
    batch = random_batch(11, [4, 4], masked=False)
    _, gradient, _ = evaluate("rloo", batch)
    advantages = batch.rewards - group_mean(batch.rewards, batch.group_ids)
    reinforce = -advantages.repeat_interleave(batch.lengths) / 8
    assert_close(gradient, reinforce * 4 / 3)


def test_vargrad_residuals_sum_to_zero_over_a_group():
    batch = random_batch(12, [5, 3, 2])
    result, _, _ = evaluate("vargrad", batch)
    residual = result.metrics["residual"]
    assert float(residual.abs().max()) > 0.1
    assert float(group_mean(residual, batch.group_ids).abs().max()) < 1e-12
    result, _, _ = evaluate("tb", batch)
    assert float(group_mean(result.metrics["residual"], batch.group_ids).abs().max()) > 0.1


def test_vargrad_is_tba_with_inverse_beta():
    """TBA (arXiv:2503.18929): (log Z + log pi - log ref - r / b)^2, log Z the detached mean of
    log ref - log pi + r / b, with b = 1 / beta."""
    batch = random_batch(13, [4, 4], masked=False)
    result, gradient, _ = evaluate("vargrad", batch, beta=2.0)
    assert batch.logprobs is not None
    assert batch.ref_logprobs is not None
    log_ratio = torch.segment_reduce(
        batch.logprobs - batch.ref_logprobs, "sum", lengths=batch.lengths
    )
    deviation = log_ratio - batch.rewards / 0.5
    delta = torch.empty_like(deviation)
    for group in batch.group_ids.unique():
        members = batch.group_ids == group
        delta[members] = deviation[members] - deviation[members].mean()
    assert_close(result.loss.detach(), delta.square().mean())
    assert_close(gradient, (2 * delta / 8).repeat_interleave(batch.lengths))


def test_vargrad_on_policy_is_rloo_with_the_kl_in_the_reward():
    beta, size = 1.7, 4
    batch = random_batch(14, [size, size, size])
    batch = batch.replace(logprobs=batch.old_logprobs)
    _, vargrad, _ = evaluate("vargrad", batch, beta=beta)
    _, rloo_kl, _ = evaluate("rloo_kl", batch, beta=beta)
    assert_close(vargrad, 2 * beta * (size - 1) / size * rloo_kl)
    _, other_beta, _ = evaluate("rloo_kl", batch, beta=1.0)
    assert float((vargrad - 2 * beta * (size - 1) / size * other_beta).abs().max()) > 1e-3


def test_detaching_the_group_mean_leaves_the_gradient_of_the_variance():
    batch = random_batch(15, [6], masked=False)
    _, gradient, _ = evaluate("vargrad", batch)
    assert batch.logprobs is not None
    assert batch.ref_logprobs is not None
    logprobs = batch.logprobs.clone().requires_grad_()
    log_ratio = torch.segment_reduce(logprobs - batch.ref_logprobs, "sum", lengths=batch.lengths)
    (log_ratio - 3.0 * batch.rewards).var(correction=0).backward()
    assert_close(gradient, logprobs.grad)
