"""An engine that `flowrl serve` runs on another node, for the length of one connection.

The trainer sends the model's config.json and later its weights: the other node needs neither the
model's files nor a shared file system.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import sys
import time
from functools import cached_property
from pathlib import Path

import flowrl
from flowrl.rollout.engine_connection import EngineConnection
from flowrl.rollout.engine_protocol import (
    EngineError,
    EngineRefusedError,
    EngineSettings,
    Message,
    receive,
    send,
)
from flowrl.rollout.engine_token import HANDSHAKE_LIMIT_S, HandshakeError, present
from flowrl.rollout_config import split_address
from flowrl.schema import ConfigError

REACH_LIMIT_S = 60.0  # for a server to come up, or to get rid of the trainer before
RETRY_S = 0.5
LOG_LIMIT_S = 10.0
LOST_AFTER_S = 120  # a node that is silent for so long is gone


class RemoteServer(EngineConnection):
    """See `EngineHost`."""

    def __init__(
        self, address: str, token: bytes, settings: EngineSettings, start_limit_s: float
    ) -> None:
        """Has it started there and waits until it is ready."""
        self.address = address
        self.name = f"vLLM server at {address}"
        self.log_path = Path("(not known)")
        self._token = token
        deadline = time.monotonic() + start_limit_s
        super().__init__(self._reach(_start_message(settings), deadline))
        self.await_ready(max(0.0, deadline - time.monotonic()))

    def _reach(self, start: Message, deadline: float) -> socket.socket:
        """A connection whose other end loads the engine. A server that is not up yet, or not yet
        rid of another trainer, is waited for."""
        give_up = min(deadline, time.monotonic() + REACH_LIMIT_S)
        is_told = False
        while True:
            why = ""
            try:
                connection, reply = self._ask(start, deadline)
            except OSError as error:
                why = f"cannot be reached ({str(error) or 'it does not answer'})"
            else:
                if reply.op == "starting":
                    self.trainer_address = connection.getsockname()[0]
                    self.log_path = Path(reply.fields["log"])
                    return connection
                connection.close()
                why = reply.fields["message"]
                if reply.op == "refused":
                    raise EngineRefusedError(f"{self.name}: {why}")
            if time.monotonic() > give_up:
                raise EngineError(
                    f"{self.name} {why}; start `flowrl serve {self.address}` there with the same "
                    "token, or correct rollout.server_address"
                )
            if not is_told:
                print(f"flowrl: {self.name} {why}; waiting for it", file=sys.stderr)
                is_told = True
            time.sleep(RETRY_S)

    def _ask(self, message: Message, deadline: float) -> tuple[socket.socket, Message]:
        """A new connection and the server's first answer on it."""
        try:
            remaining = max(0.001, deadline - time.monotonic())
            connection = socket.create_connection(split_address(self.address), remaining)
        except socket.gaierror as error:
            raise ConfigError(
                f"rollout.server_address: no host of that name in {self.address} "
                f"({error.strerror}); correct it"
            ) from error
        try:
            notice_silence(connection)
            present(connection, self._token, min(deadline, time.monotonic() + HANDSHAKE_LIMIT_S))
            send(connection, message, deadline)
            return connection, receive(connection, deadline)
        except HandshakeError as error:
            connection.close()
            raise EngineRefusedError(
                f"{self.name} {error}; set rollout.server_address to a flowrl serve with the same "
                "version and token"
            ) from error
        except EOFError as error:
            connection.close()
            raise ConnectionError("it closed the connection") from error
        except OSError:
            connection.close()
            raise

    def end(self) -> None:
        """The server kills an engine whose trainer hangs up."""
        self._connection.close()

    def how_it_ended(self) -> str:
        return self._log.fields["ended"]

    def log_tail(self) -> str:
        return self._log.fields["tail"]

    @cached_property
    def _log(self) -> Message:
        """What the server says of the engine's end, asked for when it has ended."""
        with contextlib.suppress(OSError, ConfigError):
            deadline = time.monotonic() + LOG_LIMIT_S
            connection, reply = self._ask(Message("log"), deadline)
            connection.close()
            if reply.op == "log":
                return reply
        return Message("log", {"ended": "nobody answers there", "tail": "(out of reach)"})


def notice_silence(connection: socket.socket) -> None:
    """A node that has gone without a word is noticed, and small messages are not held back."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LOST_AFTER_S // 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LOST_AFTER_S // 8)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_AFTER_S * 1000)


def _start_message(settings: EngineSettings) -> Message:
    text = (Path(settings.model_dir) / "config.json").read_text()
    sent = dataclasses.replace(settings, model_dir="", log_path="", model_config=text)
    return Message("start", {"flowrl": flowrl.__version__, "settings": sent.to_json()})
