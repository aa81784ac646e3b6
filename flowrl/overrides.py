"""Dotted command-line overrides: `--batch.group_size 4 --objective.beta=15` to nested values.

They go through the same checks as a recipe's TOML, so a wrong key or type reads the same in both.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from flowrl.config import Config
from flowrl.schema import ConfigError, settings_named, toml_value

TOP_LEVEL = ("seed",)  # settings outside a section


def split_overrides(args: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments that are not settings, and the settings as a nested mapping.

    A setting is `--section.key VALUE...`, `--section.key=VALUE` or `--seed VALUE`; a switch without
    a value is true. Hyphens in names count as underscores."""
    rest: list[str] = []
    overrides: dict[str, Any] = {}
    position = 0
    while position < len(args):
        name, equals, inline = args[position].partition("=")
        position += 1
        key = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or not ("." in key or key in TOP_LEVEL):
            rest.append(args[position - 1])
            continue
        path = key.split(".")
        texts = [inline] if equals else _take_values(path, args, position)
        position += 0 if equals else len(texts)
        _set(overrides, path, texts)
    return rest, overrides


def as_arguments(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested settings as the arguments of which `split_overrides` makes the same."""
    found: list[str] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        path = name.split(".")
        if isinstance(value, Mapping):
            inner = "" if key == "options" else f"{key}."
            found += as_arguments(value, f"{prefix}{inner}")
        elif isinstance(value, list | tuple) and _is_list(path):
            found += [f"--{name}", *(_text(item) for item in value)]
        elif isinstance(value, str) and _hint(path) is str:
            found += [f"--{name}={value}"] if value.startswith("--") else [f"--{name}", value]
        else:
            found += [f"--{name}", _text(value)]
    return found


def _text(value: Any) -> str:
    """What `_literal` reads as this value."""
    is_plain = isinstance(value, str) and _literal(value) == value
    return value if is_plain else toml_value(value)


def settings_called(name: str) -> str:
    """The end of an error message: the settings that somebody meant who wrote --name without its
    section, or named a section alone; empty where there are none."""
    meant = settings_named(name, Config)
    if name in {f.name for f in fields(Config)}:
        named = f"{name}.name" in settings_named("name", Config)
        meant = [*meant, f"{name}.name" if named else f"{name}.KEY"]
    return f"; write {' or '.join(f'--{setting} VALUE' for setting in meant)}" if meant else ""


def _take_values(path: list[str], args: Sequence[str], position: int) -> list[str]:
    """The arguments after a setting's name that are its value: one, or all up to the next flag for
    a list, or none for a switch."""
    end = position
    while end < len(args) and not args[end].startswith("--"):
        end += 1
    values = list(args[position:end])
    if _is_list(path):
        return values
    if _hint(path) is bool:
        return values[:1] if values and values[0].lower() in ("true", "false") else []
    return values[:1]


def _set(overrides: dict[str, Any], path: list[str], texts: list[str]) -> None:
    value = _value(path, texts)
    for part in path[:-1]:
        overrides = overrides.setdefault(part, {})
        if not isinstance(overrides, dict):
            raise ConfigError(f"--{'.'.join(path)} is given inside a value that is no table")
    overrides[path[-1]] = value


def _value(path: list[str], texts: list[str]) -> Any:
    if not texts and _hint(path) in (bool, None):
        return True
    if not texts and not _is_list(path):
        dotted = ".".join(path)
        raise ConfigError(f"--{dotted} needs a value; write --{dotted} VALUE")
    if _hint(path) is str:
        return texts[0]
    values = [_literal(text) for text in texts]
    if not _is_list(path):
        return values[0]
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _literal(text: str) -> Any:
    """A TOML value (3, 1e-3, true, [1, 2]); anything else is text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _hint(path: list[str]) -> Any:
    """The type of a setting; None for an unknown one and for an objective's or task's options."""
    cls: Any = Config
    for part in path:
        if not hasattr(cls, "__dataclass_fields__"):
            return None
        if part not in {f.name for f in fields(cls)}:
            return None
        cls = get_type_hints(cls)[part]
    return cls


def _is_list(path: list[str]) -> bool:
    hint = _hint(path)
    return getattr(hint, "__origin__", None) is tuple
