"""A small Qwen2 model, a packed batch for it, and what autograd keeps of a pass over it."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from flowrl.records import PackedBatch

D, F, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 352, 4, 2, 24, 3
SEQUENCES, LENGTH = 4, 64
ROWS = SEQUENCES * LENGTH
Q, K = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
CPU = torch.device("cpu")


def save_model(directory: Path) -> Path:
    extra: dict[str, Any] = {"head_dim": HEAD_DIM}
    config = Qwen2Config(
        vocab_size=32, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=False, **extra,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(directory)
    return directory


def packed_batch() -> PackedBatch:
    offsets = torch.arange(0, ROWS + 1, LENGTH, dtype=torch.int32)
    tokens = torch.randint(0, 32, (ROWS,))
    return PackedBatch(tokens, offsets, torch.ones(SEQUENCES).int(), tokens, offsets)


@contextmanager
def keeping(model: nn.Module):
    """Gives the storages that autograd keeps, the model's weights apart: {address: a tensor}."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor  # alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def total_bytes(kept: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
