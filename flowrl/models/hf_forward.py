"""The forward pass of a transformers causal LM over packed sequences, and the check that it is one
that the fused head can follow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.models.hf_files import load_causal_lm, load_model_config
from flowrl.models.packed_attention import check_attention
from flowrl.records import PackedBatch, to_cu_seqlens
from flowrl.schema import ConfigError

PLAIN_HEAD = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}
"""What scales or caps logits (Gemma, Granite, Cohere), and its value where nothing does."""
ALL_SLIDE = ("mistral", "mixtral", "phi3", "starcoder2")
"""Model types whose every layer takes the config's sliding window, if it is set."""


def load_model(model_dir: Path, dtype: torch.dtype, device: torch.device) -> Any:
    model = load_causal_lm(model_dir, dtype, device)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010
    return model


def check_config(model_dir: Path, longest: int) -> None:
    """Raises ConfigError for what a model's config.json tells of a head or an attention that are
    not followed here, over sequences of `longest` tokens. `check_forward` judges by the numbers."""
    config = load_model_config(model_dir).get_text_config()
    types = getattr(config, "layer_types", None) or []
    slides = "sliding_attention" in types or (not types and config.model_type in ALL_SLIDE)
    window = getattr(config, "sliding_window", None) if slides else None
    check_attention(getattr(config, "attn_logit_softcapping", None), window, longest)
    for name, plain in PLAIN_HEAD.items():
        value = getattr(config, name, plain)
        if value not in (plain, None):
            raise ConfigError(
                f"the model's logits are not hidden @ weight.T: {name} is {value}; use a model of "
                "the Llama or Qwen family"
            )


@torch.no_grad()
def check_forward(model: Any, own: Sequence[Tensor], batch: PackedBatch) -> None:
    """Compares logits from the packed forward and hidden @ weight.T with the model's `own`. A head
    with a bias, a scale or a soft cap, attention sinks, or layers that cannot
    tell packed sequences apart would otherwise be trained on wrong log-probs without an error."""
    if not all(torch.isfinite(logits).all() for logits in own):
        raise ConfigError(
            f"logits of the {type(model).__name__} are not finite: its weights are damaged; set "
            "model.path to another model"
        )
    hidden = packed_hidden(model, batch)
    found = hidden @ model.get_output_embeddings().weight.T
    if not torch.allclose(found, torch.cat(list(own)), atol=1e-3, rtol=1e-3):
        raise ConfigError(
            f"{type(model).__name__} does not give hidden @ weight.T over packed sequences (other "
            "head or attention, or recurrent layers); use a model of the Llama or Qwen family"
        )


def probe(model: Any, device: torch.device) -> tuple[list[Tensor], PackedBatch]:
    """Logits of two short sequences by the model's own forward, and the two as a packed batch."""
    vocabulary = model.config.get_text_config().vocab_size
    lengths = torch.tensor([5, 3], dtype=torch.int32)
    ids = torch.arange(8).remainder(vocabulary)
    offsets = to_cu_seqlens(lengths)
    batch = PackedBatch(ids, offsets, lengths, ids, offsets).to(device)
    with torch.no_grad():
        own = [
            model(input_ids=part[None].to(device), use_cache=False).logits[0]
            for part in ids.split(lengths.tolist())
        ]
    return own, batch


def packed_hidden(model: Any, batch: PackedBatch) -> Tensor:  # (T_model, D)
    output = model.base_model(
        input_ids=batch.token_ids.unsqueeze(0),
        position_ids=batch.position_ids.unsqueeze(0),
        use_cache=False,
        packed_cu_seqlens=batch.model_cu_seqlens,
        packed_max_length=int(batch.model_cu_seqlens.diff().max()),
    )
    return output.last_hidden_state.squeeze(0)
