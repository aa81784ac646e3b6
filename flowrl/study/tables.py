"""A study's tables as text, for the terminal and for Markdown pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowrl.targets import PRIORS

COLUMNS = (  # heading, measure, format
    ("success", "success_exact", "{:.3f}"),
    ("L1 to own target", "l1_to_target", "{:.3f}"),
    ("KL to own target", "kl_to_target", "{:.3f}"),
    ("L1 to own fixed point", "l1_to_fixed_point", "{:.3f}"),
    ("KL to own fixed point", "kl_to_fixed_point", "{:.3f}"),
    ("effective modes", "effective_modes", "{:.2f}"),
    ("coverage@64", "expected_coverage", "{:.3f}"),
    ("pass@16", "pass@16", "{:.3f}"),
    ("judge score", "judge_score", "{:.2f}"),
)


def describe_target(target: Mapping[str, Any], of: str = "nominal") -> str:
    """`of` nominal: the target the objective names; fixed_point: where its training ends."""
    if of == "nominal":
        beta = target.get("nominal_beta")
        return "none" if beta is None else f"{_prior(target)}exp({beta:g} r)/Z"
    point = target.get("fixed_point")
    if point is None:
        return "not known"
    reward = "r" if point["reward"] == "raw" else "z-scored r"
    if point.get("group_log_z"):
        reward = f"G/(G - 1) {reward}"
    if point["length_normalised"]:
        return f"{_prior(target)}exp(|y| ({point['beta']:g} {reward} - log Z))"
    return f"{_prior(target)}exp({point['beta']:g} {reward})/Z"


def _prior(target: Mapping[str, Any]) -> str:
    point = target.get("fixed_point") or {}
    return PRIORS[point.get("prior", "reference")]


def write_interval(interval: Mapping[str, float] | None, form: str) -> str:
    """ "0.876 (0.871 to 0.880)"; a dash where nothing was measured."""
    if interval is None:
        return "-"
    numbers = (round(interval[key], 9) + 0.0 for key in ("mean", "low", "high"))  # no -0.000
    mean, low, high = (form.format(number) for number in numbers)
    return mean if low == high == mean else f"{mean} ({low} to {high})"


def markdown(results: Mapping[str, Any]) -> str:
    """One table a world, arms in the order of the study, then the controls."""
    parts = []
    for world in results["worlds"]:
        points = [p for p in results["points"] if p["world"] == world]
        parts.append(f"## {world}\n\n{_context_line(points)}{_arms_table(points)}")
        held = [c for c in results["controls"] if c["world"] == world]
        if held:
            parts.append(f"### {world}: controls\n\n{_controls_table(held)}")
    return "\n".join(parts)


def _context_line(points: Sequence[Mapping[str, Any]]) -> str:
    done = [p for p in points if "reference" in p]
    if not done:
        return ""
    held = done[0]["reference"]
    reference = (
        f"pi_ref: effective modes {held.get('effective_modes_reference', 0):.2f}, expected "
        f"coverage@64 {held.get('expected_coverage_reference', 0):.3f}.\n\n"
    )
    return reference if "effective_modes_reference" in held else ""


def _arms_table(points: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for point in points:
        if "intervals" not in point:
            rows.append([point["label"], "not done", *[""] * (len(COLUMNS) + 1)])
            continue
        cells = [write_interval(point["intervals"].get(name), form) for _, name, form in COLUMNS]
        targets = [describe_target(point["target"], of) for of in ("nominal", "fixed_point")]
        rows.append([point["label"], *targets, *cells])
    heads = ["arm", "own target", "own fixed point", *(head for head, _, _ in COLUMNS)]
    return _table(heads, rows)


def _controls_table(controls: Sequence[Mapping[str, Any]]) -> str:
    shown = [c for c in COLUMNS if c[1] in controls[0]["intervals"]]
    rows = [
        [control_label(c), *(write_interval(c["intervals"].get(n), form) for _, n, form in shown)]
        for c in controls
    ]
    return _table(["control", *(head for head, _, _ in shown)], rows)


def control_label(control: Mapping[str, Any]) -> str:
    value = f"{control['value']:g}"
    if control["kind"] == "temperature":
        return f"{control['source']} at temperature {value}"
    if control["kind"] == "rejection":
        return f"rejection from pi_ref, at most {value} draws"
    return f"exact {control['kind']}, beta {value}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
