"""Flow of Reasoning: loss and gradient by their definition, and the distribution it ends at."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from loss_batches import assert_close, leaf, random_batch

from flowrl.objectives import build, count_totals
from flowrl.records import Actions, LossBatch, Prompt
from flowrl.targets import Table
from flowrl.targets import target as solve
from flowrl.tasks.blocksworld import BlocksWorld, Options


def evaluated(batch: LossBatch, **options):
    """Objective's loss at `batch.logprobs`, and its gradient there."""
    objective = build("flow_of_reasoning", options)
    batch = objective.prepare(batch.replace(totals=count_totals(batch)))
    batch = batch.replace(group_log_z=objective.group_statistic(batch))
    logprobs = leaf(batch.logprobs)
    loss, metrics = objective.loss(batch.replace(logprobs=logprobs))
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad, objective.summarize(metrics, batch)


def by_definition(
    batch: LossBatch, logprobs: torch.Tensor, beta: float, backward: str, ll_weight: float = 0.0
):
    """Trajectory by trajectory, with dictionaries."""
    assert batch.ref_logprobs is not None
    reference = torch.where(batch.mask, batch.ref_logprobs, 0.0).split(batch.lengths.tolist())
    likely: dict[int, float] = defaultdict(float)
    clean = torch.where(batch.mask, logprobs, 0.0)
    sums = [part.sum() for part in clean.split(batch.lengths.tolist())]
    actions = batch.actions
    assert actions is not None
    candidates = defaultdict(list)
    for n, step in enumerate(actions.step_ids.tolist()):
        candidates[step].append(n)
    scores: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    rewards, prompts = defaultdict(list), {}
    for n in range(batch.num_sequences):
        trajectory = int(actions.trajectory_ids[n])
        rewards[trajectory].append(float(batch.rewards[n]))
        prompts[trajectory] = int(batch.group_ids[n])
        if actions.chosen[n]:
            others = torch.stack([sums[m] for m in candidates[int(actions.step_ids[n])]])
            log_backward = float(actions.log_backward[n]) if backward == "uniform" else 0.0
            flow = sums[n] - others.logsumexp(0) - log_backward
            scores[trajectory] = scores[trajectory] + flow
            likely[trajectory] -= ll_weight / float(reference[n].sum())
    by_prompt = defaultdict(list)
    for trajectory, prompt in prompts.items():
        reward = sum(rewards[trajectory]) / len(rewards[trajectory])
        log_reward = math.log(math.exp(beta * reward) + likely[trajectory])
        by_prompt[prompt].append(scores[trajectory] - log_reward)
    variances = [torch.stack(group).var(correction=0) for group in by_prompt.values()]
    return torch.stack(variances).mean()


@pytest.mark.parametrize("backward", ["uniform", "tree"])
def test_value_and_gradient_are_those_of_the_variance(backward):
    batch = random_batch(5, [6, 5, 8])
    assert batch.logprobs is not None
    loss, gradient, _ = evaluated(batch, beta=0.7, backward=backward)
    logprobs = leaf(batch.logprobs)
    expected = by_definition(batch, logprobs, 0.7, backward)
    expected.backward()
    assert_close(loss, expected.detach())
    assert_close(gradient, logprobs.grad)
    assert float(gradient.abs().max()) > 1e-2
    other, _, _ = evaluated(
        batch, beta=0.7, backward="tree" if backward == "uniform" else "uniform"
    )
    assert abs(float(other - loss)) > 1e-3


def test_likelihoods_of_the_reference_are_a_part_of_the_reward():
    batch = random_batch(5, [6, 5, 8])
    assert batch.logprobs is not None
    assert batch.ref_logprobs is not None
    batch = batch.replace(ref_logprobs=-batch.ref_logprobs.abs() - 0.1)
    loss, gradient, _ = evaluated(batch, beta=0.7, ll_weight=1.5)
    logprobs = leaf(batch.logprobs)
    expected = by_definition(batch, logprobs, 0.7, "uniform", ll_weight=1.5)
    expected.backward()
    assert_close(loss, expected.detach())
    assert_close(gradient, logprobs.grad)
    assert abs(float(loss - evaluated(batch, beta=0.7)[0])) > 1e-4
    objective = build("flow_of_reasoning", {"ll_weight": 1.5})
    assert objective.needs == {"ref"}
    assert objective.fixed_point is None


def test_by_hand():
    """One prompt, two trajectories of one step with two candidates each; P = (3/4, 1/4), taken are
    3/4 with reward 1 and 1/4 with reward 0: scores log(3/4) - 1 and log(1/4)."""
    batch = LossBatch(
        rewards=torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64),
        group_ids=torch.zeros(4, dtype=torch.int64),
        cu_seqlens=torch.arange(5, dtype=torch.int32),
        logprobs=torch.tensor([0.3, 0.1, 0.3, 0.1], dtype=torch.float64).log(),
        actions=Actions(
            torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]),
            torch.tensor([True, False, False, True]), torch.zeros(4),
        ),
    )  # fmt: skip
    loss, gradient, summary = evaluated(batch, beta=1.0)
    deviation = (math.log(0.75) - 1 - math.log(0.25)) / 2
    assert_close(loss, deviation**2)
    push = deviation * 0.25  # 2 d / 2 * (1 - 3/4); the other trajectory deviates by -d
    assert_close(gradient, [push, -push, deviation * 0.75, -deviation * 0.75])
    assert summary["flow/residual_abs"] == pytest.approx(abs(deviation))
    assert summary["flow/step_prob"] == pytest.approx(0.5)


