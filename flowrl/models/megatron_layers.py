"""Layers of the split policy: megatron-core's local ones with a norm that knows of sequence
parallelism and with rotary embedding and attention over packed sequences; with FP8 Transformer
Engine's; with model.liger Liger's norm, rotary embedding and SwiGLU in the local ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from flowrl.models.liger_layers import rms_norm, rotate, swiglu_of_both
from flowrl.models.packed_attention import attend
from flowrl.records import ragged_arange
from flowrl.schema import ConfigError


class Norm(nn.RMSNorm):
    """RMSNorm whose weight says that its gradient is a share of the tokens' under sequence
    parallelism: Megatron then sums it over tensor ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore


class PackedCoreAttention(MegatronModule):
    """softmax(q k^T / sqrt(head_dim)) v within each packed sequence, causal; no parameters."""

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: Any = None, **__: Any):
        super().__init__(config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,  # (T_model, H_local, head_dim)
        key: Tensor,  # (T_model, H_kv_local, head_dim)
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:  # (T_model, H_local * head_dim)
        assert attention_mask is None, "packed sequences carry no mask"
        assert packed_seq_params is not None, "every batch is packed"
        out = attend(
            query,
            key,
            value,
            packed_seq_params.cu_seqlens_q,
            packed_seq_params.max_seqlen_q,
            self.softmax_scale,
        )
        return out.flatten(1)


class LigerNorm(Norm):
    """The same norm by Liger's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class LigerSwiGLU:
    """Megatron's hook for an activation of its own over [gate, up]; no module, for it has no state
    and a checkpoint would ask for it."""

    def __init__(self, config: TransformerConfig) -> None:
        assert config.gated_linear_unit

    def __call__(self, gate_up: Tensor) -> Tensor:
        return swiglu_of_both(gate_up)


class PackedSelfAttention(SelfAttention):
    """Self-attention that turns q and k as soon as they are made. Megatron's own asks the GPU for
    the length of every sequence, twice in each layer."""

    _angles: tuple[Tensor, Tensor] | None = None  # of positions, and cu_seqlens: inside forward

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        *,
        rotary_pos_emb: Tensor,  # (longest sequence, 1, 1, head_dim)
        packed_seq_params: PackedSeqParams,
        **rest: Any,
    ) -> Any:
        self._angles = rotary_pos_emb.flatten(1), packed_seq_params.cu_seqlens_q
        try:
            return super().forward(
                hidden_states, attention_mask, packed_seq_params=packed_seq_params, **rest
            )
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, *args: Any, **options: Any) -> Any:
        assert self._angles is not None
        made: Any = super().get_query_key_value_tensors(*args, **options)
        q, k, value = made  # (T_model, 1, H_local, head_dim), k and value with H_kv_local
        of_position, cu_seqlens = self._angles
        angles = of_position[ragged_arange(cu_seqlens.diff(), q.shape[0])]  # (T_model, head_dim)
        return *self.turn(q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype)), value

    def turn(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[a, b] -> [a cos - b sin, b cos + a sin] for the halves of every head."""
        cos, sin = (x[:, None, None] for x in (cos, sin))
        return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class LigerSelfAttention(PackedSelfAttention):
    """The same by Liger's kernel, which writes over its input: this is before what selective
    recompute makes again."""

    def turn(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (x.permute(1, 2, 0, 3) for x in (q, k))  # (1, H_local, T_model, head_dim)
        q, k = rotate(q, k, cos.unsqueeze(0), sin.unsqueeze(0))
        return q.permute(2, 0, 1, 3), k.permute(2, 0, 1, 3)


def layer_spec(config: TransformerConfig, *, liger: bool) -> ModuleSpec:
    """What each layer is made of."""
    if config.fp8:
        return _engine_spec(config)
    spec = get_gpt_layer_local_spec(
        normalization=config.normalization, qk_layernorm=config.qk_layernorm
    )
    layer: Any = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = norm(config, liger=liger)
    layer.self_attention.module = LigerSelfAttention if liger else PackedSelfAttention
    attention = layer.self_attention.submodules
    attention.core_attention = PackedCoreAttention
    if config.qk_layernorm:  # under these names Megatron sums their gradients over tensor ranks
        attention.q_layernorm = attention.k_layernorm = norm(config, liger=liger)
    if liger:
        layer.mlp.submodules.activation_func = LigerSwiGLU
    return spec


def _engine_spec(config: TransformerConfig) -> ModuleSpec:
    """Transformer Engine's layers, which multiply in FP8. Has not run: it needs a GPU."""
    check_transformer_engine()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer: Any = spec.submodules
    layer.self_attention.module = PackedSelfAttention
    return spec


def norm(config: TransformerConfig, *, liger: bool) -> Callable[..., nn.Module]:
    """Of the layers, and of the model behind them."""
    if not config.fp8:
        return LigerNorm if liger else Norm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm  # type: ignore


def check_transformer_engine() -> None:
    """Raises ConfigError where FP8 cannot run."""
    try:
        import transformer_engine.pytorch  # noqa: F401  # type: ignore
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            "model.fp8 multiplies with Transformer Engine, which does not import here "
            f"({reason}); set model.fp8=off, or on a GPU machine: "
            "pip install 'flowrl-trainer[megatron,fp8]'"
        ) from error
