"""Reads what a run left in its directory, for the report and for `flowrl inspect`.

A run may have been cut short at any byte: files may be missing, and the last line of one may be
half a line. Such a line is left out and said in `RunData.notes`. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.schema import ConfigError, read_toml

Row = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """All of a run but its samples. Rows are in the order of their steps."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    train: list[Row]
    evals: list[Row]
    timing: list[Row]
    notes: tuple[str, ...]

    @property
    def last_step(self) -> int:
        """Steps that were trained and logged."""
        return self.train[-1]["step"] if self.train else 0

    @property
    def eval_sets(self) -> list[str]:
        """Names in eval/<name>/...: all problems together, then their sets if there are several."""
        named = [n.split("/")[1] for row in self.evals for n in row if n.startswith("eval/")]
        return list(dict.fromkeys(named))

    @property
    def planned_steps(self) -> int | None:
        return self.config.get("trainer", {}).get("steps")


def read_run(path: Path) -> RunData:
    """Raises ConfigError if `path` is no run directory."""
    check_run_dir(path)
    metrics, notes = read_lines(path / "metrics.jsonl")
    timing, timing_notes = read_lines(path / "timing.jsonl")
    environment, environment_notes = _read_object(path / "env.json")
    train = [row for row in metrics if row.get("kind") == "train"]
    return RunData(
        path=path,
        config=read_toml(path / "config.toml"),
        environment=environment,
        train=sorted(train, key=lambda row: row["step"]),
        evals=sorted((r for r in metrics if r.get("kind") == "eval"), key=lambda r: r["step"]),
        timing=_merged_by_step(timing),
        notes=(*notes, *timing_notes, *environment_notes),
    )


def _merged_by_step(rows: Sequence[Row]) -> list[Row]:
    """One row a step: its own seconds and those of what followed it, a checkpoint say."""
    merged: dict[int, Row] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    return [row for _, row in sorted(merged.items()) if "timing_s/step" in row]


def check_run_dir(path: Path) -> None:
    if not (path / "config.toml").is_file():
        raise ConfigError(
            f"{path} is no run directory: it has no config.toml; give the directory that "
            "`flowrl train` printed, such as runs/countdown_cpu"
        )


def read_lines(path: Path) -> tuple[list[Row], list[str]]:
    """The JSON objects of a file, one a line, and what was left out. A missing file is empty."""
    if not path.is_file():
        return [], [f"{path.name} is missing."]
    rows, broken = [], []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
        else:
            broken.append(str(number))
    if not broken:
        return rows, []
    lines = f"line {broken[0]}" if len(broken) == 1 else f"lines {', '.join(broken)}"
    return rows, [f"{path.name}: {lines} cannot be read and was left out."]


def sample_files(path: Path, split: str) -> dict[int, Path]:
    """step -> file of recorded samples; `split` is "train" or "eval"."""
    prefix = {"train": "step", "eval": "eval"}[split]
    return numbered_files(path / "samples", f"{prefix}_*.jsonl")


def eval_files(path: Path) -> dict[int, Path]:
    """step -> file with the detail of that evaluation."""
    return numbered_files(path / "evals", "step_*.json")


def numbered_files(directory: Path, pattern: str) -> dict[int, Path]:
    """step -> file for names such as step_000012.json, in the order of the steps."""
    found = {}
    for file in directory.glob(pattern):
        number = file.stem.split("_")[-1]
        if number.isdigit():
            found[int(number)] = file
    return dict(sorted(found.items()))


def read_eval_ends(path: Path) -> tuple[Row, Row] | None:
    """Detail of the first and of the last evaluation that can be read; None with fewer than two."""
    details = []
    files = list(eval_files(path).values())
    for order in (files, files[::-1]):
        for file in order:
            detail, _ = _read_object(file)
            if detail:
                details.append((file, detail))
                break
    if len(details) < 2 or details[0][0] == details[1][0]:
        return None
    return details[0][1], details[1][1]


def series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, over the rows that have it."""
    held = [row for row in rows if isinstance(row.get(name), int | float)]
    return [row["step"] for row in held], [float(row[name]) for row in held]


def _read_object(path: Path) -> tuple[Row, list[str]]:
    if not path.is_file():
        return {}, [f"{path.name} is missing."]
    try:
        found = json.loads(path.read_text(errors="replace"))
    except ValueError:
        return {}, [f"{path.name} cannot be read and was left out."]
    return (found, []) if isinstance(found, dict) else ({}, [f"{path.name} holds no object."])
