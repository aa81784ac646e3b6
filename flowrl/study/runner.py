"""Runs jobs in worker processes, one thread each; a job that fails leaves the others alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Job(Protocol):
    """Picklable. `work` runs in a worker and raises what is wrong."""

    @property
    def label(self) -> str: ...

    @property
    def log(self) -> Path:
        """Where its output goes."""
        ...

    def work(self) -> None: ...


@dataclass(frozen=True)
class Failure:
    job: Any
    message: str


@dataclass
class _Worker:
    process: Any
    connection: Connection
    job: Any = None
    started: float = 0.0


class Workers:
    """A pool of processes for several lists of jobs; started at the first. On leaving the block,
    by an interrupt too, they end."""

    def __init__(self, count: int, say: Callable[[str], None]) -> None:
        self.count = count
        self.say = say
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            _end(worker)

    def run(self, jobs: Sequence[Any]) -> list[Failure]:
        """Works all `jobs` off, in order, and returns those that failed. A worker that dies fails
        its job alone."""
        waiting, failures = deque(jobs), list[Failure]()
        began, done = time.monotonic(), 0
        while len(self._workers) < min(self.count, len(jobs)):
            self._workers.append(_start())
        for worker in self._workers:
            _give(worker, waiting)
        while busy := {w.connection: w for w in self._workers if w.job is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                message = _result(worker)
                done += 1
                if message is not None:
                    failures.append(Failure(worker.job, message))
                left = (time.monotonic() - began) / done * (len(jobs) - done)
                self.say(_progress(worker, message, done, len(jobs), left))
                if not worker.process.is_alive():
                    worker.connection.close()
                    self._workers[self._workers.index(worker)] = worker = _start()
                _give(worker, waiting)
        return failures


def _progress(worker: _Worker, message: str | None, done: int, total: int, left: float) -> str:
    seconds = time.monotonic() - worker.started
    how = f"done in {seconds:.0f} s" if message is None else f"FAILED: {message}"
    return f"[{done}/{total}] {worker.job.label}: {how}; about {left / 60:.0f} min left"


def _start() -> _Worker:
    """Spawned, not forked: torch's threads do not survive a fork."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with _environment(_ONE_THREAD):
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
    theirs.close()
    return _Worker(process, ours)


def _give(worker: _Worker, waiting: deque[Any]) -> None:
    worker.job = waiting.popleft() if waiting else None
    worker.started = time.monotonic()
    if worker.job is not None:
        worker.connection.send(worker.job)


def _result(worker: _Worker) -> str | None:
    """None for a job that went well, else what went wrong."""
    try:
        return worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        return f"its process ended with exit code {worker.process.exitcode}; see {worker.job.log}"


def _end(worker: _Worker) -> None:
    if worker.job is None and worker.process.is_alive():
        with contextlib.suppress(BrokenPipeError):
            worker.connection.send(None)
        worker.process.join(timeout=10)
    if worker.process.is_alive():
        worker.process.terminate()
        worker.process.join()
    worker.connection.close()


def _serve(connection: Connection) -> None:
    """The worker: jobs in, None or a message out, until None comes in."""
    while (job := connection.recv()) is not None:
        connection.send(_work(job))


def _work(job: Any) -> str | None:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            job.work()
        except (Exception, SystemExit) as error:  # told to the study, which goes on without it
            traceback.print_exc()
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def as_command(arguments: Sequence[str]) -> Iterator[None]:
    """What a run writes down as its command is the one that would repeat it alone."""
    before = sys.argv
    sys.argv = ["flowrl", *arguments]
    try:
        yield
    finally:
        sys.argv = before
