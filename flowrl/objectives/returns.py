"""Discounted sums along packed sequences, and generalised advantage estimation.

A sequence is its response tokens that are not masked, one after the other: a masked token between
two others is no time step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.objectives.aggregation import response_lengths
from flowrl.records import LossBatch, ragged_arange


def discounted_sums(
    values: Tensor,  # (..., S)
    position: Tensor,  # (S,) within the segment
    factor: float,
) -> Tensor:  # (..., S)
    """sum_{i<j} factor^(j-i) values_i over the earlier members of j's segment.

    By doubling: after k rounds each holds the sum over the last 2^k, so that log2(longest segment)
    rounds over the whole row do it, whatever the segments' lengths."""
    inclusive = values
    reach, longest = 1, int(position.max()) + 1 if position.numel() else 0
    while reach < longest:
        earlier = torch.nn.functional.pad(inclusive[..., :-reach], (reach, 0))
        inside = position >= reach
        inclusive = inclusive + torch.where(inside, factor**reach * earlier, 0.0)
        reach *= 2
    shifted = torch.nn.functional.pad(inclusive[..., :-1], (1, 0))
    return torch.where(position > 0, factor * shifted, 0.0)


def discounted_to_go(values: Tensor, discount: float, batch: LossBatch) -> Tensor:
    """(T,) sum over u >= t of discount^(u - t) * values_u within the sequence; 0 where masked."""
    sums = _to_go(values.double()[batch.mask], discount, batch)
    return _scatter(sums, batch, values.dtype)


def at_last_token(values: Tensor, batch: LossBatch) -> Tensor:
    """(N,) -> (T,): the sequence's value at its last response token, 0 elsewhere."""
    owners = _owners(batch)
    last = torch.ones_like(owners, dtype=torch.bool)
    last[:-1] = owners[:-1] != owners[1:]
    return _scatter(torch.where(last, values.double()[owners], 0.0), batch, values.dtype)


def gae(
    rewards: Tensor,  # (T,)
    values: Tensor,  # (T,) of the state before each token
    batch: LossBatch,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (T,), 0 where masked.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1}
        ret_t   = A_t + V_t

    V after the last token is 0, for truncated sequences as well (as in verl).
    Source: arXiv:1506.02438."""
    owners = _owners(batch)
    kept = values.double()[batch.mask]
    following = torch.zeros_like(kept)
    following[:-1] = torch.where(owners[:-1] == owners[1:], kept[1:], 0.0)
    delta = rewards.double()[batch.mask] + gamma * following - kept
    advantages = _to_go(delta, gamma * lam, batch)
    return (
        _scatter(advantages, batch, values.dtype),
        _scatter(advantages + kept, batch, values.dtype),
    )


def _owners(batch: LossBatch) -> Tensor:
    """The sequence of every token that is not masked."""
    sequences = torch.arange(batch.num_sequences, device=batch.cu_seqlens.device)
    return sequences.repeat_interleave(response_lengths(batch))


def _to_go(values: Tensor, discount: float, batch: LossBatch) -> Tensor:
    """Discounted sums of the entry itself and what follows it in its sequence, for the tokens that
    are not masked: `discounted_sums` from the end."""
    from_end = ragged_arange(response_lengths(batch).flip(0))
    return values + discounted_sums(values.flip(0), from_end, discount).flip(0)


def _scatter(kept: Tensor, batch: LossBatch, dtype: torch.dtype) -> Tensor:
    """Entries of the tokens that are not masked, back in their places."""
    whole = torch.zeros(batch.mask.numel(), dtype=kept.dtype, device=kept.device)
    whole[batch.mask] = kept
    return whole.to(dtype)
