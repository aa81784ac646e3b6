"""`flowrl compare STUDY`: train every arm in every world and write what came of it.

flowrl compare laptop                    all of it; the same command resumes
flowrl compare laptop --arms tb,grpo     some arms; the page shows what is there
flowrl compare laptop --table            the results as Markdown
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from flowrl import assembly, parallel
from flowrl.files import write_whole
from flowrl.option_tables import check_tables
from flowrl.report.study_page import write_study_page
from flowrl.run_dir import make_directory
from flowrl.schema import ConfigError
from flowrl.study.jobs import TrainJob, control_jobs, is_done
from flowrl.study.plan import Run, Study, plan_runs, read_study
from flowrl.study.results import collect
from flowrl.study.runner import Failure, Workers
from flowrl.study.tables import markdown
from flowrl.tasks import build_task

if TYPE_CHECKING:
    from flowrl.cli import CompareArgs


class StudyError(RuntimeError):
    """Some runs failed; the others are done and reported."""


def run(args: CompareArgs) -> None:
    """Raises ConfigError for a study that cannot work, before anything is trained; StudyError at
    the end if a run failed."""
    study = read_study(args.study)
    if args.workers < 0:
        raise ConfigError(f"--workers must be >= 0, got {args.workers}; leave it out for all cores")
    if args.dry_run + args.report + args.table > 1:
        raise ConfigError("--dry-run, --report and --table exclude each other; give one")
    if args.table:
        return print(markdown(_read(args.out / study.name / "study.json")))
    console = Console(soft_wrap=True, highlight=False)
    everything = plan_runs(study, args.out)
    chosen = plan_runs(study, args.out, [a for a in args.arms.split(",") if a])
    for recipe in sorted({world.recipe for world in study.worlds.values()}):
        check_tables(recipe)
    for planned in chosen:
        _check(planned)
    if args.dry_run:
        return _list(study, chosen, console)
    make_directory(args.out / study.name, "--out")
    failures = [] if args.report else _train(study, chosen, args, console)
    _write(study, everything, failures, args.out, console)
    if failures:
        first = failures[0]
        raise StudyError(
            f"{len(failures)} of {len(chosen)} runs or controls failed, {first.job.label} for one: "
            f"{first.message}; its output is in {first.job.log}, the same command tries again"
        )


def _check(planned: Run) -> None:
    try:
        assembly.resolve(planned.config)
    except ConfigError as error:
        raise ConfigError(f"{planned.label}: {error}; or leave it out with --arms") from error


def _train(study: Study, runs: Sequence[Run], args: CompareArgs, console: Console) -> list[Failure]:
    def say(text: str) -> None:
        console.print(text, markup=False)

    workers = args.workers or os.cpu_count() or 1
    waiting = [TrainJob(r) for r in runs if not is_done(r)]
    say(
        f"study {study.name}: {len(runs)} runs, {len(runs) - len(waiting)} of them done; "
        f"{workers} worker processes"
    )
    if waiting:
        _build_bases([job.run for job in waiting], say)
    with Workers(workers, say) as pool:
        failures = pool.run(waiting)
        failed = {failure.job.label for failure in failures}
        trained = [r for r in runs if r.label not in failed]
        controls = [job for job in control_jobs(study, trained, args.out) if not job.is_done()]
        return failures + pool.run(controls)


def _build_bases(runs: Sequence[Run], say: Any) -> None:
    """Each world's base model, once, before its arms want it all at the same time."""
    worlds = {r.world: r for r in runs}
    for world in worlds.values():
        config = world.config
        if config.model.path:
            continue
        task = build_task(config.task.name, config.task.options, config.reward.timeout_s)
        assembly.model_dir(config, task, parallel.start(config.model.device), say)
        task.close()


def _write(
    study: Study, runs: Sequence[Run], failures: Sequence[Failure], out: Path, console: Console
) -> None:
    told = {f.job.label: f.message for f in failures if isinstance(f.job, TrainJob)}
    folder = out / study.name
    files = sorted(folder.glob("*/controls/*.json"))
    results = collect(study, runs, told, files)
    write_whole(folder / "study.json", json.dumps(results, indent=1) + "\n")
    page = write_study_page(results, folder / "study.html")
    done = sum(row["status"] == "done" for row in results["runs"])
    console.print(f"{done} of {len(runs)} runs are in {folder / 'study.json'}", markup=False)
    console.print(f"page: {page}", markup=False)


def _list(study: Study, runs: Sequence[Run], console: Console) -> None:
    for planned in runs:
        console.print(f"{planned.label}\n    {planned.command}", markup=False)
    console.print(f"study {study.name}: {len(runs)} runs", markup=False)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path} is not there; run the study first, or give its --out DIR")
    return json.loads(path.read_text())
