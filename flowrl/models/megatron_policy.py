"""One process's part of the split policy: its chunks of layers, heads, reference and weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from flowrl.config import Config
from flowrl.model_shape import check_fp8, check_split, read_shape
from flowrl.models import megatron_weights as weights
from flowrl.models.liger_layers import check_liger
from flowrl.models.log_z import LogZHead
from flowrl.models.megatron_model import build_chunk, transformer_config
from flowrl.models.megatron_optimizer import wrap
from flowrl.models.value_head import ValueHead
from flowrl.parallel import Parallel, longest_wait


class SplitPolicy:
    """Built with the weights of `model_dir`. Raises ConfigError for a model of another family or
    one that does not divide over the ranks."""

    def __init__(
        self, config: Config, model_dir: Path, needs: frozenset[str], parallel: Parallel
    ) -> None:
        self._config = config
        self._model_dir = model_dir
        self._device = parallel.device
        split = config.parallel
        if config.model.liger:
            check_liger(parallel.device)
        self.shape = read_shape(model_dir)
        check_split(self.shape, split)
        if config.model.fp8 != "off":
            check_fp8(self.shape, split, config.model.fp8_recipe)
        self.layout = weights.Layout(
            self.shape, split.tensor, split.pipeline, split.virtual_pipeline
        )
        _join_groups(config, parallel)
        self.place = weights.Place(
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            tensor_group=parallel_state.get_tensor_model_parallel_group(),
            pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
            dtype=getattr(torch, config.model.dtype),
            device=parallel.device,
        )
        self.chunks = wrap(self._load(self._build_heads(needs)), config)
        self._reference: list[Any] | None = None  # chunks, or tensors in host memory
        self._aside: list[Tensor] = []  # the policy's weights while the reference has their place

    def _load(self, heads: Mapping[str, nn.Module]) -> list[Any]:
        """This process's chunks, with the starting model's weights."""
        settings = transformer_config(
            self.shape, self._config.model, self._config.parallel, self._device
        )
        count = self.layout.virtual
        chunks = [
            build_chunk(
                settings,  # one for all: the schedule reads and changes it
                self.shape,
                self.layout.padded_vocab,
                index if count > 1 else None,
                heads,
                liger=self._config.model.liger,
            )
            for index in range(count)
        ]
        weights.load(self._model_dir, self.layout, self.place, _finder(chunks))
        return chunks

    def _build_heads(self, needs: frozenset[str]) -> dict[str, nn.Module]:
        """The same initial values on every process, and those of the Hugging Face backend."""
        heads: dict[str, nn.Module] = {}
        if "log_z" in needs:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._config.seed)
                heads["log_z"] = LogZHead(self.shape.hidden_size, self._config.log_z)
        if "values" in needs:
            heads["value"] = ValueHead(self.shape.hidden_size, self._config.value_head)
        return {name: head.to(self._device) for name, head in heads.items()}

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Under Hugging Face names; all processes of the replica go through it together."""
        find = _finder([chunk.module for chunk in self.chunks])
        return weights.stream(self.layout, self.place, find)

    # --- the reference policy

    def with_reference(self, action: Callable[[Sequence[Any]], Any]) -> Any:
        """The action's result on chunks that hold the reference's weights."""
        if self._reference is None:
            self._reference = self._load_reference()
        if self._config.parallel.reference == "copy":
            return action(self._reference)
        self._set_aside()
        self._fill(self._reference)
        try:
            return action(self.chunks)
        finally:
            self._fill(self._aside)

    def reset_reference(self) -> None:
        """The reference becomes the policy as it is."""
        if self._reference is None:
            self._reference = self._load_reference()
        for old, new in zip(self._reference_weights(), self._backbone(), strict=True):
            old.data.copy_(new.data)

    def reference_by_param(self) -> dict[int, Tensor]:
        """The reference's weights by the identity of the policy's parameters."""
        if self._reference is None:
            self._reference = self._load_reference()
        pairs = zip(self._backbone(), self._reference_weights(), strict=True)
        return {id(param): reference.data for param, reference in pairs}

    def _load_reference(self) -> list[Any]:
        if self._config.parallel.reference == "copy":
            chunks = self._load({})
            for chunk in chunks:
                chunk.requires_grad_(False)
            return chunks
        self._set_aside()
        find = _finder([chunk.module for chunk in self.chunks])
        weights.load(self._model_dir, self.layout, self.place, find)
        start = self._host_memory()
        for kept, param in zip(start, self._backbone(), strict=True):
            kept.copy_(param.detach())
        self._fill(self._aside)
        return start

    def _set_aside(self) -> None:
        """The policy's own weights, into host memory that is allocated once."""
        self._aside = self._aside or self._host_memory()
        for kept, param in zip(self._aside, self._backbone(), strict=True):
            kept.copy_(param.detach())

    def _host_memory(self) -> list[Tensor]:
        """Room for the policy's weights, pinned where a GPU copies to and from it."""
        pinned = self._device.type == "cuda"
        return [
            torch.empty(param.shape, dtype=param.dtype, device="cpu", pin_memory=pinned)
            for param in self._backbone()
        ]

    def _reference_weights(self) -> list[Tensor]:
        assert self._reference is not None
        if self._config.parallel.reference == "copy":
            return [param for chunk in self._reference for param in chunk.parameters()]
        return self._reference

    def _backbone(self) -> list[nn.Parameter]:
        """The policy's parameters on this process, without heads."""
        return [
            param
            for chunk in self.chunks
            for name, param in chunk.module.named_parameters()
            if not name.startswith("heads.")
        ]

    def _fill(self, values: Sequence[Tensor]) -> None:
        for param, value in zip(self._backbone(), values, strict=True):
            param.data.copy_(value)


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
    """Megatron's process groups; made again where an earlier policy had another layout."""
    split = config.parallel
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo" if parallel.device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=HashStore(), rank=0, world_size=1,
        )  # fmt: skip
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    wait = longest_wait(config.rollout.longest_wait_s)  # weights are gathered after a generation
    parallel_state.initialize_model_parallel(
        split.tensor,
        split.pipeline,
        virtual_pipeline_model_parallel_size=(
            split.virtual_pipeline if split.virtual_pipeline > 1 else None
        ),
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(wait.total_seconds() / 60),
    )
    assert parallel_state.get_data_parallel_rank() == parallel.rank, parallel
    model_parallel_cuda_manual_seed(config.seed, force_reset_rng=True)
