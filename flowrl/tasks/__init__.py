"""Tasks: where prompts come from, how answers are scored and, where known, all right answers.

A task is one file with an `Options` dataclass and a class that follows `Task`. Shipped ones are
found by name; a user's own by the path of its file (`--task.name path/to/my_task.py`), which must
define `build(options: dict) -> Task`. A worked example is in docs/tasks.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from flowrl.records import Prompt, Rollout, Score
from flowrl.schema import ConfigError, nearest, require
from flowrl.tasks.scorer_child import describe

TASK_NAMES = (
    "blocksworld", "countdown", "game24", "hypergrid", "jsonl", "modular", "toy_tree"
)  # fmt: skip
"""Each is the module flowrl.tasks.<name>."""


@dataclass(frozen=True)
class Outcome:
    """One well-formed answer to a prompt and its reward, for exact targets."""

    text: str
    reward: float
    solution: str | None = None
    """As in `Score`: the normal form of a right answer, which names its mode; None where wrong."""


class Task(Protocol):
    """What the trainer asks of a task. Everything random is a function of the arguments."""

    name: str
    alphabet: str | None
    """Characters of prompts and answers, for the base model's tokenizer; None: needs model.path."""

    def prompt(self, split: str, index: int) -> Prompt:
        """The index-th problem of `split` ("train" or "eval"), without token ids.

        Training streams are endless: an index past the end starts the next epoch, in another order.
        The prompt's index is the one asked for, so that a problem has new noise in every epoch;
        data["problem"] is a string that stays the same. The two splits never share a problem,
        unless the user's files or options say so."""
        ...

    def num_prompts(self, split: str) -> int:
        """Distinct problems in `split`."""
        ...

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Rewards, in order. A scorer that fails sets Score.error; it never passes for a reward."""
        ...

    def solutions(self, prompt: Prompt) -> frozenset[str] | None:
        """Canonical forms of all right answers, or None where they cannot be enumerated."""
        ...

    def outcomes(self, prompt: Prompt) -> list[Outcome] | None:
        """Every well-formed answer with its reward, where few enough to score; otherwise None."""
        ...

    def example(self, index: int) -> tuple[str, str] | None:
        """The index-th pre-training pair (prompt text, well-formed answer, right only by chance),
        from training problems only; None where the task has no base model of its own."""
        ...

    def close(self) -> None:
        """Ends the task's processes, if it has any."""
        ...


def names_solutions(task: Task) -> bool:
    """Whether right answers have a `Score.solution`, so that distinct ones can be counted. A task
    whose answers have none says so with an attribute of this name."""
    return getattr(task, "names_solutions", True)


def build_task(name: str, options: dict[str, Any], timeout_s: float) -> Task:
    """The task called `name`, with checked options; a name that ends in .py is a user's file.

    `timeout_s` limits one call of a user's scorer (jsonl). Raises ConfigError: unknown name or
    option (with the nearest), an impossible value, a file that cannot be loaded or defines no task.
    """
    if name.endswith(".py"):
        return _build_from_file(Path(name), options)
    if name not in TASK_NAMES:
        raise ConfigError(f"no task called {name!r}{nearest(name, TASK_NAMES)}")
    return importlib.import_module(f"flowrl.tasks.{name}").build(options, timeout_s)


def _build_from_file(path: Path, options: dict[str, Any]) -> Task:
    require(path.is_file(), f"task file not found: {path}; correct task.name")
    module = _load(path)
    require(
        callable(getattr(module, "build", None)),
        f"{path} must define build(options: dict) -> Task; see docs/tasks.md",
    )
    try:
        inspect.signature(module.build).bind(options)
    except TypeError as error:
        raise ConfigError(
            f"build(options) of {path} takes the options alone: {error}; see docs/tasks.md"
        ) from error
    try:
        task = module.build(options)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"build(options) of {path} failed: {describe(error, path)}; correct that file"
        ) from error
    members = [m for m in (*Task.__annotations__, *vars(Task)) if not m.startswith("_")]
    missing = [m for m in members if not hasattr(task, m)]
    require(not missing, f"the task of {path} must have {', '.join(missing)}; see docs/tasks.md")
    return task


def _load(path: Path) -> ModuleType:
    """The user's file as a module. Any error of its own is the user's to read, with its line."""
    name = f"flowrl_user_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None, path  # it ends in .py
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(
            f"cannot load the task file {path}: {describe(error, path)}; correct that file"
        ) from error
    return module
