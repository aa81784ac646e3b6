"""Gradients against central differences, with stop-gradient quantities frozen."""

from __future__ import annotations

import pytest
import torch
from loss_batches import assert_close, every_objective, leaf, random_batch

from flowrl.objectives import build, count_totals, names

# Moving old with current log-probs freezes the importance weight, which carries no gradient.
FROZEN_WEIGHT = [
    ("flowrl", {"preset": "paper"}),
    ("flowrl", {"preset": "release", "length_norm": False}),
    ("flowrl", {"preset": "recipe", "log_z": "group_mean", "reward": "raw"}),
    ("flowrl", {"preset": "recipe_2025_11"}),
    ("flowrl", {"bound": "none", "log_z": "zero"}),
    ("tb", {"beta": 2.0}),
    ("tb", {"bound": "paper"}),
    ("vargrad", {"beta": 0.5}),
    ("cispo", {}),
    ("cispo", {"clip_eps_low": 1.0, "aggregation": "token-sum"}),
    ("tba", {"kl_coef": 0.5}),
    ("ftb", {"alpha": 1.2, "bound": "recipe"}),
]
FREE_RATIO = [
    ("gvpo", {"beta": 2.0}),
    ("kimi_pmd", {"beta": 2.0}),
    ("gflowrl", {"bound": "none"}),
    ("ftb", {}),
    ("ftb", {"alpha": 2.0}),
    ("ftb", {"phi": "linex"}),
    ("ftb", {"phi": "shifted_cosh", "log_z": "learned"}),
    ("ftb", {"phi": "huber", "log_z": "learned"}),
    ("subtb", {}),
    ("subtb", {"lam": 1.0, "beta": 0.5}),
    ("db", {}),
    ("rloo", {}),
    ("rloo_kl", {"beta": 2.0}),
    ("grpo", {"kl_coef": 0.3}),
    ("grpo", {"clip_eps_high": 0.28, "aggregation": "token-mean"}),
    ("grpo", {"kl_coef": 0.0, "aggregation": "seq-mean-token-sum"}),
    ("grpo", {"kl_placement": "reward_token", "kl_estimator": "k2", "dual_clip": 1.1}),
    ("grpo", {"kl_coef": 1.0, "kl_ratio_weight": True}),
    ("grpo", {"kl_coef": 1.0, "kl_estimator": "k2"}),
    ("grpo", {"kl_coef": 1.0, "kl_estimator": "k1"}),
    ("reinforce", {"advantage": "none", "kl_coef": 0.5, "kl_placement": "reward_token"}),
    ("rloo", {"kl_coef": 0.5, "kl_placement": "loss", "kl_estimator": "k3"}),
    ("dr_grpo", {"max_tokens": 6}),
    ("prorl", {"preset": "v2", "kl_coef": 1.0}),
    ("gspo", {"clip_eps_low": 0.1, "clip_eps_high": 0.1, "kl_coef": 0.1}),
    ("gspo_token", {"clip_eps_low": 0.1, "clip_eps_high": 0.1}),
    ("ppo", {"gamma": 0.9, "lam": 0.8}),
    ("trpo", {"kl_penalty": 3.0}),
    ("trpo", {"method": "line_search", "critic": True}),
]
# GFlowRL's residual and its frozen weight both hold old log-probs: it is checked with w = 1.
FREE_RATIO = every_objective(FREE_RATIO, without=[*FROZEN_WEIGHT, ("gflowrl", {})])
CASES = [(*case, True) for case in FROZEN_WEIGHT] + [(*case, False) for case in FREE_RATIO]
STEP = 1e-5


def differences(objective, batch, moves_old: bool) -> torch.Tensor:
    rates = torch.zeros_like(batch.logprobs)
    for t in range(rates.numel()):
        values = []
        for sign in (1, -1):
            nudge = torch.zeros_like(rates)
            nudge[t] = sign * STEP
            old = batch.old_logprobs + nudge if moves_old else batch.old_logprobs
            moved = batch.replace(logprobs=batch.logprobs + nudge, old_logprobs=old)
            values.append(float(objective.loss(moved)[0]))
        rates[t] = (values[0] - values[1]) / (2 * STEP)
    return rates


def prepared_batch(objective, seed: int):
    batch = random_batch(seed, [4, 3, 1])
    batch = objective.prepare(batch.replace(totals=count_totals(batch)))
    if objective.coupling == "group":
        batch = batch.replace(group_log_z=objective.group_statistic(batch))
    return batch


@pytest.mark.parametrize(("name", "options", "moves_old"), CASES)
def test_gradient_in_logprobs(name, options, moves_old):
    objective = build(name, options)
    batch = prepared_batch(objective, seed=3)
    logprobs = leaf(batch.logprobs)
    objective.loss(batch.replace(logprobs=logprobs))[0].backward()
    expected = differences(objective, batch, moves_old)
    assert float(expected.abs().max()) > (1e-3 if name != "dr_grpo" else 1e-6)
    assert logprobs.grad is not None
    assert_close(logprobs.grad, expected, atol=1e-6, rtol=1e-6)


def test_differences_see_the_weight_unless_it_is_frozen():
    """Negative control: without the frozen weight the comparison fails."""
    objective = build("flowrl", {"preset": "release"})
    batch = prepared_batch(objective, seed=3)
    frozen, free = differences(objective, batch, True), differences(objective, batch, False)
    assert float((frozen - free).abs().max()) > 0.1


def test_gradient_in_log_z():
    objective = build("flowrl", {"preset": "paper"})
    batch = prepared_batch(objective, seed=4)
    log_z = leaf(batch.log_z)

    def value(z):
        return objective.loss(batch.replace(log_z=z))[0]

    assert torch.autograd.gradcheck(value, (log_z,), atol=1e-7)


@pytest.mark.parametrize(("name", "options"), [("subtb", {}), ("subtb", {"lam": 1.0}), ("db", {})])
def test_gradient_in_values(name, options):
    objective = build(name, options)
    batch = prepared_batch(objective, seed=4)
    values = leaf(batch.values)

    def value(v):
        return objective.loss(batch.replace(values=v))[0]

    assert torch.autograd.gradcheck(value, (values,), atol=1e-7)


@pytest.mark.parametrize("name", ["flowrl", "vargrad", "gvpo"])
def test_a_named_backend_reaches_the_operator(name):
    objective, reference = build(name), build(name, backend="reference")
    batch = prepared_batch(objective, seed=6)
    assert_close(objective.loss(batch)[0], reference.loss(batch)[0])
    with pytest.raises(ValueError, match="backend 'tensor-cores' must be one of"):
        build(name, backend="tensor-cores").loss(batch)


@pytest.mark.parametrize("name", names())
def test_metrics_and_statistics_carry_no_gradient(name):
    objective = build(name)
    batch = prepared_batch(objective, seed=5)
    leaves = {name: leaf(getattr(batch, name)) for name in ("logprobs", "log_z", "values")}
    batch = batch.replace(**leaves)
    if objective.coupling == "group":
        assert not objective.group_statistic(batch).requires_grad
    _, metrics = objective.loss(batch)
    assert metrics
    assert not any(m.requires_grad for m in metrics.values())
    assert {m.shape for m in metrics.values()} == {(batch.num_sequences,)}
