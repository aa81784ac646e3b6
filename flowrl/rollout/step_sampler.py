"""StepSampler: trajectories of legal actions, each drawn by the model's scores of all of them.

    P(a | s) = softmax over the legal actions a of s of log pi(tokens of a | prompt, actions so far)

Training adds exploration and local search as [steps] says; evaluation samples P itself.
Source: Flow of Reasoning, arXiv:2406.05673, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from flowrl.records import Prompt, Rollout, SampleRequest, Score
from flowrl.rollout.hf_sampler import HFSampler
from flowrl.rollout.noise import stream_keys, uniform
from flowrl.schema import ConfigError, require
from flowrl.scores import score_all
from flowrl.step_config import StepsConfig

LOCAL_SEARCH = "local search"  # stream of its noise


class LegalActions(Protocol):
    """The part of a task that is used here."""

    name: str

    def legal_actions(self, prompt: Prompt, partial_text: str) -> list[str]: ...

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]: ...


@dataclass
class _Trajectory:
    prompt: Prompt
    sample: int
    actions: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each action, as it was drawn

    @property
    def text(self) -> str:
        return "".join(self.actions)


class StepSampler(HFSampler):
    """Owns a copy of the model, as HFSampler does. See `Sampler`."""

    def __init__(
        self,
        model_path: Path,
        dtype: torch.dtype,
        device: torch.device,
        tokenizer: Any,
        max_batch_sequences: int,
        task: LegalActions,
        exploration: StepsConfig,
    ) -> None:
        super().__init__(model_path, dtype, device, tokenizer, max_batch_sequences)
        self.task = task
        self.exploration = exploration

    @torch.inference_mode()
    def sample(self, request: SampleRequest) -> list[Rollout]:
        """Complete trajectories; `rollout_logprobs` holds what each action was drawn with, at its
        first token, and 0 at its others and at the EOS."""
        require(
            request.top_p == 1,
            f"a policy over legal actions has no nucleus, got top_p={request.top_p}; set "
            "eval.top_p=1",
        )
        trajectories = [
            _Trajectory(prompt, sample)
            for prompt in request.prompts
            for sample in range(request.group_size)
        ]
        noise = _Noise(request, trajectories)
        explores = request.stream == "train"
        live = list(range(len(trajectories)))
        step = 0
        while live:
            legal = [self._legal(trajectories[i]) for i in live]
            live, legal = _without_ends(live, legal)
            states = [trajectories[i] for i in live]
            for place, logprobs in zip(live, self.action_logprobs(states, legal), strict=True):
                probs = self._behaviour(logprobs, request, noise.tempers(place), explores)
                chosen = _draw(probs, noise.action(place, step))
                actions = legal[live.index(place)]
                trajectories[place].actions.append(actions[chosen])
                trajectories[place].logprobs.append(float(np.log(probs[chosen])))
            step += 1
        rollouts = [self._rollout(t, request) for t in trajectories]
        if explores and self.exploration.local_search_tries:
            rollouts = self._local_search(rollouts, trajectories, request)
        return rollouts

    def action_logprobs(
        self, states: Sequence[_Trajectory], legal: Sequence[Sequence[str]]
    ) -> list[NDArray[np.float64]]:
        """Log-probs of each state's legal actions; a state met twice is scored once."""
        unique: dict[tuple[int, str], int] = {}
        rows: list[tuple[list[int], list[int]]] = []  # context and action tokens
        first: dict[tuple[int, str], int] = {}
        keys = [(state.prompt.index, state.text) for state in states]
        for key, state, actions in zip(keys, states, legal, strict=True):
            if key not in unique:
                unique[key], first[key] = len(actions), len(rows)
                context = [
                    *state.prompt.token_ids,
                    *(t for a in state.actions for t in self._ids(a)),
                ]
                rows += [(context, self._ids(action)) for action in actions]
        size = self.max_batch_sequences
        parts = [self._score(rows[start : start + size]) for start in range(0, len(rows), size)]
        sums = np.concatenate(parts) if parts else np.zeros(0)
        if not np.isfinite(sums).all():
            raise ValueError(
                "the policy's logits must be finite, got NaN for a legal action at policy version "
                f"{self.policy_version}; lower optimizer.lr"
            )
        return [sums[first[key] : first[key] + unique[key]] for key in keys]

    def _score(self, rows: Sequence[tuple[list[int], list[int]]]) -> NDArray[np.float64]:
        """(n,) log pi(action | context). Padded at the end, where a causal model does not look."""
        longest = max(len(context) + len(action) - 1 for context, action in rows)
        tokens = [(context + action)[:-1] for context, action in rows]
        ids = torch.tensor([t + [0] * (longest - len(t)) for t in tokens], device=self.device)
        logprobs = self.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        sums = []
        for row, (context, action) in enumerate(rows):
            places = torch.arange(len(context) - 1, len(context) + len(action) - 1)
            sums.append(logprobs[row, places, action].double().sum())
        return torch.stack(sums).cpu().numpy()

    def _behaviour(
        self,
        logprobs: NDArray[np.float64],
        request: SampleRequest,
        tempers: float,
        explores: bool,
    ) -> NDArray[np.float64]:
        """Probabilities that an action is drawn from. `tempers` in (0, 1): is the trajectory one of
        the tempered share."""
        if not explores:
            return _softmax(logprobs / request.temperature)
        hot = tempers < self.exploration.tempered_share
        temperature = self.exploration.temperature(request.step) if hot else 1.0
        epsilon = self.exploration.epsilon(request.step)
        return (1 - epsilon) * _softmax(logprobs / temperature) + epsilon / len(logprobs)

    def _local_search(
        self,
        rollouts: list[Rollout],
        trajectories: Sequence[_Trajectory],
        request: SampleRequest,
    ) -> list[Rollout]:
        """Group by group; see `StepsConfig.local_search_tries`."""
        size = request.group_size
        rewards = [score.reward for score in score_all(self.task, rollouts)]
        found = list(rollouts)
        for start in range(0, len(rollouts), size):
            group = rewards[start : start + size]
            best, worst = int(np.argmax(group)), size - 1 - int(np.argmin(group[::-1]))
            if group[best] == 1:
                continue  # nothing is better than right
            tries = self._completions(trajectories[start + best], request)
            for rollout, score in zip(tries, score_all(self.task, tries), strict=True):
                if score.reward > group[best]:
                    found[start + worst] = replace(rollout, sample=worst)
                    break
        return found

    def _completions(self, best: _Trajectory, request: SampleRequest) -> list[Rollout]:
        tries = range(self.exploration.local_search_tries)
        keys = stream_keys(
            request.seed, request.step, LOCAL_SEARCH, [best.prompt.index] * len(tries), list(tries)
        )
        kept = len(best.actions) // 2
        completed = []
        for number in tries:
            trial = _Trajectory(best.prompt, best.sample, best.actions[:kept], best.logprobs[:kept])
            while actions := self._legal(trial):
                draw = float(uniform(keys[number : number + 1], len(trial.actions))[0])
                trial.actions.append(actions[int(draw * len(actions))])
                trial.logprobs.append(-float(np.log(len(actions))))
            completed.append(self._rollout(trial, request))
        return completed

    def _legal(self, trajectory: _Trajectory) -> list[str]:
        return self.task.legal_actions(trajectory.prompt, trajectory.text)

    def _rollout(self, trajectory: _Trajectory, request: SampleRequest) -> Rollout:
        ids: list[int] = []
        logprobs: list[float] = []
        for action, logprob in zip(trajectory.actions, trajectory.logprobs, strict=True):
            tokens = self._ids(action)
            ids += tokens
            logprobs += [logprob] + [0.0] * (len(tokens) - 1)
        if len(ids) + 1 > request.max_new_tokens:
            raise ConfigError(
                f"a trajectory of {self.task.name} has {len(ids) + 1} tokens with its EOS, the "
                f"limit is {request.max_new_tokens}; set rollout.max_new_tokens={len(ids) + 1}"
            )
        return Rollout(
            prompt=trajectory.prompt,
            sample=trajectory.sample,
            response_ids=(*ids, self.tokenizer.eos_token_id),
            rollout_logprobs=(*logprobs, 0.0),
            truncated=False,
            policy_version=self.policy_version,
            text=trajectory.text,
        )

    def _ids(self, action: str) -> list[int]:
        return self.tokenizer(action, add_special_tokens=False)["input_ids"]


class _Noise:
    """Uniform numbers of every trajectory: which are tempered, and which action a step takes."""

    def __init__(self, request: SampleRequest, trajectories: Sequence[_Trajectory]) -> None:
        self.keys = stream_keys(
            request.seed,
            request.step,
            request.stream,
            [t.prompt.index for t in trajectories],
            [t.sample for t in trajectories],
        )

    def tempers(self, place: int) -> float:
        return float(uniform(self.keys[place : place + 1], 0)[0])

    def action(self, place: int, step: int) -> float:
        return float(uniform(self.keys[place : place + 1], step + 1)[0])


def _without_ends(live: list[int], legal: list[list[str]]) -> tuple[list[int], list[list[str]]]:
    going = [i for i, actions in enumerate(legal) if actions]
    return [live[i] for i in going], [legal[i] for i in going]


def _softmax(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logprobs - logprobs.max())
    return weights / weights.sum()


def _draw(probs: NDArray[np.float64], noise: float) -> int:
    """The first index whose cumulated probability exceeds the noise."""
    cdf = probs.cumsum()
    return min(int(np.searchsorted(cdf, noise * cdf[-1], side="right")), len(probs) - 1)
