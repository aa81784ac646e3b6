"""The policy and the reference as tables over every answer to a prompt, and what they tell.

answers = tabulator.answers(prompt, backend)              None where the task lists no answers
policy = tabulator.probabilities(answers, backend)        by teacher forcing, not by sampling
measure(answers, policy, answers.targets(beta, objective.fixed_point, group_size))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from flowrl import diversity
from flowrl.config import Config
from flowrl.data.packing import pack, plan_microbatches
from flowrl.metrics import distances, segment_sum
from flowrl.models import Backend
from flowrl.objectives.base import FixedPoint
from flowrl.records import Prompt, Rollout
from flowrl.schema import ConfigError
from flowrl.step_expansion import Steps
from flowrl.targets import Table, Target, target
from flowrl.tasks import Outcome, Task
from flowrl.tasks.step_task import StepTask

COVERAGE_SAMPLES = 64  # n of the expected coverage


@dataclass(frozen=True)
class Targets:
    beta: float
    nominal: Target  # prior exp(beta r) / Z
    fixed_point: Target | None  # where the objective's own training ends


@dataclass(frozen=True)
class Answers:
    """Every listed answer to one prompt, under the reference policy."""

    prompt: Prompt
    outcomes: Sequence[Outcome]
    lengths: Sequence[int]  # response tokens, EOS included
    rollouts: Sequence[Rollout]
    reference: list[float]
    reference_version: int  # times that the loop has reset the reference
    log_backward: Sequence[float] | None = None  # where the policy chooses among legal actions

    @property
    def rewards(self) -> list[float]:
        return [o.reward for o in self.outcomes]

    @property
    def solutions(self) -> list[str | None]:
        return [o.solution for o in self.outcomes]

    def targets(self, beta: float, own: FixedPoint | None, group_size: int) -> Targets:
        table = Table(self.reference, self.rewards, self.lengths, self.log_backward)
        prior = "reference" if own is None else own.prior
        nominal = target(FixedPoint(beta, prior=prior), table)
        assert nominal is not None
        return Targets(beta, nominal, None if own is None else target(own, table, group_size))


class Tabulator:
    """Tables of one run. A prompt's reference is tabulated once: it changes only when the loop
    resets it, and then has another version."""

    def __init__(self, config: Config, task: Task, tokenizer: Any) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.max_new_tokens = config.rollout.max_new_tokens
        self.tokens_per_microbatch = config.batch.tokens_per_microbatch
        self._known: dict[tuple[int, int], Answers] = {}  # by version and prompt

    def answers(self, prompt: Prompt, backend: Backend) -> Answers | None:
        """`prompt` is an encoded one. Raises ConfigError for answers that the sampler cannot reach
        within rollout.max_new_tokens."""
        key = (backend.reference_version, prompt.index)
        if key not in self._known:
            outcomes = self.task.outcomes(prompt)
            if outcomes is None:
                return None
            rollouts = self._rollouts(prompt, outcomes)
            lengths = [len(r.response_ids) for r in rollouts]
            self._known[key] = Answers(
                prompt,
                outcomes,
                lengths,
                rollouts,
                self._tabulate(rollouts, backend, reference=True),
                backend.reference_version,
                self._log_backward(rollouts),
            )
        return self._known[key]

    def probabilities(self, answers: Answers, backend: Backend) -> list[float]:
        """q(y) of every answer under the backend's current policy."""
        return self._tabulate(answers.rollouts, backend, reference=False)

    def _rollouts(self, prompt: Prompt, outcomes: Sequence[Outcome]) -> list[Rollout]:
        """Answers as the sampler would record them: one as long as max_new_tokens is cut there and
        has no EOS."""
        eos, limit = self.tokenizer.eos_token_id, self.max_new_tokens
        texts = [o.text for o in outcomes]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        longest = max(map(len, encoded))
        if longest > limit:
            raise ConfigError(
                f"rollout.max_new_tokens must hold the task's longest answer, got {limit} and "
                f"{longest} tokens; set rollout.max_new_tokens={longest + 1}"
            )
        responses = [(*ids, eos)[:limit] for ids in encoded]
        return [
            Rollout(prompt, i, ids, (0.0,) * len(ids), ids[-1] != eos, 0, text)
            for i, (ids, text) in enumerate(zip(responses, texts, strict=True))
        ]

    def _tabulate(
        self, rollouts: Sequence[Rollout], backend: Backend, *, reference: bool
    ) -> list[float]:
        return np.exp(self._logprobs(rollouts, backend, reference=reference)).tolist()

    def _log_backward(self, rollouts: Sequence[Rollout]) -> list[float] | None:
        return None

    def _logprobs(
        self, rollouts: Sequence[Rollout], backend: Backend, *, reference: bool
    ) -> np.ndarray:
        """(N,) float64: sums over the tokens of each response."""
        packed = pack(rollouts)
        found = np.empty(len(rollouts))
        for indices in plan_microbatches(packed, self.tokens_per_microbatch):
            part = packed.select(indices)
            scores = backend.logprobs([part], reference=reference)
            found[indices.numpy()] = segment_sum(scores.logprobs.cpu(), part.cu_seqlens).numpy()
        return found


