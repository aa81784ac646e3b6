"""The pair of HeadKernels in native code (csrc/linear_logprobs_cpu.cpp).

The workspace holds the logits until `dlogits_` overwrites them: one reading pass, one in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl_kernels.head import Head, LocalStatistics, RowGradients, RowStatistics
from flowrl_kernels.head.products import logits_


@dataclass
class NativeHead:
    level: int = -1
    """Index in native_library.LEVELS; -1: the best of this processor. Others are for tests."""
    forward_needs_workspace: bool = True

    def logit_bytes(self, head: Head) -> int:
        return head.dtype.itemsize

    def workspace(self, head: Head, num_rows: int) -> Tensor:
        return head.weight.new_empty(num_rows, head.weight.shape[0], dtype=head.dtype)

    def statistics(
        self, head: Head, hidden: Tensor, targets: Tensor, out: Tensor | None
    ) -> LocalStatistics:
        assert out is not None, "forward_needs_workspace"
        logits_(out, hidden, head.weight, 1 / head.temperature)
        row_max, sum_exp, target, sum_exp_z = torch.ops.flowrl_native.head_statistics(
            out, targets.contiguous(), head.vocab_start, head.entropy, self.level
        )
        return LocalStatistics(row_max, sum_exp, target, sum_exp_z if head.entropy else None)

    def dlogits_(
        self,
        head: Head,
        targets: Tensor,
        out: Tensor,
        local: LocalStatistics,
        rows: RowStatistics,
        gradients: RowGradients,
    ) -> None:
        torch.ops.flowrl_native.head_dlogits_(
            out,
            targets.contiguous(),
            head.vocab_start,
            head.temperature,
            rows.row_max,
            rows.log_sum,
            gradients.logprobs.contiguous(),
            None if gradients.lse is None else gradients.lse.contiguous(),
            rows.entropy,
            None if gradients.entropy is None else gradients.entropy.contiguous(),
            self.level,
        )
