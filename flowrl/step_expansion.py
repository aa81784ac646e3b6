"""From trajectories of legal actions to what a loss over them is made of: every legal action of
every state visited is a sequence of its own, whose log-prob the policy's softmax needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from flowrl.experience import Expansion, Experience
from flowrl.records import Actions, Rollout
from flowrl.tasks.step_task import StepTask


@dataclass(frozen=True)
class Step:
    """One step of a trajectory: the state, its legal actions and the one taken."""

    partial: str  # the trajectory so far, which is the state
    context: tuple[int, ...]  # its tokens, after those of the prompt
    actions: list[str]
    action_ids: list[list[int]]
    taken: int
    log_backward: float  # log P_B of the state that the step leads to: -log number of parents

    def candidates(self, rollout: Rollout) -> list[Rollout]:
        """Every legal action as the response to the prompt and the trajectory so far."""
        prompt = dataclasses.replace(rollout.prompt, token_ids=self.context)
        return [
            Rollout(prompt, rollout.sample, tuple(ids), (), False, rollout.policy_version, action)
            for action, ids in zip(self.actions, self.action_ids, strict=True)
        ]


class Steps:
    """Takes trajectories apart. Tokens are those that `StepSampler` scored: each action encoded by
    itself after the prompt and the actions so far."""

    def __init__(self, task: StepTask, tokenizer: Any) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self._ids = lru_cache(maxsize=1 << 14)(self._encode)

    def of(self, rollout: Rollout) -> Iterator[Step]:
        """Raises ValueError where the rollout's text is not made of legal actions."""
        prompt, partial, context = rollout.prompt, "", rollout.prompt.token_ids
        while partial != rollout.text:
            actions = self.task.legal_actions(prompt, partial)
            taken = self._taken(rollout, partial, actions)
            after = partial + actions[taken]
            ids = [self._ids(action) for action in actions]
            log_backward = -math.log(self.task.num_parents(prompt, after))
            yield Step(partial, context, actions, ids, taken, log_backward)
            partial, context = after, (*context, *ids[taken])

    def _taken(self, rollout: Rollout, partial: str, actions: list[str]) -> int:
        """The longest legal action that the trajectory goes on with."""
        rest = rollout.text[len(partial) :]
        fitting = [i for i, action in enumerate(actions) if rest.startswith(action)]
        if not fitting:
            raise ValueError(
                f"a trajectory must be made of legal actions, got {rollout.text!r} for prompt "
                f"{rollout.prompt.text!r}; sample it with the step sampler"
            )
        return max(fitting, key=lambda i: len(actions[i]))

    def _encode(self, action: str) -> list[int]:
        return self.tokenizer(action, add_special_tokens=False)["input_ids"]


class StepExpansion:
    """Expands an `Experience`."""

    def __init__(self, task: StepTask, tokenizer: Any) -> None:
        self.steps = Steps(task, tokenizer)

    def __call__(self, experience: Experience) -> Experience:
        sequences: list[Rollout] = []
        owners: list[int] = []
        step_ids: list[int] = []
        chosen: list[bool] = []
        log_backward: list[float] = []
        num_steps = 0
        for owner, rollout in enumerate(experience.rollouts):
            for step in self.steps.of(rollout):
                candidates = step.candidates(rollout)
                sequences += candidates
                chosen += [index == step.taken for index in range(len(candidates))]
                owners += [owner] * len(candidates)
                step_ids += [num_steps] * len(candidates)
                log_backward += [step.log_backward] * len(candidates)
                num_steps += 1
        table = Actions(
            trajectory_ids=torch.tensor(owners),
            step_ids=torch.tensor(step_ids),
            chosen=torch.tensor(chosen),
            log_backward=torch.tensor(log_backward, dtype=torch.float32),
        )
        return dataclasses.replace(experience, expansion=Expansion(sequences, owners, table))
