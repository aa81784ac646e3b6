"""VLLMSampler against an engine that writes down what it is asked, or dies."""

import math
import threading
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_engine_process import report

from flowrl.rollout.engine_protocol import (
    EngineError,
    Message,
)
from flowrl.rollout.vllm_sampler import SyncOptions, VLLMSampler
from flowrl.rollout.weight_check import sampled


class Recorder:
    """An engine that takes whatever comes and writes down what it was asked."""

    name = "recorder"
    trainer_address = "127.0.0.1"

    def __init__(self):
        self.asked = []
        self.held = {}

    def call(self, message, limit_s):
        self.asked.append(" ".join([message.op, *message.fields.get("parts", [])]))
        if message.op == "weights":
            for name, dtype, shape in message.fields["tensors"]:
                raw = torch.from_numpy(message.arrays[name].copy())
                self.held[name] = raw.view(getattr(torch, dtype)).reshape(shape)
        if message.op == "end_weights":
            self.checked = message.fields["check"]
            self.lap = message.fields["lap"]
            reports = [report(n, sampled(self.held[n], self.lap)) for n in self.checked]
            return Message("loaded", {"reports": reports})
        if message.op == "generate":
            count = len(message.arrays["seeds"])
            ones = np.ones(count, np.int64)
            return Message(
                "generated", {}, {"lengths": ones, "tokens": ones, "logprobs": np.zeros(count)}
            )
        return Message("ok")

    def log_tail(self):
        return ""

    def interrupt(self):
        pass

    def close(self):
        pass


def weights_of(tiny):
    return load_file(tiny.path / "model.safetensors").items()


def test_a_sleeping_engine_wakes_its_weights_for_them_and_its_cache_to_generate(
    tiny_model, make_request
):
    tiny, engine = tiny_model("qwen3"), Recorder()
    options = SyncOptions(1.0, 1.0, 1 << 20, 64, 0, sleep=True)
    sampler = VLLMSampler(tiny.path, tiny.tokenizer, torch.float32, lambda: engine, options)
    sampler.load_weights(weights_of(tiny), 0)
    for version in (1, 2):
        sampler.sample(make_request(tiny.prompts(["1+1="])))
        sampler.load_weights(weights_of(tiny), version)
    sync = ["begin_weights", "weights", "end_weights"]
    assert engine.asked == [
        *sync,
        "generate", "sleep", "wake weights", *sync,
        "wake kv_cache", "generate", "sleep", "wake weights", *sync,
    ]  # fmt: skip


def test_small_tensors_are_checked_at_every_transfer_and_matrices_in_turn(tiny_model):
    """So that an engine that quantises its matrices always has something to show."""
    tiny, engine = tiny_model("qwen3"), Recorder()
    options = SyncOptions(1.0, 1.0, 1 << 20, checked_tensors=3, restarts=0)
    sampler = VLLMSampler(tiny.path, tiny.tokenizer, torch.float32, lambda: engine, options)
    small = {name for name, tensor in weights_of(tiny) if tensor.ndim < 2}
    matrices = {name for name, _ in weights_of(tiny)} - small
    turns = math.ceil(len(matrices) / 3)
    for lap in range(2):  # of all matrices, however far a step's updates move the version
        seen = []
        for turn in range(turns):
            sampler.load_weights(weights_of(tiny), 16 * (turns * lap + turn))
            assert small < set(engine.checked)
            assert len(set(engine.checked) - small) <= 3
            assert engine.lap == lap
            seen += set(engine.checked) - small
        assert sorted(seen) == sorted(matrices)


class Mortal(Recorder):
    """Dies at the operations in `fatal`, one of them each time."""

    fatal: ClassVar[list[str]] = []

    def call(self, message, limit_s):
        if self.fatal and message.op == self.fatal[0]:
            self.fatal.pop(0)
            raise EngineError(f"died during {message.op}")
        return super().call(message, limit_s)


@pytest.mark.parametrize("restarts", [2, 1])
def test_an_engine_may_die_again_while_it_gets_its_weights_back(
    tiny_model, make_request, monkeypatch, restarts
):
    tiny, engines = tiny_model("qwen3"), []
    options = SyncOptions(1.0, 1.0, 1 << 20, 64, restarts)

    def start():
        engines.append(Mortal())
        return engines[-1]

    sampler = VLLMSampler(tiny.path, tiny.tokenizer, torch.float32, start, options)
    sampler.load_weights(weights_of(tiny), 1)
    monkeypatch.setattr(Mortal, "fatal", ["generate", "end_weights"])
    if restarts == 1:
        with pytest.raises(EngineError, match="died during end_weights; all 1 restarts are used"):
            sampler.sample(make_request(tiny.prompts(["1+1="])))
        return
    sampler.sample(make_request(tiny.prompts(["1+1="])))
    assert len(engines) == 3
    assert engines[-1].held.keys() == dict(weights_of(tiny)).keys()


def test_an_interrupted_engine_is_not_started_again(tmp_path, tiny_model, make_request):
    tiny, engines = tiny_model("qwen3"), []
    options = SyncOptions(1.0, 1.0, 1 << 20, 64, restarts=5)

    class Silent(Recorder):
        """Answers nothing until it is interrupted."""

        ended = threading.Event()

        def call(self, message, limit_s):
            if message.op == "generate":
                assert self.ended.wait(20)
                raise EngineError("gone")
            return super().call(message, limit_s)

        def interrupt(self):
            self.ended.set()

    def start():
        engines.append(Silent())
        return engines[-1]

    sampler = VLLMSampler(tiny.path, tiny.tokenizer, torch.float32, start, options)
    timer = threading.Timer(0.2, sampler.interrupt)
    timer.start()
    with pytest.raises(EngineError, match="gone"):
        sampler.sample(make_request(tiny.prompts(["1+1="])))
    assert len(engines) == 1
