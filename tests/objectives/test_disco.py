"""DisCO against its definition, written for one question at a time and differentiated."""

from __future__ import annotations

import pytest
import torch
from loss_batches import assert_close, evaluate, leaf, random_batch

from flowrl.objectives import build, count_totals


def questions():
    """Five answers, two right; three wrong ones; four, one right; one right alone."""
    batch = random_batch(11, [5, 3, 4, 1])
    right = {0: 2, 1: 0, 2: 1, 3: 1}
    rewards = torch.zeros_like(batch.rewards)
    for place, group in enumerate(torch.unique(batch.group_ids)):
        members = torch.nonzero(batch.group_ids == group).flatten()
        rewards[members[: right[place]]] = 1.0
    return batch.replace(rewards=rewards)


def by_definition(batch, logprobs, score, tau, kl_weight):
    total, counted = torch.zeros((), dtype=torch.float64), []
    log_ratio = logprobs - batch.old_logprobs
    per_token = log_ratio.exp() if score == "ratio" else logprobs
    pieces = per_token.split(batch.lengths.tolist())
    masks = batch.mask.split(batch.lengths.tolist())
    scores = torch.stack([p[m].mean() for p, m in zip(pieces, masks, strict=True)])
    groups = torch.unique(batch.group_ids)
    for group in groups:
        members = scores[batch.group_ids == group]
        right = batch.rewards[batch.group_ids == group] == 1
        if right.any() and not right.all():
            hardest = tau * (members[~right] / tau).exp().mean().log()
            total = total - (members[right].mean() - hardest)
            counted.append(int(group))
    assert len(counted) == 2
    kl = (log_ratio.exp() - 1 - log_ratio)[batch.mask].mean()
    return total / len(groups) + kl_weight * kl


@pytest.mark.parametrize(("score", "tau"), [("ratio", 1.0), ("ratio", 0.1), ("logprob", 10.0)])
@pytest.mark.parametrize("measured", [0.0, 0.003])
def test_loss_and_gradient_by_definition(score, tau, measured):
    batch = questions()
    objective = build("disco", {"score": score, "tau": tau})
    objective.after_update(measured)
    assert objective.state()["kl_weight"] == pytest.approx(2.9 if measured else 0.0)
    batch = objective.prepare(batch.replace(totals=count_totals(batch)))
    batch = batch.replace(group_log_z=objective.group_statistic(batch))
    gradients = []
    for compute in (
        lambda p: objective.loss(batch.replace(logprobs=p))[0],
        lambda p: by_definition(batch, p, score, tau, objective.state()["kl_weight"]),
    ):
        logprobs = leaf(batch.logprobs)
        value = compute(logprobs)
        value.backward()
        gradients.append((value.detach(), logprobs.grad))
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected)


def test_the_definition_tells_the_hardest_wrong_answer_from_their_mean():
    """Negative control: a large tau, where all wrong answers count alike."""
    _, gradient, _ = evaluate("disco", questions(), tau=0.1)
    _, even, _ = evaluate("disco", questions(), tau=1e6)
    assert float((gradient - even).abs().max()) > 0.01


def test_what_is_measured():
    result, _, _ = evaluate("disco", questions())
    assert result.summary["actor/one_sided"] == pytest.approx(4 / 13)
    assert result.summary["actor/kl_weight"] == 0.0
    with pytest.raises(ValueError, match="the state of disco must hold"):
        build("disco").load_state({})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tau": 0.0}, "objective.tau must be > 0"), ({"max_kl": -1.0}, "max_kl must be >= 0")],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("disco", options)
