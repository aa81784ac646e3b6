"""report.html: its numbers are those of metrics.jsonl, its plots are there, and a run cut short
still gives one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from synthetic_run import BETA, PHASES, exact_table, write_lines, write_run

from flowrl.config import ConfigError
from flowrl.report import write_report
from flowrl.report.curves import phase_seconds
from flowrl.report.headline import headline, summary
from flowrl.run_reader import read_run

CURVES = {
    "reward", "eval", "optimizer", "entropy", "coverage", "length", "mismatch", "step-time",
    "throughput", "memory",
}  # fmt: skip
FLOW = {"log-z", "residual", "weights"}


class Page(HTMLParser):
    """Cells of the headline by metric, figures with their text, links, ids and tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[str]] = {}
        self.figures: dict[str, str] = {}
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.alts: dict[str, str] = {}
        self._metric = self._figure = ""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [v for k, v in found.items() if k in ("href", "src", "xlink:href", "data")]
        if tag == "tr":
            self._metric = found.get("data-metric", "")
        if tag == "td" and self._metric:
            self.rows.setdefault(self._metric, []).append("")
            self._in_cell = True
        if tag == "figure":
            self._figure = found["id"].removeprefix("fig-")
            self.figures[self._figure] = ""
        if tag == "svg":
            self.alts[self._figure] = found["aria-label"]

    def handle_endtag(self, tag):
        if tag == "td":
            self._in_cell = False
        if tag == "figure":
            self._figure = ""

    def handle_data(self, data):
        if self._in_cell:
            self.rows[self._metric][-1] += data
        if self._figure:
            self.figures[self._figure] += data


@pytest.fixture(scope="module")
def modular(tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("report") / "modular_run")
    return path, write_report(path).read_text()


@pytest.fixture(scope="module")
def countdown(tmp_path_factory):
    path = write_run(
        tmp_path_factory.mktemp("report") / "countdown_run", steps=4, exact=False, flow=False
    )
    return path, write_report(path).read_text()


def metric_rows(path, kind):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_headline_holds_the_numbers_of_the_metrics_file(modular):
    path, text = modular
    first, *_, last = metric_rows(path, "eval")
    rows = Page(text).rows
    assert set(rows) == {name for name in first if "/" in name}
    for name, (before, after, change) in rows.items():
        scale = 100 if before.endswith("%") else 1
        for cell, row in ((before, first), (after, last)):
            digits = len(cell.rstrip("%").split(".")[1])
            assert float(cell.rstrip("%")) == pytest.approx(
                scale * row[name], abs=0.5001 * 10**-digits
            ), name
        moved = scale * (last[name] - first[name])
        assert float(change.split()[0]) == pytest.approx(moved, abs=0.051), name


def test_headline_says_what_became_better_and_what_worse(modular):
    path, text = modular
    rows = Page(text).rows
    verdicts = {name: cells[2].split()[-1] for name, cells in rows.items()}
    assert verdicts["eval/modular/avg@16"] == "better"
    assert verdicts["eval/modular/pass@16"] == "worse"
    assert verdicts["diversity/l1_to_target"] == "better"  # a distance: down is good
    assert verdicts["diversity/mode_coverage"] == "pts"  # no change, so no verdict
    found = headline(read_run(path))
    assert found is not None
    told = summary(found)
    assert "avg@16 (5.8% → 17.1%)" in told.split("Worse:")[0]
    assert "pass@16 (53.1% → 31.2%)" in told.split("Worse:")[1]


def test_modular_report_has_every_plot(modular):
    page = Page(modular[1])
    exact = {f"exact-{i}" for i in range(4)}
    assert set(page.figures) == CURVES | FLOW | {"distance"} | exact
    for name, alt in page.alts.items():
        assert re.search(r"\d", alt), f"{name} says no number to those who cannot see it"


def test_countdown_report_has_solution_counts_and_no_trajectory_balance(countdown):
    page = Page(countdown[1])
    # Of eight problems the six with most solutions are drawn, most first.
    solutions = [f"solutions-{i}" for i in range(6)]
    assert set(page.figures) == CURVES | set(solutions)
    assert [re.findall(r"Problem “(\d)", page.figures[s])[0] for s in solutions] == list("765432")
    # formula of eval_detail: counts round((4 - i) * 0.3) before and round((4 - i) * 1.3) after
    assert "Found before 3, after 4 of 16" in page.figures["solutions-0"]
    assert "9*1+3-7: before 6%, after 31%" in page.alts["solutions-0"]


