"""How every plot of the report looks: small inline SVGs whose colours follow the page's theme.

Drawn at phone width with text as text, so that a figure is legible at 350 px and sharp in print.
The palette's colours are written as CSS variables, which stylesheet.py sets for light, dark and
paper.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

WIDTH = 340  # px at natural size
INK, MUTED, RULE = "#1d2329", "#5a6572", "#d5dbe1"
SERIES = ("#0b62a4", "#c2500c", "#087f5f", "#9a3f86", "#866a00", "#5f6b7a", "#b3263e")
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    **{color: f"--series-{i + 1}" for i, color in enumerate(SERIES)},
}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flowrl",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.labelcolor": INK,
    "legend.handlelength": 1.3,
    "legend.columnspacing": 1.2,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "lines.linewidth": 1.7,
}

Scale = Literal["linear", "zero", "share", "log"]


@dataclass(frozen=True)
class Plot:
    """One figure of the page."""

    name: str  # of its HTML id, fig-<name>
    title: str
    svg: str
    alt: str  # what a reader who cannot see it needs to know
    caption: str  # the definition of what is drawn


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    plots: tuple[Plot, ...]


@dataclass(frozen=True)
class Series:
    label: str
    steps: Sequence[float]
    values: Sequence[float]
    smooth: bool = False
    """Draw a running mean, with the raw numbers faint behind it."""
    marked: bool = False
    """A marker at each point: for the few points of evaluations."""


@dataclass(frozen=True)
class Panel:
    label: str  # of the y axis, with the unit
    series: tuple[Series, ...]
    scale: Scale = "linear"
    guides: tuple[tuple[float, str], ...] = ()  # horizontal lines: height and what it means


@contextmanager
def style() -> Iterator[None]:
    with matplotlib.rc_context(STYLE):
        yield


def draw_panels(name: str, title: str, caption: str, panels: Sequence[Panel]) -> Plot | None:
    """Line charts over the same steps, one below the other. None where nothing was measured."""
    held = []
    for panel in panels:
        found = tuple(s for s in panel.series if len(s.steps))
        if found:
            held.append(Panel(panel.label, found, panel.scale, panel.guides))
    if not held:
        return None
    figure = new_figure(232 if len(held) == 1 else 165 * len(held) + 20)
    axes = figure.subplots(len(held), 1, sharex=True, squeeze=False)[:, 0]
    used = 0
    for axis, panel in zip(axes, held, strict=True):
        _draw_panel(axis, panel, used)
        used += len(panel.series)
    step_ticks(axes[-1])
    described = [_describe(panel, s) for panel in held for s in panel.series]
    return finish(figure, name, title, caption, "Line chart. " + " ".join(described))


def new_figure(height: float) -> Figure:
    """Of WIDTH by `height` px."""
    return Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")


def finish(figure: Figure, name: str, title: str, caption: str, alt: str) -> Plot:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Plot(name, title, _inline(buffer.getvalue(), name), alt, caption)


def put_legend(
    axis: Axes, columns: int = 3, handles: Sequence[Artist | Container] | None = None
) -> None:
    """Above the axes, where it can cover nothing; in the order of `handles`."""
    drawn = axis.get_legend_handles_labels()[0] if handles is None else list(handles)
    axis.legend(
        handles=drawn, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns,
        borderaxespad=0.1,
    )  # fmt: skip


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Of each value and up to window - 1 before it."""
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1))
        for i in range(len(values))
    ]


def smoothing_window(num_values: int) -> int:
    """A twentieth of the run."""
    return max(1, num_values // 20)


def step_ticks(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axis.set_xlabel("step")


def value_ticks(axis: Axes, share: bool = False) -> None:
    """About five round numbers up the side, as percentages where they are shares."""
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.yaxis.set_major_formatter(write_share if share else write_tick)


def write_share(value: float, _position: float | None = None) -> str:
    return f"{100 * value:.3g}%"


def write_tick(value: float, _position: float | None = None) -> str:
    """1.5, 2,000, 30k, 1e-05."""
    if 0 < abs(value) < 1e-3:
        return f"{value:.3g}" if "e" in f"{value:.3g}" else f"{value:.0e}"
    if abs(value) >= 10_000:
        return f"{value / 1000:,.4g}k"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def write_number(value: float) -> str:
    """Three significant digits, without a needless exponent."""
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.1e}"


def _draw_panel(axis: Axes, panel: Panel, first_color: int) -> None:
    for index, line in enumerate(panel.series):
        color = SERIES[(first_color + index) % len(SERIES)]
        marker = "o" if line.marked or len(line.steps) == 1 else None
        window = smoothing_window(len(line.values)) if line.smooth else 1
        if window > 1:
            axis.plot(line.steps, line.values, color=color, alpha=0.3, linewidth=0.9)
        drawn = running_mean(line.values, window)
        axis.plot(line.steps, drawn, color=color, marker=marker, markersize=4.5, label=line.label)
    for height, meaning in panel.guides:
        axis.axhline(height, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.annotate(
            meaning, (1, height), (0, 2), ("axes fraction", "data"), "offset points",
            ha="right", va="bottom", fontsize=9.5, color=MUTED,
        )  # fmt: skip
    axis.set_ylabel(panel.label)
    _set_scale(axis, panel)
    if len(panel.series) > 1:
        put_legend(axis)


def _set_scale(axis: Axes, panel: Panel) -> None:
    values = [v for s in panel.series for v in s.values]
    heights = [*values, *(height for height, _ in panel.guides)]
    if panel.scale == "log" and any(v > 0 for v in values):
        positive = [v for v in heights if v > 0]
        axis.set_yscale("log")
        axis.set_ylim(min(positive) / 2, max(positive) * 3)
        decades = math.log10(max(positive) / min(positive))
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(write_tick)
        axis.yaxis.set_minor_formatter(NullFormatter())
        return
    value_ticks(axis, share=panel.scale == "share")
    largest = max(heights)
    if panel.scale == "share":
        axis.set_ylim(0, min(1.0, max(0.01, largest * 1.15)) * 1.02)
    elif panel.scale in ("zero", "log"):
        axis.set_ylim(0, largest * 1.15 if largest > 0 else 1.0)


def _describe(panel: Panel, line: Series) -> str:
    what = line.label if line.label == panel.label else f"{line.label}, {panel.label}"
    first, last = write_number(line.values[0]), write_number(line.values[-1])
    low, high = write_number(min(line.values)), write_number(max(line.values))
    return (
        f"{what}: {first} at step {line.steps[0]}, {last} at step {line.steps[-1]} "
        f"(lowest {low}, highest {high})."
    )


def _inline(svg: str, name: str) -> str:
    """The <svg> element alone, scalable, with ids of its own and the theme's colours."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    svg = svg.replace("xlink:href=", "href=")
    used = set(re.findall(r"[(\"]#([^)\"]+)[)\"]", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'([("])#([A-Za-z][^)"]*)(?=[)"])', rf"\1#{name}-\2", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
