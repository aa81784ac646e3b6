"""Weights by broadcast over gloo: what is sent arrives, and a lost end is noticed."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flowrl.rollout.engine_protocol import EngineError
from flowrl.rollout.weight_broadcast import Broadcast, Meeting, WeightGroup

CPU = torch.device("cpu")
WEIGHTS = {
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "bytes": torch.arange(7, dtype=torch.uint8),  # what follows it begins at a multiple of 16
    "half": torch.randn(3, 5).bfloat16(),
    "across": torch.randn(6, 4).T,
    "double": torch.randn(11, dtype=torch.float64),
}


class Workers:
    """An engine's workers, each a thread, behind the operations that a trainer asks for."""

    def __init__(self, count: int, breaks_at: str = "") -> None:
        self.breaks_at = breaks_at
        self.pool = ThreadPoolExecutor(count)
        self.count = count
        self.groups: list[WeightGroup] = []
        self.received: list[dict[str, torch.Tensor]] = []

    def call(self, operation, fields):
        if self.breaks_at == operation:
            raise EngineError(f"it died during {operation}")
        if operation == "join_weights":
            meeting = Meeting(**fields)
            ranks = range(1, self.count + 1)
            self.groups = list(self.pool.map(lambda r: WeightGroup(meeting, r, CPU), ranks))
        else:
            self.received = list(self.pool.map(self._receive, self.groups))

    def _receive(self, group):
        found = {}
        for name, tensor in group.receive():
            if self.breaks_at == name:
                raise ValueError(f"no room for {name}")
            found[name] = tensor.clone()
        return found


def in_buckets(weights, size=2):
    entries = list(weights.items())
    yield from (entries[start : start + size] for start in range(0, len(entries), size))


@pytest.mark.parametrize("count", [1, 2])
def test_every_worker_gets_every_tensor_again_and_again(count):
    workers = Workers(count)
    broadcast = Broadcast("127.0.0.1", count, CPU, 20.0, workers.call)
    for factor in (1, 2):
        sent = {name: tensor * factor for name, tensor in WEIGHTS.items()}
        broadcast.transfer(in_buckets(sent), workers.call)
        assert len(workers.received) == count
        for received in workers.received:
            assert received.keys() == sent.keys()
            for name, tensor in sent.items():
                assert received[name].dtype == tensor.dtype
                assert torch.equal(received[name], tensor), name


def test_workers_that_never_come_are_named():
    with pytest.raises(EngineError, match="did not come"):
        Broadcast("127.0.0.1", 1, CPU, 1.0, lambda operation, fields: None)


@pytest.mark.parametrize("operation", ["join_weights", "receive_weights"])
def test_an_engine_that_dies_ends_the_transfer(operation):
    workers = Workers(1, breaks_at=operation)
    with pytest.raises(EngineError, match="it died"):
        Broadcast("127.0.0.1", 1, CPU, 20.0, workers.call).transfer(
            in_buckets(WEIGHTS), workers.call
        )


def test_a_worker_that_refuses_a_tensor_ends_the_transfer():
    workers = Workers(1, breaks_at="half")
    broadcast = Broadcast("127.0.0.1", 1, CPU, 20.0, workers.call)
    many = {f"{i}": torch.randn(1 << 18) for i in range(40)}  # more than the sockets hold
    with pytest.raises(ValueError, match="no room for half"):
        broadcast.transfer(in_buckets({"half": torch.zeros(2), **many}), workers.call)


def test_a_trainer_that_fails_half_way_tells_the_workers():
    workers = Workers(1)
    broadcast = Broadcast("127.0.0.1", 1, CPU, 20.0, workers.call)
    failures = []

    def call(operation, fields):
        try:
            workers.call(operation, fields)
        except RuntimeError as error:
            failures.append(str(error))
            raise EngineError("its core failed") from error

    def buckets():
        yield from in_buckets(dict(list(WEIGHTS.items())[:2]))
        raise OSError("a collective failed")

    with pytest.raises(OSError, match="a collective failed"):
        broadcast.transfer(buckets(), call)
    assert failures == ["the trainer gave up sending its weights"]
