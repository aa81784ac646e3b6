"""From per-token numbers to sequences and losses.

A policy-gradient loss is sum_t W_t * loss_t over response tokens; the mode names W. All but
token-sum divide by totals of the whole update, so that parts of a batch add up to the whole.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flowrl.objectives.base import given
from flowrl.records import LossBatch

Aggregation = Literal[
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum",
]

MAX_TOKENS = 3000  # the longest answer in Dr. GRPO's runs, arXiv:2503.20783


def token_weights(mode: Aggregation, batch: LossBatch, max_tokens: int = MAX_TOKENS) -> Tensor:
    """(T,) float64 W, 0 on masked tokens.

    token-mean               1 / tokens
    seq-mean-token-mean      1 / (sequences * |y|)
    seq-mean-token-sum       1 / sequences
    seq-mean-token-sum-norm  1 / (sequences * max_tokens), a constant instead of |y|
    token-sum                1
    """
    totals = given(batch.totals, "totals")
    mask = batch.mask.double()
    if mode == "token-mean":
        return mask / totals.tokens
    if mode == "seq-mean-token-sum":
        return mask / totals.sequences
    if mode == "seq-mean-token-mean":
        return mask / (totals.sequences * per_token(response_lengths(batch).clamp(min=1), batch))
    if mode == "seq-mean-token-sum-norm":
        return mask / (totals.sequences * max_tokens)
    if mode == "token-sum":
        return mask
    raise ValueError(f"aggregation must be one of {Aggregation.__args__}, got {mode!r}")


def aggregate(
    token_losses: Tensor, mode: Aggregation, batch: LossBatch, max_tokens: int = MAX_TOKENS
) -> Tensor:
    """Scalar sum_t W_t * rollout_weights_t * token_losses_t. The losses come from `unmasked`
    inputs: a NaN at a masked token would pass through a weight of 0."""
    weights = token_weights(mode, batch, max_tokens)
    if batch.rollout_weights is not None:
        weights = weights * unmasked(batch.rollout_weights.detach(), batch)
    return (weights.to(token_losses.dtype) * token_losses).sum()


def sequence_weights(batch: LossBatch) -> Tensor:
    """(N,) float64: the mean of `rollout_weights` over the sequence's response tokens, 1 without
    such weights; 0 for a sequence without a response token."""
    if batch.rollout_weights is None:
        return (response_lengths(batch) > 0).double()
    return sequence_mean(batch.rollout_weights.detach().double(), batch)


def aggregate_sequences(losses: Tensor, batch: LossBatch) -> Tensor:
    """Scalar sum_i sequence_weights_i * losses_i / sequences, for losses (N,) that are not sums
    over tokens."""
    weights = sequence_weights(batch) / given(batch.totals, "totals").sequences
    return (weights.to(losses.dtype) * losses).sum()


def unmasked(values: Tensor, batch: LossBatch) -> Tensor:
    """(T,) with 0 at masked tokens, whatever stood there: where, never a product with 0."""
    return torch.where(batch.mask, values, 0)


def per_token(values: Tensor, batch: LossBatch) -> Tensor:
    """(N,) -> (T,): each token gets its sequence's value. (T,) stays as it is; with T = N every
    sequence is one token long and both are the same."""
    if values.numel() != batch.num_sequences:
        return values
    return values.repeat_interleave(batch.lengths)


def sequence_sum(values: Tensor, batch: LossBatch) -> Tensor:
    """(T,) -> (N,): sum over the response tokens that are not masked; differentiable."""
    return torch.segment_reduce(unmasked(values, batch), "sum", lengths=batch.lengths)


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
