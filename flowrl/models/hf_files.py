"""Hugging Face model directories: check and load. Export: hf_export.py.

    model, tokenizer = load_causal_lm(directory, ...), load_tokenizer(directory)

Nothing here reaches for the network.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from flowrl.schema import ConfigError, require

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_BLOCK_BYTES = 1 << 20
# What transformers raises for files that are damaged, unknown to it, or not each other's.
_LOAD_ERRORS = (
    OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError,
)  # fmt: skip


# --- directories


def check_model_dir(path: Path) -> None:
    """Raises ConfigError unless `path` is a causal LM directory whose tokenizer fits the model."""
    require(
        path.is_dir(),
        f"model directory not found: {path}; set model.path to a Hugging Face directory on this "
        "machine (nothing is downloaded: hf download), or leave it empty to build a base model",
    )
    require(
        (path / "config.json").is_file(),
        f"{path} has no config.json, so it is not a Hugging Face model; set model.path to one",
    )
    require(
        bool(_weight_files(path)),
        f"{path} has no weights (model.safetensors); copy the whole model directory",
    )
    _check_weight_files(path)
    config = load_model_config(path)
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


def _check_weight_files(path: Path) -> None:
    """Raises ConfigError for files that are cut short, or that the index names and are not there.
    Reads their heads only. Beside one whole file an index is not read, as in transformers."""
    index = path / "model.safetensors.index.json"
    named: set[str] = set()
    if index.is_file() and not (path / "model.safetensors").is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} is damaged ({error}); copy it again") from error
    for file in sorted({*path.glob("*.safetensors"), *(path / name for name in named)}):
        require(file.is_file(), f"{file} is missing; copy the whole model directory")
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ConfigError(f"{file} is damaged ({error}); copy it again") from error


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
        with without_progress_bars():
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


def check_start(recorded: str, path: Path) -> None:
    """Raises ConfigError where the model in `path` has another fingerprint than was recorded."""
    if recorded != fingerprint(path):
        raise ConfigError(
            f"the starting model at {path} is not the one that this run began with, and it is the "
            "reference policy; put it back or start a new run"
        )


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


def load_model_config(path: Path) -> Any:
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
def written_aside(directory: Path) -> Iterator[Path]:
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
def without_progress_bars() -> Iterator[None]:
    """transformers draws a bar per file; the run has a display of its own."""
    had_bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            hf_logging.enable_progress_bar()
