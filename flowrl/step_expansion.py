"""From trajectories of legal actions to what a loss over them is made of: every legal action of
every state visited is a sequence of its own, whose log-prob the policy's softmax needs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from flowrl.experience import Expansion, Experience
from flowrl.records import Actions, Prompt, Rollout
from flowrl.tasks.step_task import StepTask


class StepExpansion:
    """Expands an `Experience`. Tokens are those that `StepSampler` scored: each action encoded by
    itself after the prompt and the actions so far."""

    def __init__(self, task: StepTask, tokenizer: Any) -> None:
        self.task = task
        self.tokenizer = tokenizer

    def __call__(self, experience: Experience) -> Experience:
        sequences: list[Rollout] = []
        owners: list[int] = []
        step_ids: list[int] = []
        chosen: list[bool] = []
        log_backward: list[float] = []
        num_steps = 0
        for owner, rollout in enumerate(experience.rollouts):
            partial, context = "", list(rollout.prompt.token_ids)
            while partial != rollout.text:
                actions = self.task.legal_actions(rollout.prompt, partial)
                taken = self._taken(rollout, partial, actions)
                log_parents = -math.log(
                    self.task.num_parents(rollout.prompt, partial + actions[taken])
                )
                prompt = dataclasses.replace(rollout.prompt, token_ids=tuple(context))
                ids = [self._ids(action) for action in actions]
                for index, (action, tokens) in enumerate(zip(actions, ids, strict=True)):
                    sequences.append(_candidate(rollout, prompt, action, tokens))
                    chosen.append(index == taken)
                owners += [owner] * len(actions)
                step_ids += [num_steps] * len(actions)
                log_backward += [log_parents] * len(actions)
                num_steps += 1
                partial += actions[taken]
                context += ids[taken]
        table = Actions(
            trajectory_ids=torch.tensor(owners),
            step_ids=torch.tensor(step_ids),
            chosen=torch.tensor(chosen),
            log_backward=torch.tensor(log_backward, dtype=torch.float32),
        )
        return dataclasses.replace(experience, expansion=Expansion(sequences, owners, table))

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

    def _ids(self, action: str) -> list[int]:
        return self.tokenizer(action, add_special_tokens=False)["input_ids"]


def _candidate(rollout: Rollout, prompt: Prompt, action: str, tokens: list[int]) -> Rollout:
    return Rollout(prompt, rollout.sample, tuple(tokens), (), False, rollout.policy_version, action)
