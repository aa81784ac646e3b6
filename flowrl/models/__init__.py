"""Training backends: packed batches in, log-probs and gradients out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from flowrl.records import LossBatch, PackedBatch

if TYPE_CHECKING:
    from flowrl.objectives.base import Objective, TrustRegion


@dataclass(frozen=True)
class Microbatch:
    """Sequences of one update that fit in one pass, in both of their records."""

    packed: PackedBatch
    loss: LossBatch


@dataclass(frozen=True)
class TokenScores:
    """Per response token, float32, in the order of the batches given."""

    logprobs: Tensor  # (T,)
    entropy: Tensor | None = None  # (T,)
    values: Tensor | None = None  # (T,) of the state before each token; with a value head


@dataclass(frozen=True)
class LossOutput:
    """Of all micro-batches together, in the order given."""

    loss: float  # this rank's share of the update's loss; the sum over ranks is the loss
    logprobs: Tensor  # (T,) of the policy that the loss was evaluated at
    entropy: Tensor | None  # (T,), if it was asked for
    metrics: dict[str, Tensor]  # per sequence (N,), what the objective measured


@dataclass(frozen=True)
class UpdateInfo:
    grad_norm: float  # global, before clipping
    lr: float
    skipped: bool  # non-finite gradient norm: weights and moments are untouched


class Backend(Protocol):
    """Gradients are summed over micro-batches and ranks, never averaged."""

    policy_version: int  # updates applied
    reference_version: int  # resets of the reference; 0: the starting policy

    def logprobs(
        self, batches: Sequence[PackedBatch], *, reference: bool = False, entropy: bool = False
    ) -> TokenScores: ...

    def forward_backward(
        self, microbatches: Sequence[Microbatch], objective: Objective, *, entropy: bool = False
    ) -> LossOutput: ...

    def step(self) -> UpdateInfo: ...

    def natural_step(self, microbatches: Sequence[Microbatch], region: TrustRegion) -> UpdateInfo:
        """In place of `step`: the natural-gradient step whose KL is region.max_kl to second order.
        Raises ConfigError where the backend has none, or the model is too large for it."""
        ...

    def snapshot(self) -> Any:
        """The trained weights as they are, for `interpolate`."""
        ...

    def interpolate(self, start: Any, share: float) -> None:
        """weights = start + share * (weights - start)."""
        ...

    def reset_reference(self) -> None:
        """The reference becomes the current policy; part of the state from then on."""
        ...

    def reset_optimizer(self) -> None:
        """Clears the moments; the schedule goes on."""
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's tensors under their Hugging Face names; never the log Z or value head."""
        ...

    def save_state(self, directory: Path) -> None:
        """Writes all that `load_state` needs to continue bit for bit. Every rank calls it."""
        ...

    def load_state(self, directory: Path) -> None: ...

    def export_hf(self, directory: Path) -> None: ...
