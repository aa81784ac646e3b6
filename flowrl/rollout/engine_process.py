"""Where an engine runs: a server process, or the trainer's own process. Every wait has a limit.

Both kinds kill every process of the engine when they close, when a limit is over and when the
engine is found dead; both keep its output in a log file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flowrl
from flowrl.rollout.engine_protocol import (
    EngineError,
    EngineRefusedError,
    EngineSettings,
    Message,
    receive,
    send,
)
from flowrl.rollout.process_tree import children, group_members, is_alive, wait_until_gone
from flowrl.schema import ConfigError

STOP_LIMIT_S = 20.0  # for an orderly end, before the engine's processes are killed
LOG_LINES = 12
FROM_TORCHRUN = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
"""The trainer's own place among its ranks, which would make vLLM join them."""


class ServerProcess:
    """An engine in a process group of its own, spoken to over a socket. See `EngineHost`."""

    def __init__(self, settings: EngineSettings, python: str, start_limit_s: float) -> None:
        """Starts it and waits until it is ready."""
        self.log_path = Path(settings.log_path)
        self.weights_dir: str | None = None
        self._import_dir = Path(tempfile.mkdtemp(prefix="flowrl-server-"))
        self._connection, theirs = socket.socketpair()
        command = [python or sys.executable, "-m", "flowrl.rollout.engine_server",
                   str(theirs.fileno()), settings.to_json()]  # fmt: skip
        with theirs, _open_log(self.log_path) as log:
            try:
                self._process = subprocess.Popen(
                    command,
                    env=_environment(settings, self._import_dir),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # one group, so that all of it can be killed
                )
            except OSError as error:
                raise ConfigError(
                    f"rollout.server_python={python!r} cannot be started ({error.strerror}); set "
                    "it to the Python of an environment that has vllm"
                ) from error
        self.pid = self._process.pid
        self.name = f"vLLM server (pid {self.pid})"
        try:
            ready = self._answer(None, start_limit_s, "load")
        except (EngineError, EngineRefusedError):
            self._kill()
            raise
        self.weights_dir = ready.fields["weights_dir"]

    def call(self, message: Message, limit_s: float) -> Message:
        return self._answer(message, limit_s, message.op)

    def _answer(self, message: Message | None, limit_s: float, what: str) -> Message:
        deadline = time.monotonic() + limit_s
        try:
            if message is not None:
                send(self._connection, message, deadline)
            reply = receive(self._connection, deadline)
        except TimeoutError:
            self._kill()
            raise EngineError(_too_late(self.name, what, limit_s, self.log_tail())) from None
        except (EOFError, OSError) as error:
            code = self._reap()
            self._kill()
            raise EngineError(
                f"{self.name} died during {what} ({_ended(code)}); its log {self.log_path} ends: "
                f"{self.log_tail()}"
            ) from error
        if reply.op == "dead":
            self._kill()
            raise EngineError(
                f"{self.name}: {reply.fields['message']} during {what}; its log {self.log_path} "
                f"ends: {self.log_tail()}"
            )
        if reply.op == "refused":
            raise EngineRefusedError(reply.fields["message"])
        return reply

    def log_tail(self) -> str:
        return _tail(self.log_path)

    def close(self) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            send(self._connection, Message("stop"), time.monotonic() + 1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_LIMIT_S)
        self._kill()

    def _reap(self) -> int | None:
        """The exit code of a process whose end of the connection is closed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(1)
        return None

    def _kill(self) -> None:
        """The whole group: the core and the workers outlive the server that started them."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        wait_until_gone(lambda: group_members(self.pid))
        self._connection.close()
        shutil.rmtree(self._import_dir, ignore_errors=True)
        if self.weights_dir is not None:
            shutil.rmtree(self.weights_dir, ignore_errors=True)


