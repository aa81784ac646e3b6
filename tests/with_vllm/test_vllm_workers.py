"""The real engine with two tensor-parallel workers, whose weights come by broadcast.

Each worker holds its part of every matrix; of this vocabulary of 100 the first has 64 rows and the
second 36 and padding. One engine serves all tests of this file; the last one kills it.
"""

import dataclasses
import time
from functools import partial

import pytest

from flowrl.rollout.engine_process import ServerProcess
from flowrl.rollout.engine_protocol import EngineError, WeightSyncError
from flowrl.rollout.process_tree import group_members, without_trackers
from flowrl.rollout.weight_broadcast import WeightGroup

from .conftest import (
    START_LIMIT_S,
    kill,
    load_model,
    logp_abs_diff,
    make_model,
    make_request,
    sampler_for,
    settings_for,
    update,
)

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory, tokenizer):
    return make_model(tmp_path_factory.mktemp("wide"), tokenizer, 100)


@pytest.fixture(scope="module")
def model(wide_dir):
    return load_model(wide_dir)


@pytest.fixture(scope="module")
def sampler(wide_dir, tokenizer, tmp_path_factory):
    log = tmp_path_factory.mktemp("workers") / "vllm.log"
    settings = dataclasses.replace(settings_for(wide_dir, log), tensor_parallel_size=2)
    sampler = sampler_for(wide_dir, tokenizer, partial(ServerProcess, settings, "", START_LIMIT_S))
    sampler.options = dataclasses.replace(sampler.options, transport="broadcast", workers=2)
    yield sampler
    sampler.close()


def test_every_weight_arrives_at_both_workers(sampler, model, tokenizer):
    for version in range(3):
        sampler.load_weights(model.named_parameters(), version)
        assert sampler.compared == len(list(model.parameters()))
        assert logp_abs_diff(model, sampler.sample(make_request(tokenizer)), 1.0) < 1e-5
        update(model, version)


def test_files_arrive_at_both_workers(sampler, model, tokenizer):
    broadcast = sampler.options
    sampler.options = dataclasses.replace(broadcast, transport="files")
    sampler.load_weights(model.named_parameters(), 3)
    assert sampler.compared == len(list(model.parameters()))
    assert logp_abs_diff(model, sampler.sample(make_request(tokenizer)), 1.0) < 1e-5
    sampler.options = broadcast


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ],
)
def test_a_tensor_that_is_changed_on_its_way_stops_the_run(sampler, model, monkeypatch, name):
    """Its last number, which is the last worker's."""
    send = WeightGroup.send

    def change(group, bucket):
        changed = [(n, t.clone()) if n == name else (n, t) for n, t in bucket]
        for found, tensor in changed:
            if found == name:
                tensor[-1, -1] += 1
        send(group, changed)

    monkeypatch.setattr(WeightGroup, "send", change)
    with pytest.raises(WeightSyncError, match=name.replace(".", r"\.")):
        sampler.load_weights(model.named_parameters(), 4)
    monkeypatch.undo()
    sampler.load_weights(model.named_parameters(), 4)  # the next transfer mends it


def test_a_worker_killed_in_a_transfer_ends_it(sampler, model):
    group = sampler.host.pid

    def weights():
        for number, entry in enumerate(model.named_parameters()):
            if number == 12:
                kill(without_trackers(group_members(group))[-1])
            yield entry

    began = time.monotonic()
    with pytest.raises(EngineError, match=r"rollout\.restart is 0"):
        sampler.load_weights(weights(), 5)
    assert time.monotonic() - began < 60
    assert group_members(group) == []
