"""`flowrl train`: assemble the parts, run the steps, keep the run directory, write the report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from flowrl import assembly, checkpoint, parallel
from flowrl.config import Config
from flowrl.display import Display, before_after
from flowrl.evaluation import Evaluation, Evaluator
from flowrl.experience import Collector
from flowrl.loggers import Logger, build_loggers, check_loggers
from flowrl.metrics import Stopwatch, peak_memory_gb
from flowrl.parallel import Parallel
from flowrl.report import write_report
from flowrl.run_dir import RunDir, check_free, read_config
from flowrl.run_inputs import checked_hashes
from flowrl.run_lock import RunLock
from flowrl.run_reader import read_run
from flowrl.schema import ConfigError
from flowrl.settings import flat, from_mapping, merge, to_mapping
from flowrl.staleness import AheadCollector
from flowrl.trainer import NonFiniteLossError, StepResult, Trainer, TrainingError, check_layout

# Settings that a resumed run may change: none of them changes a number of the steps to come, but
# for the rounding of another order of sums where the layout ([parallel]) changes.
MAY_CHANGE = {
    "trainer.steps", "trainer.max_skipped_updates", "checkpoint.every", "checkpoint.keep_last",
    "parallel.processes", "parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline",
    "parallel.sequence", "parallel.overlap_p2p", "parallel.overlap_grad_reduce",
    "parallel.recompute", "parallel.reference", "run.dir", "run.loggers", "kernels.backend",
    "reward.max_error_rate", "reward.timeout_s",
    "rollout.mode", "rollout.server_python", "rollout.server_address", "rollout.server_token_file",
    "rollout.restart", "rollout.start_timeout_s",
    "rollout.generate_timeout_s", "rollout.sync_timeout_s", "rollout.sync_bucket_mb",
    "rollout.sync_checked_tensors", "rollout.sync_transport",
    "rollout.kv_cache_gb", "rollout.gpu_memory_utilization", "rollout.max_prompt_tokens",
    "model.path",  # contents are compared
}  # fmt: skip
PROBLEMS = {"task.options.train", "task.options.eval"}  # of task jsonl: contents are compared


def run(config: Config) -> None:
    """Trains from step 1. Raises ConfigError if the run directory exists."""
    config, _ = assembly.resolve(config)
    ranks = parallel.start(config.model.device, config.parallel, config.rollout.longest_wait_s)
    check_layout(config, ranks)
    ranks.agree(lambda: check_free(config.run_dir))
    _train(config, ranks, None, is_new=True)


def resume(run_path: Path, overrides: Mapping[str, Any]) -> None:
    """Continues a run from its newest valid checkpoint, or from the start if it has none."""
    recorded = read_config(run_path)
    if recorded.run_dir != run_path:  # moved since
        overrides = merge({"run": {"dir": str(run_path)}}, overrides)
    config = assembly.resolve(resumed_config(recorded, overrides))[0]
    ranks = parallel.start(config.model.device, config.parallel, config.rollout.longest_wait_s)
    check_layout(config, ranks)
    with ranks.agree(lambda: RunLock(run_path) if ranks.is_main else nullcontext()):
        _continue(config, recorded, ranks, overrides)


def _continue(
    config: Config, recorded: Config, ranks: Parallel, overrides: Mapping[str, Any]
) -> None:
    path = config.run_dir
    console = Console(quiet=not ranks.is_main, soft_wrap=True)
    found = ranks.broadcast(
        checkpoint.newest_valid(path, lambda text: console.print(text, highlight=False))
        if ranks.is_main
        else None
    )
    if found is None:
        ranks.agree(lambda: _check_nothing_is_lost(path, recorded) if ranks.is_main else None)
        console.print(f"{path} has no checkpoint; starting from step 1", highlight=False)
    elif found.step == config.trainer.steps and not (path / "report.html").exists():
        return _finish(config, ranks, console)  # it was killed between its last step and the end
    else:
        _check_resumable(config, found, overrides)
    _train(config, ranks, found, is_new=False)


def _check_nothing_is_lost(run_path: Path, recorded: Config) -> None:
    """A run without a valid checkpoint begins again, which removes what it has: only where none was
    due yet, as with checkpoint.every = 0. Raises ConfigError elsewhere."""
    damaged = sorted((run_path / "checkpoints").glob("step_*"))
    done = len(read_run(run_path).train)
    every = recorded.checkpoint.every
    if damaged or (every and done > every):
        what = f"{len(damaged)} damaged ones" if damaged else f"{done} steps without any"
        raise ConfigError(
            f"{run_path} has no valid checkpoint to resume from, but {what}, and starting over "
            "would remove them; put the checkpoints back, or start a new run with --run.dir DIR"
        )


def resumed_config(recorded: Config, overrides: Mapping[str, Any]) -> Config:
    """The recorded config with the overrides that a resume may make; others raise ConfigError."""
    wanted = from_mapping(merge(to_mapping(recorded), overrides))
    old, new = flat(to_mapping(recorded)), flat(to_mapping(wanted))
    may_change = MAY_CHANGE | PROBLEMS if recorded.task.name == "jsonl" else MAY_CHANGE
    for name in {**old, **new}:
        if old.get(name) != new.get(name) and name not in may_change:
            raise ConfigError(
                f"{name} is {old.get(name)!r} in this run and cannot become {new.get(name)!r} on "
                "resume; leave it out, or start a new run with --run.dir DIR"
            )
    return wanted


def _check_resumable(
    config: Config, found: checkpoint.Checkpoint, overrides: Mapping[str, Any]
) -> None:
    if found.step >= config.trainer.steps:
        raise ConfigError(
            f"this run is past the end: {found.step} of {config.trainer.steps} steps are done; "
            f"train on with --trainer.steps {found.step + 100}"
        )
    recorded, now = found.state["kernel_backend"], assembly.kernel_backend(config)
    asked = "backend" in overrides.get("kernels", {})
    if recorded != now and not asked:
        raise ConfigError(
            f"this run used kernel backend {recorded}, here it would be {now}, and numbers would "
            f"differ in the last bits; continue with --kernels.backend {now} to accept that"
        )


def _train(
    config: Config, ranks: Parallel, found: checkpoint.Checkpoint | None, *, is_new: bool
) -> None:
    """All that can be wrong with the settings is found before the run directory is touched."""
    check_loggers(config.run.loggers)
    with Display(config.trainer.steps, enabled=ranks.is_main) as display, ExitStack() as opened:
        parts = assembly.assemble(config, ranks, display.say)
        opened.callback(parts.close)
        evaluator = Evaluator(config, parts.task, parts.tokenizer, ranks)
        for note in assembly.notes(config, parts.task):
            display.say(note)
        state = found.state if found else None
        hashes = ranks.agree(
            lambda: checked_hashes(config, parts.task, state) if ranks.is_main else {}
        )
        open_run = RunDir.create if is_new else RunDir.reopen
        run_dir = open_run(config, assembly.kernel_backend(config), ranks)
        opened.callback(run_dir.close)
        display.say(f"run directory: {run_dir.path}")
        loggers = build_loggers(config.run.loggers, run_dir.path) if ranks.is_main else []
        for logger in loggers:
            opened.callback(logger.close)
        session = _Session(config, ranks, run_dir, parts, evaluator, display, loggers, hashes)
        session.train(found)
    _finish(config, ranks, display.console)


def _finish(config: Config, ranks: Parallel, console: Console) -> None:
    """The report, and the evaluation before and after."""
    if ranks.is_main:
        report = write_report(config.run_dir)
        evals = read_run(config.run_dir).evals
        if evals:
            first, last = ({k: v for k, v in r.items() if "/" in k} for r in (evals[0], evals[-1]))
            before_after(first, last, evals[-1]["step"], console)
        console.print(f"report: {report}", highlight=False)
    parallel.stop()


class _Session:
    """The loop around `Trainer.step`: evaluations, logs, checkpoints."""

    def __init__(
        self,
        config: Config,
        ranks: Parallel,
        run_dir: RunDir,
        parts: assembly.Parts,
        evaluator: Evaluator,
        display: Display,
        loggers: Sequence[Logger],
        hashes: Mapping[str, str],
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.run_dir = run_dir
        self.parts = parts
        self.display = display
        self.watch = Stopwatch(ranks.device)
        self.evaluator = evaluator
        self.loggers = loggers
        self.hashes = hashes
        kind = AheadCollector if config.rollout.max_staleness else Collector
        collector = kind(
            config,
            ranks,
            parts.task,
            parts.tokenizer,
            parts.sampler,
            self.watch,
            assembly.expansion(parts),
        )
        self.trainer = Trainer(
            config, ranks, collector, parts.sampler, parts.backend, parts.objective, self.watch
        )
        self.plateau = Plateau(config.loop.reference_reset_patience or 0)

    def train(self, found: checkpoint.Checkpoint | None) -> None:
        start = self._restore(found) if found else self._begin()
        steps = self.config.trainer.steps
        for number in range(start + 1, steps + 1):
            began = time.perf_counter()
            result = self._step(number)
            seconds = time.perf_counter() - began
            self._log_step(number, result, seconds)
            if number == steps or _due(number, self.config.eval.every):
                self._evaluate(number)
            if number == steps or _due(number, self.config.checkpoint.every):
                self._checkpoint(number)

    def _begin(self) -> int:
        self.run_dir.cut_back(-1, {"metrics.jsonl": 0, "timing.jsonl": 0})
        self._evaluate(0)
        return 0

    def _restore(self, found: checkpoint.Checkpoint) -> int:
        self.trainer.load(found.state["trainer"], found.path)
        self.plateau = Plateau(**found.state["plateau"])
        self.run_dir.cut_back(found.step, found.state["lengths"])
        self.display.say(f"resumed from {found.path.name}")
        return found.step

    def _step(self, number: int) -> StepResult:
        try:
            return self.trainer.step(number)
        except NonFiniteLossError as error:
            path = self.run_dir.write_failure(number, error)
            named = [
                f"prompt {r.prompt.index} sample {r.sample}" for r, _, bad in error.sequences if bad
            ]
            at_fault = ", ".join(named[:8]) or "none on this rank"
            raise TrainingError(
                f"step {number}: {error}; samples at fault: {at_fault}; batch: {path}"
            ) from None

    def _log_step(self, number: int, result: StepResult, seconds: float) -> None:
        phases = self.watch.take()
        timing = {f"timing_s/{name}": value for name, value in phases.items()}
        timing["timing_s/step"] = seconds
        timing["perf/tokens_per_s"] = result.num_tokens / seconds
        if "generate" in phases:  # else other ranks had the step's few fresh prompts
            timing["perf/gen_tokens_per_s"] = result.num_generated / phases["generate"]
        timing["perf/train_tokens_per_s"] = result.num_tokens / phases["train"]
        timing["perf/peak_mem_gb"] = peak_memory_gb(self.ranks.device)
        full = self.config.run.samples == "full"
        self.run_dir.write_step(number, result, timing, full)
        numbers = {**result.metrics, **timing}
        for logger in self.loggers:
            logger.log(number, numbers)
        self.display.step(number, numbers)

    def _evaluate(self, number: int) -> None:
        if not self.evaluator.problems:
            return
        began = time.perf_counter()
        evaluation = self.evaluator.run(self.parts.sampler, self.parts.backend)
        self.run_dir.write_eval(number, evaluation)
        self._log_seconds(number, "eval", time.perf_counter() - began)
        for logger in self.loggers:
            logger.log(number, evaluation.metrics)
        self.display.evaluation(number, evaluation.metrics)
        self._watch_plateau(number, evaluation)

    def _watch_plateau(self, number: int, evaluation: Evaluation) -> None:
        score = evaluation.metrics[f"eval/{self.parts.task.name}/avg@{self.config.eval.samples}"]
        if self.plateau.reached(score):
            self.display.say(f"step {number}: no better avg@n; the reference is the policy now")
            self.trainer.reset_reference()

    def _checkpoint(self, number: int) -> None:
        state = {
            "step": number,
            "lengths": self.run_dir.lengths(),
            "kernel_backend": assembly.kernel_backend(self.config),
            "trainer": self.trainer.state(),
            "plateau": dataclasses.asdict(self.plateau),
            "inputs": self.hashes,
            "config": to_mapping(self.config),
        }
        began = time.perf_counter()
        checkpoint.save(
            self.run_dir.path,
            number,
            state,
            self.trainer.save,
            self.ranks,
            self.config.checkpoint.keep_last,
        )
        self._log_seconds(number, "checkpoint", time.perf_counter() - began)

    def _log_seconds(self, number: int, kind: str, seconds: float) -> None:
        """Of what happens between steps."""
        if self.ranks.is_main:
            row = {"kind": kind, "step": number, f"timing_s/{kind}": seconds}
            self.run_dir.timing.write(row)


@dataclass
class Plateau:
    """Counts evaluations without a better score; `patience` 0 never reaches one."""

    patience: int
    best: float | None = None
    since: int = 0

    def reached(self, score: float) -> bool:
        """Whether this is the patience-th in a row; counting starts anew then."""
        if self.best is None or score > self.best:
            self.best, self.since = score, 0
        else:
            self.since += 1
        if not self.patience or self.since < self.patience:
            return False
        self.since = 0
        return True


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0
