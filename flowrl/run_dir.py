"""The run directory: what a run leaves on the disk, and how a resume cuts it back.

config.toml env.json metrics.jsonl timing.jsonl samples/ evals/ checkpoints/ logs/ report.html lock
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import flowrl
from flowrl import checkpoint, run_lock
from flowrl.config import Config
from flowrl.evaluation import Evaluation
from flowrl.files import write_whole
from flowrl.metrics import JsonLines
from flowrl.models import Backend
from flowrl.parallel import Parallel
from flowrl.records import Rollout, Score
from flowrl.run_lock import RunLock
from flowrl.run_reader import check_run_dir, read_run
from flowrl.schema import ConfigError, read_toml
from flowrl.settings import from_mapping, to_toml
from flowrl.trainer import NonFiniteLossError, StepResult


class RunDir:
    """Written by rank 0 only; the other ranks take part in what gathers from them."""

    def __init__(self, path: Path, parallel: Parallel) -> None:
        self.path = path
        self.parallel = parallel
        self.lock: RunLock | None = None
        if parallel.is_main:
            for name in ("samples", "evals", "checkpoints"):
                (path / name).mkdir(parents=True, exist_ok=True)
            self.metrics = JsonLines(path / "metrics.jsonl")
            self.timing = JsonLines(path / "timing.jsonl")

    @classmethod
    def create(cls, config: Config, kernel_backend: str, parallel: Parallel) -> RunDir:
        """Raises ConfigError if the directory exists and is not empty. Locks it until `close`."""
        lock = parallel.agree(lambda: _take(config.run_dir) if parallel.is_main else None)
        environment = describe_environment(config, kernel_backend, parallel)
        run_dir = cls._open(config, environment, parallel)
        run_dir.lock = lock
        return run_dir

    @classmethod
    def reopen(cls, config: Config, kernel_backend: str, parallel: Parallel) -> RunDir:
        """An existing run, with what this resume changes written down. The caller has its lock."""
        environment = read_run(config.run_dir).environment
        now = describe_environment(config, kernel_backend, parallel)
        environment.setdefault("resumes", []).append(now)
        return cls._open(config, environment, parallel)

    @classmethod
    def _open(cls, config: Config, environment: dict[str, Any], parallel: Parallel) -> RunDir:
        def write() -> None:
            if parallel.is_main:
                config.run_dir.mkdir(parents=True, exist_ok=True)
                # First, and whole: without it a directory is no run.
                write_whole(config.run_dir / "config.toml", to_toml(config))
                text = json.dumps(environment, indent=1) + "\n"
                write_whole(config.run_dir / "env.json", text)

        parallel.agree(write)
        return parallel.agree(lambda: cls(config.run_dir, parallel))

    # --- writing

    def write_step(
        self, step: int, result: StepResult, timing: Mapping[str, float], full: bool
    ) -> None:
        lines = self._gather_samples(step, result, full)

        def write() -> None:
            if self.parallel.is_main:
                self.metrics.write({"kind": "train", "step": step, **result.metrics})
                self.timing.write({"kind": "train", "step": step, **timing})
                write_whole(self.path / "samples" / f"step_{step:06d}.jsonl", "".join(lines))

        self.parallel.agree(write)

    def write_eval(self, step: int, evaluation: Evaluation) -> None:
        self.parallel.agree(lambda: self._write_eval(step, evaluation))

    def _write_eval(self, step: int, evaluation: Evaluation) -> None:
        if not self.parallel.is_main:
            return
        self.metrics.write({"kind": "eval", "step": step, **evaluation.metrics})
        path = self.path / "evals" / f"step_{step:06d}.json"
        write_whole(path, json.dumps(evaluation.detail))
        samples = [
            _sample_row(step, rollout, score, full=False)
            for rollout, score in zip(evaluation.rollouts, evaluation.scores, strict=True)
        ]
        _write_lines(self.path / "samples" / f"eval_{step:06d}.jsonl", samples)

    def write_failure(self, step: int, error: NonFiniteLossError) -> Path:
        """The update that stopped the run, in full, with the samples at fault marked."""
        path = self.path / f"failed_step_{step:06d}.rank{self.parallel.rank}.jsonl"
        if self.parallel.model_rank:
            return path  # the replica's first process writes it
        rows = [
            {"at_fault": at_fault, **_sample_row(step, rollout, score, full=True)}
            for rollout, score, at_fault in error.sequences
        ]
        _write_lines(path, rows)
        return path

    def _gather_samples(self, step: int, result: StepResult, full: bool) -> list[str]:
        """Every replica's lines on the main process, which alone holds them; elsewhere none."""
        mine = []
        for index, (rollout, score) in enumerate(zip(result.rollouts, result.scores, strict=True)):
            measured = {name: float(values[index]) for name, values in result.rows.items()}
            row = {**_sample_row(step, rollout, score, full=full), **measured}
            mine.append((rollout.prompt.index, rollout.sample, _line(row)))
        return [line for *_, line in sorted(itertools.chain(*self.parallel.gather_to_main(mine)))]

    # --- resuming

    def lengths(self) -> dict[str, int]:
        """Bytes on the disk of the files that a resume cuts back to this point."""

        def sync() -> dict[str, int]:
            if not self.parallel.is_main:
                return {}
            return {"metrics.jsonl": self.metrics.sync(), "timing.jsonl": self.timing.sync()}

        return self.parallel.agree(sync)

    def cut_back(self, step: int, lengths: Mapping[str, int]) -> None:
        """Drops all that was written after the checkpoint of `step`."""
        self.parallel.agree(lambda: self._cut_back(step, lengths))

    def _cut_back(self, step: int, lengths: Mapping[str, int]) -> None:
        if not self.parallel.is_main:
            return
        checkpoint.drop_newer(self.path, step)
        self.metrics.cut(lengths["metrics.jsonl"])
        self.timing.cut(lengths["timing.jsonl"])
        for path in [*self.path.glob("samples/*_*.jsonl"), *self.path.glob("evals/step_*.json")]:
            if int(path.stem.split("_")[1]) > step:
                path.unlink()

    def close(self) -> None:
        if self.parallel.is_main:
            self.metrics.close()
            self.timing.close()
        if self.lock is not None:
            self.lock.release()


