"""The real engine behind `flowrl serve`, over TCP: weights, its death, the server's death.

One server and one engine serve these tests in their order; the last ones kill them.
"""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from flowrl.rollout.engine_protocol import (
    EngineError,
    EngineRefusedError,
    WeightSyncError,
)
from flowrl.rollout.engine_remote import RemoteServer
from flowrl.rollout.engine_token import TOKEN_VARIABLE
from flowrl.rollout.process_tree import group_members

from .conftest import (
    START_LIMIT_S,
    Faulty,
    below,
    flip,
    kill,
    load_model,
    logp_abs_diff,
    make_request,
    sampler_for,
    settings_for,
    stop_worker,
    update,
    wait_until,
)

pytestmark = pytest.mark.timeout(600)
TOKEN = "a token that only these tests know"


@pytest.fixture(scope="module")
def model(model_dir):
    return load_model(model_dir)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The process of `flowrl serve` and its address."""
    log = tmp_path_factory.mktemp("serve") / "vllm.log"
    command = [sys.executable, "-m", "flowrl", "serve", "127.0.0.1:0", "--log", str(log)]
    env = {**os.environ, TOKEN_VARIABLE: TOKEN}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().split()[5].removesuffix(";")
        process.kill()


@pytest.fixture(scope="module")
def sampler(server, model_dir, tokenizer):
    settings = settings_for(model_dir, "")
    start = partial(RemoteServer, server[1], TOKEN.encode(), settings, START_LIMIT_S)
    sampler = sampler_for(model_dir, tokenizer, start, restarts=1)
    yield sampler
    sampler.close()


def test_an_engine_without_the_models_files_waits_for_its_weights(sampler, model, tokenizer):
    request = make_request(tokenizer)
    with pytest.raises(EngineRefusedError, match="no weights yet"):
        sampler.sample(request)
    sampler.load_weights(model.named_parameters(), 0)
    assert sampler.compared == len(list(model.parameters()))
    assert logp_abs_diff(model, sampler.sample(request), 1.0) < 1e-5


def test_weights_arrive_over_the_connection(sampler, model, tokenizer):
    before = sampler.sample(make_request(tokenizer))
    update(model, 1)
    sampler.load_weights(model.named_parameters(), 1)
    after = sampler.sample(make_request(tokenizer))
    assert logp_abs_diff(model, after, 1.0) < 1e-5
    assert logp_abs_diff(model, before, 1.0) > 1e-3


def test_weights_arrive_by_broadcast(sampler, model, tokenizer):
    """At the same engine, which joins a group for it."""
    files = sampler.options
    sampler.options = dataclasses.replace(files, transport="broadcast")
    for version in (2, 3):
        update(model, version)
        sampler.load_weights(model.named_parameters(), version)
        assert sampler.compared == len(list(model.parameters()))
    assert logp_abs_diff(model, sampler.sample(make_request(tokenizer)), 1.0) < 1e-5
    sampler.options = files


def test_a_tensor_that_is_changed_on_its_way_stops_the_run(sampler, model):
    real, sampler.host = sampler.host, Faulty(sampler.host, "lm_head.weight", flip)
    try:
        with pytest.raises(WeightSyncError, match=r"lm_head\.weight"):
            sampler.load_weights(model.named_parameters(), 4)
    finally:
        sampler.host = real
    sampler.load_weights(model.named_parameters(), 4)


def test_an_engine_that_is_killed_is_started_again_with_its_weights(
    sampler, server, model, tokenizer, capsys
):
    before = sampler.sample(make_request(tokenizer))
    (engine,) = below(server[0].pid)
    members = group_members(engine)
    assert len(members) >= 3, "server, core and worker are one group"
    kill(members[-1])
    assert sampler.sample(make_request(tokenizer)) == before
    assert sampler.restarts == 1
    assert group_members(engine) == []
    printed = capsys.readouterr().err
    assert "vLLM server at 127.0.0.1" in printed
    assert "starting the engine again" in printed


def test_a_server_that_is_killed_ends_the_step_and_its_engine(sampler, server, tokenizer):
    process = server[0]
    (engine,) = below(process.pid)
    members = group_members(engine)
    folders = engine_folders()
    stop_worker(engine)  # no answer comes before the server dies
    threading.Timer(0.3, process.kill).start()
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"died during generate \(nobody answers there\).*all 1"):
        sampler.sample(make_request(tokenizer))
    assert time.monotonic() - began < 30
    wait_until(lambda: not set(members) & set(group_members(engine)), 15)
    wait_until(lambda: not folders <= engine_folders(), 15)


def engine_folders():
    return set(Path("/dev/shm").glob("flowrl-engine-*"))
