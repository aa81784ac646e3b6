"""The options that a recipe holds for objectives and tasks it does not choose.

    [objective.vargrad]        for `--objective.name vargrad`
    beta = 5.0

They are read when they are chosen; a misspelt one would be left out without a word.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from flowrl import objectives
from flowrl.config import Config
from flowrl.schema import ConfigError, nearest, read_toml
from flowrl.settings import NAMED, load, recipe_path
from flowrl.tasks import TASK_NAMES


def load_checked(recipe: str, overrides: Mapping[str, Any]) -> Config:
    """`settings.load`; raises ConfigError for unknown tables and keys of names not chosen, too."""
    config = load(recipe, overrides)
    check_tables(recipe)
    return config


def check_tables(recipe: str) -> None:
    """Raises ConfigError for unknown tables, and for unknown keys in tables of names not chosen."""
    sections = read_toml(recipe_path(recipe))
    for section in NAMED:
        for name, options in sections.get(section, {}).items():
            if isinstance(options, Mapping) and name != "options":
                _check_table(section, name, options)


def _check_table(section: str, name: str, options: Mapping[str, Any]) -> None:
    known = TASK_NAMES if section == "task" else objectives.names()
    if section == "task" and name.endswith(".py"):
        return
    if name not in known:
        raise ConfigError(
            f"[{section}.{name}] names no {section}{nearest(name, known, section)} (an option "
            f"that is a table itself is written [{section}.options.{name}])"
        )
    if section == "task":
        kind = importlib.import_module(f"flowrl.tasks.{name}").Options
    else:
        kind = objectives.OBJECTIVES[name].Options
    fields = [field.name for field in dataclasses.fields(kind)]
    for key in options:
        if key not in fields:
            where = f"{section}.{name}"
            raise ConfigError(f"unknown setting {where}.{key}{nearest(key, fields, where)}")
