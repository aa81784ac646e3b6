"""The tiny base model that a task makes for itself, so that nothing has to be downloaded.

directory = build_base(task, BaseConfig(), print)      # made once, then found by its hash
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flowrl.config import BaseConfig
from flowrl.models.hf_files import load_model_config, without_progress_bars, written_aside
from flowrl.records import IGNORE_INDEX
from flowrl.schema import ConfigError, require

BASE_FORMAT = 1  # raise when the same settings would build another model
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CONTEXT_TOKENS = 1024  # positions of the base model; rotary, so they cost nothing
HASHED_EXAMPLES = 32  # enough to tell two tasks or two options of one task apart
WARMUP_SHARE = 0.1  # of the pre-training steps
LOG_EVERY = 50  # pre-training steps between progress lines


class ExampleSource(Protocol):
    """What pre-training asks of a task."""

    name: str
    alphabet: str | None

    def example(self, index: int) -> tuple[str, str] | None: ...


def build_base(task: ExampleSource, base: BaseConfig, log: Callable[[str], None]) -> Path:
    """Directory of the base model that `base` and the task's examples make; built if not there.

    A Qwen3 with a character tokenizer, pre-trained on the task's well-formed answers. Raises
    ConfigError if the task has no
    alphabet or examples, or an example has characters outside the alphabet."""
    first = [task.example(i) for i in range(HASHED_EXAMPLES)]
    for example in first:
        require(
            example is None
            or (isinstance(example, tuple | list) and [*map(type, example)] == [str, str]),
            f"example() of task {task.name} must give (prompt, answer) or None, got {example!r}; "
            "correct it",
        )
    if task.alphabet is None or None in first:
        raise ConfigError(
            f"task {task.name} has no base model of its own; set model.path to a model directory"
        )
    made_from = {
        "format": BASE_FORMAT,
        "task": task.name,
        "alphabet": task.alphabet,
        "examples": first,
        "torch": torch.__version__,
        **{k: v for k, v in dataclasses.asdict(base).items() if k != "cache_dir"},
    }
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]", "_", task.name)
    directory = Path(base.cache_dir) / f"{name}-{key}"
    with _alone_in(Path(base.cache_dir)):
        if not (directory / "base.json").is_file():
            _build(directory, task, base, made_from, log)
    return directory


def _build(
    directory: Path,
    task: ExampleSource,
    base: BaseConfig,
    made_from: dict[str, Any],
    log: Callable[[str], None],
) -> None:
    log(f"building base model {directory}: {base.pretrain_steps} steps")
    start = time.perf_counter()
    tokenizer = character_tokenizer(task.alphabet or "")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base.seed)
        model = Qwen3ForCausalLM(_base_config(base, tokenizer))
    final_loss = _pretrain(model, tokenizer, task, base, log)
    seconds = round(time.perf_counter() - start, 1)
    with written_aside(directory) as aside, without_progress_bars():
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        record = {**made_from, "final_loss": final_loss, "seconds": seconds}
        (aside / "base.json").write_text(json.dumps(record, indent=2) + "\n")
    log(f"base model ready in {seconds:.0f} s, loss {final_loss:.3f} nats a token")


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """One process at a time: another that wants the same base model waits and then finds it."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token a character, in the order of `alphabet`; decoding gives the text back exactly.

    The vocabulary is filled with unused tokens until it is no multiple of 4, so that every run
    exercises heads whose vocabulary does not divide over ranks or blocks."""
    repeated = sorted({c for c in alphabet if alphabet.count(c) > 1})
    require(
        bool(alphabet) and not repeated,
        f"a task's alphabet must be distinct characters, got {alphabet!r}; remove {repeated}",
    )
    words = [PAD, EOS, UNKNOWN, *alphabet]
    if len(words) % 4 == 0:
        words.append("<unused0>")
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore
    tokenizer.decoder = decoders.Fuse()  # type: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=CONTEXT_TOKENS,
    )


def _base_config(base: BaseConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=base.hidden_size,
        intermediate_size=base.intermediate_size,
        num_hidden_layers=base.num_layers,
        num_attention_heads=base.num_heads,
        num_key_value_heads=base.num_kv_heads,
        head_dim=base.head_dim or base.hidden_size // base.num_heads,
        max_position_embeddings=CONTEXT_TOKENS,
        # Untied, as Qwen3 is from 8B on: pipeline ranks then share no weight, and V * D is small.
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()[EOS],
        pad_token_id=tokenizer.get_vocab()[PAD],
    )


def _pretrain(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: ExampleSource,
    base: BaseConfig,
    log: Callable[[str], None],
) -> float:
    """AdamW on cross-entropy of answer and EOS tokens, mean over them. Returns the last loss."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=base.pretrain_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup = max(1, round(WARMUP_SHARE * base.pretrain_steps))
    loss = torch.tensor(math.nan)
    model.train()
    for step in range(base.pretrain_steps):
        done = (step - warmup) / max(1, base.pretrain_steps - warmup)
        scale = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = base.pretrain_lr * scale
        first = base.seed * base.pretrain_steps * base.pretrain_rows + step * base.pretrain_rows
        rows = range(first, first + base.pretrain_rows)
        inputs, targets = _encode_examples(tokenizer, task, rows)
        # Rows are padded at the end: causal attention alone keeps padding out of sight.
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        answers = targets != IGNORE_INDEX
        loss = F.cross_entropy(model.lm_head(hidden[answers]), targets[answers])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % LOG_EVERY == 0:
            log(
                f"base model step {step + 1}/{base.pretrain_steps}: loss {float(loss.detach()):.3f}"
            )
    model.eval()
    return float(loss.detach())


def _encode_examples(
    tokenizer: PreTrainedTokenizerFast, task: ExampleSource, indices: Iterable[int]
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (rows, longest); targets are IGNORE_INDEX outside answer and EOS."""
    vocabulary = tokenizer.get_vocab()  # a token a character, so no need to run the tokenizer
    pad, eos, unknown = (vocabulary[token] for token in (PAD, EOS, UNKNOWN))
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for index in indices:
        example = task.example(index)
        assert example is not None, index
        ids = [vocabulary.get(c, unknown) for c in "".join(example)]
        start = len(example[0])
        if unknown in ids or not start:
            raise ConfigError(
                f"example {index} of task {task.name} must have a prompt, and only characters of "
                f"the task's alphabet, got {example}; correct the task's example() or alphabet"
            )
        inputs.append(torch.tensor(ids))
        targets.append(torch.tensor([IGNORE_INDEX] * (start - 1) + [*ids[start:], eos]))
    pack = torch.nn.utils.rnn.pad_sequence
    return pack(inputs, True, pad), pack(targets, True, IGNORE_INDEX)


@dataclass(frozen=True)
class ModelSize:
    parameters: int
    vocabulary: int  # V
    hidden: int  # D


def model_size(path: str, base: BaseConfig, alphabet: str) -> ModelSize:
    """Of the model at `path`, or of the base model for `alphabet` where `path` is empty; nothing is
    loaded or built."""
    config = (
        load_model_config(Path(path)) if path else _base_config(base, character_tokenizer(alphabet))
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    return ModelSize(model.num_parameters(), text.vocab_size, text.hidden_size)
