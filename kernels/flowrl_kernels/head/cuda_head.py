"""HeadKernels on the CUDA operators (csrc/linear_logprobs.cu, csrc/policy_loss.cu), for Hopper."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_kernels.cuda_support import stream_of
from flowrl_kernels.head import Head, RowStatistics
from flowrl_kernels.head.tiled_head import ByRow, Reduced, TiledHead


class CudaHead(TiledHead):
    def workspace_dtype(self, head: Head) -> torch.dtype:
        return torch.bfloat16

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = aligned(x)
        quantized = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        scale = torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)
        with torch.cuda.device(x.device):
            torch.ops.flowrl_cuda.quantize_rows_(quantized, scale, x, stream_of(x))
        return quantized, scale

    def reduce(
        self,
        head: Head,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        out: Tensor | None,
        scales: tuple[Tensor, Tensor] | tuple[None, None],
    ) -> Reduced:
        with torch.cuda.device(hidden.device):
            return torch.ops.flowrl_cuda.head_statistics(
                aligned(hidden),
                aligned(weight),
                targets.contiguous(),
                out,
                *scales,
                1 / head.temperature,
                head.vocab_start,
                stream_of(hidden),
            )

    def turn_into_dlogits_(
        self, head: Head, out: Tensor, tile_max: Tensor, rows: RowStatistics, by_row: ByRow
    ) -> None:
        with torch.cuda.device(out.device):
            torch.ops.flowrl_cuda.head_dlogits_(
                out,
                tile_max,
                rows.row_max.contiguous(),
                rows.log_sum.contiguous(),
                *by_row,
                stream_of(out),
            )


def aligned(matrix: Tensor) -> Tensor:
    """`matrix`, or a copy of it, as the bulk copy engine takes it: contiguous rows at multiples of
    16 bytes."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    if matrix.stride(1) == 1 and row_bytes % 16 == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)
