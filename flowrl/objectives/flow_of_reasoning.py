"""Flow of Reasoning: VarGrad over trajectories whose steps are chosen among legal actions.

    P_F(a | s) = softmax over the legal actions a of s of sum_t log pi(a_t | s, a_<t)
    score_j    = sum over j's steps of (log P_F - log P_B) - log R_j
    R_j        = exp(beta r_j) + ll_weight * sum over j's steps of -1 / log pi_ref(a | s)
    loss       = mean over prompts of mean_j (score_j - mean score)^2

P_B is uniform over the ways into a state. Every legal action of every state visited is a sequence
of the batch. Their coupling goes through the group's pass: it gives each sequence n the exact
d loss / d (log-prob of n), and the loss is linear in the log-probs with these coefficients.
Source: arXiv:2406.05673, eq. 3-5. The paper's exploration is [steps] and [loop].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowrl.objectives.aggregation import unmasked
from flowrl.objectives.base import AllReduce, FixedPoint, Metrics, Objective, given, identity
from flowrl.objectives.groups import group_mean, group_sizes
from flowrl.records import LossBatch
from flowrl.schema import require

LEAST_SURPRISE = 1e-2  # nats: a step that the reference is sure of adds at most 100


@dataclass(frozen=True)
class _Balance:
    """Per sequence (N,), float64: of the step that the sequence is a candidate of."""

    coefficient: Tensor  # d loss / d (log-prob of the sequence)
    share: Tensor  # its part of the loss
    deviation: Tensor  # score_j - mean score of its trajectory
    log_policy: Tensor  # log P_F of the sequence
    logprob: Tensor  # of the sequence


class FlowOfReasoning(Objective):
    """loss = mean over prompts of the variance of log P_F(j) - log P_B(j) - beta r_j."""

    name = "flow_of_reasoning"
    coupling = "group"
    policy = "legal_actions"
    loop_defaults: ClassVar[Mapping[str, Any]] = {
        "replay_fraction": 0.3,
        "replay_priority": "reward",
        "replay_capacity": 50,
    }

    @dataclass(frozen=True)
    class Options:
        beta: float = math.log(100.0)
        """log R of a right answer, where reward 0 has log R = 0. What the authors' BlocksWorld has:
        docs/math.md."""
        backward: Literal["uniform", "tree"] = "uniform"
        """P_B: uniform over the ways into a state, so that the mass of an end is R; or 1, the state
        being all of the text, so that the mass of a trajectory is R."""

        ll_weight: float = 0.0
        """Weight in R of how likely the steps are to pi_ref (the paper's BlocksWorld: 1.5)."""

        def __post_init__(self) -> None:
            require(
                self.beta > 0,
                f"objective.beta must be > 0, got {self.beta}; set objective.beta=4.6",
            )
            require(
                self.ll_weight >= 0,
                f"objective.ll_weight must be >= 0, got {self.ll_weight}; "
                "set objective.ll_weight=1.5",
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref"} if self.options.ll_weight else ())

    @property
    def beta(self) -> float:
        return self.options.beta

    @property
    def fixed_point(self) -> FixedPoint | None:
        if self.options.ll_weight:
            return None  # R depends on pi_ref's steps, not on the end alone
        prior = "backward" if self.options.backward == "uniform" else "uniform"
        return FixedPoint(self.beta, prior=prior)

    def prepare(self, batch: LossBatch, all_reduce: AllReduce = identity) -> LossBatch:
        return batch.replace(advantages=batch.rewards)

    @torch.no_grad()
    def group_statistic(self, batch: LossBatch) -> Tensor:
        """(N, 5): the fields of `_Balance`."""
        found = self._balance(batch)
        return torch.stack([getattr(found, f.name) for f in fields(found)], 1)

    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        """To first order around the log-probs of the group's pass; there value and gradient are
        exact, and that is where an update evaluates it."""
        statistic = given(batch.group_log_z, "group_log_z")  # (N, 5)
        coefficient, share, deviation, log_policy, before = statistic.unbind(1)
        loss = (share + coefficient * (sequence_logprobs(batch) - before)).sum()
        actions = given(batch.actions, "actions")
        metrics = {
            "chosen": actions.chosen.to(share.dtype),
            "deviation": deviation,
            "log_policy": log_policy,
        }
        dtype = given(batch.logprobs, "logprobs").dtype
        return loss.to(dtype), {name: values.to(dtype) for name, values in metrics.items()}

    def summarize(self, metrics: Metrics, batch: LossBatch) -> dict[str, float]:
        """Means over the steps taken: |deviation| of their trajectories, their P_F, and the entropy
        of P_F over the legal actions, in nats."""
        chosen = metrics["chosen"].double()
        log_policy = metrics["log_policy"].double()
        steps = chosen.sum()
        return {
            "flow/residual_abs": float((chosen * metrics["deviation"].abs()).sum() / steps),
            "flow/step_prob": float((chosen * log_policy.exp()).sum() / steps),
            "flow/step_entropy": float(-(log_policy.exp() * log_policy).sum() / steps),
        }

    def _balance(self, batch: LossBatch) -> _Balance:
        """Of whole prompts. With P trajectories of prompt p and all updates' prompts in totals:
        d loss / d logprob_n = 2 deviation_j / (prompts P) (1[n taken] - P_F(n))."""
        actions = given(batch.actions, "actions")
        logprobs = sequence_logprobs(batch).detach()
        log_policy = logprobs - segment_logsumexp(logprobs, actions.step_ids)
        log_backward = actions.log_backward.double()
        if self.options.backward == "tree":
            log_backward = torch.zeros_like(log_backward)
        taken = actions.chosen.double()
        _, owner = torch.unique(actions.trajectory_ids, return_inverse=True)  # (N,)
        num_trajectories = int(owner.max()) + 1
        flow = _sums(taken * (log_policy - log_backward), owner, num_trajectories)
        steps = _sums(taken, owner, num_trajectories)
        first = torch.full((num_trajectories,), owner.numel(), device=owner.device)
        places = torch.arange(owner.numel(), device=owner.device)
        first = first.scatter_reduce(0, owner, places, "amin")
        sizes = _sums(torch.ones_like(taken), owner, num_trajectories)
        rewards = given(batch.advantages, "advantages").double()  # alike within a trajectory
        rewards = _sums(rewards, owner, num_trajectories) / sizes
        prompts = batch.group_ids[first]
        log_reward = self.options.beta * rewards
        if self.options.ll_weight:
            likely = self._likelihoods(batch, taken, owner, num_trajectories)
            log_reward = torch.logaddexp(log_reward, likely.log())
        score = flow - log_reward
        deviation = score - group_mean(score, prompts)
        weight = 1 / (given(batch.totals, "totals").groups * group_sizes(prompts).double())
        return _Balance(
            coefficient=(2 * weight * deviation)[owner] * (taken - log_policy.exp()),
            share=(weight * deviation.square() / steps)[owner] * taken,
            deviation=deviation[owner],
            log_policy=log_policy,
            logprob=logprobs,
        )

    def _likelihoods(self, batch: LossBatch, taken: Tensor, owner: Tensor, num: int) -> Tensor:
        """(num,) ll_weight times the sum over a trajectory's steps of -1 / log pi_ref(a | s)."""
        logprobs = sequence_sums(given(batch.ref_logprobs, "ref_logprobs"), batch)
        certain = logprobs.clamp(max=-LEAST_SURPRISE)
        return self.options.ll_weight * _sums(-taken / certain, owner, num)


def sequence_logprobs(batch: LossBatch) -> Tensor:
    """(N,) float64, differentiable: log-prob of each sequence."""
    return sequence_sums(given(batch.logprobs, "logprobs"), batch)


def sequence_sums(values: Tensor, batch: LossBatch) -> Tensor:
    """(N,) float64, differentiable: sums of (T,) over the tokens of each sequence."""
    return torch.segment_reduce(unmasked(values, batch).double(), "sum", lengths=batch.lengths)


def segment_logsumexp(values: Tensor, ids: Tensor) -> Tensor:
    """(N,) log of the sum of e^value over the members with the same id, for each of them."""
    _, owner = torch.unique(ids, return_inverse=True)
    num = int(owner.max()) + 1
    top = torch.full((num,), -torch.inf, dtype=values.dtype, device=values.device)
    top = top.scatter_reduce(0, owner, values, "amax")
    return (_sums((values - top[owner]).exp(), owner, num).log() + top)[owner]


def _sums(values: Tensor, owner: Tensor, num: int) -> Tensor:
    return values.new_zeros(num).index_add(0, owner, values)
