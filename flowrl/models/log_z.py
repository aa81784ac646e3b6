"""The partition head log Z_phi(x): an MLP over the mean hidden state of the prompt.

[Linear(D, D) -> GELU -> LayerNorm(D) -> Dropout] x layers, Linear(D, 1); for two layers
2 (D^2 + D) + 4 D + (D + 1) parameters. Source: arXiv:2509.15207; variants in docs/math.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowrl.config import LogZConfig
from flowrl.records import PackedBatch, ragged_arange


class LogZHead(nn.Module):
    """Computes in float32 whatever the backbone's dtype. The output layer starts at zero, so that
    log Z starts at 0 and the first residuals are those of the reward alone."""

    def __init__(self, hidden_size: int, config: LogZConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.LayerNorm(hidden_size))
            for _ in range(config.layers)
        ).float()
        self.output = nn.Linear(hidden_size, 1).float()
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.config = config

    def forward(
        self,
        hidden: Tensor,  # (T_model, D) after the final norm
        batch: PackedBatch,
        dropout_keys: Tensor | None = None,  # (N,) int64
    ) -> Tensor:  # (N,) float32
        """One value a sequence: members of a group see the same prompt, so they get the same value.

        Dropout is a function of the key alone, so it is the same for a group's members and does not
        depend on micro-batches or ranks. Without keys there is none."""
        hidden = hidden.detach() if self.config.detach_hidden else hidden
        x = self._pool(hidden.float(), batch)
        for layer, block in enumerate(self.blocks):
            x = block(x)
            if dropout_keys is not None and self.config.dropout:
                x = x * _dropout_mask(dropout_keys, layer, x.shape[1], self.config.dropout)
        log_z = self.output(x).squeeze(-1)
        return log_z.bfloat16().float() if self.config.dtype == "bfloat16" else log_z

    def _pool(self, hidden: Tensor, batch: PackedBatch) -> Tensor:  # (N, D)
        lengths = batch.prompt_lengths.long()
        if self.config.include_last_prompt_token is False:
            lengths = (lengths - 1).clamp(min=1)  # a prompt of one token keeps it
        starts = batch.model_cu_seqlens[:-1].long()
        rows = starts.repeat_interleave(lengths) + ragged_arange(lengths)
        # Not index_add, whose order of terms CUDA chooses: tensor ranks must agree bit by bit.
        sums = torch.segment_reduce(hidden[rows], "sum", lengths=lengths, axis=0, unsafe=True)
        return sums / lengths.unsqueeze(1)


def dropout_keys(seed: int, num_updates: int, group_ids: Tensor) -> Tensor:
    """(N,) keys of the head's dropout in one update: a function of (seed, update, prompt), so there
    is no random state to save, and ranks and micro-batches do not matter."""
    start = hash((seed, num_updates)) & 0x7FFF_FFFF_FFFF_FFFF
    return group_ids + start


def _dropout_mask(keys: Tensor, layer: int, width: int, rate: float) -> Tensor:
    """(N, width): 0 with probability `rate`, else 1 / (1 - rate). The finaliser of splitmix64 over
    (key, layer, column), with wrapping int64 arithmetic."""
    columns = torch.arange(width, device=keys.device)
    x = (keys[:, None] * 0x9E3779B1 + layer) * 0x85EBCA77 + columns  # (N, width)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    uniform = ((x >> 40) & 0xFFFFFF).float() / (1 << 24)
    return (uniform >= rate).float() / (1 - rate)
