"""A policy that is a table: one softmax per node of the toy tree, trained by the real objectives.

policy = TabularPolicy(0)
policy.train("vargrad", steps=300, beta=3.0)
policy.probabilities()                              exact, over all 341 answers
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl import objectives
from flowrl.records import LossBatch, to_cu_seqlens
from flowrl.targets import Table
from flowrl.tasks.toy_tree import DEPTH, DIGITS, STOP, WEIGHTS, build

BRANCHES = len(DIGITS) + 1  # the last one is EOS
NUM_NODES = sum(len(DIGITS) ** size for size in range(DEPTH))
TASK = build({}, 1.0)
OUTCOMES = TASK.outcomes(TASK.prompt("eval", 0))
LENGTHS = torch.tensor([min(len(o.text) + 1, DEPTH) for o in OUTCOMES])
REWARDS = torch.tensor([o.reward for o in OUTCOMES], dtype=torch.float64)


def child(node: Tensor, digit: Tensor) -> Tensor:
    """Node of the answer with one digit more: the root is 0, its children 1 to 4, and so on."""
    return node * len(DIGITS) + 1 + digit


def _cells(text: str) -> list[int]:
    """Of every token of an answer, the cell of the table that holds its logit."""
    node, cells = 0, []
    for letter in text:
        digit = DIGITS.index(letter)
        cells.append(node * BRANCHES + digit)
        node = int(child(torch.tensor(node), torch.tensor(digit)))
    if len(text) < DEPTH:
        cells.append(node * BRANCHES + BRANCHES - 1)
    return cells


OUTCOME_CELLS = torch.tensor(
    [cells + [-1] * (DEPTH - len(cells)) for cells in (_cells(o.text) for o in OUTCOMES)]
)
REFERENCE = torch.tensor(
    [[(1 - STOP) * w / sum(WEIGHTS) for w in WEIGHTS] + [STOP]], dtype=torch.float64
).log()  # (1, branches), the same at every node: what the task's examples are drawn from


class TabularPolicy:
    def __init__(self, seed: int) -> None:
        self.logits = REFERENCE.repeat(NUM_NODES, 1).requires_grad_()
        self.log_z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        self.values = torch.zeros(NUM_NODES, dtype=torch.float64, requires_grad=True)
        self.random = torch.Generator().manual_seed(seed)
        self.baseline = self.probabilities()

    def probabilities(self) -> Tensor:  # (341,)
        logprobs = self.logits.detach().log_softmax(1).flatten()
        held = torch.where(OUTCOME_CELLS >= 0, logprobs[OUTCOME_CELLS], 0.0)
        return held.sum(1).exp()

    @property
    def table(self) -> Table:
        """Of the reference, which the policy starts from."""
        return Table(self.baseline.tolist(), REWARDS.tolist(), LENGTHS.tolist())

    def train(
        self, name: str, steps: int, *, lr: float = 0.05, groups: int = 32, size: int = 8,
        **options: Any,
    ) -> TabularPolicy:  # fmt: skip
        """Adam on fresh samples, one update a step; the learning rate falls to 0 linearly."""
        slow = {"params": [self.logits], "lr": lr}
        fast = {"params": [self.log_z, self.values], "lr": 5 * lr}
        optimizer = torch.optim.Adam([slow, fast])
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(steps):
            batch = self.sample(groups, size)
            objectives.loss(name, batch, **options).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return self

    def sample(self, groups: int, size: int) -> LossBatch:
        """On-policy: the old log-probs are the current ones."""
        with torch.no_grad():
            outcome = torch.multinomial(
                self.probabilities(), groups * size, replacement=True, generator=self.random
            )
        cells = OUTCOME_CELLS[outcome]
        cells = cells[cells >= 0]  # (T,), sequence by sequence
        logprobs = self.logits.log_softmax(1).flatten()[cells]
        values = self.values[cells // BRANCHES]
        group_ids = torch.arange(groups).repeat_interleave(size)
        return LossBatch(
            rewards=REWARDS[outcome],
            group_ids=group_ids,
            cu_seqlens=to_cu_seqlens(LENGTHS[outcome]),
            logprobs=logprobs,
            old_logprobs=logprobs.detach(),
            ref_logprobs=REFERENCE.repeat(NUM_NODES, 1).flatten()[cells],
            log_z=self.log_z.expand(groups * size),
            values=values,
            old_values=values.detach(),
            truncated=torch.zeros(groups * size, dtype=torch.bool),
        )