def read_config(path: Path) -> Config:
    """The config of an existing run. Raises ConfigError where there is none."""
    check_run_dir(path)
    return from_mapping(read_toml(path / "config.toml"))


def _take(path: Path) -> RunLock:
    check_free(path)
    make_directory(path, "--run.dir")
    check_writable(path)
    lock = RunLock(path)
    try:
        check_free(path)  # another may have come first
    except ConfigError:
        lock.release()
        raise
    return lock


def make_directory(path: Path, flag: str) -> None:
    """With those above it. Raises ConfigError, naming the flag that chooses it, where it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make directory {path}: {error.strerror}; choose another with {flag} DIR"
        ) from error


def check_free(path: Path) -> None:
    """Raises ConfigError unless a new run may be written to `path`."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run directory {path} is a file; choose another with --run.dir DIR")
    if (path / "config.toml").is_file():
        raise ConfigError(
            f"run directory {path} exists; continue it with --resume, or choose another with "
            "--run.dir DIR"
        )
    before_it = ("logs", run_lock.FILE)  # of a run that begins
    if path.exists() and any(p.name not in before_it for p in path.iterdir()):
        raise ConfigError(
            f"directory {path} is not empty and holds no run; choose another with --run.dir DIR"
        )


def check_writable(path: Path) -> None:
    """Raises ConfigError where the directory, or the nearest above it that exists, cannot be
    written to."""
    nearest = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write to {nearest}; choose another run directory: --run.dir DIR")


def restore_newest(path: Path, backend: Backend) -> int:
    """Loads a run's newest valid checkpoint; returns its step. Raises ConfigError without one."""
    found = checkpoint.newest_valid(path, print)
    if found is None:
        raise ConfigError(
            f"{path} has no valid checkpoint; one is written every checkpoint.every steps and at "
            "the end of a run"
        )
    backend.load_state(found.path)
    return found.step


def describe_environment(config: Config, kernel_backend: str, parallel: Parallel) -> dict[str, Any]:
    return {
        "flowrl": flowrl.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if parallel.device.type == "cuda" else "cpu",
        "kernel_backend": kernel_backend,
        "git_commit": _git_commit(),
        "seed": config.seed,
        "world_size": parallel.world_size,
        "processes": parallel.num_processes,
        "command": shlex.join(["flowrl", *sys.argv[1:]]),
    }


def _git_commit() -> str | None:
    """Of the checkout that the package lies in, if it lies in one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _sample_row(step: int, rollout: Rollout, score: Score, *, full: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": step,
        "prompt_index": rollout.prompt.index,
        "sample": rollout.sample,
        "prompt": rollout.prompt.text,
        "response": rollout.text,
        "reward": score.reward,
        "correct": score.correct,
        "solution": score.solution,
        "error": score.error,
        "truncated": rollout.truncated,
        "policy_version": rollout.policy_version,
        "response_length": len(rollout.response_ids),
    }
    if full:
        row["prompt_ids"] = list(rollout.prompt.token_ids)
        row["response_ids"] = list(rollout.response_ids)
        row["rollout_logprobs"] = list(rollout.rollout_logprobs)
    return row


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_whole(path, "".join(map(_line, rows)))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
