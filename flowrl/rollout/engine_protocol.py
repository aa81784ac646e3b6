"""What a sampler and its engine say to each other: named operations with fields and arrays.

One message is a JSON head and raw bytes, over any stream socket:

    16 bytes   lengths of head and body, big-endian
    head       {"op": ..., "fields": {...}, "arrays": [[name, dtype, shape], ...]}
    body       the arrays' bytes, one after the other

Nothing is pickled, so the two ends may run different Pythons. Imports no torch and no engine.
"""

from __future__ import annotations

import dataclasses
import json
import math
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from flowrl.schema import ConfigError

_LENGTHS = struct.Struct(">QQ")
_CHUNK_BYTES = 1 << 20


class EngineError(RuntimeError):
    """The engine died, or did not answer within its limit."""


class EngineRefusedError(ConfigError):
    """The engine cannot do what was asked; it is still there."""


class WeightSyncError(RuntimeError):
    """What the engine holds is not what the trainer sent."""


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is started; plain values, so that they travel as JSON."""

    model_dir: str
    log_path: str
    dtype: str = "float32"
    device: str = "cpu"
    max_model_len: int = 256
    max_sequences: int = 256
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.5
    kv_cache_gb: float = 1.0
    enforce_eager: bool = True
    sleep: bool = False
    quantization: str | None = None
    ipc: bool = False  # weights arrive as CUDA IPC handles
    model_config: str = ""  # text of config.json, for an engine that cannot read model_dir

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EngineSettings:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Message:
    op: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


class EngineHost(Protocol):
    """Where an engine runs. Every call has a limit in seconds."""

    name: str  # for messages: what was waited for
    trainer_address: str  # this machine's, as the engine's node sees it

    def call(self, message: Message, limit_s: float) -> Message:
        """Raises EngineError if the engine is gone or the limit is over (it is killed then), and
        EngineRefusedError for what it cannot do."""
        ...

    def log_tail(self) -> str: ...

    def interrupt(self) -> None:
        """Makes a call that another thread waits in fail soon."""
        ...

    def close(self) -> None:
        """Ends the engine and every process of it."""
        ...


def send(connection: socket.socket, message: Message, deadline: float) -> None:
    """Raises TimeoutError past `deadline` (time.monotonic) and OSError if the other end is gone."""
    arrays = {name: np.ascontiguousarray(a) for name, a in message.arrays.items()}
    described = [[name, a.dtype.str, a.shape] for name, a in arrays.items()]
    head = json.dumps({"op": message.op, "fields": message.fields, "arrays": described}).encode()
    body_bytes = sum(a.nbytes for a in arrays.values())
    send_bytes(connection, memoryview(_LENGTHS.pack(len(head), body_bytes) + head), deadline)
    for array in arrays.values():
        if array.nbytes:
            send_bytes(connection, array.reshape(-1).view(np.uint8).data, deadline)


def receive(connection: socket.socket, deadline: float) -> Message:
    """Raises TimeoutError past `deadline`, EOFError if the other end closed, OSError if it died."""
    head_bytes, body_bytes = _LENGTHS.unpack(receive_bytes(connection, _LENGTHS.size, deadline))
    head = json.loads(bytes(receive_bytes(connection, head_bytes, deadline)))
    body = receive_bytes(connection, body_bytes, deadline)
    arrays, start = {}, 0
    for name, dtype, shape in head["arrays"]:
        count = math.prod(shape)
        array = np.frombuffer(body, np.dtype(dtype), count, start)
        arrays[name] = array.reshape(shape)
        start += array.nbytes
    return Message(head["op"], head["fields"], arrays)


def send_bytes(connection: socket.socket, data: memoryview, deadline: float) -> None:
    for start in range(0, len(data), _CHUNK_BYTES):
        connection.settimeout(_remaining(deadline))
        connection.sendall(data[start : start + _CHUNK_BYTES])


def receive_bytes(connection: socket.socket, size: int, deadline: float) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    done = 0
    while done < size:
        connection.settimeout(_remaining(deadline))
        got = connection.recv_into(view[done : done + _CHUNK_BYTES])
        if not got:
            raise EOFError("the other end closed the connection")
        done += got
    return data


def _remaining(deadline: float) -> float | None:
    if deadline == math.inf:
        return None
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining
