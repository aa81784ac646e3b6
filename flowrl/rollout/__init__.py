"""Samplers: prompts in, rollouts out. Each engine is one file; the trainer sees only `Sampler`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from flowrl.records import Rollout, SampleRequest


class Sampler(Protocol):
    def sample(self, request: SampleRequest) -> list[Rollout]:
        """group_size responses per prompt, prompt-major. Rollouts carry the log-probs of the
        distribution that was sampled from, and the version of the weights that made them."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Takes the policy's tensors under their Hugging Face names and checks that they arrived."""
        ...

    def close(self) -> None: ...
