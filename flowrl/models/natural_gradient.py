"""Natural gradient by conjugate gradients, for models small enough to hold their logits.

    solve (F + damping I) x = g,     step = -sqrt(2 max_kl / x'Fx) x

F is the Fisher matrix of the response tokens' distributions, the Hessian of the mean KL(old || new)
per token at new = old. Source: TRPO, arXiv:1502.05477, appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from flowrl.objectives.base import TrustRegion
from flowrl.parallel import Parallel
from flowrl.records import IGNORE_INDEX, PackedBatch
from flowrl.schema import ConfigError

MAX_PARAMETERS = 50_000_000  # CG holds five vectors of this length, and makes 3 passes an iteration
RELATIVE_STEP = 1e-2  # of the finite difference: the perturbation's rms over the weights' rms


def natural_gradient(
    params: Mapping[str, nn.Parameter],
    logits: Callable[[PackedBatch], Tensor],  # (T, V), differentiable in params
    batches: Sequence[PackedBatch],
    region: TrustRegion,
    parallel: Parallel,
) -> None:
    """Moves `params` by the step above for the gradients that they hold (summed over ranks), and
    clears those gradients. Raises ConfigError for a model that is too large."""
    check_size(sum(p.numel() for p in params.values()))
    fisher = Fisher(list(params.values()), logits, batches, parallel)
    gradient = fisher.flat([p.grad for p in params.values()])
    direction = conjugate_gradient(
        lambda v: fisher(v) + region.damping * v, gradient, region.cg_iterations
    )
    curvature = float(direction @ fisher(direction))
    if curvature > 0:
        fisher.add(direction, -((2 * region.max_kl / curvature) ** 0.5))
    for param in params.values():
        param.grad = None


def check_size(num_parameters: int) -> None:
    """Raises ConfigError for a model that is too large for conjugate gradients."""
    if num_parameters > MAX_PARAMETERS:
        raise ConfigError(
            f"conjugate gradients are for at most {MAX_PARAMETERS:,} parameters, this model has "
            f"{num_parameters:,}; set objective.method=line_search or penalty"
        )


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """x with product(x) = target, from x = 0; `product` is symmetric and positive definite."""
    x = torch.zeros_like(target)
    residual = target.clone()
    direction = target.clone()
    squared = residual @ residual
    start = squared
    for _ in range(iterations):
        if not squared > tolerance * start:
            break
        image = product(direction)
        length = squared / (direction @ image)
        x += length * direction
        residual -= length * image
        previous, squared = squared, residual @ residual
        direction = residual + (squared / previous) * direction
    return x


class Fisher:
    """v -> F v = J' (diag(p) - p p') J v / tokens, over the batches of all ranks. J v is a central
    difference of the logits: it needs no second derivative of attention kernels."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        logits: Callable[[PackedBatch], Tensor],
        batches: Sequence[PackedBatch],
        parallel: Parallel,
    ) -> None:
        self.params = params
        self.logits = logits
        self.batches = batches
        self.parallel = parallel
        counted = sum(int((b.targets != IGNORE_INDEX).sum()) for b in batches)
        self.tokens = float(parallel.all_reduce(torch.tensor(counted).double()))
        weights = self.flat([p.detach() for p in params])
        self.scale = RELATIVE_STEP * float(weights.norm())

    def flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        pairs = zip(tensors, self.params, strict=True)
        return torch.cat([(torch.zeros_like(p) if t is None else t).flatten() for t, p in pairs])

    @torch.no_grad()
    def add(self, vector: Tensor, factor: float) -> None:
        """params += factor * vector."""
        parts = vector.split([p.numel() for p in self.params])
        for param, part in zip(self.params, parts, strict=True):
            param += factor * part.view_as(param)

    def __call__(self, vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        for batch in self.batches:
            total += self._product(batch, vector)
        return self.parallel.all_reduce(total) / self.tokens

    def _product(self, batch: PackedBatch, vector: Tensor) -> Tensor:
        held = (batch.targets != IGNORE_INDEX).unsqueeze(1)
        change = torch.where(held, self._jvp(batch, vector), 0.0)
        with torch.enable_grad():
            logits = self.logits(batch)
            p = logits.detach().float().softmax(1)
            cotangent = p * (change - (p * change).sum(1, keepdim=True))
            grads = torch.autograd.grad(
                (logits * cotangent.to(logits.dtype)).sum(), self.params, allow_unused=True
            )
        return self.flat(grads)

    @torch.no_grad()
    def _jvp(self, batch: PackedBatch, vector: Tensor) -> Tensor:
        """(T, V) derivative of the logits along `vector`."""
        saved = [p.detach().clone() for p in self.params]
        epsilon = self.scale / float(vector.norm().clamp(min=1e-30))
        sides = []
        for sign in (1.0, -1.0):
            self.add(vector, sign * epsilon)
            sides.append(self.logits(batch).float())
            for param, old in zip(self.params, saved, strict=True):
                param.copy_(old)
        return (sides[0] - sides[1]) / (2 * epsilon)
