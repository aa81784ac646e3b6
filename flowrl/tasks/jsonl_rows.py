"""The lines of a JSON Lines file as problems, or an error that names file and line."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from flowrl.records import Message
from flowrl.schema import ConfigError, nearest, require


@dataclass(frozen=True)
class Fields:
    """Where a line's prompt and answer stand. A dot leads into an object: reward_model.answer."""

    prompt: str
    answer: str  # "": rows need none
    empty_answers: bool


@dataclass(frozen=True)
class Row:
    text: str  # of messages: their contents
    messages: tuple[Message, ...]  # empty: `text` is the prompt as it stands
    answer: str  # "" without an answer's field
    fields: dict[str, Any]  # the whole line
    problem: str  # identifies the prompt


def read_rows(path: Path, names: Fields) -> list[Row]:
    """The file's problems. Raises ConfigError with file and line for whatever cannot be one."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; correct task.train or task.eval"
        ) from error
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = _read_row(line, f"{path}, line {number}", names)
            if row.problem in seen:
                raise ConfigError(
                    f"{path}, line {number}: the same prompt as line {seen[row.problem]}; "
                    "remove one"
                )
            seen[row.problem] = number
            rows.append(row)
    require(bool(rows), f"{path} has no problems; write one JSON object a line")
    return rows


def _read_row(line: bytes, where: str, names: Fields) -> Row:
    try:
        fields = json.loads(line.decode(), parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:  # of decoding, of JSON, or nested too deeply
        raise ConfigError(f"{where}: not valid UTF-8 JSON: {error}; correct that line") from error
    require(
        isinstance(fields, dict),
        f"{where}: must be a JSON object, got {type(fields).__name__}; "
        f'write {{"{names.prompt}": ...}}',
    )
    prompt = _value(fields, names.prompt, where, "prompt_field")
    messages: tuple[Message, ...] = ()
    if isinstance(prompt, list):
        messages = _messages(prompt, f"{where}: field {names.prompt!r}")
        text = "\n".join(message["content"] for message in messages)
    else:
        text = _string(prompt, names.prompt, where)
        require(bool(text), f"{where}: {names.prompt!r} is empty; remove that line")
    answer = ""
    if names.answer:
        answer = _string(_value(fields, names.answer, where, "answer_field"), names.answer, where)
        require(
            names.empty_answers or bool(answer.strip()),
            f"{where}: {names.answer!r} is empty; remove that line",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: {names.prompt!r} has half of a surrogate pair, {text[error.start]!r}, which "
            "is no character; correct that line"
        ) from error
    key = json.dumps(messages) if messages else text
    digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    return Row(text, messages, answer, fields, digest)


def _value(fields: dict[str, Any], name: str, where: str, option: str) -> Any:
    """The field `name`, or where there is none, the one that its dots lead to."""
    if name in fields:
        return fields[name]
    value: Any = fields
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            known = [str(f) for f in (value if isinstance(value, dict) else fields)]
            raise ConfigError(f"{where}: no field {name!r} (task.{option}){nearest(part, known)}")
        value = value[part]
    return value


def _messages(value: list[Any], where: str) -> tuple[Message, ...]:
    """Chat messages, each of them {"role": ..., "content": ...}."""
    require(bool(value), f"{where} has no messages; remove that line")
    for message in value:
        require(
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and all(isinstance(part, str) for part in message.values()),
            f"{where}: a message must be an object with the strings role and content, "
            f"got {json.dumps(message)[:60]}; correct that line",
        )
    return tuple(value)


def _string(value: Any, name: str, where: str) -> str:
    require(
        isinstance(value, str),
        f"{where}: field {name!r} must be a string, got {json.dumps(value)[:60]}; put it in quotes",
    )
    return value


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