def test_alt_texts_hold_first_and_last_number(modular):
    path, text = modular
    train = metric_rows(path, "train")
    alt = Page(text).alts["reward"]
    assert f"{train[0]['reward/mean']:.3g} at step 1" in alt
    assert f"{train[-1]['reward/mean']:.3g} at step 60" in alt


def test_bars_of_the_target_have_the_targets_proportions(modular):
    figure = modular[1].split('id="fig-exact-0"')[1].split("</figure>")[0]
    bars = re.findall(
        r'<path d="M ([\d. ]+?) \nL ([\d. ]+?) \nL ([\d. ]+?) \nL ([\d. ]+?) \nz\n"[^>]*'
        r"fill: var\(--series-6\)",
        figure,
    )
    heights = [float(bar[0].split()[1]) - float(bar[2].split()[1]) for bar in bars[:7]]
    target = sorted(exact_table(1, 1.0)["target"], reverse=True)[:7]
    assert heights == pytest.approx([heights[0] * t / target[0] for t in target], rel=1e-3)
    assert f"exp({BETA:g} r)" in figure


def test_group_estimate_is_log_z_minus_the_gap(modular):
    path, text = modular
    last = metric_rows(path, "train")[-1]
    expected = last["flow/log_z_mean"] - last["flow/log_z_gap"]
    told = Page(text).alts["log-z"].split("group estimate")[1]
    assert f"{expected:.3g} at step 60" in told


def test_phase_seconds_adds_up():
    rows = [
        {"step": 1, "timing_s/step": 2.0, "timing_s/generate": 0.5, "timing_s/train": 1.25},
        {"step": 2, "timing_s/step": 1.0, "timing_s/train": 1.0, "timing_s/checkpoint": 3.0},
    ]
    assert phase_seconds(rows) == {
        "generate": [0.5, 0.0],
        "train": [1.25, 1.0],
        "other": [0.25, 0.0],
        "checkpoint": [0.0, 3.0],
    }


def test_phase_table_shares(modular):
    path, text = modular
    table = text.split('id="phases"')[1].split("</table>")[0]
    shares = [float(s) for s in re.findall(r"([\d.]+)%", table)]
    assert sum(shares) == pytest.approx(100, abs=0.4)
    seconds = re.search(r"generate</th><td>([\d.]+) s", table)
    assert seconds is not None
    timing = [json.loads(line) for line in (path / "timing.jsonl").read_text().splitlines()]
    expected = sum(row["timing_s/generate"] for row in timing)
    assert float(seconds[1]) == pytest.approx(expected, abs=0.051)
    assert expected == pytest.approx(60 * PHASES["generate"], rel=0.05)


def test_page_is_self_contained(modular):
    page = Page(modular[1])
    assert not page.tags & {"script", "iframe", "object", "embed", "img"}
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    fragments = {link[1:] for link in page.links if link.startswith("#")}
    assert fragments <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))  # figures do not borrow each other's clip paths
    text = modular[1].replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "://" not in text
    assert "@import" not in text
    assert set(re.findall(r"url\(([^)])", text)) == {"#"}


def test_model_text_cannot_mark_up_the_page(modular):
    assert "script" not in Page(modular[1]).tags
    assert "&lt;script&gt;alert(1)" in modular[1]


def test_setup_shows_config_command_and_environment(modular):
    text = modular[1]
    setup = text.split('id="setup"')[1]
    assert "flowrl train modular_cpu --seed 7" in setup
    assert "[objective]\nname = &quot;flowrl&quot;" in setup
    assert "Linux-6.1-x86_64" in setup
    assert 'name="viewport"' in text
    assert "@media print" in text


def test_a_resume_is_told_in_a_word_and_by_what_changed(tmp_path):
    path = write_run(tmp_path / "resumed", steps=4)
    environment = json.loads((path / "env.json").read_text())
    environment["resumes"] = [{**environment, "threads": 1}]
    (path / "env.json").write_text(json.dumps(environment))
    setup = write_report(path).read_text().split('id="setup"')[1]
    assert "resumed</th><td>once<" in setup
    assert "threads when resumed</th><td>1<" in setup
    assert setup.count("when resumed") == 1


def test_right_responses_come_first(tmp_path):
    path = write_run(tmp_path / "right", steps=4)
    rows = [
        {"step": 4, "prompt_index": index, "sample": sample, "prompt": f"p{index}",
         "response": f"r{index}.{sample}", "reward": float(right), "correct": right}
        for index in range(6) for sample in range(8) for right in [(index, sample) == (5, 7)]
    ]  # fmt: skip
    write_lines(path / "samples/step_000004.jsonl", rows)
    shown = re.findall(r"<code>(r\d\.\d)</code>", write_report(path).read_text())
    assert shown[shown.index("r5.7") :][:2] == ["r5.7", "r5.0"]
    assert shown.index("r5.7") < shown.index("r0.0")


def test_log_z_of_the_group_itself_is_not_drawn(tmp_path):
    drawn = write_report(write_run(tmp_path / "learned", steps=4)).read_text()
    path = write_run(tmp_path / "group", steps=4)
    rows = metric_rows(path, "train")
    write_lines(path / "metrics.jsonl", [{**row, "flow/log_z_gap": 1e-9} for row in rows])
    assert "own estimate" in drawn
    assert "own estimate" not in write_report(path).read_text()


def test_colours_follow_the_theme(modular):
    """A fixed dark ink would vanish on a dark page."""
    figures = re.findall(r"<svg.*?</svg>", modular[1], flags=re.DOTALL)
    assert figures
    for figure in figures:
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", figure)) <= set()


def test_crashed_run_without_evaluation_still_gives_a_report(tmp_path):
    path = write_run(tmp_path / "crashed", steps=20)
    rows = metric_rows(path, "train")[:5]
    write_lines(path / "metrics.jsonl", rows)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "reward/me')
    (path / "timing.jsonl").unlink()
    (path / "env.json").write_text("{")
    for file in [*path.glob("samples/*"), *path.glob("evals/*")]:
        file.unlink()
    text = write_report(path).read_text()
    page = Page(text)
    assert "The run ended after 5 of 20 steps" in text
    assert "metrics.jsonl: line 6 cannot be read and was left out." in text
    assert "timing.jsonl is missing." in text
    assert "env.json cannot be read" in text
    assert "No evaluation was recorded" in text
    expected = {"reward", "optimizer", "entropy", "length", "mismatch", "log-z", "weights"}
    assert set(page.figures) == expected
    assert "at step 5" in page.alts["reward"]


def test_run_that_stopped_before_its_first_step(tmp_path):
    (tmp_path / "config.toml").write_text("[trainer]\nsteps = 3\n")
    text = write_report(tmp_path).read_text()
    assert "The run ended after 0 of 3 steps" in text
    assert Page(text).figures == {}


def test_one_evaluation_has_no_after(tmp_path):
    path = write_run(tmp_path / "run", steps=4)
    rows = [row for row in metric_rows(path, "eval") if row["step"] == 0]
    write_lines(path / "metrics.jsonl", rows)
    for file in path.glob("evals/step_00000[1-9].json"):
        file.unlink()
    found = headline(read_run(path))
    assert found is not None
    assert found.after_step is None
    assert {line.after for line in found.lines} == {""}
    text = write_report(path).read_text()
    assert "nothing to compare" in text
    assert not [name for name in Page(text).figures if name.startswith("exact")]


def test_report_replaces_an_older_one_and_leaves_nothing_aside(modular):
    path, _ = modular
    (path / "report.html").write_text("old")
    assert write_report(path) == path / "report.html"
    assert (path / "report.html").read_text().startswith("<!doctype html>")
    assert not list(path.glob("*.partial"))


def test_same_run_gives_the_same_page(countdown):
    path, text = countdown
    assert write_report(path).read_text() == text


def test_no_run_directory(tmp_path):
    with pytest.raises(ConfigError, match=r"is no run directory: it has no config\.toml; give"):
        write_report(tmp_path / "nowhere")


def test_nothing_heavy_is_imported_before_a_report_is_asked_for():
    code = (
        "import sys, flowrl.report, flowrl.inspection, flowrl.loggers\n"
        "print(*({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
