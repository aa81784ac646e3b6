"""Hugging Face model directories: check, load, export, and build the tiny base model.

    directory = build_base(task, BaseConfig(), print)      # made once, then found by its hash
    model, tokenizer = load_causal_lm(directory, ...), load_tokenizer(directory)

Nothing here reaches for the network.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from flowrl.config import BaseConfig
from flowrl.records import IGNORE_INDEX
from flowrl.schema import ConfigError, require
from flowrl.weights import copy_weights

BASE_FORMAT = 1  # raise when the same settings would build another model
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CONTEXT_TOKENS = 1024  # positions of the base model; rotary, so they cost nothing
HASHED_EXAMPLES = 32  # enough to tell two tasks or two options of one task apart
WARMUP_SHARE = 0.1  # of the pre-training steps
LOG_EVERY = 50  # pre-training steps between progress lines
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_BLOCK_BYTES = 1 << 20
# What transformers raises for files that are damaged, unknown to it, or not each other's.
_LOAD_ERRORS = (
    OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError,
)  # fmt: skip


class ExampleSource(Protocol):
    """What pre-training asks of a task."""

    name: str
    alphabet: str | None

    def example(self, index: int) -> tuple[str, str] | None: ...


# --- directories


def check_model_dir(path: Path) -> None:
    """Raises ConfigError unless `path` is a causal LM directory whose tokenizer fits the model."""
    require(
        path.is_dir(),
        f"model directory not found: {path}; set model.path to a Hugging Face directory, "
        "or leave it empty to build a base model",
    )
    require(
        (path / "config.json").is_file(),
        f"{path} has no config.json, so it is not a Hugging Face model; set model.path to one",
    )
    require(
        bool(_weight_files(path)),
        f"{path} has no weights (model.safetensors); copy the whole model directory",
    )
    config = _load_config(path)
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    names = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "?")]
    require(
        any(name in causal for name in names),
        f"{path} must be a causal language model, got {', '.join(names)}; set model.path to a "
        "model that AutoModelForCausalLM loads",
    )
    num_tokens = len(load_tokenizer(path))
    num_rows = config.get_text_config().vocab_size
    require(
        num_tokens <= num_rows,
        f"the tokenizer of {path} has {num_tokens} tokens, the model embeds {num_rows}; use the "
        f"model's own tokenizer or resize its embedding to {num_tokens}",
    )


def load_tokenizer(path: Path) -> Any:
    """The directory's tokenizer. Raises ConfigError if there is none."""
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    require(
        any((path / name).is_file() for name in files),
        f"{path} has no tokenizer ({', '.join(files)}); copy the files of the model's tokenizer",
    )
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except _LOAD_ERRORS as error:
        raise ConfigError(
            f"the tokenizer of {path} does not load: {_reason(error)}; copy its files again"
        ) from error


def load_causal_lm(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The directory's model in evaluation mode. Raises ConfigError if it does not load whole."""
    try:
        with _without_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except _LOAD_ERRORS as error:
        raise ConfigError(
            f"the model in {path} does not load: {_reason(error)}; check its files"
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # transformers fills them with random numbers and goes on
        raise ConfigError(
            f"{path} lacks {len(missing)} weights of {type(model).__name__}, {missing[0]} for one; "
            "copy the whole model directory"
        )
    return model.to(device).eval()


def export_hf(
    source: Path, weights: Iterable[tuple[str, Tensor]], out: Path, dtype: torch.dtype
) -> None:
    """Writes the model of `source` with other `weights` (Hugging Face names) and its tokenizer.

    Raises ConfigError if `out` exists and is not empty, ValueError for weights of another model."""
    require(
        not out.exists() or (out.is_dir() and not any(out.iterdir())),
        f"export directory must be new or empty, got {out}; choose another or remove it",
    )
    model = load_causal_lm(source, dtype, torch.device("cpu"))
    copy_weights(model, weights)
    with _written_aside(out) as aside, _without_progress_bars():
        model.save_pretrained(aside)
        load_tokenizer(source).save_pretrained(aside)


def fingerprint(path: Path) -> str:
    """Hex hash of config.json and the weight files: names, sizes, and of each file the first, the
    last and 30 blocks of 1 MiB between, which is all of a small one and seconds of a large one."""
    digest = hashlib.sha256()
    for file in [path / "config.json", *_weight_files(path)]:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        last = max(0, size - _BLOCK_BYTES)
        with file.open("rb") as stream:
            if size <= 32 * _BLOCK_BYTES:
                digest.update(stream.read())
                continue
            for part in range(32):
                stream.seek(last * part // 31)
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _weight_files(path: Path) -> list[Path]:
    return sorted(file for pattern in _WEIGHTS for file in path.glob(pattern))


def _load_config(path: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except _LOAD_ERRORS as error:
        raise ConfigError(
            f"{path / 'config.json'} does not load: {_reason(error)}; set model.path to a "
            "model that this version of transformers knows"
        ) from error


def _reason(error: Exception) -> str:
    """The start of the message on one line; some of transformers' go on for pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."


@contextmanager
def _written_aside(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory`, renamed to it at the end: whole, or not there at all."""
    aside = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # what an interrupted run left
    aside.mkdir(parents=True)
    try:
        yield aside
        if directory.exists():
            directory.rmdir()
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers draws a bar per file; the run has a display of its own."""
    had_bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            hf_logging.enable_progress_bar()


@dataclass(frozen=True)
class ModelSize:
    parameters: int
    vocabulary: int  # V
    hidden: int  # D


def model_size(path: str, base: BaseConfig, alphabet: str) -> ModelSize:
    """Of the model at `path`, or of the base model for `alphabet` where `path` is empty; nothing is
    loaded or built."""
    config = _load_config(Path(path)) if path else _base_config(base, character_tokenizer(alphabet))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    return ModelSize(model.num_parameters(), text.vocab_size, text.hidden_size)


# --- the base model


def build_base(task: ExampleSource, base: BaseConfig, log: Callable[[str], None]) -> Path:
    """Directory of the base model that `base` and the task's examples make; built if not there.

    A Qwen3 with a character tokenizer, pre-trained on the task's well-formed answers. Raises
    ConfigError if the task has no
    alphabet or examples, or an example has characters outside the alphabet."""
    first = [task.example(i) for i in range(HASHED_EXAMPLES)]
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
    with _written_aside(directory) as aside, _without_progress_bars():
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
        head_dim=base.hidden_size // base.num_heads,
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
