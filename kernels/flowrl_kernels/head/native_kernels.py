"""HeadKernels in native code (csrc/softmax_cpu.cpp, csrc/head_products_cpu.cpp).

The workspace holds the logits until `dlogits_` overwrites them. It lies column by column, the n
rows of a column side by side, so that a vector holds as many rows. Our own products reduce a tile
of logits as soon as it is made, and keep none where no gradient follows.

Products of bfloat16 operands are native where the processor multiplies them faster than float32;
dlogits are rounded to bfloat16 for them, after (p - 1). Products of float32 operands are native
where that is faster than PyTorch's, on AMD's processors with AVX-512. All others are PyTorch's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl_kernels.head import Head, LocalStatistics, Products, RowGradients, RowStatistics
from flowrl_kernels.head import products as torch_products

# The default of max_logits_bytes: as many bytes as so many rows take, and at most so many MiB;
# where the products are ours, and where they are torch's. At 151936 columns ours take 662 rows in
# bfloat16 (512 are 4% faster than 256, 1024 in one chunk 7% faster than 512) and 193 in float32
# (384: 8% faster, for twice the memory); torch's 276, and 441 (140: 13% slower). A smaller
# vocabulary has a workspace that malloc hands out again and again: of 1024 x 8192, 16 MiB at a time
# take 5% longer than 20, and more than 32 half as long again: malloc gives that back, and its pages
# are new in every call.
OWN_CHUNKS = {torch.bfloat16: (640, 384), torch.float32: (384, 112)}
TORCH_CHUNKS = {
    torch.bfloat16: (256, 160),
    torch.float16: (256, 160),
    torch.float32: (384, 256),
}
REUSED_LOGITS_BYTES = 20 << 20
OWN_BLOCK_BYTES = 100 << 20  # 1024 rows, 151936 columns: at 50 MiB 10% slower, at 200 no faster
FEWEST_COLUMNS = 2048  # below, tiles of the vocabulary are too few to share and float32 is torch's
ROW_STEP = 16  # the workspace's columns are padded to whole vectors of rows


def logits_bytes(
    weight: Tensor, max_logits_bytes: int | None, num_rows: int = 0, sums_dweight: bool = False
) -> int:
    """`max_logits_bytes`, or the default for the columns and the dtype of `weight` (V_local, D).

    `sums_dweight`: the gradient of a bfloat16 weight is summed over chunks in float32. One chunk of
    all `num_rows` rows needs no sum, and may take its memory, less the gradient's."""
    if max_logits_bytes is not None:
        return max_logits_bytes
    columns = weight.shape[0]
    sizes = OWN_CHUNKS if _native(weight, columns, -1) else TORCH_CHUNKS
    rows, most = sizes[weight.dtype]
    limit = min(max(rows * columns * 4, REUSED_LOGITS_BYTES), most << 20)
    if sums_dweight and NativeProducts(-1).rounds_dweight(weight):
        of_all = num_rows * columns * 4
        if of_all <= limit + weight.numel() * (4 - 2):
            return max(limit, of_all)
    return limit


def block_bytes(weight: Tensor, max_logits_bytes: int | None) -> int:
    """The same for blocks of columns in backward."""
    limit = logits_bytes(weight, max_logits_bytes)
    is_free = max_logits_bytes is None and _native(weight, weight.shape[0], -1)
    return min(limit, OWN_BLOCK_BYTES) if is_free else limit


@dataclass(frozen=True)
class NativeProducts:
    level: int

    def dhidden(self, dlogits: Tensor, weight: Tensor) -> Tensor:
        if _native(weight, weight.shape[0], self.level):
            return torch.ops.flowrl_native.head_dhidden(
                _columns(dlogits), weight.contiguous(), dlogits.shape[0], self.level
            )
        return torch_products.dhidden(dlogits, weight)

    def dweight_(self, total: Tensor, dlogits: Tensor, hidden: Tensor, beta: int) -> None:
        if _native(hidden, total.shape[0], self.level):
            torch.ops.flowrl_native.head_dweight_(
                total, _columns(dlogits), hidden.contiguous(), beta == 1, self.level
            )
        else:
            torch_products.dweight_(total, dlogits, hidden, beta)

    def rounds_dweight(self, weight: Tensor) -> bool:
        return weight.dtype == torch.bfloat16 and _native(weight, weight.shape[0], self.level)


class NativeHead:
    products: Products

    def __init__(self, level: int = -1) -> None:
        """`level`: index in native_library.LEVELS, for tests. -1: the best of this processor."""
        self.level = level
        self.products = NativeProducts(level)

    def forward_needs_workspace(self, head: Head) -> bool:
        return not _native(head.weight, head.weight.shape[0], self.level)

    def logit_bytes(self, head: Head) -> int:
        return head.dtype.itemsize

    def workspace(self, head: Head, num_rows: int) -> Tensor:  # (num_rows, V_valid), strides (1, s)
        steps = -(-num_rows // ROW_STEP)
        if steps >= 32:
            steps |= 1  # long columns a power of two apart would share a few places of a cache
        columns = head.weight.new_empty(head.weight.shape[0], steps * ROW_STEP, dtype=head.dtype)
        return columns.T[:num_rows]

    def statistics(
        self, head: Head, hidden: Tensor, targets: Tensor, out: Tensor | None
    ) -> LocalStatistics:
        ops = torch.ops.flowrl_native
        weight, targets = head.weight, targets.contiguous()
        if _native(weight, weight.shape[0], self.level):
            row_max, sum_exp, target, sum_exp_z = ops.head_forward(
                hidden.contiguous(),
                weight.contiguous(),
                targets,
                head.vocab_start,
                head.temperature,
                head.entropy,
                None if out is None else _columns(out),
                self.level,
            )
        else:
            assert out is not None, "forward_needs_workspace"
            torch_products.logits_(out, hidden, weight, 1 / head.temperature)
            row_max, sum_exp, target, sum_exp_z = ops.head_statistics(
                _columns(out), targets, head.vocab_start, head.entropy, self.level
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
            _columns(out),
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


def _columns(logits: Tensor) -> Tensor:  # (V, s)
    """The whole columns of rows (n, V) of a workspace, padding and rows that are not in use
    included."""
    columns, stride = logits.shape[1], logits.stride(1)
    return logits.as_strided((columns, stride), (stride, 1))


def _native(operand: Tensor, columns: int, level: int) -> bool:
    """Whether the products of this operand with `columns` of the vocabulary are ours."""
    if operand.dtype == torch.bfloat16:
        return torch.ops.flowrl_native.has_products(True, level)
    if operand.dtype != torch.float32 or (level == -1 and columns < FEWEST_COLUMNS):
        return False
    return torch.ops.flowrl_native.has_products(False, level)
