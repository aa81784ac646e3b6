"""`flowrl serve`: engines for trainers on other nodes, one after the other.

A trainer that knows the token gets an engine of its own: a server process like the one that a
trainer starts on its own node, which takes over the connection. Others are told to wait meanwhile.
It is killed when its trainer hangs up, dies, or falls silent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import select
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import flowrl
from flowrl.rollout.engine_connection import tail
from flowrl.rollout.engine_process import ServerGroup
from flowrl.rollout.engine_protocol import EngineSettings, Message, receive, send
from flowrl.rollout.engine_remote import notice_silence
from flowrl.rollout.engine_token import HANDSHAKE_LIMIT_S, admit
from flowrl.rollout_config import split_address
from flowrl.schema import ConfigError

STRANGERS = 16  # connections that may be in their handshake at once
WATCH_INTERVAL_MS = 200
LOG_WAIT_S = 5.0  # for a dying engine to be gone


class EngineListener:
    """`python` and `log_path` are the engines'. One thread for each connection."""

    def __init__(self, address: str, token: bytes, python: str, log_path: Path) -> None:
        """Listens at host:port; port 0 is any free one. Raises ConfigError where that is not
        possible."""
        host, port = split_address(address)
        self._token = token
        self._python = python
        self._log_path = log_path.resolve()
        self._engine = threading.Lock()  # held while an engine runs
        self._group: ServerGroup | None = None
        self._ended = "no engine has run"
        self._trainer = ""
        self._is_closed = False
        self._strangers = threading.BoundedSemaphore(STRANGERS)
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {address} ({error.strerror}); give an address of this machine "
                "and a free port"
            ) from error
        self.port = self._socket.getsockname()[1]

    def serve(self) -> None:
        """Until `close`, or an interrupt."""
        while True:
            try:
                connection, peer = self._socket.accept()
            except OSError:
                if self._is_closed:
                    return
                raise
            if self._strangers.acquire(blocking=False):
                name = f"{peer[0]}:{peer[1]}"
                threading.Thread(target=self._meet, args=(connection, name), daemon=True).start()
            else:
                connection.close()

    def close(self) -> None:
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which a close does not
        self._socket.close()
        if self._group is not None:
            self._group.kill()

    def _meet(self, connection: socket.socket, peer: str) -> None:
        with connection:
            try:
                notice_silence(connection)
                deadline = time.monotonic() + HANDSHAKE_LIMIT_S
                admit(connection, self._token, deadline)
                request = receive(connection, deadline)
            except (OSError, EOFError, ValueError) as error:
                _say(f"turned {peer} away: {error or 'it did not answer'}")
                return
            finally:
                self._strangers.release()
            with contextlib.suppress(OSError):
                if request.op == "start":
                    self._start(connection, request.fields, peer)
                elif request.op == "log":
                    self._send_log(connection)

    def _send_log(self, connection: socket.socket) -> None:
        if self._engine.acquire(timeout=LOG_WAIT_S):
            self._engine.release()
        fields = {"ended": self._ended, "tail": tail(self._log_path)}
        _reply(connection, "log", fields)

    def _start(self, connection: socket.socket, fields: Any, peer: str) -> None:
        if fields["flowrl"] != flowrl.__version__:
            text = f"it has flowrl {flowrl.__version__}, this is {fields['flowrl']}; install one"
            return _reply(connection, "refused", {"message": text})
        if not self._engine.acquire(blocking=False):
            return _reply(connection, "busy", {"message": f"serves {self._trainer}"})
        try:
            self._trainer = f"another trainer, {peer}, since {time.strftime('%H:%M:%S')}"
            settings = EngineSettings.from_json(fields["settings"])
            settings = dataclasses.replace(settings, log_path=str(self._log_path))
            _reply(connection, "starting", {"log": str(self._log_path)})
            self._run(connection, settings, peer)
        finally:
            self._engine.release()

    def _run(self, connection: socket.socket, settings: EngineSettings, peer: str) -> None:
        """One engine, from its start until its trainer or itself has gone."""
        self._ended = "it is still there"
        try:
            group = self._group = ServerGroup(settings, self._python, connection)
        except ConfigError as error:
            _say(str(error))
            return _reply(connection, "refused", {"message": str(error)})
        _say(f"{peer} has an engine (pid {group.pid}, log {self._log_path})")
        is_alone = _wait(group, connection)
        group.kill()
        self._ended = "it was killed, its trainer had hung up" if is_alone else group.ended
        _say(f"the engine of {peer} has ended: {self._ended}")


def _wait(group: ServerGroup, connection: socket.socket) -> bool:
    """Until the engine's server has ended or the trainer has hung up, which is told."""
    poller = select.poll()
    poller.register(connection, select.POLLRDHUP)
    while group.process.poll() is None:
        if poller.poll(WATCH_INTERVAL_MS):
            return True
    return False


def _reply(connection: socket.socket, op: str, fields: dict[str, Any]) -> None:
    send(connection, Message(op, fields), time.monotonic() + HANDSHAKE_LIMIT_S)


def _say(text: str) -> None:
    print(f"flowrl: {text}", file=sys.stderr, flush=True)
