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
        blocks: list[nn.Module] = []
        for _ in range(config.layers):
            blocks += [
                nn.Linear(hidden_size, hidden_size),
                nn.GELU(),
                nn.LayerNorm(hidden_size),
                nn.Dropout(config.dropout or 0.0),
            ]
        self.mlp = nn.Sequential(*blocks, nn.Linear(hidden_size, 1)).float()
        nn.init.zeros_(self.mlp[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.mlp[-1].bias)  # type: ignore[arg-type]
        self.config = config

    def forward(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """hidden (T_model, D) after the final norm -> log Z (N,) float32, one value a sequence:
        members of a group see the same prompt, so they get the same value."""
        hidden = hidden.detach() if self.config.detach_hidden else hidden
        log_z = self.mlp(self._pool(hidden.float(), batch)).squeeze(-1)  # (N,)
        return log_z.bfloat16().float() if self.config.dtype == "bfloat16" else log_z

    def _pool(self, hidden: Tensor, batch: PackedBatch) -> Tensor:  # (N, D)
        lengths = batch.prompt_lengths.long()
        if self.config.include_last_prompt_token is False:
            lengths = (lengths - 1).clamp(min=1)  # a prompt of one token keeps it
        starts = batch.model_cu_seqlens[:-1].long()
        rows = starts.repeat_interleave(lengths) + ragged_arange(lengths)
        owner = torch.arange(lengths.numel(), device=hidden.device).repeat_interleave(lengths)
        sums = hidden.new_zeros(lengths.numel(), hidden.shape[1]).index_add(0, owner, hidden[rows])
        return sums / lengths.unsqueeze(1)
