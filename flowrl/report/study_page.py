"""`study.html`: one self-contained page about a study, in the report's own style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flowrl.files import write_whole
from flowrl.report.stylesheet import CSS
from flowrl.study.tables import (
    COLUMNS,
    control_label,
    describe_target,
    write_interval,
)

Row = Mapping[str, Any]

STUDY_CSS = """
.scroll { overflow-x: auto; }
.study { font-size: .9rem; }
.study td, .study th { padding: 5px 5px; white-space: nowrap; }
.study td.target { white-space: normal; min-width: 140px; text-align: left; font-size: .76rem; }
.study .spread { display: block; color: var(--muted); font-size: .7rem; }
.study thead th { white-space: normal; min-width: 50px; vertical-align: bottom; }
.hint + .card { margin-top: 10px; }
.dot { display: inline-block; width: .62em; height: .62em; border-radius: 50%; margin-right: 6px; }
.maximiser { background: var(--series-2); } .regularised { background: var(--series-5); }
.flowrl { background: var(--series-1); } .matcher { background: var(--series-3); }
.key { margin: 8px 0 0; display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--muted);
  font-size: .88rem; }
"""
LEFT_OUT = ("kl_to_fixed_point",)  # of the page for its width; study.json and --table have it
FAMILY_NAMES = {
    "maximiser": "maximises reward",
    "regularised": "maximises reward with a KL term",
    "flowrl": "FlowRL",
    "matcher": "matches a distribution",
}


def write_study_page(results: Mapping[str, Any], path: Path) -> Path:
    """Writes the page aside and renames it. What is not done yet is left out and said."""
    # Matplotlib takes most of a second to load, which only those who want a page should pay.
    from flowrl.report import figures, study_figures
    from flowrl.report.page import figure_html

    families = results["families"]
    points = [{**p, "family": families[p["arm"]]} for p in results["points"]]
    body = [_header(results), _navigation(results), _notes(results)]
    with figures.style():
        for world in results["worlds"]:
            mine = [p for p in points if p["world"] == world]
            controls = [c for c in results["controls"] if c["world"] == world]
            guides = _guides(mine)
            drawn = [
                study_figures.coverage_frontier(world, mine, controls),
                study_figures.kl_frontier(world, mine, controls),
                study_figures.distance_rows(world, mine),
                study_figures.modes_rows(world, mine, guides["modes"]),
                study_figures.coverage_rows(world, mine, {}),
            ]
            plots = "".join(figure_html(plot) for plot in drawn if plot is not None)
            body.append(_world(results, world, mine, controls, plots))
    body.append(_commands(results))
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(results['study'])} · flowrl study</title>\n"
        f"<style>{CSS}{STUDY_CSS}</style>\n</head>\n<body>\n{''.join(body)}</body>\n</html>\n"
    )
    write_whole(path, text)
    return path


def _header(results: Mapping[str, Any]) -> str:
    runs = results["runs"]
    done = sum(run["status"] == "done" for run in runs)
    seconds = sum(run.get("seconds", 0.0) for run in runs)
    about = f"<p>{escape(results['about'])}</p>" if results["about"] else ""
    return (
        f"<header><h1>{escape(results['study'])}</h1>{about}<p>{len(results['families'])} arms · "
        f"seeds {', '.join(map(str, results['seeds']))} · {done} of {len(runs)} runs done · "
        f"{seconds / 60:.0f} min of training steps</p></header>\n"
    )


def _navigation(results: Mapping[str, Any]) -> str:
    anchors = [(f"world-{w}", w) for w in results["worlds"]] + [("commands", "Commands")]
    return "<nav>" + "".join(f'<a href="#{a}">{escape(t)}</a>' for a, t in anchors) + "</nav>\n"


def _notes(results: Mapping[str, Any]) -> str:
    notes = [
        f"{run['world']}/{run['arm']} seed {run['seed']} failed: {run['message']}"
        for run in results["runs"]
        if run["status"] == "failed"
    ]
    missing = sum(run["status"] == "missing" for run in results["runs"])
    if missing:
        notes.append(f"{missing} runs are not done yet; the same command goes on.")
    if not notes:
        return ""
    told = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f'<aside class="notes" aria-label="Notes">{told}</aside>\n'


def _guides(points: Sequence[Row]) -> dict[str, dict[str, float]]:
    reference = next((p["reference"] for p in points if p.get("reference")), {})
    modes = reference.get("effective_modes_reference")
    return {"modes": {} if modes is None else {"pi_ref": modes}}


def _world(
    results: Mapping[str, Any],
    world: str,
    points: Sequence[Row],
    controls: Sequence[Row],
    plots: str,
) -> str:
    recipe = results["worlds"][world]["recipe"]
    used = [f for f in FAMILY_NAMES if any(p["family"] == f for p in points)]
    key = "".join(f'<span><i class="dot {f}"></i>{FAMILY_NAMES[f]}</span>' for f in used)
    held = _controls(controls) if controls else ""
    return (
        f'<section id="world-{escape(world)}"><h2>{escape(world)}</h2>'
        f'<p class="hint">Recipe <code>{escape(recipe)}</code>. Mean over seeds and prompts with '
        "its 95% bootstrap interval over both. An arm without a target of its own is measured "
        f"against pi_ref exp(beta r)/Z at beta {_common_beta(points)}. KL and L1 are exact.</p>"
        f'<div class="card scroll">{_arms(points)}<div class="key">{key}</div></div>'
        f'<div class="figures" style="margin-top:16px">{plots}</div>{held}</section>\n'
    )


def _common_beta(points: Sequence[Row]) -> str:
    """Of the arms that have no target of their own."""
    betas = {
        p["target"]["beta"]
        for p in points
        if p.get("target") and p["target"]["nominal_beta"] is None and p["target"]["beta"]
    }
    return ", ".join(f"{beta:g}" for beta in sorted(betas)) or "of the recipe"


def _arms(points: Sequence[Row]) -> str:
    shown = [
        column
        for column in COLUMNS
        if column[1] not in LEFT_OUT and any(column[1] in p.get("intervals", {}) for p in points)
    ]
    heads = "".join(f"<th>{escape(head)}</th>" for head, _, _ in shown)
    rows = "".join(_arm_row(point, shown) for point in points)
    return (
        '<table class="study"><thead><tr><th>arm</th><th style="text-align:left">own target<br>'
        f"own fixed point</th>{heads}<th>seeds</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _arm_row(point: Row, shown: Sequence[tuple[str, str, str]]) -> str:
    name = f'<th scope="row"><i class="dot {point["family"]}"></i>{escape(point["label"])}</th>'
    if "intervals" not in point:
        return f'<tr>{name}<td colspan="{len(shown) + 2}">not done</td></tr>'
    target = point["target"]
    told = f"{escape(describe_target(target))}<br>{escape(describe_target(target, 'fixed_point'))}"
    cells = "".join(_cell(point["intervals"].get(measure), form) for _, measure, form in shown)
    return f'<tr>{name}<td class="target">{told}</td>{cells}<td>{len(point["seeds"])}</td></tr>'


def _cell(interval: Mapping[str, float] | None, form: str) -> str:
    mean, _, spread = write_interval(interval, form).partition(" (")
    under = f'<span class="spread">{spread.rstrip(")")}</span>' if spread else ""
    return f"<td>{mean}{under}</td>"


def _controls(controls: Sequence[Row]) -> str:
    shown = [c for c in COLUMNS if any(c[1] in control["intervals"] for control in controls)]
    heads = "".join(f"<th>{escape(head)}</th>" for head, _, _ in shown)
    rows = "".join(
        f'<tr><th scope="row">{escape(control_label(control))}</th>'
        + "".join(_cell(control["intervals"].get(measure), form) for _, measure, form in shown)
        + "</tr>"
        for control in controls
    )
    return (
        '<details class="card" style="margin-top:16px"><summary>Controls: exact, without training '
        'of their own</summary><div class="scroll"><table class="study"><thead><tr><th>control</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _commands(results: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(run["world"])}/{escape(run["arm"])} seed {run["seed"]}</th>'
        f'<td style="text-align:left"><code>{escape(run["command"])}</code></td></tr>'
        for run in results["runs"]
    )
    return (
        '<section id="commands"><h2>Commands</h2><details class="card"><summary>The command of '
        f'every run</summary><div class="scroll"><table class="facts"><tbody>{rows}</tbody></table>'
        "</div></details></section>\n"
    )
