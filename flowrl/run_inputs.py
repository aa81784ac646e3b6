"""The files that a run reads, known by their contents: problems, and how the model reads and ends.

A run goes on with the files that it began with, wherever they lie by then. The weights themselves
are compared by the backend (`hf_files.fingerprint`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.config import Config
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
    found = {}
    for what, path in files.items():
        with path.open("rb") as file:
            found[what] = hashlib.file_digest(file, "sha256").hexdigest()
    if state is None:
        return found
    if "inputs" not in state:
        return _of_an_older_run(config, state, found)
    for what in [*state["inputs"], *found]:
        if found.get(what) != state["inputs"].get(what):
            where = f" ({files[what]})" if what in files else ", which is gone now,"
            raise ConfigError(
                f"{what}{where} is not what this run began with; put it back, or start a new run "
                "with --run.dir DIR"
            )
    return found


def _of_an_older_run(
    config: Config, state: Mapping[str, Any], found: dict[str, str]
) -> dict[str, str]:
    recorded = state["config"]
    options = recorded["task"].get("options", {})
    before: dict[str, Any] = {"model.path": recorded["model"].get("path", "")}
    now: dict[str, Any] = {"model.path": config.model.path}
    for name in ("train", "eval"):
        before[f"task.{name}"] = options.get(name)
        now[f"task.{name}"] = config.task.options.get(name)
    for name, old in before.items():
        if now[name] != old:
            raise ConfigError(
                f"{name} was {old!r}, and this run's checkpoints do not say what was in it; leave "
                f"{name} as it was"
            )
    return found
