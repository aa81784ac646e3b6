"""Who may speak to an engine over TCP: both ends prove that they know the same token.

    server -> trainer   MAGIC, 32 random bytes
    trainer -> server   32 random bytes, HMAC-SHA256(token, "trainer" + both)
    server -> trainer   HMAC-SHA256(token, "server" + both)

All of it has a fixed length, and a server reads nothing more before it has compared the trainer's
proof, in constant time. The token never travels. What follows is not encrypted: use a private
network or a tunnel.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
from pathlib import Path

from flowrl.rollout.engine_protocol import receive_bytes, send_bytes
from flowrl.schema import require

TOKEN_VARIABLE = "FLOWRL_ENGINE_TOKEN"
MIN_TOKEN_BYTES = 16
HANDSHAKE_LIMIT_S = 10.0
MAGIC = b"flowrl-engine-1\n"
_NONCE_BYTES = 32
_PROOF_BYTES = 32


class HandshakeError(ConnectionError):
    """The other end is no flowrl engine or trainer, or has another token."""


def read_token(path: str) -> bytes:
    """The token in the file, or without one in FLOWRL_ENGINE_TOKEN. Raises ConfigError for none and
    for one that could be guessed."""
    remedy = "make one with: python -c 'import secrets; print(secrets.token_hex())'"
    where = path or TOKEN_VARIABLE
    text = Path(path).read_text() if path else os.environ.get(TOKEN_VARIABLE, "")
    token = text.strip().encode()
    require(
        bool(token),
        f"an engine that listens for trainers needs a token that both know, {where} has none; "
        f"{remedy}, and set {TOKEN_VARIABLE} or a token file to it on both nodes",
    )
    require(
        len(token) >= MIN_TOKEN_BYTES,
        f"the token in {where} must have at least {MIN_TOKEN_BYTES} bytes, got {len(token)}; "
        f"{remedy}",
    )
    return token


def admit(connection: socket.socket, token: bytes, deadline: float) -> None:
    """A server's side. Raises HandshakeError for a trainer without the token."""
    own = secrets.token_bytes(_NONCE_BYTES)
    send_bytes(connection, memoryview(MAGIC + own), deadline)
    answer = bytes(receive_bytes(connection, _NONCE_BYTES + _PROOF_BYTES, deadline))
    theirs, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(token, b"trainer", own + theirs)):
        raise HandshakeError("it does not know the token")
    send_bytes(connection, memoryview(_proof(token, b"server", own + theirs)), deadline)


def present(connection: socket.socket, token: bytes, deadline: float) -> None:
    """A trainer's side. Raises HandshakeError for a server that does not know the token, or does
    not accept this one."""
    greeting = _expected(connection, len(MAGIC) + _NONCE_BYTES, "is no flowrl serve", deadline)
    theirs = greeting[len(MAGIC) :]
    if not greeting.startswith(MAGIC):
        raise HandshakeError("is no flowrl serve of this version")
    own = secrets.token_bytes(_NONCE_BYTES)
    answer = own + _proof(token, b"trainer", theirs + own)
    send_bytes(connection, memoryview(answer), deadline)
    proof = _expected(connection, _PROOF_BYTES, "does not accept this token", deadline)
    if not hmac.compare_digest(proof, _proof(token, b"server", theirs + own)):
        raise HandshakeError("does not know the token")


def _expected(connection: socket.socket, size: int, otherwise: str, deadline: float) -> bytes:
    try:
        return bytes(receive_bytes(connection, size, deadline))
    except TimeoutError:
        raise
    except (EOFError, OSError) as error:
        raise HandshakeError(otherwise) from error


def _proof(token: bytes, who: bytes, nonces: bytes) -> bytes:
    return hmac.digest(token, who + nonces, "sha256")
