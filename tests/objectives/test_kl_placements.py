"""What each placement of the KL optimises: expected gradients by enumeration of all answers.

A tabular policy over answers of two tokens from an alphabet of three; on-policy, so the
expectation over answers of an objective's gradient is exact.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from loss_batches import assert_close
from tabular_tree import TabularPolicy

from flowrl.metrics import distances
from flowrl.objectives import build, count_totals
from flowrl.objectives.base import FixedPoint
from flowrl.records import LossBatch, to_cu_seqlens
from flowrl.targets import target

ANSWERS = list(itertools.product(range(3), range(3)))
TAU = 0.7


def table(seed: int) -> torch.Tensor:
    """(4, 3) logits: of the first token, and of the second after each first one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, generator=generator, dtype=torch.float64)


LOGITS, REF = table(0), table(1)
REWARDS = torch.randn(9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def token_logprobs(logits: torch.Tensor) -> torch.Tensor:  # (9, 2)
    logprobs = logits.log_softmax(1)
    return torch.stack([torch.stack([logprobs[0, a], logprobs[1 + a, b]]) for a, b in ANSWERS])


def gradient_of(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, logits)[0]


def expected_gradient(name: str = "reinforce", **options) -> torch.Tensor:
    """Sum over answers of pi(y) times the gradient of the loss of y alone."""
    logits = LOGITS.clone().requires_grad_()
    current = token_logprobs(logits)
    old = current.detach().flatten()
    batch = LossBatch(
        rewards=REWARDS,
        group_ids=torch.arange(9),
        cu_seqlens=to_cu_seqlens(torch.full((9,), 2)),
        logprobs=current.flatten(),
        old_logprobs=old,
        ref_logprobs=token_logprobs(REF).flatten(),
    )
    batch = batch.replace(totals=count_totals(batch))
    objective = build(name, options)
    batch = objective.prepare(batch)
    losses = [objective.loss(batch.select(torch.tensor([i])))[0] * 9 for i in range(9)]
    probabilities = current.detach().sum(1).exp()
    return gradient_of((torch.stack(losses) * probabilities).sum(), logits)


def pair_gradient(name: str, log_answers: torch.Tensor, **options) -> float:
    """Largest entry of the expected gradient over all groups of two answers, at the policy that
    gives the answers these log-probs (9,)."""
    by_first = log_answers.view(3, 3)
    logits = torch.cat([by_first.logsumexp(1)[None], by_first]).requires_grad_()
    pairs = torch.cartesian_prod(torch.arange(9), torch.arange(9)).flatten()  # (162,)
    current = token_logprobs(logits)
    batch = LossBatch(
        rewards=REWARDS[pairs],
        group_ids=torch.arange(81).repeat_interleave(2),
        cu_seqlens=to_cu_seqlens(torch.full((162,), 2)),
        logprobs=current[pairs].flatten(),
        old_logprobs=current[pairs].flatten().detach(),
        ref_logprobs=token_logprobs(REF)[pairs].flatten(),
    )
    objective = build(name, options)
    batch = objective.prepare(batch.replace(totals=count_totals(batch)))
    losses = [objective.loss(batch.select(torch.tensor([i])))[0] for i in range(162)]
    chance = log_answers[pairs].view(81, 2).sum(1).exp().repeat_interleave(2)
    return float(gradient_of((torch.stack(losses) * chance).sum(), logits).abs().max())


def exact(kl: float) -> torch.Tensor:
    """Gradient of -(E[r] - kl * KL(pi || pi_ref))."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = token_logprobs(logits).sum(1)
    regularised = REWARDS - kl * (logprobs - token_logprobs(REF).sum(1))
    return gradient_of(-(logprobs.exp() * regularised).sum(), logits)


def token_local(forward: bool) -> torch.Tensor:
    """Gradient of the sum over states of the KL of their next token, states held as they are."""
    logits = LOGITS.clone().requires_grad_()
    current, reference = logits.log_softmax(1), REF.log_softmax(1)
    first, second = (reference, current) if forward else (current, reference)
    kl = (first.exp() * (first - second)).sum(1)  # (4,)
    reached = torch.cat([torch.ones(1).double(), current.detach()[0].exp()])
    return gradient_of((kl * reached).sum(), logits)


NONE = {"advantage": "none", "kl_coef": TAU}


@pytest.mark.parametrize("placement", ["reward_sequence", "reward_token"])
def test_k1_in_the_reward_is_the_regularised_objective(placement):
    assert_close(expected_gradient(**NONE, kl_placement=placement), exact(TAU))
    assert float((exact(TAU) - exact(0.0)).abs().max()) > 0.01


def test_rloo_kl_has_the_same_expectation():
    """Groups of one, where there is no baseline to take off."""
    assert_close(expected_gradient("rloo_kl", beta=1 / TAU), exact(TAU))


def test_k1_in_the_loss_does_nothing_in_expectation():
    assert_close(expected_gradient(**NONE, kl_placement="loss"), exact(0.0))


@pytest.mark.parametrize("estimator", ["k2", "k3_straight_through"])
def test_k2_in_the_loss_is_the_kl_of_each_token(estimator):
    found = expected_gradient(**NONE, kl_placement="loss", kl_estimator=estimator)
    assert_close(found, exact(0.0) + TAU * token_local(forward=False))
    assert float((found - exact(TAU)).abs().max()) > 1e-3  # what it does to later KL is missing


def test_k3_in_the_loss_is_the_forward_kl_of_each_token():
    found = expected_gradient(**NONE, kl_placement="loss", kl_estimator="k3")
    assert_close(found, exact(0.0) + TAU * token_local(forward=True))


def test_the_weighted_k3_is_the_kl_of_each_token():
    options = {"kl_placement": "loss", "kl_estimator": "k3", "kl_ratio_weight": True}
    found = expected_gradient(**NONE, **options)
    assert_close(found, exact(0.0) + TAU * token_local(forward=False))


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({}, 0.0, 0.02),
        ({"kl_placement": "reward_token"}, 0.0, 0.1),
        ({"kl_placement": "loss", "kl_estimator": "k2"}, 0.3, 0.5),
        ({"kl_placement": "loss", "kl_estimator": "k3"}, 0.15, 0.4),
        ({"kl_placement": "loss", "kl_estimator": "k1"}, 1.5, 2.0),
    ],
)
def test_distance_to_the_target_on_the_toy_tree(options, low, high):
    """RLOO with coefficient 1 / 3: the placement decides, docs/math.md has the numbers."""
    policy = TabularPolicy(3).train("rloo", steps=300, kl_coef=1 / 3, **options)
    found = target(FixedPoint(3.0), policy.table)
    assert found is not None
    l1 = distances(policy.probabilities().tolist(), found.probabilities.tolist())["l1"]
    assert low <= l1 < high


@pytest.mark.parametrize(
    ("name", "placement", "share"),
    [
        ("rloo", "reward_sequence", 1.0),
        ("rloo", "reward_token", 1.0),
        ("reinforce", "reward_sequence", 1.0),
        ("reinforce", "reward_token", 0.5),
    ],
)
def test_where_groups_of_two_end_with_k1_in_the_reward(name, placement, share):
    """By enumeration: no gradient at pi_ref exp(share r / kl_coef) / Z. The group's mean takes half
    of the reward with it, and of the KL only where that stands in the reward as a whole."""
    options = {"kl_coef": TAU, "kl_placement": placement}
    for tried in (0.5, 1.0):
        tilted = token_logprobs(REF).sum(1) + tried * REWARDS / TAU
        found = pair_gradient(name, tilted - tilted.logsumexp(0), **options)
        assert (found < 1e-10) == (tried == share), (tried, found)
    declared = build(name, options).fixed_point
    assert declared == (FixedPoint(1 / TAU) if share == 1 else None)
