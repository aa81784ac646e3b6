"""The plan's activations against the tensors that a transformers model really keeps."""

from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from flowrl.assembly import resolve
from flowrl.model_shape import read_shape
from flowrl.models.hf_backend import HFBackend
from flowrl.parallel import Parallel
from flowrl.plan import activation_bytes
from flowrl.records import PackedBatch
from flowrl.settings import load

D, F, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 352, 4, 2, 24, 3
SEQUENCES, LENGTH = 4, 64
ROWS = SEQUENCES * LENGTH
Q, K = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "qwen2"
    extra: dict[str, Any] = {"head_dim": HEAD_DIM}
    config = Qwen2Config(
        vocab_size=32, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=False, **extra,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(directory)
    return directory


def kept_bytes(config, directory) -> int:
    """Of all storages that autograd keeps up to the hidden states, weights apart."""
    backend = HFBackend(config, directory, frozenset(), Parallel(0, 1, CPU))
    weights = {p.untyped_storage().data_ptr() for p in backend.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor  # alive, so that no other takes its place
        return tensor

    offsets = torch.arange(0, ROWS + 1, LENGTH, dtype=torch.int32)
    tokens = torch.randint(0, 32, (ROWS,))
    packed = PackedBatch(tokens, offsets, torch.ones(SEQUENCES).int(), tokens, offsets)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backend._hidden(backend.model, packed)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


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
