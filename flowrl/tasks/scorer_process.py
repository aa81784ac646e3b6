"""A user's scoring function in a process that can be killed.

    scorer = ScorerProcess("grade.py", "score", timeout_s=10.0)
    scorer.score(prompt="2+2=", response="4", answer="4", row={})    ->  Score(1.0, True)

A call that raises, takes too long, ends the process or returns something else than a reward gives a
Score with `error` set, never a reward; the process is then started again where it has to be. No
process outlives its parent. It is a limit on time and crashes, not a sandbox: the function has the
user's rights.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any, cast

from flowrl.records import Score
from flowrl.schema import ConfigError, require
from flowrl.tasks import scorer_child

LOAD_TIMEOUT_S = 60.0  # of the user's imports


class ScorerProcess:
    """One function in one process, one call at a time. Raises ConfigError if it does not load."""

    def __init__(self, path: str | Path, function: str, timeout_s: float) -> None:
        self._path = Path(path).resolve()
        self._function = function
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        require(timeout_s > 0, f"reward.timeout_s must be > 0, got {timeout_s}; set it to 10")
        require(
            self._path.is_file(),
            f"task.scorer: file not found: {path}; write path/to/file.py:function",
        )
        problem = self._start()
        if problem is not None:
            raise ConfigError(
                f"task.scorer: cannot load {function!r} from {path}: {problem}; correct that file"
            )

    @property
    def pid(self) -> int | None:
        """The running process's id; None between a kill and the next call."""
        return self._process.pid if self._process else None

    def score(self, prompt: str, response: str, answer: str, row: dict[str, Any]) -> Score:
        if self._process is None:
            problem = self._start()
            if problem is not None:
                return _failed(f"the scorer did not start again: {problem}")
        request = {"prompt": prompt, "response": response, "answer": answer, "row": row}
        reply, problem = self._exchange(request, self._timeout_s)
        if reply is None:
            return _failed(problem)
        if "error" in reply:
            return _failed(reply["error"])
        return Score(reply["reward"], reply["correct"], reply["solution"])

    def close(self) -> None:
        """Ends the process and whatever it started. A later call starts it again."""
        if self._process is not None:
            self._kill()

    def _start(self) -> str | None:
        """Starts the process and loads the function; what went wrong, or None."""
        command = [sys.executable, "-P", scorer_child.__file__, str(self._path), self._function]
        self._process = subprocess.Popen(
            [*command, str(self._timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # its own group, so that a kill takes its children along
        )
        reply, problem = self._exchange(None, LOAD_TIMEOUT_S)
        if reply is not None and "load_error" in reply:
            self._kill()
            return reply["load_error"]
        return None if reply is not None else problem

    def _exchange(
        self, request: dict[str, Any] | None, limit_s: float
    ) -> tuple[dict[str, Any] | None, str]:
        """Sends a request and waits for the reply. (None, what happened) if none came: the process
        is then gone. A timer kills the process at the limit, which ends a blocked write or read."""
        process = self._process
        assert process is not None
        stdin, stdout = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            _kill_group(process.pid)

        timer = threading.Timer(limit_s, expire)
        timer.start()
        line = b""
        try:
            if request is not None:
                stdin.write(json.dumps(request).encode() + b"\n")
                stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            pass  # the process is gone: its exit code says more, below
        except BaseException:
            self._kill()  # interrupted: a late reply must not be taken for the next call's
            raise
        finally:
            timer.cancel()
            timer.join()
        if line.endswith(b"\n") and not expired.is_set():
            return json.loads(line), ""
        status = self._kill()
        if expired.is_set():
            return None, f"no result within {limit_s:g} s; its process was killed"
        ending = f"exit code {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
        return None, f"its process ended ({ending})"

    def _kill(self) -> int:
        process = self._process
        assert process is not None
        self._process = None
        _kill_group(process.pid)
        status = process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):  # of a request that was not sent in full
                cast(IO[bytes], pipe).close()
        return status


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.killpg(pid, signal.SIGKILL)


def _failed(message: str) -> Score:
    return Score(0.0, False, error=message)
