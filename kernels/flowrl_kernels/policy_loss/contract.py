"""What linear_policy_loss gives its objective, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The part of the batch that one call of the objective sees: whole sequences, in order."""

    sequences: slice  # of the N sequences
    tokens: slice  # of the T rows
    cu_seqlens: Tensor  # (n + 1,) of these sequences, starting at 0
    inputs: Mapping[str, Tensor]  # these sequences' and tokens' part of every input, by name


class Objective(Protocol):
    def __call__(
        self, logprobs: Tensor, entropy: Tensor | None, rows: Rows, /
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss summed over the rows' sequences, and metrics, each (n,): one per sequence."""
        ...


class PolicyLoss(NamedTuple):
    loss: Tensor  # () differentiable
    metrics: dict[str, Tensor]  # (N,) each, without gradient
    logprobs: Tensor  # (T,) without gradient; 0 where masked
    entropy: Tensor | None  # (T,) without gradient; None unless asked for