class StepTabulator(Tabulator):
    """The same for a policy over legal actions: every legal action of every state is scored once,
    and an answer's probability is the product of its steps'."""

    def __init__(self, config: Config, task: Task, tokenizer: Any) -> None:
        super().__init__(config, task, tokenizer)
        self.steps = Steps(cast(StepTask, task), tokenizer)  # assembly refuses other tasks

    def _tabulate(
        self, rollouts: Sequence[Rollout], backend: Backend, *, reference: bool
    ) -> list[float]:
        candidates: list[Rollout] = []
        states: dict[str, slice] = {}  # where the candidates of each partial text are
        paths: list[list[tuple[str, int]]] = []  # per answer: states, and the action taken there
        for rollout in rollouts:
            path = []
            for step in self.steps.of(rollout):
                if step.partial not in states:
                    start = len(candidates)
                    candidates += step.candidates(rollout)
                    states[step.partial] = slice(start, len(candidates))
                path.append((step.partial, step.taken))
            paths.append(path)
        scores = self._logprobs(candidates, backend, reference=reference)
        policy = {partial: _log_softmax(scores[held]) for partial, held in states.items()}
        totals = [sum(float(policy[state][taken]) for state, taken in path) for path in paths]
        return np.exp(totals).tolist()

    def _log_backward(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [sum(step.log_backward for step in self.steps.of(r)) for r in rollouts]


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    return scores - np.logaddexp.reduce(scores)


def measure(answers: Answers, policy: Sequence[float], targets: Targets) -> dict[str, float]:
    """diversity/*: every exact number of one prompt. Those given a listed answer are left out where
    the policy has lost them all. Equations: docs/math.md."""
    nominal = targets.nominal.probabilities
    listed = float(np.sum(policy))
    found = {
        **_distances("target", policy, nominal),
        "success_exact": _success(answers, policy),
        "success_target": _success(answers, nominal),
        "reward_exact": float(np.dot(policy, answers.rewards)),
        "length_exact": float(np.dot(policy, answers.lengths)) / listed if listed > 0 else math.nan,
        "kl_to_reference": _kl_to_reference(policy, answers.reference),
        "mode_mass_error": abs(_success(answers, policy) - _success(answers, nominal)),
        "rank_correlation": diversity.spearman(policy, nominal.tolist()),
        **_modes(answers, policy, ""),
        **_modes(answers, nominal, "_target"),
        **_modes(answers, answers.reference, "_reference"),
    }
    if targets.nominal.log_z is not None:
        prior = targets.nominal.prior.tolist()
        implied = diversity.implied_log_z(policy, prior, answers.rewards, targets.beta)
        found["log_z_target"] = targets.nominal.log_z
        found["log_z_error"] = abs(implied - targets.nominal.log_z)
    if targets.fixed_point is not None:
        own = targets.fixed_point.probabilities
        if targets.fixed_point.log_z is not None:
            found["log_z_fixed_point"] = targets.fixed_point.log_z
        found |= _distances("fixed_point", policy, own)
        found["success_fixed_point"] = _success(answers, own)
        found |= _modes(answers, own, "_fixed_point")
    return {f"diversity/{name}": value for name, value in found.items() if math.isfinite(value)}


def _distances(name: str, policy: Sequence[float], other: np.ndarray) -> dict[str, float]:
    found = distances(policy, other.tolist())
    return {
        f"l1_to_{name}": found["l1"],
        f"jsd_to_{name}": found["jsd"],
        f"kl_to_{name}": found["kl"],
        f"kl_from_{name}": found["kl_from"],
    }


def _kl_to_reference(policy: Sequence[float], reference: Sequence[float]) -> float:
    """KL(q || pi_ref) of whole answers, both given a listed one."""
    share = np.asarray(reference, dtype=np.float64)
    return distances(policy, (share / share.sum()).tolist())["kl"]


def _success(answers: Answers, probabilities: Sequence[float] | np.ndarray) -> float:
    right = [solution is not None for solution in answers.solutions]
    return float(np.dot(probabilities, right))


def _modes(
    answers: Answers, probabilities: Sequence[float] | np.ndarray, suffix: str
) -> dict[str, float]:
    masses = list(diversity.mode_masses(list(probabilities), answers.solutions).values())
    if not masses:
        return {}
    return {
        f"expected_coverage{suffix}": diversity.expected_coverage(masses, COVERAGE_SAMPLES),
        f"effective_modes{suffix}": diversity.effective_modes(masses),
    }
