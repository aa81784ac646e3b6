"""Tensor-, sequence- and pipeline-parallel training with megatron-core; see `Backend`.

A replica is the processes that share one copy of the policy. All of them call every method together
with the same arguments, and get the same results: the last stage's are sent to the others.

With model.dtype=bfloat16 weights are kept in bfloat16 beside the optimizer's in float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from flowrl_kernels import linear_logprobs, linear_policy_loss
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from flowrl.config import Config
from flowrl.model_shape import check_split, read_shape
from flowrl.models import LossOutput, Microbatch, TokenScores, UpdateInfo
from flowrl.models import megatron_checkpoint as checkpoint
from flowrl.models import megatron_weights as weights
from flowrl.models.hf_files import export_hf, fingerprint
from flowrl.models.log_z import LogZHead
from flowrl.models.megatron_cpu_shim import on_cpu
from flowrl.models.megatron_model import build_chunk, transformer_config
from flowrl.models.megatron_optimizer import PolicyOptimizer, wrap
from flowrl.models.megatron_schedule import FP8_ROWS, Job, run
from flowrl.objectives.base import Objective
from flowrl.parallel import TIMEOUT, Parallel
from flowrl.records import LossBatch, PackedBatch
from flowrl.schema import ConfigError

COUNTERS = "backend.json"


class MegatronBackend:
    """A policy split over processes, with its log Z head, reference and optimizer."""

    def __init__(
        self, config: Config, model_dir: Path, needs: frozenset[str], parallel: Parallel
    ) -> None:
        """Raises ConfigError for a model of another family, one that does not divide over the
        ranks, and for an objective with a value head."""
        if "values" in needs:
            raise ConfigError(
                "model.backend=megatron has no value head, and the objective needs one; set "
                "model.backend=hf, or an objective without values"
            )
        self.config = config
        self.model_dir = model_dir
        self.parallel = parallel
        self.policy_version = 0
        self.dtype = getattr(torch, config.model.dtype)
        self.shape = read_shape(model_dir)
        check_split(self.shape, config.parallel)
        split = config.parallel
        self.layout = weights.Layout(
            self.shape, split.tensor, split.pipeline, split.virtual_pipeline
        )
        with on_cpu():
            _join_groups(config, parallel)
            self.place = self._own_place()
            log_z_head = self._build_log_z() if "log_z" in needs else None
            self._chunks = wrap(self._load(log_z_head), config)
            self.optimizer = PolicyOptimizer(self._chunks, config)
        self._reference: list[Any] | None = None

    # --- forward passes

    @torch.no_grad()
    def logprobs(
        self, batches: Sequence[PackedBatch], *, reference: bool = False, entropy: bool = False
    ) -> TokenScores:
        def job(batch: PackedBatch) -> Job:
            def use(hidden: Tensor, weight: Tensor, log_z_head: LogZHead | None) -> Any:
                scores = linear_logprobs(
                    hidden[batch.hidden_rows],
                    weight,
                    batch.targets,
                    entropy="metric" if entropy else "none",
                    **self._head_options,
                )
                return hidden.new_zeros(()), (scores.logprobs, scores.entropy)

            return Job(batch, use)

        jobs = [job(batch.to(self.parallel.device)) for batch in batches]
        with on_cpu():
            if reference:
                scores = self._with_reference(lambda chunks: self._run(chunks, jobs, True))
            else:
                scores = self._run(self._chunks, jobs, True)
        return TokenScores(
            torch.cat([logprobs for logprobs, _ in scores]),
            torch.cat([found for _, found in scores]) if entropy else None,
        )

    def forward_backward(
        self, microbatches: Sequence[Microbatch], objective: Objective, *, entropy: bool = False
    ) -> LossOutput:
        mode = "grad" if "entropy" in objective.needs else "metric" if entropy else "none"
        jobs = [self._loss_job(microbatch, objective, mode) for microbatch in microbatches]
        with on_cpu():
            outputs = self._run(self._chunks, jobs, False)
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
        keys = self._dropout_keys(batch)

        def use(hidden: Tensor, weight: Tensor, log_z_head: LogZHead | None) -> Any:
            inputs = {}
            if log_z_head is not None:
                inputs["log_z"] = log_z_head(hidden, packed, keys)
            output = linear_policy_loss(
                hidden[packed.hidden_rows],
                weight,
                packed.targets,
                packed.cu_seqlens,
                _chunk_objective(batch, objective),
                sequence_inputs=inputs,
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
            multiple *= FP8_ROWS
        return run(chunks, jobs, multiple, forward_only=forward_only)

    @property
    def _head_options(self) -> dict[str, Any]:
        kernels = self.config.kernels
        split = self.layout.tensor > 1
        return {
            "temperature": self.config.rollout.temperature,
            "vocab_start": self.place.tensor_rank * self.layout.vocab_shard if split else 0,
            "vocab_size": self.shape.vocab_size,
            "group": self.place.tensor_group if split else None,
            "max_logits_bytes": kernels.max_logits_mb << 20 or None,
            "backend": None if kernels.backend == "auto" else kernels.backend,
        }

    def _dropout_keys(self, batch: LossBatch) -> Tensor:
        """As in the Hugging Face backend: a function of (seed, update, prompt)."""
        start = hash((self.config.seed, self.optimizer.num_updates)) & 0x7FFF_FFFF_FFFF_FFFF
        return batch.group_ids + start

    # --- update

    def step(self) -> UpdateInfo:
        """Clips and updates. A non-finite norm leaves all as it is."""
        with on_cpu():
            info = self.optimizer.step()
        self.policy_version += not info.skipped
        return info

    # --- parts

    def _load(self, log_z_head: LogZHead | None) -> list[Any]:
        """This process's chunks, with the starting model's weights."""
        settings = transformer_config(
            self.shape, self.config.model, self.config.parallel, self.parallel.device
        )
        count = self.layout.virtual
        chunks = [
            build_chunk(
                settings,  # one for all: the schedule reads and changes it
                self.shape,
                self.layout.padded_vocab,
                index if count > 1 else None,
                log_z_head,
            )
            for index in range(count)
        ]
        with torch.no_grad():
            weights.load(self.model_dir, self.layout, self.place, _finder(chunks))
        return chunks

    def _build_log_z(self) -> LogZHead | None:
        """The same initial values on every process, and those of the Hugging Face backend."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            head = LogZHead(self.shape.hidden_size, self.config.log_z)
        return head.to(self.parallel.device)

    def _with_reference(self, action: Callable[[Sequence[Any]], Any]) -> Any:
        """The action's result on the frozen starting policy, loaded when first asked for."""
        if self.config.parallel.reference == "copy":
            if self._reference is None:
                self._reference = self._load(None)
                for chunk in self._reference:
                    chunk.requires_grad_(False)
            return action(self._reference)
        params = [p for chunk in self._chunks for p in chunk.module.parameters()]
        own = [p.detach().to("cpu", copy=True) for p in params]
        if self._reference is None:
            find = _finder([chunk.module for chunk in self._chunks])
            weights.load(self.model_dir, self.layout, self.place, find)
            self._reference = [p.detach().to("cpu", copy=True) for p in params]
        for param, start in zip(params, self._reference, strict=True):
            param.data.copy_(start)
        try:
            return action(self._chunks)
        finally:
            for param, kept in zip(params, own, strict=True):
                param.data.copy_(kept)

    def _own_place(self) -> weights.Place:
        return weights.Place(
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            tensor_group=parallel_state.get_tensor_model_parallel_group(),
            pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
            dtype=self.dtype,
            device=self.parallel.device,
        )

    # --- weights and state

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """All processes of the replica go through it together."""
        find = _finder([chunk.module for chunk in self._chunks])
        return weights.stream(self.layout, self.place, find)

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
        if self.parallel.is_main:
            state.mkdir()
            counters = {
                "policy_version": self.policy_version,
                "num_updates": self.optimizer.num_updates,
                "num_steps": self.optimizer.num_steps,
                "start_model": fingerprint(self.model_dir),
                "log_z": any(c.module.log_z_head is not None for c in self._chunks[-1:]),
            }
            (directory / COUNTERS).write_text(json.dumps(counters))
        self.parallel.barrier()
        with on_cpu():
            checkpoint.save(state, self._chunks, self.optimizer)

    def load_state(self, directory: Path) -> None:
        """Reads a state of any layout. Raises ConfigError if the starting model, which is the
        reference, has changed, or if the parameters differ."""
        counters = json.loads((directory / COUNTERS).read_text())
        if counters["start_model"] != fingerprint(self.model_dir):
            raise ConfigError(
                f"the starting model at {self.model_dir} is not the one that this run began with, "
                "and it is the reference policy; put it back or start a new run"
            )
        self.optimizer.num_updates = counters["num_updates"]
        self.optimizer.num_steps = counters["num_steps"]
        self.policy_version = counters["policy_version"]
        with on_cpu():
            checkpoint.load(directory / "megatron", self._chunks, self.optimizer)


