"""AdamW over Megatron's distributed optimizer: each replica keeps a share of moments and main
weights. Clipping, warm-up and weight decay are those of the Hugging Face backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import ParamKey, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamPredicate
from torch import Tensor

from flowrl.config import Config
from flowrl.models import UpdateInfo

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = ("param", *MOMENTS)  # of each parameter: its main weight, and the moments


def wrap(chunks: Sequence[Any], config: Config) -> list[DistributedDataParallel]:
    """The chunks with gradient buffers that are summed over replicas, in float32."""
    overlap = config.parallel.overlap_grad_reduce
    wrapped = []
    for index, chunk in enumerate(chunks):
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap,
        )
        wrapped.append(
            DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=index > 0)
        )
    chunk_config = chunks[0].config
    chunk_config.finalize_model_grads_func = _finalize
    if overlap:
        contexts = [chunk.no_sync for chunk in wrapped]
        chunk_config.no_sync_func = contexts if len(contexts) > 1 else contexts[0]
    return wrapped


def _finalize(chunks: list[Any], num_tokens: Tensor | None, **options: Any) -> None:
    """Sums over replicas, tensor ranks and tied embeddings; divides by nothing. Small heads have
    the same gradient on all tensor ranks, in exact arithmetic: they take the first rank's."""
    finalize_model_grads(chunks, None, **options)
    group: Any = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    for chunk in chunks:
        for param in chunk.module.heads.parameters():
            torch.distributed.broadcast(param.main_grad, group=group, group_src=0)


class PolicyOptimizer:
    def __init__(self, chunks: Sequence[DistributedDataParallel], config: Config) -> None:
        self._config = config
        self._chunks = list(chunks)
        options = config.optimizer
        heads = {"log_z": config.log_z.lr, "value": config.value_head.lr}
        vector = ParamPredicate(name="vector", fn=lambda param: param.ndim < 2)
        groups: Any = {
            ParamKey(predicate=vector): {"wd_mult": 0.0},
            **{
                ParamKey(name=f"*heads.{name}.*"): {
                    "wd_mult": 0.0, "max_lr": options.lr if lr is None else lr
                }
                for name, lr in heads.items()
            },
        }  # fmt: skip
        dtype = chunks[0].config.params_dtype
        chained = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=options.lr,
                weight_decay=options.weight_decay,
                adam_beta1=options.betas[0],
                adam_beta2=options.betas[1],
                adam_eps=options.eps,
                clip_grad=0.0,  # below, with the norm that decides whether there is an update
                use_distributed_optimizer=True,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
            ),
            self._chunks,  # type: ignore
            groups,
            use_gloo_process_groups=False,
        )
        self._inner: list[Any] = chained.chained_optimizers  # type: ignore
        self.num_updates = 0  # updates tried, for the warm-up and the dropout keys
        self.num_steps = 0  # updates made, which AdamW counts for its bias correction
        self.zero_grad()

    def zero_grad(self) -> None:
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        for inner in self._inner:
            inner.zero_grad()

    def step(self) -> UpdateInfo:
        """Clips and updates. A non-finite norm leaves weights and moments as they are."""
        options = self._config.optimizer
        scale = min(1.0, (self.num_updates + 1) / max(1, options.warmup_updates))
        for inner in self._inner:
            inner.prepare_grads()
            for group in inner.param_groups:  # Megatron's multipliers act through a scheduler only
                group["lr"] = group["max_lr"] * scale
                group["weight_decay"] = options.weight_decay * group["wd_mult"]
        norm = math.sqrt(sum(inner.get_grad_norm() ** 2 for inner in self._inner))
        finite = math.isfinite(norm)
        if finite:
            for inner in self._inner:
                if options.grad_clip:
                    clip_grad_by_total_norm_fp32(inner.get_parameters(), options.grad_clip, norm)
                inner.step_with_ready_grads()
            self.num_steps += 1
        self.num_updates += 1
        self.zero_grad()
        return UpdateInfo(norm, options.lr * scale, skipped=not finite)

    # --- main weights, for steps that are shortened

    def snapshot(self) -> list[Tensor]:
        """This replica's share of the main weights."""
        return [main.detach().clone() for main in self._mains()]

    @torch.no_grad()
    def interpolate(self, start: Sequence[Tensor], share: float) -> None:
        """weights = start + share * (weights - start), on all replicas."""
        for main, old in zip(self._mains(), start, strict=True):
            main.copy_(torch.lerp(old, main, share) if share else old)
        for inner in self._inner:
            inner._copy_main_params_to_model_params()
        for chunk in self._chunks:
            chunk.start_param_sync()

    def reset(self) -> None:
        """Clears the moments; the schedule goes on."""
        for inner in self._inner:
            inner.optimizer.state.clear()
        self.num_steps = 0
        self.count_steps()

    def count_steps(self) -> None:
        """After a reset or a load. Megatron takes Transformer Engine's AdamW where it is installed,
        which counts its steps for a group of parameters and not for each."""
        for inner in self._inner:
            if not isinstance(inner.optimizer, torch.optim.AdamW):
                for group in inner.optimizer.param_groups:
                    group["step"] = self.num_steps

    def _mains(self) -> list[Tensor]:
        return [main for inner in self._inner for main in inner.get_parameters()]

    # --- state, parameter by parameter

    def gather_state(self, param: Tensor, group: Any) -> dict[str, Tensor]:
        """Main weight and moments of a parameter of this process, whole, in float32 and in host
        memory: {"param", "exp_avg", "exp_avg_sq"}. Each replica in `group` has a share of them."""
        whole = {
            name: torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
            for name in STATE
        }
        inner, place = self._share(param)
        if inner is not None:
            main, state = self._main(inner, param)
            whole["param"][place] = main.detach().flatten()
            for name in MOMENTS:
                if name in state:
                    whole[name][place] = state[name].flatten()
        if group.size() > 1:
            for tensor in whole.values():  # one replica has the entry, the others zero
                torch.distributed.all_reduce(tensor, group=group)
        return {name: tensor.view_as(param).cpu() for name, tensor in whole.items()}

    @torch.no_grad()
    def scatter_state(self, param: Tensor, name: str, whole: Tensor) -> None:
        """Takes back one entry of what `gather_state` gave: this replica's share of it. Moments of
        a run that has made no step are left out."""
        if name == "param":
            param.data.copy_(whole)
        inner, place = self._share(param)
        if inner is None:
            return
        main, state = self._main(inner, param)
        share = whole.flatten()[place].view_as(main)
        if name == "param":
            main.copy_(share)
        elif self.num_steps:
            state[name] = share.to(main.device, copy=True)
            # A counter of its own: AdamW counts it up in place.
            state["step"] = torch.tensor(float(self.num_steps))

    def _share(self, param: Tensor) -> tuple[Any, slice]:
        """The optimizer that has a part of the parameter on this replica, and which part."""
        for inner in self._inner:
            if param in inner.model_param_group_index_map:
                found = inner._get_model_param_range_map(param)["param"]
                return inner, slice(found.start, found.end)
        return None, slice(0, 0)

    @staticmethod
    def _main(inner: Any, param: Tensor) -> tuple[Tensor, dict[str, Any]]:
        group, order = inner.model_param_group_index_map[param]
        main = inner.optimizer.param_groups[group]["params"][order]
        return main, inner.optimizer.state[main]
