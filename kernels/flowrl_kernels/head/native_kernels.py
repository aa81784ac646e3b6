"""HeadKernels in native code (csrc/linear_logprobs_cpu.cpp, csrc/head_products_cpu.cpp).

The workspace holds the logits until `dlogits_` overwrites them: one reading pass, one in place.
Products of bfloat16 operands are native where the processor multiplies them faster than float32;
dlogits are rounded to bfloat16 for them, after (p - 1). All other products are PyTorch's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl_kernels.head import Head, LocalStatistics, Products, RowGradients, RowStatistics
from flowrl_kernels.head import products as torch_products
from flowrl_kernels.native_library import FIRST_WITH_PRODUCTS

# The default of max_logits_bytes: in bfloat16, with products of our own, 256 rows of 151936 columns
# run fastest; in float32, with torch's products, 384. A smaller vocabulary has a workspace that
# malloc hands out again and again: 1024 x 8192 take 49 ms with 16 MiB and 73 ms with 40 MiB, whose
# pages are new in every call.
MOST_LOGITS_BYTES = {torch.bfloat16: 160 << 20, torch.float32: 256 << 20}
REUSED_LOGITS_BYTES = 16 << 20
ENOUGH_ROWS = {torch.bfloat16: 256, torch.float32: 384}


def logits_bytes(weight: Tensor, max_logits_bytes: int | None) -> int:
    """`max_logits_bytes`, or the default for the columns and the dtype of `weight` (V_local, D)."""
    if max_logits_bytes is not None:
        return max_logits_bytes
    enough = ENOUGH_ROWS[weight.dtype] * weight.shape[0] * 4
    return min(max(enough, REUSED_LOGITS_BYTES), MOST_LOGITS_BYTES[weight.dtype])


TILE_COLUMNS = 1024  # of float32 logits between products and passes: 1.5 MB in 384 rows


@dataclass(frozen=True)
class NativeProducts:
    level: int

    def dhidden_(self, total: Tensor, dlogits: Tensor, weight: Tensor, beta: int) -> None:
        if _native(weight, self.level):
            assert beta == 0, "all columns at once"
            weight = weight.contiguous()
            total.copy_(torch.ops.flowrl_native.head_dhidden(dlogits, weight, self.level))
        else:
            torch_products.dhidden_(total, dlogits, weight, beta)

    def dweight_(self, total: Tensor, dlogits: Tensor, hidden: Tensor, beta: int) -> None:
        if _native(hidden, self.level):
            torch.ops.flowrl_native.head_dweight_(
                total, dlogits, hidden.contiguous(), beta == 1, self.level
            )
        else:
            torch_products.dweight_(total, dlogits, hidden, beta)


class NativeHead:
    forward_needs_workspace = True
    products: Products

    def __init__(self, level: int = -1) -> None:
        """`level`: index in native_library.LEVELS, for tests. -1: the best of this processor."""
        self.level = level
        self.products = NativeProducts(level)

    def columns_at_once(self, head: Head) -> int:
        columns = max(head.weight.shape[0], 1)
        return columns if _native(head.weight, self.level) else min(TILE_COLUMNS, columns)

    def logit_bytes(self, head: Head) -> int:
        return head.dtype.itemsize

    def workspace(self, head: Head, num_rows: int) -> Tensor:
        return head.weight.new_empty(num_rows, head.weight.shape[0], dtype=head.dtype)

    def statistics(
        self, head: Head, hidden: Tensor, targets: Tensor, out: Tensor | None
    ) -> LocalStatistics:
        assert out is not None, "forward_needs_workspace"
        row_max = out.new_full((out.shape[0],), float("-inf"))
        target = row_max.clone()
        sum_exp = torch.zeros_like(row_max, dtype=torch.float64)
        sum_exp_z = torch.zeros_like(sum_exp)
        hidden, targets = hidden.contiguous(), targets.contiguous()
        step = self.columns_at_once(head)
        for start in range(0, out.shape[1], step):
            columns = slice(start, min(start + step, out.shape[1]))
            part, logits = head.of(columns), out[:, columns]
            if _native(hidden, self.level):
                torch.ops.flowrl_native.head_logits_(
                    logits, hidden, part.weight.contiguous(), 1 / head.temperature, self.level
                )
            else:
                torch_products.logits_(logits, hidden, part.weight, 1 / head.temperature)
            torch.ops.flowrl_native.head_statistics_(
                row_max,
                sum_exp,
                target,
                sum_exp_z,
                logits,
                targets,
                part.vocab_start,
                head.entropy,
                self.level,
            )
        entropy_sum = sum_exp_z.float() if head.entropy else None
        return LocalStatistics(row_max, sum_exp.float(), target, entropy_sum)

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


def _native(operand: Tensor, level: int) -> bool:
    if operand.dtype != torch.bfloat16:
        return False
    chosen = torch.ops.flowrl_native.best_level() if level == -1 else level
    return chosen >= FIRST_WITH_PRODUCTS
