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
    bos_token_id: int | None
    chat_template: Any

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any: ...

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, max_tokens: int
) -> list[Prompt]:
    """The prompts with token ids: a text behind the BOS token, if the tokenizer puts one in front
    of texts, and messages as its chat template writes them. Raises ConfigError for one that is
    empty, longer than `max_tokens`, has characters that the tokenizer does not know, or messages
    that it has no template for."""
    if not prompts:
        return []
    plain = [_plain(prompt, tokenizer) for prompt in prompts]
    found = tokenizer([prompt.text for prompt in plain], add_special_tokens=False)["input_ids"]
    bos = _bos(tokenizer)
    encoded = []
    for given, prompt, ids in zip(prompts, plain, found, strict=True):
        ids = ids if given.messages else [*bos, *ids]  # a template writes its own
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


def _bos(tokenizer: Tokenizer) -> list[int]:
    """What stands in front of a text, and never what may stand behind it."""
    (of_nothing,) = tokenizer([""], add_special_tokens=True)["input_ids"]
    return [i for i in of_nothing[:1] if i == tokenizer.bos_token_id]


def _plain(prompt: Prompt, tokenizer: Tokenizer) -> Prompt:
    """The prompt as text alone."""
    if not prompt.messages:
        return prompt
    return dataclasses.replace(prompt, text=_chat_text(prompt, tokenizer), messages=())


def _chat_text(prompt: Prompt, tokenizer: Tokenizer) -> str:
    if not tokenizer.chat_template:
        raise ConfigError(
            f"prompt {prompt.index} is a list of messages, and the model's tokenizer has no chat "
            "template; set model.path to a chat model, or write prompts as strings"
        )
    try:
        return tokenizer.apply_chat_template(
            list(prompt.messages), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # of the template: it may refuse a role or an order
        raise ConfigError(
            f"prompt {prompt.index}: the tokenizer's chat template refuses its messages: {error}; "
            "correct them"
        ) from error
