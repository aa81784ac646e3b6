"""The plan's activations against the tensors that a transformers model really keeps."""

import pytest
from kept_tensors import (
    CPU,
    HEAD_DIM,
    HEADS,
    LAYERS,
    ROWS,
    D,
    K,
    Q,
    keeping,
    packed_batch,
    save_model,
    total_bytes,
)  # fmt: skip

from flowrl.assembly import resolve
from flowrl.model_shape import read_shape
from flowrl.models.hf_backend import HFBackend
from flowrl.parallel import Parallel
from flowrl.plan import activation_bytes
from flowrl.settings import load


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "qwen2")


def kept_bytes(config, directory) -> int:
    """Of all storages that autograd keeps up to the hidden states, weights apart."""
    backend = HFBackend(config, directory, frozenset(), Parallel(0, 1, CPU))
    with keeping(backend.model) as kept:
        backend._hidden(backend.model, packed_batch())
    return total_bytes(kept)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_a_layer_keeps_what_the_plan_says(model, dtype, width, recompute):
    chosen = {"path": str(model), "dtype": dtype, "gradient_checkpointing": recompute}
    settings = {"model": chosen, "batch": {"tokens_per_microbatch": ROWS}}
    config, _ = resolve(load("countdown_cpu", settings))
    planned = activation_bytes(config, read_shape(model), width)
    behind = 8 * D * ROWS  # the final norm's float32 states
    if recompute:  # before backward makes a layer again
        layer = planned - LAYERS * 4 * D * ROWS
        expected = LAYERS * 4 * D * ROWS + behind
        assert layer > 0
    else:
        padded = width * 2 * (Q + K) * ROWS  # q, k, v and output of attention on a CPU
        expected = planned + LAYERS * padded + behind
    # Per token, attention's sums, the norms' and positions, and of all layers the angles.
    small = ROWS * (LAYERS * (4 * HEADS + 32) + 8 * HEAD_DIM)
    assert 0 <= kept_bytes(config, model) - expected <= small
