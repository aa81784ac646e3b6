"""Writes a trained policy as a Hugging Face directory, shard by shard.

    export_hf(source, backend.named_weights(), out, dtype)

Of the weights no more than a shard is held at a time, whatever the size of the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping

from flowrl.models.hf_files import (
    load_causal_lm,
    load_model_config,
    load_tokenizer,
    without_progress_bars,
    written_aside,
)
from flowrl.schema import require
from flowrl.weights import copy_weights

MAX_SHARD_BYTES = 5 << 30


def export_hf(
    source: Path,
    weights: Iterable[tuple[str, Tensor]],
    out: Path,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the model of `source` with other `weights` (Hugging Face names) and its tokenizer, in
    files of at most `max_shard_bytes`, or of one tensor that is larger.

    A model whose files name or cut its tensors otherwise than its modules do (mixtures of experts),
    or which holds more than its parameters, is put together in memory first.

    Raises ConfigError if `out` exists and is not empty, ValueError for weights of another model."""
    check_export_dir(out)
    structure = _structure(source, dtype)
    with written_aside(out) as aside, without_progress_bars():
        if _files_hold_the_parameters(structure):
            structure.save_pretrained(aside, state_dict={})  # all but the weights
            _write_shards(structure, weights, aside, dtype, max_shard_bytes)
        else:
            model = load_causal_lm(source, dtype, torch.device("cpu"))
            copy_weights(model, weights)
            model.save_pretrained(aside, max_shard_size=max_shard_bytes)
        load_tokenizer(source).save_pretrained(aside)


def check_export_dir(out: Path) -> None:
    """Raises ConfigError unless `out` is new or an empty directory."""
    require(
        not out.exists() or (out.is_dir() and not any(out.iterdir())),
        f"export directory must be new or empty, got {out}; choose another or remove it",
    )


def _structure(source: Path, dtype: torch.dtype) -> Any:
    """The source's model without memory for its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_model_config(source), dtype=dtype)
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source, local_files_only=True)
    return model


def _files_hold_the_parameters(structure: Any) -> bool:
    """Whether the files of this model hold its parameters under their names, and nothing else."""
    parameters = {id(p) for p in structure.parameters()}
    return (
        all(id(held) in parameters for held in structure.state_dict(keep_vars=True).values())
        and not get_model_conversion_mapping(structure, add_legacy=False)
        and not structure._keep_in_fp32_modules
        and not structure._keep_in_fp32_modules_strict
    )


def _write_shards(
    structure: Any,
    weights: Iterable[tuple[str, Tensor]],
    directory: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Raises ValueError unless each parameter comes once, under any of its names where it is tied,
    in its shape."""
    missing = {id(p): name for name, p in structure.named_parameters()}  # the names to write
    known = structure.state_dict(keep_vars=True)
    writer = _ShardWriter(directory, max_shard_bytes)
    for given, tensor in weights:
        if given not in known:
            raise ValueError(f"the model has no weight called {given}; send weights of this model")
        name = missing.pop(id(known[given]), None)
        if name is None:
            raise ValueError(f"{given} came twice, perhaps by another name; send each weight once")
        if known[given].shape != tensor.shape:
            raise ValueError(
                f"{given} must have shape {tuple(known[given].shape)}, got {tuple(tensor.shape)}; "
                "send weights of this model"
            )
        writer.add(name, tensor.detach().to("cpu", dtype))
    if missing:
        raise ValueError(
            f"{len(missing)} weights did not come, {next(iter(missing.values()))} for one; "
            "send every weight"
        )
    writer.finish(structure.num_parameters())


class _ShardWriter:
    """Files of tensors, in the order in which they come. How many there are is known at the end, so
    they get their names then."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []  # names of the tensors in each

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        tensor = tensor.contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:  # a view would keep all of it alive
            tensor = tensor.clone()
        self._held[name] = tensor
        self._held_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def _flush(self) -> None:
        if self._held:
            save_file(self._held, self._path(len(self._shards)), metadata={"format": "pt"})
            self._shards.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def finish(self, num_parameters: int) -> None:
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._path(0).rename(self._directory / "model.safetensors")
            return
        weight_map = {}
        for index, names in enumerate(self._shards):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._path(index).rename(self._directory / final)
            weight_map |= dict.fromkeys(names, final)
        sizes = {"total_parameters": num_parameters, "total_size": self._total_bytes}
        content = {"metadata": sizes, "weight_map": weight_map}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (self._directory / "model.safetensors.index.json").write_text(text)

    def _path(self, index: int) -> Path:
        return self._directory / f"shard-{index}.safetensors"
