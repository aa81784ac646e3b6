"""Samplers: prompts in, rollouts out. Each engine is one file; the trainer sees only `Sampler`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.parallel import Parallel
from flowrl.records import Rollout, SampleRequest


class Sampler(Protocol):
    def sample(self, request: SampleRequest) -> list[Rollout]:
        """group_size responses per prompt, prompt-major. Rollouts carry the log-probs of the
        distribution that was sampled from, and the version of the weights that made them."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Takes the policy's tensors under their Hugging Face names; checks that they arrived."""
        ...

    def close(self) -> None: ...


def build_sampler(config: Config, model_dir: Path, tokenizer: Any, parallel: Parallel) -> Sampler:
    """The sampler that config.rollout.engine names, holding the weights of `model_dir`.

    Raises ConfigError for a replay directory without recorded rollouts and for an engine that
    cannot be started with these settings."""
    if config.rollout.engine == "replay":
        from flowrl.rollout.replay_sampler import ReplaySampler

        return ReplaySampler(Path(config.rollout.replay_dir))
    if config.rollout.engine == "vllm":
        from flowrl.rollout.vllm_start import build_vllm_sampler

        return build_vllm_sampler(config, model_dir, tokenizer, parallel)
    from flowrl.rollout.hf_sampler import HFSampler

    return HFSampler(
        model_dir,
        getattr(torch, config.model.dtype),
        parallel.device,
        tokenizer,
        config.rollout.max_batch_sequences,
    )
