"""The core of `flowrl inspect`: a run's recorded responses, group by group, on the console.

show(Path("runs/countdown_cpu"), step=200, only="correct")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowrl.run_reader import Row, check_run_dir, read_lines, sample_files
from flowrl.schema import ConfigError, require

Only = Literal["all", "correct", "wrong", "truncated", "error"]

KEEPS: dict[str, Callable[[Row], bool]] = {
    "all": lambda row: True,
    "correct": lambda row: bool(row.get("correct")),
    "wrong": lambda row: not row.get("correct"),
    "truncated": lambda row: bool(row.get("truncated")),
    "error": lambda row: bool(row.get("error")),
}

MEASURED = (  # heading, field, format: columns that only some files have
    ("tokens", "response_length", "d"),
    ("residual", "residual", "+.3f"),
    ("weight", "importance_weight", ".3f"),
    ("log Z", "log_z", "+.3f"),
)


def show(
    run_dir: Path,
    *,
    step: int | None = None,
    split: Literal["train", "eval"] = "train",
    prompt_index: int | None = None,
    only: Only = "all",
    limit: int = 4,
    console: Console | None = None,
) -> None:
    """Prints one table per prompt of a step's samples: reward, response and what was measured.

    `step` is the last recorded one by default; `limit` bounds the number of prompts, 0 shows all.
    Raises ConfigError for no run directory, and for a step or prompt without samples (naming those
    that have some)."""
    console = console or Console()
    require(limit >= 0, f"--limit must be >= 0, got {limit}; 0 shows all prompts")
    require(
        only in KEEPS, f"--only must be one of {', '.join(KEEPS)}, got {only!r}; use --only all"
    )
    step, file = _choose_file(run_dir, split, step)
    rows, notes = read_lines(file)
    groups = _groups(rows, prompt_index, f"step {step} of {run_dir}")
    kept = {index: [row for row in group if KEEPS[only](row)] for index, group in groups.items()}
    kept = {index: group for index, group in kept.items() if group}
    shown = list(kept)[: limit or None]
    for index in shown:
        console.print(_table(kept[index], groups[index]))
        console.print()
    for text in (*notes, _summary(step, split, rows)):
        console.print(text, highlight=False, markup=False)
    asked = "" if only == "all" else f" with {only} responses"
    told = f"shown: {len(shown)} of {len(kept)} prompts{asked}"
    more = "; --limit 0 shows all" if len(shown) < len(kept) else ""
    console.print(told + more, highlight=False, markup=False)


def _choose_file(run_dir: Path, split: str, step: int | None) -> tuple[int, Path]:
    check_run_dir(run_dir)
    files = sample_files(run_dir, split)
    if not files:
        other = "train" if split == "eval" else "eval"
        hint = f"; it has some of --split {other}" if sample_files(run_dir, other) else ""
        raise ConfigError(f"{run_dir} has no {split} samples yet{hint}; let it train a step first")
    if step is None:
        step = max(files)
    if step not in files:
        raise ConfigError(
            f"{run_dir} has no {split} samples of step {step}; it has those of "
            f"{_ranges(sorted(files))}: choose with --step"
        )
    return step, files[step]


def _groups(rows: Sequence[Row], prompt_index: int | None, where: str) -> dict[int, list[Row]]:
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_index"], []).append(row)
    if prompt_index is None:
        return groups
    if prompt_index not in groups:
        raise ConfigError(
            f"{where} has no prompt {prompt_index}; it has {_ranges(sorted(groups))}: choose with "
            "--prompt"
        )
    return {prompt_index: groups[prompt_index]}


def _ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 50] -> "1-3, 50"; at most eight of them."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    told = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    if len(told) > 8:
        told = [*told[:4], "...", *told[-3:]]
    return ", ".join(told)


def _table(rows: Sequence[Row], group: Sequence[Row]) -> Table:
    """`rows` of one prompt; the title counts over its whole `group`."""
    rewards = [row["reward"] for row in group]
    title = Text.assemble(
        (f"prompt {group[0]['prompt_index']}  ", "bold"),
        group[0]["prompt"],
        (
            f"\nmean reward {sum(rewards) / len(rewards):.3f}, "
            f"{sum(map(KEEPS['correct'], group))} of {len(group)} right",
            "dim",
        ),
    )
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("reward", justify="right")
    table.add_column("verdict")
    measured = [m for m in MEASURED if any(row.get(m[1]) is not None for row in rows)]
    for heading, _, _ in measured:
        table.add_column(heading, justify="right")
    table.add_column("response", overflow="fold")
    for row in rows:
        cells = [format(row[f], spec) if row.get(f) is not None else "" for _, f, spec in measured]
        # Text, not str: a response may hold what rich would read as markup.
        response = Text(row["response"])
        table.add_row(str(row["sample"]), f"{row['reward']:.2f}", _verdict(row), *cells, response)
    return table


def _verdict(row: Row) -> Text:
    if row.get("error"):
        return Text(f"scorer failed: {row['error']}", "red")
    if row.get("correct"):
        return Text("right", "green")
    return Text("cut off" if row.get("truncated") else "wrong", "dim")


def _summary(step: int, split: str, rows: Sequence[Row]) -> str:
    counts = {name: sum(map(keep, rows)) for name, keep in KEEPS.items()}
    what = "training" if split == "train" else "evaluation"
    return (
        f"{what} step {step}: {len(rows)} responses to {len({r['prompt_index'] for r in rows})} "
        f"prompts; {counts['correct']} right, {counts['truncated']} truncated, "
        f"{counts['error']} with a failed scorer"
    )
