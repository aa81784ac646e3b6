"""The pair of HeadKernels in PyTorch: in place, in blocks of rows that stay in the cache.

The workspace holds logits z only between the product and the reduction; then it holds
E = exp(z - row_max), whose relative error is that of one exponential, so that dlogits need neither
the logits nor a second exponential: p = E exp(local max - global max - log_sum).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flowrl_kernels.head import (
    Head,
    LocalStatistics,
    Products,
    RowGradients,
    RowStatistics,
    products,
)
from flowrl_kernels.head.products import is_mixed, logits_

# Five passes over 1024 x 151936 logits: 0.08 s in blocks of 1-2 MB, 0.16 s over the whole chunk
# (two cores of a Xeon with 2 MB of L2 each). On a GPU blocks only bound the temporaries.
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}


class TorchHead:
    products: Products = products

    def forward_needs_workspace(self, head: Head) -> bool:
        return True

    def logit_bytes(self, head: Head) -> int:
        """A bfloat16 copy of the gradient, where the products need it, counts too."""
        return head.dtype.itemsize + 2 * is_mixed(head.weight.dtype, head.weight.device)

    def workspace(self, head: Head, num_rows: int) -> Tensor:
        return head.weight.new_empty(num_rows, head.weight.shape[0], dtype=head.dtype)

    def statistics(
        self, head: Head, hidden: Tensor, targets: Tensor, out: Tensor | None
    ) -> LocalStatistics:
        assert out is not None, "forward_needs_workspace"
        logits_(out, hidden, head.weight, 1 / head.temperature)
        column, owned = head.own_targets(targets)
        if out.shape[1] == 0:  # this rank holds padding only
            nothing = out.new_full((out.shape[0],), float("-inf"))
            zero = torch.zeros_like(nothing)
            return LocalStatistics(nothing, zero, nothing, zero if head.entropy else None)
        at_target = out.gather(1, column[:, None])[:, 0]
        target = at_target.where(owned, float("-inf"))
        row_max, sum_exp = torch.empty_like(target), torch.empty_like(target)
        sum_exp_z = torch.empty_like(target) if head.entropy else None
        for rows in _blocks(out):
            z = out[rows]
            torch.amax(z, 1, out=row_max[rows])
            z.sub_(row_max[rows, None])
            if sum_exp_z is not None:
                shifted = z.clone()
                torch.sum(shifted.mul_(z.exp_()), 1, out=sum_exp_z[rows])
            else:
                z.exp_()
            torch.sum(z, 1, out=sum_exp[rows])
        return LocalStatistics(row_max, sum_exp, target, sum_exp_z)

    def dlogits_(
        self,
        head: Head,
        targets: Tensor,
        out: Tensor,
        local: LocalStatistics,
        rows: RowStatistics,
        gradients: RowGradients,
    ) -> None:
        if out.shape[1] == 0:
            return
        to_p = (local.row_max - rows.row_max - rows.log_sum).exp()  # (n,) p = E * to_p
        scale = -gradients.logprobs  # (n,) dlogits = p * scale, and 1 - p at the target below
        if gradients.lse is not None:
            scale = scale + gradients.lse
        if gradients.entropy is None:
            factor = to_p * scale / head.temperature
            for block in _blocks(out):
                out[block].mul_(factor[block, None])
        else:
            assert rows.entropy is not None, "entropy gradient without entropy statistics"
            scale = (scale - gradients.entropy * rows.entropy) / head.temperature
            slope = gradients.entropy / head.temperature
            for block in _blocks(out):
                p = out[block].mul_(to_p[block, None])
                p_log_p = torch.special.xlogy(p, p)  # 0 where p has underflowed, never 0 * -inf
                p.mul_(scale[block, None]).sub_(p_log_p.mul_(slope[block, None]))
        column, owned = head.own_targets(targets)
        at_target = (gradients.logprobs / head.temperature).where(owned, 0)
        out.scatter_add_(1, column[:, None], at_target[:, None])


def _blocks(out: Tensor) -> Iterator[slice]:
    row_bytes = max(out.shape[1] * out.element_size(), 1)
    step = max(BLOCK_BYTES[out.device.type] // row_bytes, 1)
    for start in range(0, out.shape[0], step):
        yield slice(start, min(start + step, out.shape[0]))
