"""A trainer's end of the conversation with an engine in another process: every call has a limit."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

from flowrl.rollout.engine_protocol import (
    EngineError,
    EngineRefusedError,
    Message,
    receive,
    send,
)

STOP_LIMIT_S = 20.0  # for an orderly end, before the engine's processes are killed
LOG_LINES = 12


class EngineConnection:
    """See `EngineHost`. A kind of server says how its engine is ended and where its log is."""

    name: str
    log_path: Path  # for messages; on the engine's node

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def end(self) -> None:
        """Kills every process of the engine, also when that has been done."""
        raise NotImplementedError

    def await_end(self, limit_s: float) -> None:
        """Waits for the orderly end of the engine, or as long as the limit."""
        with contextlib.suppress(TimeoutError):
            receive(self._connection, time.monotonic() + limit_s)  # nothing but its close

    def how_it_ended(self) -> str:
        raise NotImplementedError

    def log_tail(self) -> str:
        raise NotImplementedError

    def call(self, message: Message, limit_s: float) -> Message:
        return self._answer(message, limit_s, message.op)

    def interrupt(self) -> None:
        with contextlib.suppress(OSError):  # closed already
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """An orderly end, where the engine still listens."""
        with contextlib.suppress(OSError, EOFError):
            send(self._connection, Message("stop"), time.monotonic() + 1)
            self.await_end(STOP_LIMIT_S)
        self.end()

    def await_ready(self, limit_s: float) -> Message:
        """Waits until the model is loaded."""
        try:
            return self._answer(None, limit_s, "load")
        except (EngineError, EngineRefusedError):
            self.end()
            raise

    def _answer(self, message: Message | None, limit_s: float, what: str) -> Message:
        deadline = time.monotonic() + limit_s
        try:
            if message is not None:
                send(self._connection, message, deadline)
            reply = receive(self._connection, deadline)
        except (EOFError, OSError) as error:
            self.end()
            if isinstance(error, TimeoutError) and error.errno is None:  # the deadline's
                raise EngineError(too_late(self.name, what, limit_s, self.log_tail())) from None
            ended = self.how_it_ended()
            raise EngineError(self._died(f"died during {what} ({ended})")) from error
        if reply.op == "dead":
            self.end()
            raise EngineError(self._died(f"{reply.fields['message']} during {what}"))
        if reply.op == "refused":
            raise EngineRefusedError(reply.fields["message"])
        return reply

    def _died(self, how: str) -> str:
        return f"{self.name} {how}; its log {self.log_path} ends: {self.log_tail()}"


def too_late(name: str, what: str, limit_s: float, tail: str) -> str:
    limits = {"load": "start_timeout_s", "generate": "generate_timeout_s"}
    setting = limits.get(what, "sync_timeout_s")
    return (
        f"waited {limit_s:g} s for {name} to answer {what} and killed it; raise "
        f"rollout.{setting} if it only needs longer; its log ends: {tail}"
    )


def tail(path: Path) -> str:
    """A log's last lines, oldest first, on one line."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - 8192))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return "(no log)"
    return " | ".join(line.strip()[:200] for line in lines[-LOG_LINES:] if line.strip())


def exit_text(code: int | None) -> str:
    if code is None:
        return "its process is still there"
    return f"signal {-code}" if code < 0 else f"exit status {code}"
