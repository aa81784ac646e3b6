"""HeadKernels whose logits live in registers: what Triton's and CUDA's have in common.

A kernel makes tiles of logits and reduces each row of a tile where it is. `out` holds
E = exp(z - tile's maximum), and d(logits) follow from E, that maximum and four numbers a row.

Legend: n rows, D hidden, V columns of this rank that are true vocabulary, S tiles of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

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

Reduced = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""row_max, sum_exp, target, sum_exp_z (of use with entropy only): (n,) each; tile_max (S, n)."""


class ByRow(NamedTuple):
    """dlogits = p * factor - p log p * slope, and at_target at the target's column."""

    factor: Tensor  # (n,)
    slope: Tensor | None  # (n,)
    at_target: Tensor  # (n,)
    column: Tensor  # (n,) -1 where this rank does not have the target


@dataclass(frozen=True)
class TiledStatistics(LocalStatistics):
    tile_max: Tensor  # (S, n) maximum of each row of each tile: E is relative to it


class TiledHead(ABC):
    products: Products = products

    def __init__(self, precision: str = "native") -> None:
        self._fp8 = precision == "fp8"
        self._quantized_weight: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def workspace_dtype(self, head: Head) -> torch.dtype:
        """Of E and d(logits)."""

    @abstractmethod
    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """e4m3 rows and their float32 scales: x = q * scale."""

    @abstractmethod
    def reduce(
        self,
        head: Head,
        hidden: Tensor,  # (n, D)
        weight: Tensor,  # (V, D)
        targets: Tensor,  # (n,)
        out: Tensor | None,  # (n, V)
        scales: tuple[Tensor, Tensor] | tuple[None, None],  # (n,) and (V,) for e4m3
    ) -> Reduced:
        """Statistics of the rows; E in `out`."""

    @abstractmethod
    def turn_into_dlogits_(
        self,
        head: Head,
        out: Tensor,  # (n, V) E
        tile_max: Tensor,  # (S, n)
        rows: RowStatistics,
        by_row: ByRow,
    ) -> None:
        """E in `out` becomes d(logits)."""

    def forward_needs_workspace(self, head: Head) -> bool:
        return False

    def logit_bytes(self, head: Head) -> int:
        return self.workspace_dtype(head).itemsize

    def workspace(self, head: Head, num_rows: int) -> Tensor:  # (num_rows, V_valid)
        """Rows start at multiples of 128 bytes: what the gradient products need for full speed."""
        columns = head.weight.shape[0]
        padded = -(-columns // 64) * 64
        dtype = self.workspace_dtype(head)
        return head.weight.new_empty(num_rows, padded, dtype=dtype)[:, :columns]

    def statistics(
        self, head: Head, hidden: Tensor, targets: Tensor, out: Tensor | None
    ) -> LocalStatistics:
        weight, scales = head.weight, (None, None)
        if self._fp8:
            if self._quantized_weight is None:
                self._quantized_weight = self.quantize_rows(weight)
            hidden, of_rows = self.quantize_rows(hidden)
            weight, of_columns = self._quantized_weight
            scales = (of_rows, of_columns)
        reduced = self.reduce(head, hidden, weight, targets, out, scales)
        row_max, sum_exp, target, sum_exp_z, tile_max = reduced
        of_entropy = sum_exp_z if head.entropy else None
        return TiledStatistics(row_max, sum_exp, target, of_entropy, tile_max)

    def dlogits_(
        self,
        head: Head,
        targets: Tensor,
        out: Tensor,
        local: LocalStatistics,
        rows: RowStatistics,
        gradients: RowGradients,
    ) -> None:
        assert isinstance(local, TiledStatistics), type(local)
        logprobs, dlogprobs = rows.logprobs, gradients.logprobs
        factor = -dlogprobs
        off_target = torch.zeros_like(factor)  # the part of factor that has no (p - 1) in it
        if gradients.lse is not None:
            off_target = off_target + gradients.lse
        if gradients.entropy is not None:
            assert rows.entropy is not None, "entropy gradient without entropy statistics"
            off_target = off_target - gradients.entropy * rows.entropy
        factor = factor + off_target
        slope = gradients.entropy
        at_target = off_target if slope is None else off_target - slope * logprobs
        # expm1(log p) is p - 1 with all its digits, where p is near 1 too.
        at_target = logprobs.exp() * at_target - dlogprobs * torch.expm1(logprobs)
        column, owned = head.own_targets(targets)
        scale = 1 / head.temperature
        by_row = ByRow(
            factor * scale,
            None if slope is None else slope * scale,
            at_target * scale,
            column.where(owned, -1),
        )
        self.turn_into_dlogits_(head, out, local.tile_max, rows, by_row)
