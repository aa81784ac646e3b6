"""Weights between Hugging Face's names and Megatron's shards, bit for bit both ways.

In: each process reads only its rows or columns from the safetensors files. Out: one layer at a time
is gathered over tensor ranks and sent to every stage, so a process holds one whole layer at most.

Megatron keeps q, k and v in one matrix, group by group ([q of group 0, k 0, v 0, q of group 1,
...]), gate and up in one, and pads the vocabulary; none of that leaves this file.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from flowrl.model_shape import ModelShape
from flowrl.schema import ConfigError

VOCABULARY_ALIGNMENT = 8  # rows of the vocabulary's shard are a multiple of this

Rows = Callable[[int, int], Tensor]  # rows [start, stop) of a tensor in the files


@dataclass(frozen=True)
class Slot:
    """One parameter of Megatron's, on one tensor rank, and the Hugging Face tensors it is made
    of."""

    name: str  # Megatron's, within its layer or model
    kind: str  # vocabulary | column | row | copy | qkv | gate_up
    hf_names: tuple[str, ...]
    shape: tuple[int, ...]  # of the shard


@dataclass(frozen=True)
class Layout:
    """How a model is cut: tensor ranks, and stages of equally many layers, perhaps interleaved."""

    shape: ModelShape
    tensor: int
    pipeline: int
    virtual: int

    @property
    def vocab_shard(self) -> int:
        """Rows of the embedding on each tensor rank, padding included."""
        rows = -(-self.shape.vocab_size // self.tensor)
        return -(-rows // VOCABULARY_ALIGNMENT) * VOCABULARY_ALIGNMENT

    @property
    def padded_vocab(self) -> int:
        return self.vocab_shard * self.tensor

    def stage_of(self, layer: int) -> int:
        """Pipeline rank that holds the layer."""
        per_chunk = self.shape.num_layers // (self.pipeline * self.virtual)
        return (layer // per_chunk) % self.pipeline

    def embedding(self) -> Slot:
        name = "embedding.word_embeddings.weight"
        return self._vocabulary(name, "model.embed_tokens.weight")

    def output(self) -> Slot:
        hf_name = "model.embed_tokens.weight" if self.shape.tied else "lm_head.weight"
        return self._vocabulary("output_layer.weight", hf_name)

    def final_norm(self) -> Slot:
        names = ("model.norm.weight",)
        return Slot("decoder.final_layernorm.weight", "copy", names, (self.shape.hidden_size,))

    def _vocabulary(self, name: str, hf_name: str) -> Slot:
        return Slot(name, "vocabulary", (hf_name,), (self.vocab_shard, self.shape.hidden_size))

    def layer(self, index: int) -> list[Slot]:
        s, parts = self.shape, self.tensor
        prefix = f"model.layers.{index}."
        qkv = (s.queries_width + 2 * s.keys_width) // parts
        projections = tuple(f"{prefix}self_attn.{x}_proj." for x in "qkv")
        slots = [
            ("input_layernorm.weight", "copy", (f"{prefix}input_layernorm.weight",),
             (s.hidden_size,)),
            ("self_attention.linear_qkv.weight", "qkv", tuple(p + "weight" for p in projections),
             (qkv, s.hidden_size)),
            ("self_attention.linear_proj.weight", "row", (f"{prefix}self_attn.o_proj.weight",),
             (s.hidden_size, s.queries_width // parts)),
            ("pre_mlp_layernorm.weight", "copy", (f"{prefix}post_attention_layernorm.weight",),
             (s.hidden_size,)),
            ("mlp.linear_fc1.weight", "gate_up",
             (f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"),
             (2 * s.intermediate_size // parts, s.hidden_size)),
            ("mlp.linear_fc2.weight", "row", (f"{prefix}mlp.down_proj.weight",),
             (s.hidden_size, s.intermediate_size // parts)),
        ]  # fmt: skip
        if s.qkv_bias:
            names = tuple(p + "bias" for p in projections)
            slots.append(("self_attention.linear_qkv.bias", "qkv", names, (qkv,)))
        if s.qk_norm:
            slots += [
                (f"self_attention.{x}_layernorm.weight", "copy",
                 (f"{prefix}self_attn.{x}_norm.weight",), (s.head_dim,))
                for x in "qk"
            ]  # fmt: skip
        return [Slot(*slot) for slot in slots]

    # --- one shard from the files, and whole tensors from all shards

    def cut(self, slot: Slot, rank: int, rows: Sequence[Rows], columns: Rows) -> Tensor:
        """Tensor rank `rank`'s shard, from `rows` of each Hugging Face tensor or `columns` of the
        first."""
        size = slot.shape[0]
        if slot.kind == "copy":
            return rows[0](0, size)
        if slot.kind == "row":
            return columns(rank * slot.shape[1], (rank + 1) * slot.shape[1])
        if slot.kind == "gate_up":
            half = size // 2
            return torch.cat([part(rank * half, (rank + 1) * half) for part in rows])
        if slot.kind == "qkv":
            groups = self.shape.num_kv_heads // self.tensor
            parts = []
            for part, height in zip(rows, self._group_heights, strict=True):
                found = part(rank * groups * height, (rank + 1) * groups * height)
                parts.append(found.unflatten(0, (groups, height)))
            return torch.cat(parts, 1).flatten(0, 1)
        start = min(rank * size, self.shape.vocab_size)
        stop = min(start + size, self.shape.vocab_size)
        found = rows[0](start, stop)
        padding = found.new_zeros(size - (stop - start), *found.shape[1:])
        return torch.cat([found, padding])

    def join(self, slot: Slot, shards: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """The whole Hugging Face tensors, from the shards of all tensor ranks in order."""
        names = slot.hf_names
        if slot.kind == "copy":
            return [(names[0], shards[0])]
        if slot.kind == "row":
            return [(names[0], torch.cat(list(shards), 1))]
        if slot.kind == "vocabulary":
            return [(names[0], torch.cat(list(shards))[: self.shape.vocab_size])]
        if slot.kind == "gate_up":
            halves = [shard.chunk(2) for shard in shards]
            return [(name, torch.cat([h[i] for h in halves])) for i, name in enumerate(names)]
        groups = self.shape.num_kv_heads // self.tensor
        split = [s.unflatten(0, (groups, -1)).split(self._group_heights, 1) for s in shards]
        return [
            (name, torch.cat([parts[i].flatten(0, 1) for parts in split]))
            for i, name in enumerate(names)
        ]

    @property
    def _group_heights(self) -> list[int]:
        """Rows of q, k and v in one group."""
        s = self.shape
        return [s.queries_width // s.num_kv_heads, s.head_dim, s.head_dim]


class WeightFiles:
    """The safetensors files of a model directory, read in slices."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}

    def __enter__(self) -> WeightFiles:
        index = self._directory / "model.safetensors.index.json"
        if index.is_file():
            self._where = json.loads(index.read_text())["weight_map"]
            return self
        for path in sorted(self._directory.glob("*.safetensors")):
            for name in self._file(path.name).keys():  # noqa: SIM118 (safe_open is no mapping)
                self._where[name] = path.name
        if not self._where:
            raise ConfigError(
                f"{self._directory} has no *.safetensors, which the megatron backend reads; "
                "save the model with save_pretrained"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _file(self, name: str) -> Any:
        if name not in self._files:
            opened = safe_open(self._directory / name, framework="pt")
            self._files[name] = self._open.enter_context(opened)
        return self._files[name]

    def shard(self, layout: Layout, slot: Slot, rank: int) -> Tensor:
        slices = [self._slice(name) for name in slot.hf_names]

        def rows_of(found: Any) -> Rows:
            return lambda start, stop: found[start:stop]

        shard = layout.cut(
            slot, rank, [rows_of(s) for s in slices], lambda start, stop: slices[0][:, start:stop]
        )
        if tuple(shard.shape) != slot.shape:
            raise ConfigError(
                f"{self._directory}: {slot.hf_names[0]} does not fit config.json, its shard has "
                f"shape {tuple(shard.shape)} instead of {slot.shape}; copy the directory again"
            )
        return shard

    def _slice(self, name: str) -> Any:
        if name not in self._where:
            raise ConfigError(
                f"{self._directory} has no weight {name}; copy the whole model directory"
            )
        return self._file(self._where[name]).get_slice(name)


@dataclass(frozen=True)
class Place:
    """Where this process stands in its replica, and the groups that weights travel over."""

    tensor_rank: int
    stage: int
    tensor_group: Any
    pipeline_group: Any
    dtype: torch.dtype  # of the parameters
    device: torch.device


Find = Callable[[int | None, str], Tensor]
"""This process's parameter, by layer (None: of the model) and name."""


def load(directory: Path, layout: Layout, place: Place, find: Find) -> None:
    """Fills this process's parameters from the model directory."""
    with WeightFiles(directory) as files:
        for layer, slot, stage in _slots(layout):
            if stage == place.stage:
                find(layer, slot.name).data.copy_(files.shard(layout, slot, place.tensor_rank))
        if layout.shape.tied and layout.pipeline > 1 and place.stage == layout.pipeline - 1:
            slot = layout.output()  # the last stage's copy of the embedding
            find(None, slot.name).data.copy_(files.shard(layout, slot, place.tensor_rank))


def stream(layout: Layout, place: Place, find: Find) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its Hugging Face name, on every process of the replica, which all go
    through it together. A layer is one message."""
    for _, bucket in itertools.groupby(_slots(layout), lambda entry: (entry[0], entry[2])):
        yield from _bucket(layout, place, find, list(bucket))


def _bucket(
    layout: Layout, place: Place, find: Find, entries: list[tuple[int | None, Slot, int]]
) -> Iterator[tuple[str, Tensor]]:
    """The weights of one layer, or neighbours outside the layers; all on one stage."""
    slots = [slot for _, slot, _ in entries]
    layer, _, owner = entries[0]
    sizes = [torch.Size(slot.shape).numel() for slot in slots]
    if place.stage == owner:
        mine = torch.cat([find(layer, slot.name).detach().flatten() for slot in slots])
        shards = [torch.empty_like(mine) for _ in range(layout.tensor)]
        if layout.tensor > 1:
            dist.all_gather(shards, mine, group=place.tensor_group)
        whole = torch.stack(shards if layout.tensor > 1 else [mine])  # (tensor, sum of sizes)
    else:
        whole = torch.empty(layout.tensor, sum(sizes), dtype=place.dtype, device=place.device)
    if layout.pipeline > 1:
        dist.broadcast(whole, group=place.pipeline_group, group_src=owner)
    for slot, pieces in zip(slots, whole.split(sizes, 1), strict=True):
        shards = [piece.view(slot.shape) for piece in pieces]
        for name, tensor in layout.join(slot, shards):
            yield name, tensor.contiguous()


def _slots(layout: Layout) -> Iterator[tuple[int | None, Slot, int]]:
    """(layer, slot, stage) of every parameter that is a weight of the Hugging Face model."""
    last = layout.pipeline - 1
    yield None, layout.embedding(), 0
    for layer in range(layout.shape.num_layers):
        for slot in layout.layer(layer):
            yield layer, slot, layout.stage_of(layer)
    yield None, layout.final_norm(), last
    if not layout.shape.tied:
        yield None, layout.output(), last
