"""Data-parallel training of a transformers causal LM: packed forward, fused head, AdamW.

Trained weights, gradients and moments are float32; `model.dtype` is the dtype of the matrix
products (autocast), of the reference and of what the sampler receives. The backbone's dropout is
off: a log-prob must be that of the policy that was sampled.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from flowrl_kernels import linear_logprobs, linear_policy_loss
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowrl.config import Config
from flowrl.models import LossOutput, Microbatch, TokenScores, UpdateInfo
from flowrl.models import packed_attention as attention
from flowrl.models.head_objective import chunk_objective
from flowrl.models.hf_export import export_hf
from flowrl.models.hf_files import check_start, fingerprint
from flowrl.models.hf_forward import check_forward, load_model, packed_hidden, probe
from flowrl.models.liger_layers import check_liger, use_liger
from flowrl.models.log_z import LogZHead, dropout_keys
from flowrl.models.natural_gradient import natural_gradient
from flowrl.models.value_head import ValueHead
from flowrl.objectives.base import Objective, TrustRegion
from flowrl.parallel import Parallel
from flowrl.records import IGNORE_INDEX, PackedBatch
from flowrl.schema import ConfigError

REDUCE_BUCKET_BYTES = 64 << 20  # gradients are summed over ranks in buckets of this size


class HFBackend:
    """A transformers causal LM with its log Z head, reference and optimizer; see `Backend`."""

    def __init__(
        self, config: Config, model_dir: Path, needs: frozenset[str], parallel: Parallel
    ) -> None:
        self.config = config
        self.model_dir = model_dir
        self.parallel = parallel
        self.policy_version = 0
        self.dtype = getattr(torch, config.model.dtype)
        if config.model.liger:
            check_liger(parallel.device)
        self.model = load_model(model_dir, torch.float32, parallel.device)
        own, probed = probe(self.model, parallel.device)
        self._prepare(self.model)
        check_forward(self.model, own, probed)
        if config.model.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.train()
        self.log_z_head = self._build_log_z() if "log_z" in needs else None
        self.value_head = self._build_value_head() if "values" in needs else None
        self._reference: Any = None
        self.reference_version = 0
        self.params = {
            **dict(self.model.named_parameters()),
            **_prefixed("log_z", self.log_z_head),
            **_prefixed("value_head", self.value_head),
        }
        self._fused = parallel.device.type == "cuda"  # or AdamW copies all parameters for a moment
        self.optimizer = torch.optim.AdamW(
            self._param_groups(),
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=self._fused or None,
        )
        self._num_updates = 0  # updates tried, for the warm-up and the dropout seed

    # --- forward passes

    @torch.no_grad()
    def logprobs(
        self, batches: Sequence[PackedBatch], *, reference: bool = False, entropy: bool = False
    ) -> TokenScores:
        model = self.reference if reference else self.model
        scores, values = [], []
        for batch in batches:
            batch = batch.to(self.parallel.device)
            hidden = self._hidden(model, batch)[batch.hidden_rows]
            if self.value_head is not None and not reference:
                values.append(self.value_head(hidden))
            scores.append(
                linear_logprobs(
                    hidden,
                    self._head_weight(model),
                    batch.targets,
                    entropy="metric" if entropy else "none",
                    **self._head_options,
                )
            )
        return TokenScores(
            torch.cat([s.logprobs for s in scores]),
            torch.cat([s.entropy for s in scores]) if entropy else None,
            torch.cat(values) if values else None,
        )

    def forward_backward(
        self, microbatches: Sequence[Microbatch], objective: Objective, *, entropy: bool = False
    ) -> LossOutput:
        entropy_mode = "grad" if "entropy" in objective.needs else "metric" if entropy else "none"
        outputs = []
        for microbatch in microbatches:
            packed = microbatch.packed.to(self.parallel.device)
            hidden = self._hidden(self.model, packed)
            inputs = {}
            if self.log_z_head is not None:
                prompts = microbatch.loss.group_ids.to(self.parallel.device)
                keys = dropout_keys(self.config.seed, self._num_updates, prompts)
                inputs["log_z"] = self.log_z_head(hidden, packed, keys)
            rows = hidden[packed.hidden_rows]
            values = {} if self.value_head is None else {"values": self.value_head(rows)}
            output = linear_policy_loss(
                rows,
                self._head_weight(self.model),
                packed.targets,
                packed.cu_seqlens,
                chunk_objective(microbatch.loss.to(self.parallel.device), objective),
                sequence_inputs=inputs,
                token_inputs=values,
                entropy=entropy_mode,
                **self._head_options,
            )
            output.loss.backward()
            outputs.append(output)
        return LossOutput(
            loss=math.fsum(float(o.loss.detach()) for o in outputs),
            logprobs=torch.cat([o.logprobs.detach() for o in outputs]),
            entropy=torch.cat([o.entropy.detach() for o in outputs]) if entropy else None,
            metrics={
                name: torch.cat([o.metrics[name] for o in outputs]) for name in outputs[0].metrics
            },
        )

    def _hidden(self, model: Any, batch: PackedBatch) -> Tensor:
        """Hidden states after the final norm, (T_model, D)."""
        with self._autocast():
            return packed_hidden(model, batch).to(self.dtype)

    def _head_weight(self, model: Any) -> Tensor:  # (V, D)
        return model.get_output_embeddings().weight.to(self.dtype)

    @property
    def _head_options(self) -> dict[str, Any]:
        kernels = self.config.kernels
        return {
            "temperature": self.config.rollout.temperature,
            "max_logits_bytes": kernels.max_logits_mb << 20 or None,
            "backend": None if kernels.backend == "auto" else kernels.backend,
        }

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.parallel.device.type, dtype=self.dtype)

    # --- update

    def step(self) -> UpdateInfo:
        """Sums gradients over ranks, clips, updates. A non-finite norm leaves all as it is."""
        return self._step(lambda: None)

    def natural_step(self, microbatches: Sequence[Microbatch], region: TrustRegion) -> UpdateInfo:
        """The backbone moves along the natural gradient, heads by the optimizer; see `Backend`."""

        def move() -> None:
            natural_gradient(
                dict(self.model.named_parameters()),
                lambda batch: self._logits(self.model, batch),
                [_counted(m).to(self.parallel.device) for m in microbatches],
                region,
                self.parallel,
            )

        return self._step(move)

    def _step(self, before: Callable[[], None]) -> UpdateInfo:
        options = self.config.optimizer
        self._reduce_gradients()
        norm = nn.utils.get_total_norm([p.grad for p in self.params.values()])
        finite = bool(torch.isfinite(norm))
        scale = min(1.0, (self._num_updates + 1) / max(1, options.warmup_updates))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        if finite:
            before()
            if options.grad_clip:
                nn.utils.clip_grads_with_norm_(self.params.values(), options.grad_clip, norm)
            self.optimizer.step()
            self.policy_version += 1
        self._num_updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateInfo(float(norm), options.lr * scale, skipped=not finite)

    def _logits(self, model: Any, batch: PackedBatch) -> Tensor:
        """(T, V) at the response rows, tempered: for models small enough to hold them."""
        rows = self._hidden(model, batch)[batch.hidden_rows]
        return rows @ self._head_weight(model).T / self.config.rollout.temperature

    def snapshot(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.params.values()]

    @torch.no_grad()
    def interpolate(self, start: list[Tensor], share: float) -> None:
        for param, old in zip(self.params.values(), start, strict=True):
            param.copy_(torch.lerp(old, param, share) if share else old)

    def reset_optimizer(self) -> None:
        self.optimizer.state.clear()

    def _reduce_gradients(self) -> None:
        """Over ranks. What the loss did not touch has a gradient of zero, on one rank as on many:
        its moments and weights decay."""
        for param in self.params.values():
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        if self.parallel.world_size == 1:
            return
        bucket: list[Tensor] = []
        size = 0
        for param in self.params.values():
            assert param.grad is not None
            bucket.append(param.grad)
            size += param.grad.nbytes
            if size >= REDUCE_BUCKET_BYTES:
                self._reduce_bucket(bucket)
                bucket, size = [], 0
        self._reduce_bucket(bucket)

    def _reduce_bucket(self, grads: list[Tensor]) -> None:
        if not grads:
            return
        flat = self.parallel.all_reduce(torch.cat([g.flatten() for g in grads]))
        for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(total.view_as(grad))

    def _param_groups(self) -> list[dict[str, Any]]:
        options = self.config.optimizer
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "lr": options.lr, "weight_decay": options.weight_decay},
            {"params": vectors, "lr": options.lr, "weight_decay": 0.0},
        ]
        if self.log_z_head is not None:
            lr = options.lr if self.config.log_z.lr is None else self.config.log_z.lr
            head = list(self.log_z_head.parameters())
            groups.append({"params": head, "lr": lr, "weight_decay": 0.0})
        if self.value_head is not None:
            lr = self.config.value_head.lr
            head = list(self.value_head.parameters())
            groups.append(
                {"params": head, "lr": options.lr if lr is None else lr, "weight_decay": 0.0}
            )
        return [{**g, "peak_lr": g["lr"]} for g in groups if g["params"]]

    # --- heads and reference

    def _prepare(self, model: Any) -> None:
        """For packed batches, and with the layers that were chosen."""
        model.set_attn_implementation(attention.NAME)
        if self.config.model.liger:
            use_liger(model)

    def _build_log_z(self) -> LogZHead:
        with _seeded(self.config.seed, torch.device("cpu")):
            head = LogZHead(self.model.config.get_text_config().hidden_size, self.config.log_z)
        return head.to(self.parallel.device)

    def _build_value_head(self) -> ValueHead:
        size = self.model.config.get_text_config().hidden_size
        return ValueHead(size, self.config.value_head).to(self.parallel.device)

    @property
    def reference(self) -> Any:
        """The frozen starting policy, or that of the last reset; loaded when first asked for."""
        if self._reference is None:
            self._reference = load_model(self.model_dir, self.dtype, self.parallel.device)
            self._prepare(self._reference)
            self._reference.eval().requires_grad_(False)
        return self._reference

    @torch.no_grad()
    def reset_reference(self) -> None:
        own = dict(self.model.named_parameters())
        for name, param in self.reference.named_parameters():
            param.copy_(own[name])
        self.reference_version += 1

    # --- weights and state

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, param in self.model.named_parameters():
            yield name, param.detach().to(self.dtype)

    def export_hf(self, directory: Path) -> None:
        export_hf(self.model_dir, self.named_weights(), directory, self.dtype)

    def save_state(self, directory: Path) -> None:
        if not self.parallel.is_main:
            return
        state = {f"param.{name}": p.detach() for name, p in self.params.items()}
        for name, param in self.params.items():
            for key, value in self.optimizer.state.get(param, {}).items():
                state[f"{key}.{name}"] = value
        if self.reference_version:
            state |= {f"reference.{n}": p for n, p in self.reference.named_parameters()}
        save_file(
            {k: v.contiguous().cpu() for k, v in state.items()}, directory / "state.safetensors"
        )
        counters = {
            "policy_version": self.policy_version,
            "num_updates": self._num_updates,
            "reference_version": self.reference_version,
            "start_model": fingerprint(self.model_dir),
        }
        (directory / "backend.json").write_text(json.dumps(counters))

    def load_state(self, directory: Path) -> None:
        """Raises ConfigError if the starting model, which is the reference, has changed, or if the
        parameters differ."""
        counters = json.loads((directory / "backend.json").read_text())
        check_start(counters["start_model"], self.model_dir)
        state = load_file(directory / "state.safetensors", device=str(self.parallel.device))
        names = {key.removeprefix("param.") for key in state if key.startswith("param.")}
        if names != set(self.params):
            odd = sorted(names ^ set(self.params))
            raise ConfigError(
                f"{directory} has other parameters than this run, {odd[0]} for one; resume with "
                "the objective and log_z settings that it was written with"
            )
        for name, param in self.params.items():
            param.data.copy_(state[f"param.{name}"])
            moments = {k: state[f"{k}.{name}"] for k in ("exp_avg", "exp_avg_sq", "step")
                       if f"{k}.{name}" in state}  # fmt: skip
            if moments:
                if not self._fused:
                    moments["step"] = moments["step"].cpu()
                self.optimizer.state[param] = moments
        kept = {k: v for k, v in state.items() if k.startswith("reference.")}
        self.reference_version = counters["reference_version"]
        if kept:
            for name, param in self.reference.named_parameters():
                param.data.copy_(kept[f"reference.{name}"])
        self.policy_version = counters["policy_version"]
        self._num_updates = counters["num_updates"]


def _counted(microbatch: Microbatch) -> PackedBatch:
    """The sequences without the tokens that take no part in the loss."""
    packed = microbatch.packed
    targets = torch.where(microbatch.loss.mask, packed.targets, IGNORE_INDEX)
    return dataclasses.replace(packed, targets=targets)


def _prefixed(prefix: str, module: nn.Module | None) -> dict[str, nn.Parameter]:
    if module is None:
        return {}
    return {f"{prefix}.{name}": param for name, param in module.named_parameters()}


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch.manual_seed for a block; the generators before it come back after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
