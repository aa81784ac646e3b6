"""Causal attention over packed sequences, as an attention function of transformers.

A packed batch is one row of T_model tokens; `cu_seqlens` says where each sequence begins. No token
may see another sequence. On CUDA in 16 bits this is a variable-length flash attention. Elsewhere
the sequences are padded to the longest of the micro-batch for one SDPA call and the padding is
dropped again, so that no (T_model, T_model) mask exists.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from flowrl.records import ragged_arange
from flowrl.schema import ConfigError

NAME = "flowrl_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, T_model, head_dim)
    key: Tensor,  # (1, H_kv, T_model, head_dim)
    value: Tensor,  # (1, H_kv, T_model, head_dim)
    attention_mask: Tensor | None,
    *,
    packed_cu_seqlens: Tensor,  # (N + 1,) int32
    packed_max_length: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """softmax(q k^T * scaling) v within each sequence, causal. Returns (1, T_model, H, head_dim).

    Raises ValueError for a mask, ConfigError for a soft cap or a sliding window shorter than a
    sequence: they are not implemented here and must not be ignored."""
    if attention_mask is not None:
        raise ValueError("packed attention takes packed_cu_seqlens and no attention_mask")
    check_attention(softcap, sliding_window, packed_max_length)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T_model, H, head_dim)
    if dropout:
        raise ValueError(f"packed attention has no dropout, got {dropout}; set it to 0")
    device = q.device.type
    if torch.is_autocast_enabled(device):  # where float32 angles have made q and k float32
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    out = attend(q, k, v, packed_cu_seqlens, packed_max_length, scaling)
    return out.unsqueeze(0), None


def check_attention(softcap: float | None, sliding_window: int | None, longest: int) -> None:
    """Raises ConfigError for attention that is not implemented here, over `longest` tokens."""
    if softcap:
        raise ConfigError(
            f"packed attention has no soft cap, this model asks for {softcap}; use a model of the "
            "Llama or Qwen family"
        )
    if sliding_window and sliding_window < longest:
        raise ConfigError(
            f"packed attention has no sliding window, this model's is {sliding_window} and the "
            f"longest sequence {longest} tokens; lower rollout.max_new_tokens, or use another model"
        )


def attend(
    q: Tensor,  # (T_model, H, head_dim)
    k: Tensor,  # (T_model, H_kv, head_dim)
    v: Tensor,  # (T_model, H_kv, head_dim)
    cu_seqlens: Tensor,  # (N + 1,) int32
    max_length: int,
    scaling: float | None,
) -> Tensor:  # (T_model, H, head_dim)
    """softmax(q k^T * scaling) v within each sequence, causal."""
    if q.is_cuda and q.dtype != torch.float32:  # flash attention has 16-bit kernels only
        return _varlen_flash(q, k, v, cu_seqlens, max_length, scaling)
    return _padded_sdpa(q, k, v, cu_seqlens, max_length, scaling)


def _padded_sdpa(
    q: Tensor,  # (T_model, H, head_dim)
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scaling: float | None,
) -> Tensor:
    lengths = cu_seqlens.diff().long()
    num_sequences = lengths.numel()
    slots = ragged_arange(lengths) + (
        torch.arange(num_sequences, device=q.device) * max_length
    ).repeat_interleave(lengths)  # (T_model,) place of each token in (N, max_length)

    def pad(x: Tensor) -> Tensor:  # -> (N, H, max_length, head_dim)
        padded = x.new_zeros(num_sequences * max_length, *x.shape[1:]).index_copy(0, slots, x)
        return padded.unflatten(0, (num_sequences, max_length)).transpose(1, 2)

    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda:  # or CUDA takes its plain form in float32, with all probabilities
        k, v = for_all_heads(k, v, q.shape[1])
        grouped = False
    # Padding stands at a sequence's end: the causal mask keeps it out of every token's sight.
    out = F.scaled_dot_product_attention(
        pad(q), pad(k), pad(v), is_causal=True, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(0, 1)[slots]


def for_all_heads(k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """k and v (T_model, H_kv, head_dim) once for each query head that shares them."""
    groups = num_heads // k.shape[1]
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def _varlen_flash(
    q: Tensor,  # (T_model, H, head_dim)
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scaling: float | None,
) -> Tensor:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        grouped: dict[str, Any] = {}
        if "enable_gqa" in signature(varlen_attn).parameters:  # torch 2.13 has it, 2.11 does not
            grouped = {"enable_gqa": q.shape[1] != k.shape[1]}
        else:
            k, v = for_all_heads(k, v, q.shape[1])
        out = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, max_length, max_length,
            scale=scaling, window_size=(-1, 0), **grouped,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, causal=True, softmax_scale=scaling
    )


AttentionInterface.register(NAME, packed_attention)
