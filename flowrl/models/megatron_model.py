"""A Megatron GPTModel that computes packed log-probs: its settings, embedding and head. What its
layers are made of: megatron_layers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from flowrl.config import ModelConfig
from flowrl.model_shape import ModelShape
from flowrl.models.megatron_layers import layer_spec, norm
from flowrl.parallel_config import ParallelConfig


class HeadUse(Protocol):
    """What the last stage does with the hidden states: called inside the output layer."""

    def __call__(self, hidden: Tensor, weight: Tensor, heads: Mapping[str, Any]) -> Any:
        """hidden (T_model padded, D), the same on all tensor ranks; weight (V_local, D); heads
        "log_z" and "value", as far as the objective needs them."""
        ...


class TokenEmbedding(tensor_parallel.VocabParallelEmbedding):
    """The embedding over the vocabulary's shards, without a gradient for the padding token. Its row
    may be zero, where the gradient of the norm behind it is a thousand times too large."""

    padding_token: int | None

    def forward(self, input_: Tensor) -> Tensor:  # (1, T_model) -> (1, T_model, D), or (T, 1, D)
        local = input_ - self.vocab_start_index
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        padding = (
            None if self.padding_token is None else self.padding_token - self.vocab_start_index
        )
        if padding is not None and not 0 <= padding < self.weight.shape[0]:
            padding = None
        rows = local.masked_fill(elsewhere, 0)
        found = nn.functional.embedding(rows, self.weight, padding_idx=padding)
        found = found.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if not self.reduce_scatter_embeddings:
            return tensor_parallel.reduce_from_tensor_model_parallel_region(
                found, group=self.tp_group
            )
        return tensor_parallel.reduce_scatter_to_sequence_parallel_region(
            found.transpose(0, 1).contiguous(), group=self.tp_group
        )


class PolicyHead(tensor_parallel.ColumnParallelLinear):
    """The output layer, which hands its vocabulary shard to a `HeadUse` instead of making logits.
    Called as a module, so that hooks that wait for its weight have run."""

    def forward(  # type: ignore[override]
        self, input_: Tensor, weight: Tensor | None, use: HeadUse, heads: Mapping[str, Any]
    ) -> Any:
        hidden = input_  # (T_model / tensor under sequence parallelism, 1, D)
        if self.sequence_parallel:
            # The fused head sums its gradient over tensor ranks itself, and that of the small
            # heads is the same on all: backward takes this rank's tokens and adds nothing.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        weight = self.weight if weight is None else weight
        assert weight is not None
        return use(hidden.squeeze(1), weight, heads)


class PolicyModel(GPTModel):
    """The part of the policy on this stage. `labels` of `forward` is a `HeadUse`; what that returns
    is what the last stage returns."""

    def __init__(
        self,
        *args: Any,
        heads: Mapping[str, nn.Module],
        padding_token: int | None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if self.pre_process:
            words: Any = self.embedding.word_embeddings
            words.__class__ = TokenEmbedding  # built by GPTModel, as a plain one
            words.padding_token = padding_token
        if self.post_process:
            self.output_layer.__class__ = PolicyHead  # built by GPTModel, as a plain one
        self.heads = nn.ModuleDict(heads if self.post_process else {})

    def _postprocess(self, hidden_states: Tensor, *_: Any, labels: HeadUse, **__: Any) -> Any:
        if not self.post_process:
            return hidden_states
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        return self.output_layer(hidden_states, weight, labels, dict(self.heads.items()))


def transformer_config(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, device: torch.device
) -> TransformerConfig:
    """Megatron's settings of a model. Gradients are summed, never averaged: with the loss "per
    token" Megatron divides by nothing of its own."""
    dtype = getattr(torch, model.dtype)
    interleaved = parallel.virtual_pipeline > 1
    options: dict[str, Any] = {}
    if parallel.recompute == "full":
        options = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif parallel.recompute == "selective":
        options = {"recompute_granularity": "selective"}
    if model.fp8 != "off":
        options |= {"fp8": model.fp8, "fp8_recipe": model.fp8_recipe}
        # Replicas have their own numbers of micro-batches, and so of these reductions.
        options["tp_only_amax_red"] = True
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        use_te_activation_func=model.liger,  # the hook's name; the function is Liger's
        bias_activation_fusion=device.type == "cuda" and not model.liger,  # by torch.compile
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        use_cpu_initialization=device.type == "cpu",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,  # needs Apex
        calculate_per_token_loss=True,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        sequence_parallel=parallel.sequence,
        overlap_p2p_comm=interleaved and parallel.overlap_p2p,
        batch_p2p_comm=not (interleaved and parallel.overlap_p2p),
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # what variable lengths demand, though nothing is MoE
        **options,
    )


def build_chunk(
    config: TransformerConfig,
    shape: ModelShape,
    padded_vocab: int,
    chunk: int | None,
    heads: Mapping[str, nn.Module],
    *,
    liger: bool,
) -> PolicyModel:
    """One chunk of consecutive layers on this rank, with unset weights; `chunk` is None without
    interleaving."""
    layers = [layer_spec(config, liger=liger)] * get_num_layers_to_build(config, chunk)
    final_norm: Any = norm(config, liger=liger)
    block = TransformerBlockSubmodules(layers, final_norm)
    return PolicyModel(
        config,
        block,
        vocab_size=padded_vocab,
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(False, chunk),
        post_process=parallel_state.is_pipeline_last_stage(False, chunk),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,  # type: ignore
        rope_scaling=shape.rope_factor is not None,
        rope_scaling_factor=shape.rope_factor or 8.0,
        vp_stage=chunk,
        heads=heads,
        padding_token=shape.padding_token,
    )


def _leave_as_is(weight: Tensor) -> Tensor:
    """Weights come from files."""
    return weight
