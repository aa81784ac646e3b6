"""The shape of a dense decoder-only model, read from a Hugging Face config.json. Imports no torch.

    shape = read_shape("qwen2.5-32b")       a shipped description, or a directory, or a JSON file
    shape.num_parameters                    exact

Families: Qwen2 and Qwen2.5 (bias on q, k, v), Qwen3 (norms on q and k), Llama.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from flowrl.parallel_config import ParallelConfig
from flowrl.schema import ConfigError, nearest, require

SHAPES_DIR = Path(__file__).parent / "shapes"
FAMILIES = ("llama", "qwen2", "qwen3")
# The one variant of Llama 3's rotary scaling that megatron-core 0.16.1 computes.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class ModelShape:
    family: str
    num_layers: int
    hidden_size: int  # D
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # V
    max_positions: int = field(compare=False)  # chat models have other limits than their bases
    norm_eps: float
    rope_theta: float
    rope_factor: float | None  # of Llama 3's scaling; None: plain rotary embedding
    tied: bool  # the output layer is the embedding
    # Token whose embedding gets no gradient, as in transformers.
    padding_token: int | None = field(default=None, compare=False)

    def difference(self, other: ModelShape) -> str:
        """The first field in which the two differ, in words."""
        for name in (f.name for f in fields(self) if f.compare):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} is {theirs} instead of {mine}"
        return "nothing differs"

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    @property
    def queries_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def keys_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Entries of one layer's matrices."""
        qkv = self.hidden_size * (self.queries_width + 2 * self.keys_width)
        return (
            qkv
            + self.queries_width * self.hidden_size
            + 3 * self.hidden_size * self.intermediate_size
        )

    @property
    def layer_vectors(self) -> int:
        """Entries of one layer's norms and biases."""
        bias = self.queries_width + 2 * self.keys_width if self.qkv_bias else 0
        return 2 * self.hidden_size + bias + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def num_parameters(self) -> int:
        vocabulary = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        layers = self.num_layers * (self.layer_matrices + self.layer_vectors)
        return vocabulary + layers + self.hidden_size


def shape_names() -> list[str]:
    return sorted(path.stem for path in SHAPES_DIR.glob("*.json"))


def read_shape(where: str | Path) -> ModelShape:
    """From a shipped description's name, a model directory or a config.json."""
    path = Path(where)
    if path.is_dir():
        path = path / "config.json"
    elif path.suffix != ".json":
        path = SHAPES_DIR / f"{where}.json"
        if not path.is_file():
            raise ConfigError(
                f"no model shape called {str(where)!r}{nearest(str(where), shape_names())}"
            )
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read {path}: {error}; give a Hugging Face config.json"
        ) from error
    return shape_of(given, str(path))


def shape_of(given: Mapping[str, Any], where: str) -> ModelShape:
    """Raises ConfigError for another family, or a variant of it that would be computed wrongly."""
    family = given.get("model_type", "")
    require(
        family in FAMILIES,
        f"{where}: model_type must be one of {', '.join(FAMILIES)} here, got {family!r}; "
        "use model.backend=hf",
    )
    _check_variant(given, family, where)
    try:
        heads = given["num_attention_heads"]
        theta, factor = _rotary(given, where)
        return ModelShape(
            family=family,
            num_layers=given["num_hidden_layers"],
            hidden_size=given["hidden_size"],
            intermediate_size=given["intermediate_size"],
            num_heads=heads,
            num_kv_heads=given.get("num_key_value_heads") or heads,
            head_dim=_head_dim(given, family),
            vocab_size=given["vocab_size"],
            max_positions=given["max_position_embeddings"],
            norm_eps=given["rms_norm_eps"],
            rope_theta=theta,
            rope_factor=factor,
            tied=given.get("tie_word_embeddings", False),
            padding_token=given.get("pad_token_id"),
        )
    except KeyError as error:
        raise ConfigError(f"{where} has no {error}; give the model's own config.json") from error


def _head_dim(given: Mapping[str, Any], family: str) -> int:
    if given.get("head_dim"):
        return given["head_dim"]
    return 128 if family == "qwen3" else given["hidden_size"] // given["num_attention_heads"]


def _check_variant(given: Mapping[str, Any], family: str, where: str) -> None:
    for name in ("attention_bias", "mlp_bias"):
        require(
            not given.get(name, False),
            f"{where}: {name} must be false for model_type {family}, got true; "
            "use model.backend=hf",
        )
    sliding = given.get("use_sliding_window", False) or "sliding_attention" in (
        given.get("layer_types") or []
    )
    require(not sliding, f"{where}: sliding windows are not implemented; use model.backend=hf")
    activation = given.get("hidden_act", "silu")
    require(
        activation == "silu",
        f"{where}: hidden_act must be silu, got {activation}; use model.backend=hf",
    )


def _rotary(given: Mapping[str, Any], where: str) -> tuple[float, float | None]:
    """Base, and the factor of Llama 3's scaling."""
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or given.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    known = kind == "llama3" and all(rope.get(k) == v for k, v in LLAMA3_ROPE.items())
    require(
        known,
        f"{where}: rotary scaling must be none or Llama 3's with {LLAMA3_ROPE}, got {dict(rope)}; "
        "use model.backend=hf",
    )
    return theta, float(rope["factor"])


FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""What divides the sides of a matrix, and the tokens on a tensor rank, that each of Transformer
Engine's recipes multiplies in FP8."""


def check_fp8(shape: ModelShape, parallel: ParallelConfig, recipe: str) -> None:
    """Raises ConfigError where a matrix of a tensor rank has a side that the recipe does not
    take."""
    multiple = FP8_MULTIPLES[recipe]
    sides = {
        "hidden_size": shape.hidden_size,
        "attention heads * head_dim": shape.queries_width // parallel.tensor,
        "queries, keys and values": (shape.queries_width + 2 * shape.keys_width) // parallel.tensor,
        "intermediate_size": shape.intermediate_size // parallel.tensor,
    }
    for name, side in sides.items():
        require(
            side % multiple == 0,
            f"model.fp8_recipe={recipe} takes sides that {multiple} divides, got {name} of {side} "
            f"on each of {parallel.tensor} tensor ranks; set model.fp8=off or a lower "
            "parallel.tensor",
        )


def check_split(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Raises ConfigError where the model does not divide over the ranks of [parallel]."""
    common = math.gcd(shape.num_heads, shape.num_kv_heads, shape.intermediate_size)
    best = max(d for d in range(1, parallel.tensor + 1) if common % d == 0)
    require(
        common % parallel.tensor == 0,
        f"parallel.tensor must divide the model's {shape.num_heads} attention heads, "
        f"{shape.num_kv_heads} key-value heads and {shape.intermediate_size} MLP columns, got "
        f"{parallel.tensor}; set parallel.tensor={best}",
    )
    chunks = parallel.pipeline * parallel.virtual_pipeline
    require(
        shape.num_layers % chunks == 0,
        "parallel.pipeline * parallel.virtual_pipeline must divide the model's "
        f"{shape.num_layers} layers, got {parallel.pipeline} * {parallel.virtual_pipeline}; set "
        f"parallel.pipeline={max(d for d in range(1, chunks + 1) if shape.num_layers % d == 0)} "
        "and parallel.virtual_pipeline=1",
    )
