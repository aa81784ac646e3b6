"""Recipes and overrides to a checked Config, and back to TOML. Imports no torch.

config = load("countdown_cpu", {"objective": {"name": "vargrad"}, "seed": 1})
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.config import Config, ObjectiveConfig, TaskConfig
from flowrl.schema import ConfigError, build, nearest, read_toml, require, toml_text

RECIPES_DIR = Path(__file__).parent / "recipes"
NAMED = {"task": TaskConfig().name, "objective": ObjectiveConfig().name}
"""Sections that are a name and a mapping of options, and the name they have without one."""


def recipe_names() -> list[str]:
    return sorted(p.stem for p in RECIPES_DIR.glob("*.toml"))


def recipe_path(name: str) -> Path:
    """A shipped recipe's name, or the path of a TOML file."""
    if name.endswith(".toml"):
        path = Path(name)
        require(
            path.is_file(),
            f"recipe file not found: {name}; shipped ones: {', '.join(recipe_names())}",
        )
        return path
    path = RECIPES_DIR / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"no recipe called {name!r}{nearest(name, recipe_names())}")
    return path


def load(recipe: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The recipe's settings with `overrides` (nested by section) on top, checked.

    Raises ConfigError for an unknown key (naming the nearest), a wrong type or an impossible value.
    """
    path = recipe_path(recipe)
    return from_mapping(merge({"recipe": path.stem, **read_toml(path)}, overrides or {}))


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`overrides` on top of `base`, section by section. A new objective or task name drops the
    options that `base` gave the old one and takes its table ([objective.vargrad]) instead."""
    merged = dict(base)
    for key, value in overrides.items():
        old = merged.get(key)
        if key in NAMED and isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[key] = _merge_named(key, old, value)
        elif isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _merge_named(
    section: str, base: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    tables = [k for k, v in overrides.items() if isinstance(v, Mapping) and k != "options"]
    require(
        not tables,
        f"unknown setting {section}.{''.join(tables[:1])}; options of the chosen {section} are "
        f"written {section}.KEY",
    )
    old = base.get("name", NAMED[section])
    name = overrides.get("name", old)
    kept = {k: v for k, v in base.items() if name == old or _is_table(k, v)}
    mine = _named_options(section, {**overrides, "name": name})["options"]
    options = {**_named_options(section, {**kept, "name": name})["options"], **mine}
    return {**{k: v for k, v in kept.items() if _is_table(k, v)}, "name": name, "options": options}


def _is_table(key: str, value: Any) -> bool:
    return isinstance(value, Mapping) and key != "options"


def from_mapping(data: Mapping[str, Any]) -> Config:
    """A checked Config from nested mappings, as TOML or overrides give them."""
    sections = dict(data)
    for key in NAMED:
        if isinstance(sections.get(key), Mapping):
            sections[key] = _named_options(key, sections[key])
    return build(Config, sections, "")


def to_mapping(config: Config) -> dict[str, Any]:
    """Nested plain values without None; `from_mapping` reads it back to an equal Config."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items() if v is not None}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _named_options(section: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """{name, vargrad = {...}, options = {...}, beta} -> {name, options}: the chosen name's table,
    then `options`, then the flat keys, later ones first in rank."""
    name = given.get("name", NAMED[section])
    options = given.get("options", {})
    require(
        isinstance(options, Mapping),
        f"{section}.options must be a table, got {options!r}; write {section}.KEY = VALUE",
    )
    flat = {k: v for k, v in given.items() if k not in ("name", "options") and not _is_table(k, v)}
    return {"name": name, "options": {**given.get(name, {}), **options, **flat}}


def to_toml(config: Config) -> str:
    """The resolved config as TOML text."""
    return toml_text(to_mapping(config))
