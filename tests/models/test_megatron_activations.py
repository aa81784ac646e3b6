"""The plan's activations against the tensors that a layer really keeps for its backward pass."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from kept_tensors import (
    CPU,
    HEAD_DIM,
    HEADS,
    LAYERS,
    ROWS,
    D,
    F,
    K,
    Q,
    keeping,
    packed_batch,
    save_model,
    total_bytes,
)  # fmt: skip
from megatron_cases import config_of

from flowrl import parallel
from flowrl.config import Config
from flowrl.model_shape import read_shape
from flowrl.models.megatron_backend import MegatronBackend
from flowrl.models.megatron_cpu_shim import on_cpu, silence_megatron
from flowrl.models.megatron_schedule import _inputs
from flowrl.parallel import Parallel
from flowrl.plan import activation_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    silence_megatron()
    yield save_model(tmp_path_factory.mktemp("model") / "qwen2")
    parallel.stop()


def kept_floats(config: Config, directory) -> float:
    """Per token: of all storages that autograd keeps up to the head, weights apart."""
    backend = MegatronBackend(config, directory, frozenset(), Parallel(0, 1, CPU))
    (chunk,) = backend.policy.chunks
    layers: Any = chunk.module.config
    layers.bias_activation_fusion = True  # as on CUDA
    total = 0

    def head(hidden, weight, heads):
        nonlocal total
        total = total_bytes(kept)
        return hidden.sum(), None

    with (
        on_cpu(CPU),
        torch._dynamo.config.patch(disable=True),  # the fusion's formulas, uncompiled
        keeping(chunk) as kept,
    ):
        chunk(**_inputs(packed_batch(), 1), attention_mask=None, labels=head)
    return total / 4 / ROWS


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_layer_keeps_what_the_plan_says(model, recompute):
    config = config_of({"recompute": recompute}, "megatron")
    config = replace(config, batch=replace(config.batch, tokens_per_microbatch=ROWS))
    planned = activation_bytes(config, read_shape(model), 4) / 4 / ROWS
    layer = 4 * D + 2 * HEAD_DIM + 3 * (Q + K + F)
    norm = D  # on a CPU RMSNorm keeps the normalised states as well
    padded = 2 * Q + 2 * K  # and its attention the padded q, k, v and output
    behind = 2 * D  # the final norm's
    if recompute == "full":
        assert planned == LAYERS * D + layer
        expected = LAYERS * D + behind  # before backward makes a layer again
    else:
        assert planned == LAYERS * layer
        expected = LAYERS * (layer + 2 * norm + padded * (recompute == "none")) + behind
    small = HEADS + 16  # per token and layer: attention's sums, the norms', positions
    assert 0 <= kept_floats(config, model) - expected <= LAYERS * small
