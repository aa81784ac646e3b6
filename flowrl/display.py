"""What a run prints: a live table with a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

COLUMNS = (  # heading, metric, format
    ("reward", "reward/mean", ".3f"),
    ("loss", "actor/loss", ".3g"),
    ("grad", "actor/grad_norm", ".3g"),
    ("entropy", "actor/entropy", ".3f"),
    ("length", "response_length/mean", ".1f"),
    ("distinct", "diversity/distinct_solutions", ".2f"),
    ("ESS", "flow/iw_ess", ".3f"),
    ("s/step", "timing_s/step", ".2f"),
    ("tok/s", "perf/tokens_per_s", ",.0f"),
)
ROWS_SHOWN = 8
DIVERSITY = (
    "distinct_solutions", "mode_coverage", "expected_coverage", "effective_modes", "judge_score",
    "l1_to_target", "kl_to_target", "l1_to_fixed_point", "success_exact", "success_target",
)  # fmt: skip
"""Of an evaluation's diversity/* what is printed; metrics.jsonl has all."""


class Display:
    """Context manager; silent on ranks other than 0."""

    def __init__(self, total_steps: int, *, enabled: bool, console: Console | None = None) -> None:
        self.console = console or Console(quiet=not enabled, soft_wrap=True)
        self.total_steps = total_steps
        self.rows: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=ROWS_SHOWN)
        self.progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()
        )
        self.bar = self.progress.add_task("train", total=total_steps)
        self.live = None
        if enabled and self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def step(self, number: int, numbers: Mapping[str, float]) -> None:
        if self.live is None:
            if number <= 3 or number % 10 == 0 or number == self.total_steps:
                self.say(f"step {number}/{self.total_steps}  {_line(numbers)}")
            return
        self.rows.append((number, numbers))
        self.progress.update(self.bar, completed=number)
        self.live.update(Group(self._table(), self.progress))

    def evaluation(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of all problems, then of each set, where there are several, its avg@k."""
        sets = list(dict.fromkeys(n.split("/")[1] for n in numbers if n.startswith("eval/")))
        whole = {n: v for n, v in numbers.items() if n.split("/")[1] not in sets[1:] and _shown(n)}
        shown = [f"{name.split('/')[-1]} {value:.3f}" for name, value in whole.items()]
        for name, value in numbers.items():
            if name.split("/")[1] in sets[1:] and "/avg@" in name:
                shown.append(f"{name.removeprefix('eval/')} {value:.3f}")
        shown = "  ".join(shown)
        self.say(f"eval at step {step}: {shown}")

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("step", justify="right")
        shown = [c for c in COLUMNS if any(c[1] in numbers for _, numbers in self.rows)]
        for heading, _, _ in shown:
            table.add_column(heading, justify="right")
        for number, numbers in self.rows:
            cells = [format(numbers[m], f) if m in numbers else "" for _, m, f in shown]
            table.add_row(str(number), *cells)
        return table


def before_after(
    first: Mapping[str, float], last: Mapping[str, float], steps: int, console: Console
) -> None:
    """The evaluation before and after training, side by side."""
    table = Table(title="held-out problems", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column(f"after {steps} steps", justify="right")
    for name, value in first.items():
        if name in last and _shown(name):
            table.add_row(name, f"{value:.4f}", f"{last[name]:.4f}")
    console.print(table)


def _shown(name: str) -> bool:
    section, _, rest = name.partition("/")
    return section != "diversity" or rest in DIVERSITY


def _line(numbers: Mapping[str, float]) -> str:
    return "  ".join(
        f"{heading} {format(numbers[metric], spec)}"
        for heading, metric, spec in COLUMNS
        if metric in numbers
    )
