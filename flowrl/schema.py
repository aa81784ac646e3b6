"""Frozen dataclasses from plain mappings and back to TOML, with errors that name the remedy.

Imports no torch. Used for the run's config and for the options of objectives and tasks.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal


class ConfigError(ValueError):
    """A setting that cannot work: the message says what is required, what was given, what to do."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; correct that line") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8: {error}; save it as that") from error


def build(cls: type, data: Mapping[str, Any], where: str, root: type | None = None) -> Any:
    """An instance of the dataclass `cls` from nested mappings; `where` prefixes names in errors.
    `root` is the whole that `cls` is a section of.

    Raises ConfigError for an unknown key (naming the same in another section, or the nearest), a
    wrong type or an impossible value.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    values = {}
    for key, value in data.items():
        dotted = f"{where}.{key}" if where else key
        if key not in fields:
            same = settings_named(key, root) if root else []
            meant = f"; did you mean {' or '.join(same)}?" if same else nearest(key, fields, where)
            raise ConfigError(f"unknown setting {dotted}{meant}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            require(
                isinstance(value, Mapping),
                f"{dotted} must be a table, got {value!r}; write [{dotted}]",
            )
            values[key] = build(typing.cast(type, hint), value, dotted, root or cls)
        else:
            values[key] = _coerce(value, hint, dotted)
    return cls(**values)


def settings_named(name: str, root: type) -> list[str]:
    """section.name for each section of the dataclass `root` that has a setting called so."""
    sections = typing.get_type_hints(root).items()
    found = [(key, hint) for key, hint in sections if dataclasses.is_dataclass(hint)]
    return [f"{key}.{name}" for key, hint in found if name in typing.get_type_hints(hint)]


def nearest(name: str, choices: Iterable[str], where: str = "") -> str:
    """The end of an error message: the closest choice, or all of them."""
    ordered = sorted(choices)
    close = difflib.get_close_matches(name, ordered, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {where + '.' if where else ''}{close[0]}?"
    return f"; choose from: {', '.join(ordered)}"


def toml_text(mapping: Mapping[str, Any]) -> str:
    """Nested plain values as TOML."""
    lines: list[str] = []

    def table(mapping: Mapping[str, Any], prefix: str) -> None:
        scalars = {k: v for k, v in mapping.items() if not isinstance(v, Mapping)}
        if prefix and (scalars or not mapping):
            lines.append(f"\n[{prefix}]")
        lines.extend(f"{_toml_key(k)} = {toml_value(v)}" for k, v in scalars.items())
        for key, value in mapping.items():
            if isinstance(value, Mapping):
                table(value, f"{prefix}.{_toml_key(key)}" if prefix else _toml_key(key))

    table(mapping, "")
    return "\n".join(lines) + "\n"


def _coerce(value: Any, hint: Any, dotted: str) -> Any:
    """`value` as `hint` asks, or a ConfigError. Integers pass as floats; nothing else converts."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), dotted)
    if origin is Literal:
        if value in args:
            return value
        choices = [str(a) for a in args]
        raise ConfigError(
            f"{dotted} must be one of {', '.join(choices)}, got {value!r}"
            f"{nearest(str(value), choices)}"
        )
    if origin is tuple and isinstance(value, list | tuple):
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        require(
            len(inner) == len(value),
            f"{dotted} must have {len(inner)} values, got {len(value)}: {list(value)}",
        )
        return tuple(_coerce(v, a, dotted) for v, a in zip(value, inner, strict=True))
    if origin is dict:
        origin = Mapping
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    expected = origin or hint
    if not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(
            f"{dotted} must be of type {getattr(hint, '__name__', hint)}, got {value!r}; "
            + (_as_text(dotted, value) if hint is str else _as_value(dotted))
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{dotted} must be finite, got {value}; give a finite number")
    return value


def _as_value(dotted: str) -> str:
    return f"write --{dotted} VALUE or {dotted.split('.')[-1]} = VALUE in the recipe"


def _as_text(dotted: str, value: Any) -> str:
    """On the command line a setting's type is known, an option's is not: it needs the quotes."""
    is_option = dotted.split(".")[0] in ("task", "objective")
    shown = f"'\"{value}\"'" if is_option else value
    return f'write --{dotted} {shown} or {dotted.split(".")[-1]} = "{value}" in the recipe'


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() else toml_value(key)


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04x}", escaped) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return repr(value)
