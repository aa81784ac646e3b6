"""What a study's workers do: train one run, or work one control out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl import assembly
from flowrl.commands import train
from flowrl.files import write_whole
from flowrl.run_dir import read_config
from flowrl.run_reader import read_run
from flowrl.schema import ConfigError
from flowrl.settings import flat, to_mapping
from flowrl.study import controls
from flowrl.study.plan import Run, Study
from flowrl.study.runner import as_command


@dataclass(frozen=True)
class TrainJob:
    run: Run

    @property
    def label(self) -> str:
        return self.run.label

    @property
    def log(self) -> Path:
        return self.run.directory.with_suffix(".log")

    def work(self) -> None:
        with as_command(self.run.arguments):
            if (self.run.directory / "config.toml").is_file():
                train.resume(self.run.directory, {})
            else:
                train.run(self.run.config)


def is_done(run: Run) -> bool:
    """Trained to the end with these very settings, wherever it lies, and reported. Raises
    ConfigError where the directory holds a run with other settings."""
    if not (run.directory / "config.toml").is_file():
        return False
    wanted = assembly.resolve(run.config)[0]
    old, new = (flat(to_mapping(c)) for c in (read_config(run.directory), wanted))
    for name in sorted({*old, *new} - {"run.dir"}):
        if old.get(name) != new.get(name):
            raise ConfigError(
                f"{run.directory} was trained with {name}={old.get(name)!r}, the study now says "
                f"{new.get(name)!r}; remove that directory, or choose another with --out DIR"
            )
    evals = read_run(run.directory).evals
    finished = bool(evals) and evals[-1]["step"] == wanted.trainer.steps
    return finished and (run.directory / "report.html").is_file()


@dataclass(frozen=True)
class ControlJob:
    """One file of control points. `needs_policy`: of the run's trained policy, else of pi_ref."""

    run: Run
    path: Path
    options: dict[str, tuple[float, ...]]
    needs_policy: bool

    @property
    def label(self) -> str:
        kind = "temperatures" if self.needs_policy else "controls from pi_ref"
        return f"{self.run.label if self.needs_policy else self.run.world}: {kind}"

    @property
    def log(self) -> Path:
        return self.path.with_suffix(".log")

    def is_done(self) -> bool:
        if not self.path.is_file():
            return False
        report = self.run.directory / "report.html"
        fresh = self.path.stat().st_mtime >= report.stat().st_mtime
        return fresh and json.loads(self.path.read_text())["options"] == _plain(self.options)

    def work(self) -> None:
        work = controls.temperature_points if self.needs_policy else controls.reference_points
        points = work(self.run, **self.options)
        told = {"options": _plain(self.options), "command": self.run.command, "points": points}
        write_whole(self.path, json.dumps(told))


def control_jobs(study: Study, runs: Iterable[Run], out: Path) -> list[ControlJob]:
    """Of the runs that are done: temperatures of each chosen arm's own point and every seed, and
    once a world the controls from pi_ref."""
    jobs: list[ControlJob] = []
    seen: set[str] = set()
    options = study.controls
    for run in runs:
        folder = out / study.name / run.world / "controls"
        if run.world not in seen and (options.rejection_tries or options.target_betas):
            given = {"tries": options.rejection_tries, "betas": options.target_betas}
            jobs.append(ControlJob(run, folder / "reference.json", given, False))
        seen.add(run.world)
        if run.arm in options.temperature_arms and not run.point and options.temperatures:
            path = folder / f"{run.arm}_seed_{run.seed}.json"
            given = {"temperatures": options.temperatures}
            jobs.append(ControlJob(run, path, given, True))
    return jobs


def _plain(options: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    return {name: list(values) for name, values in options.items()}
