"""The definition of linear_logprobs: plain differentiable PyTorch with all logits at once."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_kernels.checks import IGNORE_INDEX, statistics_dtype, valid_columns
from flowrl_kernels.linear_logprobs.contract import LinearLogprobs


def linear_logprobs(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (T,)
    *,
    temperature: float,
    vocab_start: int,
    vocab_size: int | None,
    entropy: str,
    **_without_meaning_on_one_rank: object,
) -> LinearLogprobs:
    counted = targets != IGNORE_INDEX  # (T,)
    dtype = statistics_dtype(hidden.dtype)
    weight = weight[: valid_columns(weight, vocab_start, vocab_size)]
    with torch.autocast(hidden.device.type, enabled=False):
        # Masked rows are emptied before the product: where() after it would leave NaN * 0 in
        # backward.
        rows = hidden.where(counted[:, None], 0).to(dtype)
        logits = rows @ weight.to(dtype).T / temperature  # (T, V)
    log_p = logits.log_softmax(-1)
    logprobs = log_p.gather(1, targets.where(counted, 0)[:, None])[:, 0]
    row_entropy = None
    if entropy != "none":
        row_entropy = -(log_p.exp() * log_p).sum(-1).where(counted, 0)
        if entropy == "metric":
            row_entropy = row_entropy.detach()
    return LinearLogprobs(
        logprobs.where(counted, 0), logits.logsumexp(-1).where(counted, 0), row_entropy
    )