class InProcess:
    """An engine in this process; vLLM's core is its child. See `EngineHost`."""

    name = "vLLM (in process)"

    def __init__(self, settings: EngineSettings, start_limit_s: float) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "an engine inside one of several ranks would join their process group, got "
                "rollout.mode=in_process; set rollout.mode=server"
            )
        from flowrl.rollout.vllm_engine import VLLMEngine

        self.log_path = Path(settings.log_path)
        before = set(children())
        self._engine: VLLMEngine | None = None
        self.pids: list[int] = []
        with _output_to(self.log_path):
            self._engine = self._limited(
                lambda: VLLMEngine(settings),
                start_limit_s,
                "load",
                lambda: self._kill(set(children()) - before),
            )
            _log_to(self.log_path)
        self.pids = sorted(set(children()) - before)

    def call(self, message: Message, limit_s: float) -> Message:
        engine = self._engine
        if engine is None:
            raise EngineError(f"{self.name} is not running any more")
        gone = [pid for pid in self.pids if not is_alive(pid)]
        if gone:
            self._kill(self.pids)
            raise EngineError(self._died(f"process {gone[0]} is gone", message.op))

        def answer() -> Message:
            try:
                return engine.answer(message)
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                if isinstance(error, EngineError):
                    raise
                text = f"{message.op}: {type(error).__name__}: {error}"
                raise EngineRefusedError(text) from error

        return self._limited(answer, limit_s, message.op, lambda: self._kill(self.pids))

    def _limited(
        self, action: Callable[[], Any], limit_s: float, what: str, kill: Callable[[], None]
    ) -> Any:
        """Runs the action; when the limit is over the core's processes are killed, so that vLLM
        gives up waiting for them."""
        late = threading.Event()

        def too_late() -> None:
            late.set()
            kill()

        timer = threading.Timer(limit_s, too_late)
        timer.daemon = True
        timer.start()
        try:
            return action()
        except (EngineError, EngineRefusedError) as error:
            if late.is_set():
                raise EngineError(_too_late(self.name, what, limit_s, self.log_tail())) from error
            if isinstance(error, EngineRefusedError) and all(map(is_alive, self.pids)):
                raise
            kill()
            raise EngineError(self._died(str(error), what)) from error
        finally:
            timer.cancel()

    def _died(self, why: str, what: str) -> str:
        return f"{self.name}: {why} during {what}; its log {self.log_path} ends: {self.log_tail()}"

    def log_tail(self) -> str:
        return _tail(self.log_path)

    def close(self) -> None:
        if self._engine is not None:
            timer = threading.Timer(STOP_LIMIT_S, lambda: self._kill(self.pids))
            timer.daemon = True
            timer.start()
            self._engine.close()
            timer.cancel()
            self._engine = None
        self._kill(self.pids)

    @staticmethod
    def _kill(pids: Sequence[int] | set[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until_gone(lambda: [pid for pid in pids if is_alive(pid)])


def _environment(settings: EngineSettings, import_dir: Path) -> dict[str, str]:
    """For the server: finds this flowrl, but none of the packages that lie beside it, sees its own
    GPUs and knows nothing of the trainer's ranks."""
    (import_dir / "flowrl").symlink_to(Path(flowrl.__file__).parent)
    kept = {k: v for k, v in os.environ.items() if k not in FROM_TORCHRUN}
    paths = [str(import_dir), *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    kept["PYTHONPATH"] = os.pathsep.join(paths)
    if settings.device.startswith("cuda"):
        first = int(settings.device.partition(":")[2] or 0)
        wanted = range(first, first + settings.tensor_parallel_size)
        visible = kept.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [visible[i] if i < len(visible) and visible[i] else str(i) for i in wanted]
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    return kept


def _open_log(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """This process's stdout and stderr go to the log meanwhile, and so do those of the processes
    that start meanwhile, for good."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with _open_log(path) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, saved in enumerate(kept, 1):
            os.dup2(saved, descriptor)
            os.close(saved)


def _log_to(path: Path) -> None:
    """vLLM's own logger in this process writes to the log too."""
    for handler in logging.getLogger("vllm").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(path.open("a"))


def _tail(path: Path) -> str:
    """The log's last lines, oldest first, on one line."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - 8192))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return "(no log)"
    return " | ".join(line.strip()[:200] for line in lines[-LOG_LINES:] if line.strip())


def _too_late(name: str, what: str, limit_s: float, tail: str) -> str:
    limits = {"load": "start_timeout_s", "generate": "generate_timeout_s"}
    setting = limits.get(what, "sync_timeout_s")
    return (
        f"waited {limit_s:g} s for {name} to answer {what} and killed it; raise "
        f"rollout.{setting} if it only needs longer; its log ends: {tail}"
    )


def _ended(code: int | None) -> str:
    if code is None:
        return "its process is still there"
    return f"signal {-code}" if code < 0 else f"exit status {code}"
