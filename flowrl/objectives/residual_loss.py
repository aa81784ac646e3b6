"""The squared-residual family's loss of one batch: by the fused operator, or in plain PyTorch.

The fused operator has the square without a clipped gap; everything else works on (T,) and (N,)
tensors, which are small beside the logits that they came from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from flowrl_kernels import WeightBound, trajectory_balance
from torch import Tensor

from flowrl.objectives.aggregation import rollout_correction
from flowrl.objectives.base import given
from flowrl.objectives.residual_settings import ResidualSettings
from flowrl.records import LossBatch


class Residuals(NamedTuple):
    """Only `loss` is differentiable, in log-probs and log Z. A sequence without a counted token
    holds 0 (weight: 1)."""

    loss: Tensor  # ()
    residual: Tensor  # (N,)
    log_weight: Tensor  # (N,) sum_t(logprobs - old_logprobs), before the bound
    weight: Tensor  # (N,) what multiplies phi: after the bound and the sampler's correction
    z_estimate: Tensor  # (N,) the log Z that would make this residual 0, gap unclipped
    counted: Tensor  # (N,) bool: has a token that counts


def evaluate(
    settings: ResidualSettings,
    batch: LossBatch,
    log_z: Tensor,  # (N,)
    mask: Tensor | None,  # (T,) bool
    backend: str | None,
) -> Residuals:
    """residual_i = log_z_i + m_t(logprobs) - beta * advantages_i - m_t(anchor)
    loss       = scale / divisor * sum_i  w_i * c_i * phi(residual_i)

    c_i is the correction of sampler against trainer (aggregation.rollout_correction). With a gap
    clip the residual's value at the old policy is clamped, and the policy's move since is added."""
    fused = (
        settings.phi.kind == "square"
        and settings.gap_clip is None
        and batch.rollout_weights is None
    )
    if not fused:
        return plain(settings, batch, log_z, mask)
    result = trajectory_balance(
        given(batch.logprobs, "logprobs"),
        batch.old_logprobs,
        anchor(settings, batch),
        log_z,
        given(batch.advantages, "advantages"),
        batch.cu_seqlens,
        response_mask=mask,
        beta=settings.beta,
        weight_bound=settings.weight_bound,
        length_norm=settings.length_norm,
        scale=loss_scale(settings, batch),
        backend=backend,
    )
    return Residuals(
        result.loss,
        result.residual,
        result.log_weight,
        result.weight,
        log_z.detach().to(result.residual.dtype) - result.residual,
        result.num_tokens > 0,
    )


def plain(
    settings: ResidualSettings, batch: LossBatch, log_z: Tensor, mask: Tensor | None
) -> Residuals:
    """`evaluate` for every setting. Sums over tokens run in float64."""
    logprobs = given(batch.logprobs, "logprobs")
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    keep = batch.mask if mask is None else mask

    def segment_sums(values: Tensor) -> Tensor:  # (T,) -> (N,) float64
        kept = torch.where(keep, values.double(), 0.0)
        return torch.segment_reduce(kept, "sum", lengths=batch.lengths)

    num_tokens = segment_sums(torch.ones_like(logprobs))
    counted = num_tokens > 0
    divisor = num_tokens.clamp(min=1) if settings.length_norm else 1.0
    moved = segment_sums(logprobs - old)  # since the old policy
    from_anchor = segment_sums(old - anchor(settings, batch)) / divisor
    reward = settings.beta * given(batch.advantages, "advantages").double()
    gap = log_z.double() + from_anchor - reward  # the residual at the old policy
    clipped = gap
    if settings.gap_clip is not None:
        low, high = settings.gap_clip
        clipped = gap.clamp(-low, high)
    residual = torch.where(counted, clipped + moved / divisor, 0.0)
    z_estimate = torch.where(counted, log_z.double() - gap - moved / divisor, log_z.double())
    log_weight = moved.detach()
    weight = torch.where(counted, _bounded(log_weight, settings.weight_bound), 1.0)
    weight = weight * rollout_correction(batch).double()
    loss = loss_scale(settings, batch) * (weight * settings.phi(residual)).sum()
    dtype = logprobs.dtype
    return Residuals(
        loss.to(dtype),
        residual.detach().to(dtype),
        log_weight.to(dtype),
        weight.to(dtype),
        z_estimate.detach().to(dtype),
        counted,
    )


def anchor(settings: ResidualSettings, batch: LossBatch) -> Tensor:
    """(T,) what the policy's log-probs are compared with."""
    if settings.anchor == "ref":
        return given(batch.ref_logprobs, "ref_logprobs")
    if batch.old_logprobs is None:  # on-policy
        return given(batch.logprobs, "logprobs").detach()
    return batch.old_logprobs


def loss_scale(settings: ResidualSettings, batch: LossBatch) -> float:
    totals = given(batch.totals, "totals")
    if settings.divisor == "sequences":
        return settings.scale / totals.sequences
    return settings.scale / max(1.0, totals.sequences - totals.groups)


def _bounded(log_weight: Tensor, bound: WeightBound | None) -> Tensor:
    if bound is None:
        return torch.ones_like(log_weight)
    if bound.log_low is not None:
        log_weight = log_weight.clamp(min=bound.log_low)
    if bound.log_high is not None:
        log_weight = log_weight.clamp(max=bound.log_high)
    return log_weight.exp()
