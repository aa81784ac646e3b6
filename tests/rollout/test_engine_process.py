"""Messages and engine processes without vLLM: what is sent arrives, and every wait has an end."""

import dataclasses
import json
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowrl.parallel import Parallel
from flowrl.parallel_config import ParallelConfig
from flowrl.rollout.engine_connection import EngineConnection
from flowrl.rollout.engine_process import ServerProcess
from flowrl.rollout.engine_protocol import (
    EngineError,
    EngineRefusedError,
    EngineSettings,
    Message,
    WeightSyncError,
    receive,
    send,
)
from flowrl.rollout.model_limits import eos_ids
from flowrl.rollout.process_tree import group_members
from flowrl.rollout.vllm_engine import check_room, shares_of_cpus
from flowrl.rollout.vllm_sampler import SyncOptions, VLLMSampler
from flowrl.rollout.vllm_start import check_device, check_gpus
from flowrl.rollout.weight_check import columns, compare, fingerprint, sampled
from flowrl.rollout_config import RolloutConfig
from flowrl.schema import ConfigError


def exchange(message):
    left, right = socket.socketpair()
    with left, right:
        sender = threading.Thread(target=send, args=(left, message, time.monotonic() + 10))
        sender.start()
        got = receive(right, time.monotonic() + 10)
        sender.join()
    return got


def test_a_message_arrives_as_it_was_sent():
    arrays = {
        "big": np.arange(700_000, dtype=np.int64).reshape(7, -1),
        "none": np.zeros(0, np.float64),
        "bytes": np.frombuffer(b"abc", np.uint8),
        "across": np.arange(12.0).reshape(3, 4).T,  # not contiguous
    }
    got = exchange(Message("op", {"text": "é", "values": [1, 2.5, None]}, arrays))
    assert (got.op, got.fields) == ("op", {"text": "é", "values": [1, 2.5, None]})
    assert got.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert got.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(got.arrays[name], array)


def test_a_silent_end_is_not_waited_for_for_ever():
    left, right = socket.socketpair()
    with left, right, pytest.raises(TimeoutError):
        receive(left, time.monotonic() + 0.2)
    left, right = socket.socketpair()
    with left, right, pytest.raises(TimeoutError):  # nobody reads: the buffers fill up
        send(left, Message("op", {}, {"a": np.zeros(1 << 24, np.uint8)}), time.monotonic() + 0.5)


def test_a_closed_end_is_noticed():
    left, right = socket.socketpair()
    right.close()
    with left, pytest.raises((EOFError, OSError)):
        receive(left, time.monotonic() + 5)


def settings(tmp_path):
    return EngineSettings(model_dir=str(tmp_path), log_path=str(tmp_path / "logs" / "vllm.log"))


def script(tmp_path, text):
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_an_engine_that_never_gets_ready_is_killed_with_its_children(tmp_path):
    python = script(tmp_path, f"echo $$ > {tmp_path}/pid; sleep 300 & sleep 300")
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"waited 1 s for vLLM server .*start_timeout_s"):
        ServerProcess(settings(tmp_path), python, 1.0)
    assert time.monotonic() - began < 15
    assert group_members(int((tmp_path / "pid").read_text())) == []


