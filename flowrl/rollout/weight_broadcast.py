"""Weights by broadcast, from a trainer to the workers of its engine: gloo on CPUs, NCCL on GPUs.

Trainer and workers make a process group of their own, the trainer as rank 0. A bucket is two
broadcasts:

    head   (2,) int64: bytes of the description, bytes of the body; END, or GIVEN_UP, instead
    body   uint8: the description (JSON [name, dtype, shape] of each tensor), then the tensors, each
           from a multiple of 16 bytes on

Both ends need torch of about the same version. Imports no vllm.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl.rollout.engine_protocol import EngineError

c10d: Any = dist  # what it does not export by name
END, GIVEN_UP = 0, -1
ALIGNMENT = 16  # bytes, more than any dtype needs
NAME = "flowrl_weights"


@dataclass(frozen=True)
class Meeting:
    """Where the members of a group find each other; plain values, so that they travel as JSON."""

    host: str  # of the trainer
    port: int
    size: int  # the trainer and the workers
    timeout_s: float


class WeightGroup:
    """One member's end. The trainer calls `send`, `end` and `give_up`, workers `receive`."""

    def __init__(
        self, meeting: Meeting, rank: int, device: torch.device, store: Any = None
    ) -> None:
        """Waits for the others. Raises RuntimeError (torch's) where they do not come in time."""
        self.device = device
        timeout = timedelta(seconds=meeting.timeout_s)
        found = store or c10d.TCPStore(meeting.host, meeting.port, meeting.size, False, timeout)
        place = c10d.PrefixStore(NAME, found), rank, meeting.size
        if device.type == "cpu":
            options = c10d.ProcessGroupGloo._Options()
            own = meeting.host if rank == 0 else _address_towards(meeting.host)
            options._devices = [c10d.ProcessGroupGloo.create_device(hostname=own)]
            options._timeout = timeout
            self._group = c10d.ProcessGroupGloo(*place, options)
        else:
            options = c10d.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = c10d.ProcessGroupNCCL(*place, options)

    def send(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        text = torch.frombuffer(
            bytearray(json.dumps(described(bucket)).encode()), dtype=torch.uint8
        )
        pieces = [text, *(t.detach().contiguous().view(-1).view(torch.uint8) for _, t in bucket)]
        body = torch.empty(sum(map(_padded, pieces)), dtype=torch.uint8, device=self.device)
        start = 0
        for piece in pieces:
            body[start : start + piece.numel()] = piece
            start += _padded(piece)
        self._broadcast(self._head(text.numel(), body.numel()))
        self._broadcast(body)

    def end(self) -> None:
        self._broadcast(self._head(END, 0))

    def give_up(self) -> None:
        """Instead of `end`: the workers' `receive` raises."""
        self._broadcast(self._head(GIVEN_UP, 0))

    def receive(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is sent, on this member's device. Raises RuntimeError where the trainer
        gives up."""
        while True:
            head = self._head(0, 0)
            self._broadcast(head)
            text_bytes, body_bytes = head.tolist()
            if text_bytes == END:
                return
            if text_bytes == GIVEN_UP:
                raise RuntimeError("the trainer gave up sending its weights")
            body = torch.empty(body_bytes, dtype=torch.uint8, device=self.device)
            self._broadcast(body)
            yield from _unpacked(body, text_bytes)

    def abort(self) -> None:
        """Ends what waits here for the others."""
        with contextlib.suppress(RuntimeError):
            self._group.abort()

    def _head(self, text_bytes: int, body_bytes: int) -> Tensor:
        return torch.tensor([text_bytes, body_bytes], device=self.device)

    def _broadcast(self, tensor: Tensor) -> None:
        self._group.broadcast(tensor, 0).wait()


def described(bucket: Sequence[tuple[str, Tensor]]) -> list[tuple[str, str, list[int]]]:
    """(name, dtype, shape) of each tensor, as JSON can hold them."""
    return [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in bucket]


def _padded(piece: Tensor) -> int:
    return -(-piece.numel() // ALIGNMENT) * ALIGNMENT


def _unpacked(body: Tensor, text_bytes: int) -> Iterator[tuple[str, Tensor]]:
    text = body[:text_bytes]
    start = _padded(text)
    for name, dtype_name, shape in json.loads(bytes(text.tolist())):
        dtype = getattr(torch, dtype_name)
        piece = body[start : start + math.prod(shape) * dtype.itemsize]
        start += _padded(piece)
        yield name, piece.view(dtype).view(shape)


def _address_towards(host: str) -> str:
    """This machine's address as `host` sees it; nothing is sent."""
    family = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]


class Broadcast:
    """A trainer's way to one engine: meets its workers once, then a transfer at a time.

    `call` asks the engine for an operation and waits for its answer; it runs beside the broadcasts,
    so that an engine that dies ends them."""

    def __init__(
        self,
        host: str,
        workers: int,
        device: torch.device,
        timeout_s: float,
        call: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """Raises what `call` raises, and EngineError where the workers do not come."""
        timeout = timedelta(seconds=timeout_s)
        store = c10d.TCPStore(host, 0, workers + 1, True, timeout, wait_for_workers=False)
        meeting = Meeting(host, store.port, workers + 1, timeout_s)
        made: list[WeightGroup] = []
        failed: list[Exception] = []

        def meet() -> None:
            try:
                made.append(WeightGroup(meeting, 0, device, store))
            except Exception as error:  # raised below
                failed.append(error)

        thread = threading.Thread(target=meet, daemon=True, name="flowrl-meets-workers")
        thread.start()
        call("join_weights", asdict(meeting))
        thread.join()
        if failed:
            raise EngineError(f"the engine's workers did not come for weights: {failed[0]}")
        self._group = made[0]

    def transfer(
        self,
        buckets: Iterator[Sequence[tuple[str, Tensor]]],
        call: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """Sends all buckets while the engine receives them. Raises what `buckets` raises, and else
        what `call` raises; then the engine is without whole weights."""
        failed: list[Exception] = []

        def receive() -> None:
            try:
                call("receive_weights", {})
            except Exception as error:  # raised below
                failed.append(error)
                self._group.abort()

        thread = threading.Thread(target=receive, daemon=True, name="flowrl-engine-receives")
        thread.start()
        try:
            broken = self._send_all(buckets)
        except BaseException:  # of `buckets`, or an interrupt: the caller's own
            _attempt(self._group.give_up)
            thread.join()
            raise
        thread.join()
        if failed:
            raise failed[0] from broken
        if broken is not None:
            raise EngineError(f"weights could not be broadcast: {broken}") from broken

    def _send_all(self, buckets: Iterator[Sequence[tuple[str, Tensor]]]) -> RuntimeError | None:
        """What ended the broadcasts early, if anything did."""
        for bucket in buckets:
            broken = _attempt(self._group.send, bucket)
            if broken is not None:
                return broken
        return _attempt(self._group.end)


def _attempt(action: Callable[..., None], *arguments: Any) -> RuntimeError | None:
    try:
        action(*arguments)
    except RuntimeError as error:
        return error
    return None
