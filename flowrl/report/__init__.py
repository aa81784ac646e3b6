"""`report.html`: one self-contained page about a run, with no script and nothing loaded from afar.

    write_report(Path("runs/countdown_cpu"))

headline.py says what changed from before to after; figures.py draws (the only user of matplotlib),
curves.py and solutions.py say what; page.py and stylesheet.py lay it out.
"""

from __future__ import annotations

from pathlib import Path

from flowrl.files import write_whole
from flowrl.run_reader import read_run


def write_report(run_dir: Path) -> Path:
    """Writes run_dir/report.html, aside and renamed, and returns its path. A run that was cut short
    gives a report of what there is. Raises ConfigError if `run_dir` is no run directory."""
    run = read_run(run_dir)
    # Matplotlib takes most of a second to load, which only those who want a report should pay.
    from flowrl.report import curves, figures, page, solutions

    with figures.style():
        learning, diversity, *others = curves.sections(run)
        sections = [learning, diversity, solutions.section(run), *others]
    text = page.render(run, sections)
    path = run_dir / "report.html"
    write_whole(path, text)
    return path
