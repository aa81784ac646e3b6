"""Sums over what is still to come in a packed sequence, and generalised advantage estimation.

A sequence is its response tokens that are not masked, one after the other: a masked token between
two others is no time step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.objectives.aggregation import response_lengths
from flowrl.records import LossBatch


def discounted_to_go(values: Tensor, discount: float, batch: LossBatch) -> Tensor:
    """(T,) sum over u >= t of discount^(u - t) * values_u within the sequence; 0 where masked."""
    sums = _scan(values.double()[batch.mask], discount, _owners(batch))
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
    advantages = _scan(delta, gamma * lam, owners)
    return (
        _scatter(advantages, batch, values.dtype),
        _scatter(advantages + kept, batch, values.dtype),
    )


def _owners(batch: LossBatch) -> Tensor:
    """The sequence of every token that is not masked."""
    sequences = torch.arange(batch.num_sequences, device=batch.cu_seqlens.device)
    return sequences.repeat_interleave(response_lengths(batch))


def _scan(values: Tensor, discount: float, owners: Tensor) -> Tensor:
    """Discounted suffix sums of each owner's run, in log2(longest) passes of doubling reach: after
    the pass of `shift`, every entry holds the sum of the 2 * shift that start with it."""
    sums = values.clone()
    longest = int(torch.bincount(owners).max()) if owners.numel() else 0
    shift = 1
    while shift < longest:
        same = owners[:-shift] == owners[shift:]
        later = torch.where(same, sums[shift:] * discount**shift, 0.0)
        sums = torch.cat([sums[:-shift] + later, sums[-shift:]])
        shift *= 2
    return sums


def _scatter(kept: Tensor, batch: LossBatch, dtype: torch.dtype) -> Tensor:
    """Entries of the tokens that are not masked, back in their places."""
    whole = torch.zeros(batch.mask.numel(), dtype=kept.dtype, device=kept.device)
    whole[batch.mask] = kept
    return whole.to(dtype)