class Tabular:
    """A policy over the legal actions of one problem: a score for every (state text, action)."""

    def __init__(self, task: BlocksWorld, prompt: Prompt, by_state: bool) -> None:
        self.task, self.prompt, self.by_state = task, prompt, by_state
        self.index: dict = {}
        self.outcomes = task.outcomes(prompt) or []
        for outcome in self.outcomes:
            for text, actions, _ in self.steps(outcome.text):
                for action in actions:
                    self.index.setdefault(self.key(text, action), len(self.index))
        self.scores = torch.zeros(len(self.index), dtype=torch.float64, requires_grad=True)

    def key(self, text: str, action: str):
        state = self.task.walk(self.prompt.data, text) if self.by_state else text
        return state, action.lstrip(",")

    def steps(self, answer: str):
        """(text before, legal actions, index of the one taken) of every step."""
        text = ""
        while text != answer:
            actions = self.task.legal_actions(self.prompt, text)
            taken = next(i for i, a in enumerate(actions) if answer.startswith(text + a))
            yield text, actions, taken
            text += actions[taken]

    def probabilities(self) -> torch.Tensor:
        found = []
        for outcome in self.outcomes:
            total = torch.zeros((), dtype=torch.float64)
            for text, actions, taken in self.steps(outcome.text):
                rows = [self.index[self.key(text, a)] for a in actions]
                total = total + self.scores[rows].log_softmax(0)[taken]
            found.append(total)
        return torch.stack(found).detach().exp()

    def batch(self, answers: list[int]) -> LossBatch:
        """Every step's candidates of these trajectories, one token each."""
        columns: dict[str, list] = defaultdict(list)
        for trajectory, answer in enumerate(answers):
            outcome = self.outcomes[answer]
            for text, actions, taken in self.steps(outcome.text):
                parents = self.task.num_parents(self.prompt, text + actions[taken])
                columns["step"] += [columns["step"][-1] + 1 if columns["step"] else 0] * len(
                    actions
                )
                columns["row"] += [self.index[self.key(text, a)] for a in actions]
                columns["chosen"] += [i == taken for i in range(len(actions))]
                columns["parents"] += [-math.log(parents)] * len(actions)
                columns["trajectory"] += [trajectory] * len(actions)
                columns["reward"] += [outcome.reward] * len(actions)
        size = len(columns["row"])
        batch = LossBatch(
            rewards=torch.tensor(columns["reward"], dtype=torch.float64),
            group_ids=torch.zeros(size, dtype=torch.int64),
            cu_seqlens=torch.arange(size + 1, dtype=torch.int32),
            logprobs=self.scores[torch.tensor(columns["row"])],
            actions=Actions(
                torch.tensor(columns["trajectory"]), torch.tensor(columns["step"]),
                torch.tensor(columns["chosen"]),
                torch.tensor(columns["parents"], dtype=torch.float64),
            ),
        )  # fmt: skip
        return batch.replace(totals=count_totals(batch))


@pytest.mark.parametrize("backward", ["uniform", "tree"])
def test_ends_at_the_reward_times_the_backward_policy(backward):
    """uniform: an end s has mass R(s) / Z, shared among its ways by P_B. tree: every plan has mass
    R / Z. Off-policy: every plan is given equally often."""
    task = BlocksWorld(Options())
    data = {"start": ["ab", "c"], "goal": ["a", "b", "c"], "steps": 4}
    policy = Tabular(task, Prompt(0, "", data=data), by_state=backward == "uniform")
    objective = build("flow_of_reasoning", {"beta": 1.5, "backward": backward})
    optimizer = torch.optim.Adam([policy.scores], lr=0.1)
    everything = list(range(len(policy.outcomes)))
    for _ in range(150):
        batch = objective.prepare(policy.batch(everything))
        batch = batch.replace(group_log_z=objective.group_statistic(batch))
        optimizer.zero_grad()
        objective.loss(batch)[0].backward()
        optimizer.step()
    rewards = torch.tensor([o.reward for o in policy.outcomes]).double()
    log_backward = torch.zeros_like(rewards)
    if backward == "uniform":
        for i, outcome in enumerate(policy.outcomes):
            for text, actions, taken in policy.steps(outcome.text):
                log_backward[i] -= math.log(task.num_parents(policy.prompt, text + actions[taken]))
    target = (1.5 * rewards + log_backward).softmax(0)
    table = Table([1.0] * len(rewards), rewards.tolist(), [1] * len(rewards), log_backward.tolist())
    point = objective.fixed_point
    assert point is not None
    declared = solve(point, table)
    assert declared is not None
    assert_close(torch.as_tensor(declared.probabilities), target)
    assert float((policy.probabilities() - target).abs().sum()) < 0.02
    uniform = (1.5 * rewards).softmax(0)
    if backward == "uniform":
        assert float((target - uniform).abs().sum()) > 0.05, "P_B matters in this problem"
