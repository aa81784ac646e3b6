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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flowrl
from flowrl.rollout.engine_connection import (
    STOP_LIMIT_S,
    EngineConnection,
    exit_text,
    tail,
    too_late,
)
from flowrl.rollout.engine_protocol import (
    EngineError,
    EngineRefusedError,
    EngineSettings,
    Message,
)
from flowrl.rollout.engine_token import TOKEN_VARIABLE
from flowrl.rollout.owned_folder import OwnedFolder
from flowrl.rollout.process_tree import (
    children,
    is_alive,
    kill_group,
    wait_until_gone,
    without_trackers,
)
from flowrl.schema import ConfigError

LOOPBACK = "127.0.0.1"
NOT_FOR_ENGINES = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_",
    TOKEN_VARIABLE,
)  # fmt: skip
"""Variables that begin so: the trainer's own place among its ranks, which would make vLLM join
them, and a secret."""


class ServerGroup:
    """An engine's processes: one group, so that all of it can be killed."""

    def __init__(self, settings: EngineSettings, python: str, connection: socket.socket) -> None:
        """Starts it; it speaks through `connection`. Raises ConfigError if there is no such
        Python, or too few GPUs."""
        environment = _environment(settings)
        self._import_dir = OwnedFolder("flowrl-server-", Path(tempfile.gettempdir()))
        command = [python or sys.executable, "-m", "flowrl.rollout.engine_server",
                   str(connection.fileno()), settings.to_json()]  # fmt: skip
        environment["PYTHONPATH"] = _import_path(self._import_dir.path)
        with _open_log(Path(settings.log_path)) as log:
            try:
                self.process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[connection.fileno()],
                    start_new_session=True,
                )
            except OSError as error:
                self._import_dir.remove()
                raise ConfigError(
                    f"rollout.server_python={python!r} cannot be started ({error.strerror}); set "
                    "it to the Python of an environment that has vllm"
                ) from error
        self.pid = self.process.pid
        self.ended = ""  # how the server had ended when the group was killed
        self._killing = threading.Lock()

    def kill(self) -> None:
        """The core and the workers, too, which outlive the server that started them. All are gone
        when it returns, whichever thread calls."""
        with self._killing:
            if self.ended:
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)  # its end of the connection closes before it is gone
            self.ended = exit_text(self.process.returncode)
            kill_group(self.pid)
            self.process.wait()
            self._import_dir.remove()


class ServerProcess(EngineConnection):
    """An engine in a process group of its own, spoken to over a socket. See `EngineHost`."""

    trainer_address = LOOPBACK

    def __init__(self, settings: EngineSettings, python: str, start_limit_s: float) -> None:
        """Starts it and waits until it is ready."""
        self.log_path = Path(settings.log_path)
        self.folder: str | None = None
        ours, theirs = socket.socketpair()
        super().__init__(ours)
        with theirs:
            self._group = ServerGroup(settings, python, theirs)
        self.pid = self._group.pid
        self.name = f"vLLM server (pid {self.pid})"
        self.folder = self.await_ready(start_limit_s).fields["folder"]

    def end(self) -> None:
        self._connection.close()
        self._group.kill()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def await_end(self, limit_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._group.process.wait(limit_s)

    def how_it_ended(self) -> str:
        return self._group.ended

    def log_tail(self) -> str:
        return tail(self.log_path)


class InProcess:
    """An engine in this process; vLLM's core is its child. See `EngineHost`."""

    name = "vLLM (in process)"
    trainer_address = LOOPBACK

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
                lambda: self._kill(without_trackers(set(children()) - before)),
            )
            _log_to(self.log_path)
        self.pids = without_trackers(set(children()) - before)

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

        def give_up() -> None:
            late.set()
            kill()

        timer = threading.Timer(limit_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            return action()
        except (EngineError, EngineRefusedError) as error:
            if late.is_set():
                raise EngineError(too_late(self.name, what, limit_s, self.log_tail())) from error
            if isinstance(error, EngineRefusedError) and all(map(is_alive, self.pids)):
                raise
            kill()
            raise EngineError(self._died(str(error), what)) from error
        except BaseException:
            if self._engine is None:  # it was loading, and nobody else knows its processes
                kill()
            raise
        finally:
            timer.cancel()

    def _died(self, why: str, what: str) -> str:
        return f"{self.name}: {why} during {what}; its log {self.log_path} ends: {self.log_tail()}"

    def log_tail(self) -> str:
        return tail(self.log_path)

    def interrupt(self) -> None:
        self._kill(self.pids)

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
    def _kill(pids: Sequence[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until_gone(lambda: [pid for pid in pids if is_alive(pid)])


def _import_path(folder: Path) -> str:
    """PYTHONPATH of a server that finds this flowrl, but none of the packages that lie beside
    it."""
    (folder / "flowrl").symlink_to(Path(flowrl.__file__).parent)
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def _environment(settings: EngineSettings) -> dict[str, str]:
    """For the server: it sees its own GPUs and knows nothing of the trainer's ranks."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(NOT_FOR_ENGINES)}
    if settings.device.startswith("cuda"):
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(_gpus(settings, kept.get("CUDA_VISIBLE_DEVICES")))
    return kept


def _gpus(settings: EngineSettings, visible: str | None) -> list[str]:
    """What CUDA calls the engine's GPUs: the trainer's own and the next ones of those that it sees.
    Raises ConfigError where there are not so many."""
    first = int(settings.device.partition(":")[2] or 0)
    wanted = range(first, first + settings.tensor_parallel_size)
    if not visible:
        return [str(i) for i in wanted]
    names = [name.strip() for name in visible.split(",")]
    if wanted.stop > len(names):
        raise ConfigError(
            f"rollout.tensor_parallel_size={settings.tensor_parallel_size} from GPU {first} on "
            f"needs {wanted.stop} GPUs, CUDA_VISIBLE_DEVICES={visible} has {len(names)}; set it "
            "lower"
        )
    return [names[i] for i in wanted]


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
