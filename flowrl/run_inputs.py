"""The files that a run reads, known by their contents: problems, and how the model reads and ends.

A run goes on with the files that it began with, wherever they lie by then. The weights themselves
are compared by the backend (`hf_files.fingerprint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.config import Config
from flowrl.files import sha256
from flowrl.schema import ConfigError
from flowrl.tasks import Task

OF_THE_MODEL = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def input_files(config: Config, task: Task) -> dict[str, Path]:
    """By what they are: the task's `data_files`, if it has any, and those of model.path but the
    weights."""
    files = {f"task.{name}": Path(path) for name, path in getattr(task, "data_files", {}).items()}
    if config.model.path:
        paths = [Path(config.model.path) / name for name in OF_THE_MODEL]
        files |= {f"model.path {path.name}": path for path in paths if path.is_file()}
    return files


def checked_hashes(config: Config, task: Task, state: Mapping[str, Any] | None) -> dict[str, str]:
    """Hex SHA-256 of each input file, for the checkpoints. Raises ConfigError where they are not
    those of `state`, a checkpoint's."""
    files = input_files(config, task)
    found = {what: sha256(path) for what, path in files.items()}
    if state is None:
        return found
    for what in [*state["inputs"], *found]:
        if found.get(what) != state["inputs"].get(what):
            where = f" ({files[what]})" if what in files else ", which is gone now,"
            raise ConfigError(
                f"{what}{where} is not what this run began with; put it back, or start a new run "
                "with --run.dir DIR"
            )
    return found
