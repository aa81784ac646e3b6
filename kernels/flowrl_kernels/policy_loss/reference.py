"""The definition of linear_policy_loss: the objective on all sequences at once, under autograd."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flowrl_kernels.linear_logprobs import reference
from flowrl_kernels.policy_loss.contract import Objective, PolicyLoss, Rows


def linear_policy_loss(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (N + 1,)
    objective: Objective,
    *,
    sequence_inputs: Mapping[str, Tensor],
    token_inputs: Mapping[str, Tensor],
    temperature: float,
    vocab_start: int,
    vocab_size: int | None,
    entropy: str,
    grad_scale: float,
    **_without_meaning_on_one_rank: object,
) -> PolicyLoss:
    scores = reference.linear_logprobs(
        hidden,
        weight,
        targets,
        temperature=temperature,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        entropy=entropy,
    )
    rows = Rows(
        slice(0, cu_seqlens.numel() - 1),
        slice(0, hidden.shape[0]),
        cu_seqlens,
        {**sequence_inputs, **token_inputs},
    )
    loss, metrics = objective(scores.logprobs, scores.entropy, rows)
    loss = loss.clone()
    if loss.requires_grad:
        loss.register_hook(lambda gradient: gradient * grad_scale)
    return PolicyLoss(
        loss,
        {name: metric.detach() for name, metric in metrics.items()},
        scores.logprobs.detach(),
        None if scores.entropy is None else scores.entropy.detach(),
    )
