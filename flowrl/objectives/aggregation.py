"""From per-token numbers to sequences and losses.

A policy-gradient loss is sum_t W_t * loss_t over response tokens; the mode names W. All divide by
totals of the whole update, so that parts of a batch add up to the whole.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flowrl.objectives.base import given
from flowrl.records import LossBatch

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]


def token_weights(mode: Aggregation, batch: LossBatch) -> Tensor:
    """(T,) float64 W: 1 / tokens, 1 / (sequences * |y|) or 1 / sequences; 0 on masked tokens."""
    totals = given(batch.totals, "totals")
    mask = batch.mask.double()
    if mode == "token-mean":
        return mask / totals.tokens
    if mode == "seq-mean-token-sum":
        return mask / totals.sequences
    if mode == "seq-mean-token-mean":
        return mask / (totals.sequences * per_token(response_lengths(batch).clamp(min=1), batch))
    raise ValueError(f"aggregation must be one of {Aggregation.__args__}, got {mode!r}")


def aggregate(token_losses: Tensor, mode: Aggregation, batch: LossBatch) -> Tensor:
    """Scalar sum_t W_t * token_losses_t. The losses come from `unmasked` inputs: a NaN at a masked
    token would pass through a weight of 0."""
    return (token_weights(mode, batch).to(token_losses.dtype) * token_losses).sum()


def unmasked(values: Tensor, batch: LossBatch) -> Tensor:
    """(T,) with 0 at masked tokens, whatever stood there: where, never a product with 0."""
    return torch.where(batch.mask, values, 0)


def per_token(values: Tensor, batch: LossBatch) -> Tensor:
    """(N,) -> (T,): each token gets its sequence's value."""
    return values.repeat_interleave(batch.lengths)


def sequence_sum(values: Tensor, batch: LossBatch) -> Tensor:
    """(T,) -> (N,): sum over the response tokens that are not masked, without gradient."""
    clean = unmasked(values.detach(), batch)
    return torch.segment_reduce(clean, "sum", lengths=batch.lengths)


def sequence_mean(values: Tensor, batch: LossBatch) -> Tensor:
    """(T,) -> (N,): mean over the response tokens that are not masked; 0 where there is none."""
    return sequence_sum(values, batch) / response_lengths(batch).clamp(min=1)


def response_lengths(batch: LossBatch) -> Tensor:
    """(N,) int64 |y|: response tokens that are not masked."""
    return torch.segment_reduce(batch.mask.double(), "sum", lengths=batch.lengths).long()


MAX_ROLLOUT_CORRECTION = 2.0  # as for token weights (TIS); a product over tokens has heavy tails


def rollout_correction(batch: LossBatch) -> Tensor:
    """(N,) factor of a sequence-level loss for the sampler's other log-probs: the product of the
    response's `rollout_weights`, at most 2; 1 without them. Without gradient."""
    if batch.rollout_weights is None:
        return torch.ones_like(batch.rewards)
    log_weights = torch.where(batch.mask, batch.rollout_weights.double(), 1.0).log()
    product = torch.segment_reduce(log_weights, "sum", lengths=batch.lengths).exp()
    return product.clamp(max=MAX_ROLLOUT_CORRECTION).detach()
