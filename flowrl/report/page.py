"""The page itself: HTML text from a run's numbers and finished plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from flowrl.report.curves import phase_seconds
from flowrl.report.figures import Plot, Section
from flowrl.report.headline import Headline, Line, headline, summary
from flowrl.report.stylesheet import CSS
from flowrl.run_reader import Row, RunData, read_lines, sample_files

PROMPTS_SHOWN = 3
RESPONSES_SHOWN = 4
RESPONSE_CHARACTERS = 500


def render(run: RunData, sections: Sequence[Section]) -> str:
    """The whole page. Everything that a run recorded is escaped: model text cannot mark it up."""
    drawn = [section for section in sections if section.plots]
    anchors = [(s.name, s.title) for s in drawn]
    anchors += [("samples", "Sample responses"), ("setup", "Set-up")]
    body = [
        _header(run),
        "<nav>" + "".join(f'<a href="#{n}">{escape(t)}</a>' for n, t in anchors) + "</nav>",
        _notes(run),
        _headline_section(run),
        *(_plot_section(section) for section in drawn),
        _phase_table(run),
        _samples(run),
        _setup(run),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # without it a browser asks the server for one
        f"<title>{escape(_run_name(run))} · flowrl report</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{''.join(body)}</body>\n</html>\n"
    )


def _run_name(run: RunData) -> str:
    return run.path.resolve().name


def _header(run: RunData) -> str:
    objective = run.config.get("objective", {}).get("name")
    facts = [
        ("objective", objective),
        ("task", run.config.get("task", {}).get("name")),
        ("recipe", run.config.get("recipe")),
        ("seed", run.config.get("seed")),
    ]
    told = " · ".join(f"{name} <b>{escape(str(v))}</b>" for name, v in facts if v is not None)
    steps = f"{run.last_step}" + (f" of {run.planned_steps}" if run.planned_steps else "")
    seconds = sum(row.get("timing_s/step", 0.0) for row in run.timing)
    time = f" · {_duration(seconds)} of training steps" if seconds else ""
    return (
        f"<header><h1>{escape(_run_name(run))}</h1><p>{told}</p>"
        f"<p>{steps} steps{time}</p></header>\n"
    )


def _notes(run: RunData) -> str:
    notes = list(run.notes)
    if run.planned_steps and run.last_step < run.planned_steps:
        notes.insert(
            0,
            f"The run ended after {run.last_step} of {run.planned_steps} steps; "
            "flowrl train --resume continues it.",
        )
    for name, what in (
        ("reward/error_rate", "an answer whose scorer failed"),
        ("actor/skipped_updates", "an update skipped for a non-finite gradient"),
    ):
        count = sum(row.get(name, 0.0) > 0 for row in run.train)
        if count:
            notes.append(f"{count} of {run.last_step} steps had {what} ({name}).")
    if not notes:
        return ""
    told = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f'<aside class="notes" aria-label="Notes">{told}</aside>\n'


# --- before and after


def _headline_section(run: RunData) -> str:
    found = headline(run)
    if found is None:
        return (
            '<section id="headline"><h2>Before → after</h2><p class="card">No evaluation was '
            "recorded: the run stopped before its first one, or <code>eval.num_prompts</code> is 0."
            "</p></section>\n"
        )
    options = run.config.get("eval", {})
    told = [text.format(options[name]) for name, text in _EVAL_OPTIONS if name in options]
    how = f"Held-out problems: {', '.join(told)}." if told else "Held-out problems."
    return (
        '<section id="headline"><h2>Before → after</h2>'
        f'<p class="verdict">{escape(summary(found))}</p>'
        f'<div class="card headline">{_headline_table(found)}</div>'
        f'<p class="hint">{escape(how)} The same problems and the same noise each time.</p>'
        "</section>\n"
    )


_EVAL_OPTIONS = (
    ("num_prompts", "at most {} of them"),
    ("samples", "{} samples each"),
    ("temperature", "temperature {}"),
    ("top_p", "top_p {}"),
)


def _headline_table(found: Headline) -> str:
    after = "after" if found.after_step is None else f"step {found.after_step}"
    before = f"step {found.before_step}"
    rows = "".join(_headline_row(line, before, after) for line in found.lines)
    return (
        f"<table><thead><tr><th>measure</th><th>before<br>{before}</th>"
        f"<th>after<br>{after}</th><th>change</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _headline_row(line: Line, before: str, after: str) -> str:
    judged = line.verdict in ("better", "worse")
    tag = line.verdict if judged else "plain"
    change = f"{line.change} {line.verdict}" if judged else line.change
    return (
        f'<tr data-metric="{escape(line.metric)}"><th scope="row">{escape(line.title)}'
        f'<span class="what">{escape(line.definition)}</span></th>'
        f'<td data-label="{before}">{line.before}</td><td data-label="{after}">{line.after}</td>'
        f'<td><span class="tag {tag}">{change}</span></td></tr>'
    )


# --- plots


def _plot_section(section: Section) -> str:
    figures = "".join(figure_html(plot) for plot in section.plots)
    return (
        f'<section id="{section.name}"><h2>{escape(section.title)}</h2>'
        f'<div class="figures">{figures}</div></section>\n'
    )


def figure_html(plot: Plot) -> str:
    label = f'<svg role="img" aria-label="{escape(plot.alt)}"'
    return (
        f'<figure class="card" id="fig-{plot.name}"><h3>{escape(plot.title)}</h3>'
        f"{plot.svg.replace('<svg', label, 1)}"
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>\n"
    )


def _phase_table(run: RunData) -> str:
    seconds = {phase: sum(values) for phase, values in phase_seconds(run.timing).items()}
    total = sum(seconds.values())
    if not total:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{phase}</th><td>{value:.1f} s</td>'
        f"<td>{value / len(run.timing):.3f} s</td>"
        f'<td><span class="share" style="width:{60 * value / total:.0f}px"></span>'
        f"{value / total:.1%}</td></tr>"
        for phase, value in sorted(seconds.items(), key=lambda item: -item[1])
    )
    return (
        '<section id="phases"><h2>Where the time went</h2><div class="card"><table><thead><tr>'
        "<th>phase</th><th>total</th><th>per step</th><th>share</th></tr></thead>"
        f'<tbody>{rows}</tbody></table><p class="hint">Wall-clock seconds of rank 0 over '
        f"{len(run.timing)} steps; evaluation and start-up are not counted. “other” is what a step "
        "took beyond its phases.</p></div></section>\n"
    )


# --- samples


def _samples(run: RunData) -> str:
    files = list(sample_files(run.path, "train").items())
    if not files:
        return (
            '<section id="samples"><h2>Sample responses</h2><p class="card">No samples were '
            "recorded.</p></section>\n"
        )
    cards = "".join(_sample_card(step, read_lines(file)[0]) for step, file in _ends(files))
    return (
        f'<section id="samples"><h2>Sample responses</h2><div class="columns">{cards}</div>'
        '<p class="hint">Prompts and responses that are right come first. All of them: <code>'
        f"flowrl inspect {escape(str(run.path))}</code></p>"
        "</section>\n"
    )


def _ends(files: Sequence[Any]) -> list[Any]:
    return [files[0], files[-1]] if len(files) > 1 else list(files)


def _sample_card(step: int, rows: Iterable[Row]) -> str:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("prompt_index"), []).append(row)
    ordered = sorted(groups.values(), key=lambda group: not any(map(_is_right, group)))
    tables = "".join(_group_table(group) for group in ordered[:PROMPTS_SHOWN])
    return f'<div class="card"><h3>Training step {step}</h3>{tables}</div>'


def _group_table(group: Sequence[Row]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(_clip(str(row.get('response', ''))))}</code></td>"
        f"<td>{row.get('reward', 0.0):.2f}</td><td>{_mark(row)}</td></tr>"
        for row in sorted(group, key=lambda row: not _is_right(row))[:RESPONSES_SHOWN]
    )
    prompt = escape(_clip(str(group[0].get("prompt", ""))))
    return (
        f'<table class="responses"><caption>Prompt <code>{prompt}</code>, '
        f"{min(RESPONSES_SHOWN, len(group))} of {len(group)}</caption><thead><tr>"
        f"<th>response</th><th>reward</th><th></th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _is_right(row: Row) -> bool:
    return bool(row.get("correct"))


def _mark(row: Row) -> str:
    if row.get("error"):
        return '<span class="tag worse">scorer failed</span>'
    if _is_right(row):
        return '<span class="tag better">right</span>'
    return '<span class="tag plain">' + ("cut off" if row.get("truncated") else "wrong") + "</span>"


def _clip(text: str) -> str:
    if len(text) <= RESPONSE_CHARACTERS:
        return text
    return f"{text[:RESPONSE_CHARACTERS]}… ({len(text) - RESPONSE_CHARACTERS} more characters)"


# --- set-up


def _resumes(resumes: Sequence[Row], started: Row) -> Row:
    """How often the run was resumed, and what was another then than at its start."""
    if not resumes:
        return {}
    changed = {
        f"{name} when resumed": now[name]
        for now in resumes
        for name, value in started.items()
        if name in now and now[name] != value
    }
    return {"resumed": f"{len(resumes)} times" if len(resumes) > 1 else "once", **changed}


def _setup(run: RunData) -> str:
    environment = dict(run.environment)
    command = environment.pop("command", None)
    environment |= _resumes(environment.pop("resumes", []), environment)
    told = f"<pre>{escape(str(command))}</pre>" if command else "<p>Not recorded.</p>"
    rows = "".join(
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th>'
        f"<td>{escape('unknown' if value is None else str(value))}</td></tr>"
        for name, value in environment.items()
    )
    facts = (
        f'<table class="facts"><tbody>{rows}</tbody></table>' if rows else "<p>Not recorded.</p>"
    )
    config = escape((run.path / "config.toml").read_text(errors="replace"))
    return (
        '<section id="setup"><h2>Set-up</h2><div class="columns"><div class="card">'
        f"<h3>Command</h3>{told}</div>"
        f'<div class="card"><h3>Environment</h3>{facts}</div></div>'
        '<details class="card" style="margin-top:16px"><summary>Resolved config</summary>'
        f'<pre id="config">{config}</pre></details></section>\n'
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
