"""Prompts as the model reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from flowrl.records import Prompt
from flowrl.schema import ConfigError


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    unk_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, max_tokens: int
) -> list[Prompt]:
    """The prompts with token ids. Raises ConfigError for one that is empty, longer than
    `max_tokens`, or has characters that the tokenizer does not know."""
    encoded = []
    for prompt in prompts:
        ids = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        start = f"prompt {prompt.index} ({prompt.text[:40]!r})"
        if not 0 < len(ids) <= max_tokens:
            raise ConfigError(
                f"{start} has {len(ids)} tokens, the limit is {max_tokens}; "
                f"set rollout.max_prompt_tokens={len(ids)} or remove it"
            )
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise ConfigError(
                f"{start} has characters outside the model's vocabulary; set model.path to a model "
                "whose tokenizer covers them (empty, for tasks that build their own)"
            )
        encoded.append(dataclasses.replace(prompt, token_ids=tuple(ids)))
    return encoded
