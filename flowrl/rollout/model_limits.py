"""What a model's own files say about sampling: where its responses end, how long they may be.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.records import SampleRequest
from flowrl.schema import require


def eos_ids(model_dir: Path, tokenizer: Any) -> frozenset[int]:
    """The tokenizer's end-of-sequence token and all of the model's own: chat models have several.

    Raises ConfigError if there is none."""
    declared = read_json(model_dir / "generation_config.json").get("eos_token_id")
    if declared is None:
        declared = read_json(model_dir / "config.json").get("eos_token_id")
    several = declared if isinstance(declared, list) else [declared]
    ids = frozenset(i for i in (*several, tokenizer.eos_token_id) if i is not None)
    require(
        bool(ids),
        "the model must have an end-of-sequence token, neither its tokenizer nor its "
        "generation_config.json names one; add eos_token_id to generation_config.json",
    )
    return ids


def check_request(request: SampleRequest, limit: int | None) -> None:
    """Raises ConfigError for a prompt without tokens, or without room for its response within the
    `limit`, the model's positions."""
    empty = [p.index for p in request.prompts if not p.token_ids]
    require(not empty, f"prompts must have tokens, prompt {empty[:1]} has none; encode it")
    longest = max((len(p.token_ids) for p in request.prompts), default=0)
    check_length(limit, longest, request.max_new_tokens)


def positions(config: Mapping[str, Any]) -> int | None:
    """Of the context of a model with this config.json, rotary scaling included; None where it names
    none."""
    config = config.get("text_config") or config
    given = config.get("max_position_embeddings", config.get("n_positions"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if given is None or original is None or factor is None:
        return given
    return max(given, int(original * factor))


def check_length(limit: int | None, longest_prompt: int, max_new_tokens: int) -> None:
    """Raises ConfigError where a prompt and its response are longer than the model's context."""
    require(
        limit is None or longest_prompt + max_new_tokens <= limit,
        f"prompt and response must fit the model's {limit} positions, got {longest_prompt} + "
        f"{max_new_tokens} tokens; set rollout.max_prompt_tokens and rollout.max_new_tokens lower",
    )


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
