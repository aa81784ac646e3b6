"""The plots of a study: frontiers, and one row an arm for what is measured of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from flowrl.report.figures import (
    INK,
    MUTED,
    SERIES,
    Plot,
    finish,
    new_figure,
    put_legend,
    value_ticks,
    write_number,
    write_share,
    write_tick,
)

Row = Mapping[str, Any]
FAMILIES = {  # family -> name, colour, marker
    "maximiser": ("maximises reward", SERIES[1], "o"),
    "regularised": ("with a KL term", SERIES[4], "s"),
    "flowrl": ("FlowRL", SERIES[0], "D"),
    "matcher": ("matches", SERIES[2], "^"),
}
CONTROLS = {  # kind -> name, colour, line style
    "target": ("exact target", INK, (0, (5, 2))),
    "length-normalised target": ("length-normalised", MUTED, (0, (1, 1.5))),
    "rejection": ("rejection", SERIES[3], "-"),
    "temperature": ("temperature", SERIES[5], (0, (3, 1, 1, 1))),
}
LABEL_SIZE = 8.8
KL_FLOOR = 1e-4  # below it a KL is drawn at the edge of a logarithmic axis
OFFSETS = ((6, 0, "left"), (-6, 0, "right"), (0, 8, "center"), (0, -8, "center"))


def coverage_frontier(name: str, points: Sequence[Row], controls: Sequence[Row]) -> Plot | None:
    drawn = _frontier(
        points, controls, ("success_exact", "expected_coverage"), ("success", "expected coverage"),
        lambda axis: (
            value_ticks(axis, share=True),
            axis.xaxis.set_major_formatter(write_share),
            axis.set_ylim(bottom=0),
        ),
    )  # fmt: skip
    if drawn is None:
        return None
    return finish(
        drawn[0], f"{name}-coverage", "Success against coverage",
        "Up and to the right is better. Success: probability of a right answer. Expected coverage: "
        "share of all right answers that 64 samples would hit. Both exact, mean over prompts and "
        "seeds. A thin line joins the values of a sweep; points without a name are in the table.",
        "Scatter plot. " + drawn[1],
    )  # fmt: skip


def kl_frontier(name: str, points: Sequence[Row], controls: Sequence[Row]) -> Plot | None:
    def scale(axis: Axes) -> None:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(write_tick)
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))

    kept = [c for c in controls if c["kind"] in ("temperature", "rejection")]
    measures, labels = ("reward_exact", "kl_to_target"), ("mean reward", "KL to target (nats)")
    drawn = _frontier(points, kept, measures, labels, scale)
    if drawn is None:
        return None
    return finish(
        drawn[0], f"{name}-kl", "Reward against distance",
        "KL(policy || target), on a logarithmic axis; lower is closer. The target is the arm's own "
        "nominal one where it has one, else that of the table's heading; rejection sampling is "
        "measured against the latter.",
        "Scatter plot. " + drawn[1],
    )  # fmt: skip


def _frontier(
    points: Sequence[Row],
    controls: Sequence[Row],
    measures: tuple[str, str],
    labels: tuple[str, str],
    scale: Callable[[Axes], Any],
) -> tuple[Any, str] | None:
    held = [p for p in points if all(m in p.get("intervals", {}) for m in measures)]
    if not held:
        return None
    figure = new_figure(330)
    axis = figure.subplots()
    scale(axis)
    _draw_controls(axis, controls, measures)
    for family, (title, color, marker) in FAMILIES.items():
        mine = [p for p in held if p["family"] == family]
        if not mine:
            continue
        for arm in dict.fromkeys(p["arm"] for p in mine):
            x, y = _sorted([_at(p, measures) for p in mine if p["arm"] == arm])
            axis.plot(x, y, color=color, linewidth=0.8, alpha=0.6)
        axis.scatter(
            *zip(*(_at(p, measures) for p in mine), strict=True),
            s=26, color=color, marker=marker, label=title, zorder=3,
        )  # fmt: skip
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.grid(axis="x", visible=True)
    axis.margins(x=0.08)
    axis.legend(
        loc="lower left", bbox_to_anchor=(-0.16, 1.0), ncols=3, fontsize=9, borderaxespad=0.1,
        columnspacing=0.9, handletextpad=0.4,
    )  # fmt: skip
    own = [p for p in held if not p["point"]]
    _write_labels(axis, [(*_at(p, measures), p["arm"]) for p in own])
    told = "; ".join(
        f"{p['label']}: {labels[0]} {write_number(x)}, {labels[1]} {write_number(y)}"
        for p in held for x, y in [_at(p, measures)]
    )  # fmt: skip
    return figure, told + "."


def _draw_controls(axis: Axes, controls: Sequence[Row], measures: tuple[str, str]) -> None:
    for kind, (title, color, style) in CONTROLS.items():
        mine = [c for c in controls if c["kind"] == kind]
        for index, source in enumerate(dict.fromkeys(c["source"] for c in mine)):
            at = [
                _at(c, measures)
                for c in sorted(mine, key=lambda c: c["value"])
                if c["source"] == source and all(m in c["intervals"] for m in measures)
            ]
            if at:
                x, y = zip(*at, strict=True)
                axis.plot(
                    x, y, color=color, linestyle=style, linewidth=1.1, marker=".", markersize=4,
                    label=title if index == 0 else None, zorder=1,
                )  # fmt: skip


def _at(point: Row, measures: tuple[str, str]) -> tuple[float, float]:
    x, y = (float(point["intervals"][m]["mean"]) for m in measures)
    return x, max(y, KL_FLOOR) if measures[1].startswith("kl") else y


def _sorted(at: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    ordered = sorted(at)
    return [x for x, _ in ordered], [y for _, y in ordered]


def _write_labels(axis: Axes, at: Sequence[tuple[float, float, str]]) -> None:
    """A name beside each point where it covers no other name and no other point."""
    figure = axis.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]
    dots = [axis.transData.transform((x, y)) for x, y, _ in at]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in dots]
    frame = axis.get_window_extent()
    for index, (x, y, text) in enumerate(at):
        others = [box for i, box in enumerate(taken) if i != index]
        for dx, dy, align in OFFSETS:
            label = axis.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha=align, va="center",
                fontsize=LABEL_SIZE, color=INK,
            )  # fmt: skip
            box = label.get_window_extent().padded(2)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 4
            inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in others):
                taken.append(box)
                break
            label.remove()


# --- one row an arm


def distance_rows(name: str, points: Sequence[Row]) -> Plot | None:
    return _rows(
        f"{name}-l1", "Distance to target and to fixed point", points,
        {"l1_to_target": "own target", "l1_to_fixed_point": "own fixed point"}, "L1",
        "Sum over all answers of |policy - target|: 0 is equal, 2 disjoint. A filled mark is the "
        "arm's nominal target (that of the heading for arms without one), a hollow one where its "
        "training ends. Far from the first and near the second: a wrong target, not poor "
        "training. Bars: 95% bootstrap interval over seeds and prompts.",
    )  # fmt: skip


def modes_rows(name: str, points: Sequence[Row], guides: Mapping[str, float]) -> Plot | None:
    return _rows(
        f"{name}-modes", "Effective modes", points, {"effective_modes": "policy"},
        "effective modes",
        "exp of the entropy over the right answers, given a right one. Dashed: what pi_ref has, "
        "and so what pi_ref exp(beta r) / Z has when all right answers earn the same.",
        guides,
    )  # fmt: skip


def coverage_rows(name: str, points: Sequence[Row], guides: Mapping[str, float]) -> Plot | None:
    return _rows(
        f"{name}-found", "Success and expected coverage", points,
        {"success_exact": "success", "expected_coverage": "coverage"}, "share",
        "Success: probability of a right answer (filled). Coverage: share of all right answers "
        "that 64 samples would hit (hollow).",
        guides,
    )  # fmt: skip


def _rows(
    name: str,
    title: str,
    points: Sequence[Row],
    measures: Mapping[str, str],
    unit: str,
    caption: str,
    guides: Mapping[str, float] | None = None,
) -> Plot | None:
    held = [p for p in points if not p["point"] and set(measures) & set(p.get("intervals", {}))]
    if not held:
        return None
    figure = new_figure(84 + 17 * len(held))
    axis = figure.subplots()
    for index, (measure, label) in enumerate(measures.items()):
        shift = 0.0 if len(measures) == 1 else 0.17 * (2 * index - 1)
        for row, point in enumerate(held):
            found = point["intervals"].get(measure)
            if found is None:
                continue
            color = FAMILIES[point["family"]][1]
            axis.plot([found["low"], found["high"]], [row + shift] * 2, color=color, linewidth=1.4)
            axis.plot(
                found["mean"], row + shift, color=color, markersize=5, linestyle="none",
                marker=FAMILIES[point["family"]][2],
                markerfacecolor=color if index == 0 else "none",
                label=None,
            )  # fmt: skip
        face = MUTED if index == 0 else "none"
        axis.plot([], [], color=MUTED, marker="o", linestyle="none", markerfacecolor=face,
                  markersize=5, label=label)  # fmt: skip
    for meaning, at in (guides or {}).items():
        axis.axvline(at, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), label=meaning)
    axis.set_yticks(np.arange(len(held)), [p["arm"] for p in held], fontsize=9.2)
    axis.set_ylim(len(held) - 0.4, -0.6)
    farthest = max(p["intervals"][m]["high"] for p in held for m in measures if m in p["intervals"])
    axis.set_xlim(0, 1.06 * max([farthest, *(guides or {}).values()]) or 1.0)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", visible=True)
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.xaxis.set_major_formatter(write_share if unit == "share" else write_tick)
    axis.set_xlabel(unit)
    put_legend(axis, columns=2)
    told = "; ".join(
        f"{p['arm']}: " + ", ".join(
            f"{label} {write_number(p['intervals'][m]['mean'])}"
            for m, label in measures.items() if m in p["intervals"]
        )
        for p in held
    )  # fmt: skip
    return finish(figure, name, title, caption, f"Dot plot by arm. {told}.")
