"""Tensor-, sequence- and pipeline-parallel training with megatron-core; see `Backend`.

A replica is the processes that share one copy of the policy. All of them call every method together
with the same arguments, and get the same results: the last stage's are sent to the others.

With model.dtype=bfloat16 weights are kept in bfloat16 beside the optimizer's in float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flowrl_kernels import linear_logprobs, linear_policy_loss
from torch import Tensor

from flowrl.config import Config
from flowrl.model_shape import FP8_MULTIPLES
from flowrl.models import LossOutput, Microbatch, TokenScores, UpdateInfo
from flowrl.models import megatron_checkpoint as checkpoint
from flowrl.models.head_objective import chunk_objective
from flowrl.models.hf_export import export_hf
from flowrl.models.hf_files import check_start, fingerprint
from flowrl.models.log_z import dropout_keys
from flowrl.models.megatron_cpu_shim import on_cpu
from flowrl.models.megatron_optimizer import PolicyOptimizer
from flowrl.models.megatron_policy import SplitPolicy
from flowrl.models.megatron_schedule import Job, run
from flowrl.objectives.base import Objective, TrustRegion
from flowrl.parallel import Parallel
from flowrl.records import PackedBatch
from flowrl.schema import ConfigError

COUNTERS = "backend.json"


class MegatronBackend:
    """A policy split over processes, with its log Z head, reference and optimizer."""

    def __init__(
        self, config: Config, model_dir: Path, needs: frozenset[str], parallel: Parallel
    ) -> None:
        self.config = config
        self.model_dir = model_dir
        self.heads = sorted(needs & {"log_z", "values"})
        self.parallel = parallel
        self.policy_version = 0
        self.reference_version = 0
        self.dtype = getattr(torch, config.model.dtype)
        with on_cpu(self.parallel.device):
            self.policy = SplitPolicy(config, model_dir, needs, parallel)
            self.optimizer = PolicyOptimizer(self.policy.chunks, config)

    # --- forward passes

    @torch.no_grad()
    def logprobs(
        self, batches: Sequence[PackedBatch], *, reference: bool = False, entropy: bool = False
    ) -> TokenScores:
        jobs = [
            self._scores_job(batch.to(self.parallel.device), reference, entropy)
            for batch in batches
        ]
        with on_cpu(self.parallel.device):
            if reference:
                found = self.policy.with_reference(lambda chunks: self._run(chunks, jobs, True))
            else:
                found = self._run(self.policy.chunks, jobs, True)
        logprobs, *optional = zip(*found, strict=True)
        return TokenScores(
            torch.cat(logprobs),
            *(None if parts[0] is None else torch.cat(parts) for parts in optional),
        )

    def _scores_job(self, batch: PackedBatch, reference: bool, entropy: bool) -> Job:
        def use(hidden: Tensor, weight: Tensor, heads: Mapping[str, Any]) -> Any:
            rows = hidden[batch.hidden_rows]
            scores = linear_logprobs(
                rows,
                weight,
                batch.targets,
                entropy="metric" if entropy else "none",
                **self._head_options,
            )
            with_values = "value" in heads and not reference
            values = heads["value"](rows) if with_values else None
            return hidden.new_zeros(()), (scores.logprobs, scores.entropy, values)

        return Job(batch, use)

    def forward_backward(
        self, microbatches: Sequence[Microbatch], objective: Objective, *, entropy: bool = False
    ) -> LossOutput:
        mode = "grad" if "entropy" in objective.needs else "metric" if entropy else "none"
        jobs = [self._loss_job(microbatch, objective, mode) for microbatch in microbatches]
        with on_cpu(self.parallel.device):
            outputs = self._run(self.policy.chunks, jobs, False)
        names = outputs[0]["metrics"]
        return LossOutput(
            loss=math.fsum(float(o["loss"]) for o in outputs),
            logprobs=torch.cat([o["logprobs"] for o in outputs]),
            entropy=torch.cat([o["entropy"] for o in outputs]) if entropy else None,
            metrics={name: torch.cat([o["metrics"][name] for o in outputs]) for name in names},
        )

    def _loss_job(self, microbatch: Microbatch, objective: Objective, entropy: str) -> Job:
        packed = microbatch.packed.to(self.parallel.device)
        batch = microbatch.loss.to(self.parallel.device)
        keys = dropout_keys(self.config.seed, self.optimizer.num_updates, batch.group_ids)

        def use(hidden: Tensor, weight: Tensor, heads: Mapping[str, Any]) -> Any:
            rows = hidden[packed.hidden_rows]
            inputs, values = {}, {}
            if "log_z" in heads:
                inputs["log_z"] = heads["log_z"](hidden, packed, keys)
            if "value" in heads:
                values["values"] = heads["value"](rows)
            output = linear_policy_loss(
                rows,
                weight,
                packed.targets,
                packed.cu_seqlens,
                chunk_objective(batch, objective),
                sequence_inputs=inputs,
                token_inputs=values,
                entropy=entropy,  # type: ignore
                **self._head_options,
            )
            # A copy: the schedule divides what it is given in place.
            result = {"loss": output.loss.detach().clone(), "logprobs": output.logprobs.detach(),
                      "entropy": output.entropy, "metrics": dict(output.metrics)}  # fmt: skip
            return output.loss, result

        return Job(packed, use)

    def _run(self, chunks: Sequence[Any], jobs: Sequence[Job], forward_only: bool) -> list[Any]:
        multiple = self.config.parallel.tensor if self.config.parallel.sequence else 1
        if self.config.model.fp8 != "off":
            multiple *= FP8_MULTIPLES[self.config.model.fp8_recipe]
        return run(chunks, jobs, multiple, forward_only=forward_only)

    @property
    def _head_options(self) -> dict[str, Any]:
        kernels = self.config.kernels
        layout, place = self.policy.layout, self.policy.place
        split = layout.tensor > 1
        return {
            "temperature": self.config.rollout.temperature,
            "vocab_start": place.tensor_rank * layout.vocab_shard if split else 0,
            "vocab_size": layout.shape.vocab_size,
            "group": place.tensor_group if split else None,
            "max_logits_bytes": kernels.max_logits_mb << 20 or None,
            "backend": None if kernels.backend == "auto" else kernels.backend,
        }

    # --- update

    def step(self) -> UpdateInfo:
        """Clips and updates. A non-finite norm leaves all as it is."""
        with on_cpu(self.parallel.device):
            info = self.optimizer.step()
        self.policy_version += not info.skipped
        return info

    def natural_step(self, microbatches: Sequence[Microbatch], region: TrustRegion) -> UpdateInfo:
        """Raises ConfigError: the natural gradient is made for small models on one process."""
        raise ConfigError(
            f"model.backend=megatron has no natural gradient, got a trust region with method "
            f"{region.method}; set model.backend=hf or the objective's line_search"
        )

    def snapshot(self) -> Any:
        return self.optimizer.snapshot()

    def interpolate(self, start: Any, share: float) -> None:
        with on_cpu(self.parallel.device):
            self.optimizer.interpolate(start, share)

    def reset_reference(self) -> None:
        with on_cpu(self.parallel.device):
            self.policy.reset_reference()
        self.reference_version += 1

    def reset_optimizer(self) -> None:
        self.optimizer.reset()

    # --- weights and state

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """All processes of the replica go through it together."""
        return self.policy.named_weights()

    def export_hf(self, directory: Path) -> None:
        """Every process calls it; the main one writes."""
        stream = self.named_weights()

        def write() -> None:
            try:
                if self.parallel.is_main:
                    export_hf(self.model_dir, stream, directory, self.dtype)
            finally:
                for _ in stream:
                    pass

        self.parallel.agree(write)

    def save_state(self, directory: Path) -> None:
        """Raises CheckpointMismatchError where the files do not hold what was written."""
        state = directory / "megatron"

        def begin() -> None:
            if not self.parallel.is_main:
                return
            counters = {
                "policy_version": self.policy_version,
                "num_updates": self.optimizer.num_updates,
                "num_steps": self.optimizer.num_steps,
                "start_model": fingerprint(self.model_dir),
                "reference_version": self.reference_version,
                "heads": self.heads,
            }
            state.mkdir()
            (directory / COUNTERS).write_text(json.dumps(counters))

        self.parallel.agree(begin)
        with on_cpu(self.parallel.device):
            checkpoint.save(state, self._contents())

    def load_state(self, directory: Path) -> None:
        """Reads a state of any layout. Raises ConfigError if the starting model, which is the
        reference, has changed, or if the parameters differ."""
        counters = json.loads((directory / COUNTERS).read_text())
        check_start(counters["start_model"], self.model_dir)
        if counters["heads"] != self.heads:
            raise ConfigError(
                f"{directory} has the heads {counters['heads']}, this run has {self.heads}: log_z "
                "and values; resume with the objective that it was written with"
            )
        self.optimizer.num_updates = counters["num_updates"]
        self.optimizer.num_steps = counters["num_steps"]
        self.policy_version = counters["policy_version"]
        self.reference_version = counters["reference_version"]
        with on_cpu(self.parallel.device):
            checkpoint.load(directory / "megatron", self._contents())

    def _contents(self) -> checkpoint.Contents:
        reference = self.policy.reference_by_param() if self.reference_version else {}
        return checkpoint.Contents(self.policy.chunks, self.optimizer, reference)
