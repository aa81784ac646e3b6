"""Corrections of the sampler's mismatch: a weight for each token's loss, without gradient.

The trainer's policy and the sampler's differ by rounding, by kernels, by fp8, or by age. With

    mu_t = exp(old_logprobs_t - rollout_logprobs_t)         of one token
    M    = prod_t mu_t,   g = exp(mean_t log mu_t)          of a sequence

each correction is one line of `corrected`. Sums are float64 and stay in log space up to the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.metrics import segment_sum
from flowrl.records import LossBatch
from flowrl.rollout_config import RolloutConfig

LOG_LIMIT = 60.0  # exp of a log-ratio stays finite in float32


@dataclass(frozen=True)
class _Ratios:
    token: Tensor  # (T,) log mu; 0 where masked
    sequence: Tensor  # (T,) log M of the token's sequence
    mean: Tensor  # (T,) log g of the token's sequence
    k3: Tensor  # (T,) mean over the sequence of mu - 1 - log mu


Formula = Callable[[_Ratios, float, float], Tensor]
"""(ratios, low, high) -> weights (T,)."""


def _tis(r: _Ratios, low: float, high: float) -> Tensor:
    return r.token.clamp(max=_log(high)).exp()


def _seq_tis(r: _Ratios, low: float, high: float) -> Tensor:
    return r.sequence.clamp(max=_log(high)).exp()


def _icepop(r: _Ratios, low: float, high: float) -> Tensor:
    return _kept(r.token, r.token, low, high)


def _seq_mask(r: _Ratios, low: float, high: float) -> Tensor:
    return _kept(r.sequence, r.sequence, low, high)


def _seq_mask_tis(r: _Ratios, low: float, high: float) -> Tensor:
    return _kept(r.token, r.mean, low, high)


def _geo_rs(r: _Ratios, low: float, high: float) -> Tensor:
    return _kept(torch.zeros_like(r.mean), r.mean, low, high)


def _k3_rs(r: _Ratios, low: float, high: float) -> Tensor:
    return (r.k3 < high).to(r.k3.dtype)


FORMULAS: dict[str, Formula] = {
    "tis": _tis,
    "seq_tis": _seq_tis,
    "icepop": _icepop,
    "seq_mask": _seq_mask,
    "seq_mask_tis": _seq_mask_tis,
    "geo_rs": _geo_rs,
    "k3_rs": _k3_rs,
}


PER_SEQUENCE = ("seq_tis", "seq_mask", "geo_rs", "k3_rs")
"""Corrections that give all tokens of a sequence one weight, which is the sequence's factor."""


def corrected(
    batch: LossBatch,
    trainer_logprobs: Tensor,  # (T,) by the trainer, at the weights before the step's updates
    rollout: RolloutConfig,
) -> LossBatch:
    """The batch with `rollout_weights` (T,), 1 at masked tokens, and where the correction is one of
    whole sequences `rollout_factors` (N,). Without a correction the batch as it is.

    tis           min(mu_t, high)                     truncated importance sampling, high 2
    seq_tis       min(M, high)                        high 2
    icepop        mu_t if low <= mu_t <= high else 0        0.5 and 5
    seq_mask      M if low <= M <= high else 0              0 and 3
    seq_mask_tis  mu_t if low <= g <= high else 0           0.5 and 5
    geo_rs        1 if low <= g <= high else 0              0.999 and 1.001
    k3_rs         1 if mean_t (mu_t - 1 - log mu_t) < high else 0       0.01

    Sources: docs/rollouts.md."""
    if rollout.correction == "none":
        return batch
    assert batch.rollout_logprobs is not None
    low, high = rollout.correction_bounds
    weights = FORMULAS[rollout.correction](_ratios(batch, trainer_logprobs), low, high)
    factors = None
    if rollout.correction in PER_SEQUENCE:
        factors = weights[batch.cu_seqlens[:-1].long()].float()
    weights = torch.where(batch.mask, weights, 1.0).float()
    return batch.replace(rollout_weights=weights, rollout_factors=factors)


def correction_metrics(batch: LossBatch) -> dict[str, Tensor]:
    """Per sequence (N,): sums over its tokens of the weight, and of whether it is 0."""
    assert batch.rollout_weights is not None
    weights = torch.where(batch.mask, batch.rollout_weights, 0.0)
    dropped = batch.mask & (batch.rollout_weights == 0)
    return {
        "correction_weight": segment_sum(weights, batch.cu_seqlens),
        "correction_dropped": segment_sum(dropped.double(), batch.cu_seqlens),
    }


def _ratios(batch: LossBatch, trainer_logprobs: Tensor) -> _Ratios:
    assert batch.rollout_logprobs is not None
    log_ratio = (trainer_logprobs - batch.rollout_logprobs).double()
    token = torch.where(batch.mask, log_ratio, 0.0).clamp(-LOG_LIMIT, LOG_LIMIT)
    counts = segment_sum(batch.mask.double(), batch.cu_seqlens).clamp(min=1)
    k3 = token.expm1() - token
    sums, k3_sums = (segment_sum(x, batch.cu_seqlens) for x in (token, k3))
    lengths = batch.lengths

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(lengths)

    return _Ratios(token, spread(sums), spread(sums / counts), spread(k3_sums / counts))


def _kept(log_weight: Tensor, log_judged: Tensor, low: float, high: float) -> Tensor:
    """exp(log_weight) where low <= exp(log_judged) <= high, else 0."""
    inside = (log_judged >= _log(low)) & (log_judged <= _log(high))
    return torch.where(inside, log_weight.clamp(max=LOG_LIMIT).exp(), 0.0)


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf
