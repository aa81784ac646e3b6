"""The value head: a scalar of the state before each response token, on the policy's backbone.

PPO's critic and the flow function of SubTB and detailed balance are both this head."""

from __future__ import annotations

from torch import Tensor, nn

from flowrl.config import ValueHeadConfig


class ValueHead(nn.Module):
    """Computes in float32 whatever the backbone's dtype; starts at zero."""

    def __init__(self, hidden_size: int, config: ValueHeadConfig) -> None:
        super().__init__()
        self.output = nn.Linear(hidden_size, 1).float()
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.config = config

    def forward(self, hidden: Tensor) -> Tensor:  # (T, D) -> (T,) float32
        hidden = hidden.detach() if self.config.detach_hidden else hidden
        return self.output(hidden.float()).squeeze(-1)