def _chunk_objective(batch: LossBatch, objective: Objective) -> Callable[..., Any]:
    def evaluate(logprobs: Tensor, entropy: Tensor | None, rows: Any) -> Any:
        part = batch
        if (rows.sequences.start, rows.sequences.stop) != (0, batch.num_sequences):
            part = batch.select(torch.arange(batch.num_sequences)[rows.sequences])
        log_z = rows.inputs.get("log_z")
        return objective.loss(part.replace(logprobs=logprobs, entropy=entropy, log_z=log_z))

    return evaluate


def _finder(chunks: Sequence[Any]) -> weights.Find:
    """Parameters by layer of the whole model and Megatron's name; Transformer Engine keeps a norm
    with the matrix behind it."""
    fused = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    table: dict[tuple[int | None, str], Tensor] = {}
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                layer = chunk.decoder.layers[int(parts[2])].layer_number - 1
                table[layer, ".".join(parts[3:])] = param
            else:
                table[None, name] = param

    def find(layer: int | None, name: str) -> Tensor:
        found = table.get((layer, name))
        return table[layer, fused[name]] if found is None else found

    return find


def _join_groups(config: Config, parallel: Parallel) -> None:
    """Megatron's process groups; made again where an earlier backend had another layout."""
    split = config.parallel
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo" if parallel.device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT,
        )  # fmt: skip
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        split.tensor,
        split.pipeline,
        virtual_pipeline_model_parallel_size=(
            split.virtual_pipeline if split.virtual_pipeline > 1 else None
        ),
        create_gloo_process_groups=False,
    )
    assert parallel_state.get_data_parallel_rank() == parallel.rank, parallel
    model_parallel_cuda_manual_seed(config.seed, force_reset_rng=True)
