"""Steps of a bounded length: an update is shortened until the policy has moved no further than the
objective's trust region allows and its loss has improved. Source: arXiv:1502.05477, appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.models import Backend, Microbatch, UpdateInfo
from flowrl.objectives.base import TrustRegion
from flowrl.objectives.kl import k3
from flowrl.records import LossBatch


@dataclass(frozen=True)
class Moved:
    """How far an update moved the policy."""

    update: UpdateInfo
    kl: float  # mean KL(old || new) per token
    share: float = 1.0  # of the proposed step; 0: rejected


def take_step(
    backend: Backend,
    region: TrustRegion,
    microbatches: Sequence[Microbatch],
    measure: Callable[[], tuple[float, float]],
    loss_before: float,
) -> Moved:
    """Proposes a step and takes the longest share 1, b, b^2, ... of it, b = region.backtrack, with
    KL(old || new) <= region.max_kl and a lower loss; none of it if no share will do. `measure`
    gives both at the current weights, alike on every rank. The optimizer's moments stay as they
    are."""
    start = backend.snapshot()
    if region.method == "conjugate_gradient":
        update = backend.natural_step(microbatches, region)
    else:
        update = backend.step()
    if update.skipped:
        return Moved(update, 0.0, 0.0)
    share = 1.0
    for _ in range(region.max_backtracks + 1):
        kl, loss = measure()
        if kl <= region.max_kl and loss < loss_before:
            return Moved(update, kl, share)
        share *= region.backtrack
        backend.interpolate(start, region.backtrack)
    backend.interpolate(start, 0.0)
    return Moved(update, 0.0, 0.0)


def kl_old_new(logprobs: Tensor, old_logprobs: Tensor, batch: LossBatch) -> Tensor:
    """This rank's share of the mean over the update's tokens of k3 for KL(old || new), float64:
    rho - 1 - log rho on tokens that the old policy sampled, rho = new / old."""
    assert batch.totals is not None
    log_ratio = torch.where(batch.mask, old_logprobs - logprobs, 0.0).double()
    return k3(log_ratio).sum() / batch.totals.tokens