def test_an_engine_that_dies_leaves_its_exit_and_its_logs_tail(tmp_path):
    python = script(tmp_path, "echo out of luck; exit 7")
    with pytest.raises(EngineError, match=r"died during load \(exit status 7\).*out of luck"):
        ServerProcess(settings(tmp_path), python, 30.0)


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [("", "1,2"), ("4,5,6,7", "5,6"), ("GPU-a, GPU-b, GPU-c", "GPU-b,GPU-c")],
)
def test_an_engine_sees_its_own_gpus_and_no_ranks(tmp_path, monkeypatch, visible, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in ("RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "a trainer's")
    python = script(tmp_path, 'echo "<$CUDA_VISIBLE_DEVICES|$RANK|$TORCHELASTIC_RUN_ID>"; exit 7')
    with pytest.raises(EngineError, match=rf"<{gpus}\|\|>"):
        ServerProcess(on_two_gpus(tmp_path), python, 30.0)


def on_two_gpus(tmp_path):
    return dataclasses.replace(settings(tmp_path), device="cuda:1", tensor_parallel_size=2)


def test_an_engine_never_takes_gpus_that_its_trainer_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(ConfigError, match="from GPU 1 on needs 3 GPUs"):
        ServerProcess(on_two_gpus(tmp_path), script(tmp_path, "exit 7"), 30.0)


def test_a_python_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="rollout.server_python"):
        ServerProcess(settings(tmp_path), str(tmp_path / "nowhere"), 30.0)


def test_a_python_without_vllm_says_what_to_install(tmp_path):
    pytest.importorskip("flowrl_kernels")
    if "vllm" in sys.modules or _has_vllm():
        pytest.skip("vllm is installed here")
    with pytest.raises(EngineRefusedError, match=r"needs vllm .*set rollout.server_python"):
        ServerProcess(settings(tmp_path), sys.executable, 60.0)


def _has_vllm():
    import importlib.util

    return importlib.util.find_spec("vllm") is not None


# --- weights


def test_wide_matrices_are_compared_by_columns_that_change():
    assert columns(200, 3).tolist() == list(range(200))
    first, second = columns(4096, 0), columns(4096, 1)
    assert len(first) == len(second) == 64
    assert not set(first.tolist()) & set(second.tolist())
    seen = {c for version in range(64) for c in columns(4096, version).tolist()}
    assert seen == set(range(4096))


def test_fingerprints_ignore_what_a_product_cannot_give_back():
    values = torch.tensor([1.0, -0.0, 1e-42, 2.0])
    assert fingerprint(values) == fingerprint(torch.tensor([1.0, 0.0, 0.0, 2.0]))
    assert fingerprint(values) != fingerprint(torch.tensor([1.0, 0.0, 2.0, 0.0]))
    assert fingerprint(values) != fingerprint(torch.tensor([1.0000001, 0.0, 0.0, 2.0]))


def report(name, tensor, **changes):
    held = {"name": name, "row_start": 0, "rows": tensor.shape[0], "positions": None}
    return {**held, "checksum": fingerprint(tensor), **changes}


def test_shares_of_several_workers_are_compared_with_the_whole():
    whole = torch.randn(8, 6)
    sent = {"w": sampled(whole, 1)}
    by_rows = [report("w", whole[s : s + 4].contiguous(), row_start=s) for s in (0, 4)]
    by_columns = [
        report("w", whole[:, s : s + 3].contiguous(), positions=list(range(s, s + 3)))
        for s in (0, 3)
    ]
    assert compare(sent, by_rows, 1) == compare(sent, by_columns, 1) == 1
    swapped = [{**r, "row_start": 4 - r["row_start"]} for r in by_rows]
    with pytest.raises(WeightSyncError, match="w for one"):
        compare(sent, swapped, 1)


def test_an_engine_that_reads_nothing_back_is_not_trusted():
    with pytest.raises(WeightSyncError, match="none of 1 weights"):
        compare({"w": torch.zeros(2, 2)}, [], 1)


def test_workers_share_the_cpus():
    assert shares_of_cpus({5, 1, 3, 2, 0}, 2) == "0,1|2,3"
    with pytest.raises(EngineRefusedError, match="set it lower"):
        shares_of_cpus({0, 1}, 3)


def test_weights_that_do_not_fit_are_refused_before_they_are_written(tmp_path):
    check_room(tmp_path, 1)
    with pytest.raises(EngineRefusedError, match="--shm-size"):
        check_room(tmp_path, 1 << 60)


# --- settings


def test_every_eos_of_the_model_stops_a_response(tmp_path, tiny_model):
    tiny = tiny_model("qwen3")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    assert eos_ids(tmp_path, tiny.tokenizer) == {1, 5}
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert eos_ids(tmp_path, tiny.tokenizer) == {1, 7}


@pytest.mark.parametrize(
    ("device", "options"),
    [
        ("cpu", {"dtype": "fp8", "correction": "tis"}),
        ("cpu", {"sleep": True}),
        ("cpu", {"gpu_memory_utilization": 0.3}),
        ("cpu", {"sync_transport": "ipc"}),
        ("cuda", {"kv_cache_gb": 2.0}),
        ("cuda", {"sync_transport": "ipc", "tensor_parallel_size": 2}),
        ("cuda", {"sync_transport": "broadcast"}),
    ],
)
def test_settings_of_the_other_device_are_refused(device, options):
    with pytest.raises(ConfigError, match="rollout"):
        check_device(RolloutConfig(engine="vllm", **options), torch.device(device))


def on_gpus(rollout, tensor=1, processes=1, index=0):
    config = SimpleNamespace(
        rollout=RolloutConfig(engine="vllm", **rollout), parallel=ParallelConfig(tensor=tensor)
    )
    replicas = processes // tensor
    return config, Parallel(0, replicas, torch.device("cuda", index), model_size=tensor)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (on_gpus({"tensor_parallel_size": 2}, processes=8), "set rollout.tensor_parallel_size=1"),
        (on_gpus({"tensor_parallel_size": 8}, 4, 8), "set rollout.tensor_parallel_size=4"),
        (on_gpus({"tensor_parallel_size": 4}), "from cuda:0 on needs 4 GPUs"),
    ],
)
def test_an_engine_on_another_replicas_gpus_is_refused(settings, remedy):
    with pytest.raises(ConfigError, match=remedy):
        check_gpus(*settings)


def test_expandable_segments_are_not_shared(monkeypatch):
    check_device(RolloutConfig(engine="vllm", sync_transport="ipc"), torch.device("cuda"))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native,expandable_segments:True")
    with pytest.raises(ConfigError, match="set rollout.sync_transport=files"):
        check_device(RolloutConfig(engine="vllm", sync_transport="ipc"), torch.device("cuda"))


def test_a_lost_engine_is_started_again_only_as_often_as_allowed(tmp_path, tiny_model):
    """Every start ends at once here; the error says how many were allowed."""
    tiny = tiny_model("qwen3")
    start = partial(ServerProcess, settings(tmp_path), script(tmp_path, "exit 3"), 30.0)
    options = SyncOptions(1.0, 1.0, 1 << 20, 64, 2)
    with pytest.raises(EngineError, match="exit status 3"):
        VLLMSampler(tiny.path, tiny.tokenizer, torch.float32, start, options)


def test_a_call_that_waits_ends_when_it_is_interrupted():
    ours, theirs = socket.socketpair()
    connection = EngineConnection(ours)
    connection.end = ours.close
    connection.name, connection.log_path = "engine", Path("no.log")
    connection.how_it_ended = lambda: "interrupted"
    connection.log_tail = lambda: ""
    threading.Timer(0.2, connection.interrupt).start()
    began = time.monotonic()
    with theirs, pytest.raises(EngineError, match="died during generate"):
        connection.call(Message("generate"), 60.0)
    assert time.monotonic() - began < 10
