"""An objective of linear_policy_loss whose every input has a gradient, and its inputs."""

from __future__ import annotations

import torch
from flowrl_kernels import Rows, WeightBound, trajectory_balance
from torch import Tensor

OFFSETS = [0, 5, 5, 30, 31, 48, 65]  # one sequence is empty
N, T, V = 6, 65, 130


def flow(logprobs: Tensor, entropy: Tensor | None, rows: Rows, backend: str | None = None):
    """Trajectory balance by `backend`, a value loss and an entropy bonus."""
    inputs = rows.inputs
    balance = trajectory_balance(
        logprobs,
        inputs["old"],
        inputs["ref"],
        inputs["log_z"],
        inputs["rewards"],
        rows.cu_seqlens,
        beta=2.0,
        weight_bound=WeightBound(0.5, 2.0),
        scale=1 / N,
        backend=backend,
    )
    loss = balance.loss + ((inputs["values"] - logprobs.detach()) ** 2).sum() / T
    if entropy is not None:
        loss = loss - 0.1 * entropy.sum()
    return loss, {"residual": balance.residual, "length": balance.num_tokens}


def inputs_for(
    dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)

    def draw(size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    sequence = {"log_z": draw(N).requires_grad_(), "rewards": draw(N)}
    token = {"old": draw(T) * 0.01 - 5, "ref": draw(T) - 5, "values": draw(T).requires_grad_()}
    return sequence, token
