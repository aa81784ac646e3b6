"""The plan's activations against the tensors that a layer really keeps for its backward pass."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from megatron_cases import config_of
from transformers import Qwen2Config, Qwen2ForCausalLM

from flowrl import parallel
from flowrl.config import Config
from flowrl.model_shape import read_shape
from flowrl.models.megatron_backend import MegatronBackend
from flowrl.models.megatron_cpu_shim import on_cpu, silence_megatron
from flowrl.models.megatron_schedule import _inputs
from flowrl.parallel import Parallel
from flowrl.plan import activation_bytes
from flowrl.records import PackedBatch

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
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        tie_word_embeddings=False, **extra,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(directory)
    silence_megatron()
    yield directory
    parallel.stop()


def kept_floats(config: Config, directory) -> float:
    """Per token: of all storages that autograd keeps up to the head, weights apart."""
    backend = MegatronBackend(config, directory, frozenset(), Parallel(0, 1, CPU))
    (chunk,) = backend.policy.chunks
    layers: Any = chunk.module.config
    layers.bias_activation_fusion = True  # as on CUDA
    weights = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
    kept: dict[int, torch.Tensor] = {}
    total = 0.0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor  # alive, so that no other takes its place
        return tensor

    def head(hidden, weight, heads):
        nonlocal total
        total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        return hidden.sum(), None

    offsets = torch.arange(0, ROWS + 1, LENGTH, dtype=torch.int32)
    tokens = torch.randint(0, 32, (ROWS,))
    prompts = torch.ones(SEQUENCES, dtype=torch.int32)
    packed = PackedBatch(tokens, offsets, prompts, tokens, offsets)
    with (
        on_cpu(CPU),
        torch._dynamo.config.patch(disable=True),  # the fusion's formulas, uncompiled
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        chunk(**_inputs(packed, 1), attention_mask=None, labels=head)
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
