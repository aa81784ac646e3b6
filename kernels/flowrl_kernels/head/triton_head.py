"""The pair of HeadKernels on Triton: launches, tile sizes, and operators that torch knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flowrl_kernels.head import Head, RowStatistics
from flowrl_kernels.head.products import is_mixed
from flowrl_kernels.head.tiled_head import ByRow, Reduced, TiledHead
from flowrl_kernels.head.triton_kernels import (
    _dlogits_kernel,
    _head_fwd_kernel,
    _merge_kernel,
    _quantize_rows_kernel,
)
from flowrl_kernels.triton_support import interpreting, launch

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Tiles:
    """Of the forward kernel. Not tuned on a GPU yet; all fit sm_90 (python -m bench aot)."""

    block_t: int
    block_v: int
    block_d: int
    group_t: int
    num_warps: int
    num_stages: int


INTERPRETED = Tiles(32, 64, 32, 2, 4, 1)
MERGE: dict[str, Any] = {"BLOCK_T": 32, "BLOCK_S": 32, "num_warps": 4}
DLOGITS: dict[str, Any] = {"BLOCK_R": 16, "num_warps": 4}
QUANTIZE: dict[str, Any] = {"BLOCK_D": 1024, "num_warps": 4}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def tiles_for(dtype: torch.dtype, store: bool, device: torch.device) -> Tiles:
    """By the dtype of the operands, and whether E is stored: its way through shared memory costs a
    stage of the pipeline."""
    if device.type == "cpu":
        return INTERPRETED
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 16, 8, 3)  # no tensor cores: float32 products stay float32
    if dtype == FP8:
        return Tiles(128, 128, 128, 16, 8, 4)
    if dtype == torch.float16 and store:
        return Tiles(128, 128, 64, 16, 8, 4)  # E in float32 takes twice the room of bfloat16
    return Tiles(128, 256, 64, 16, 8, 3 if store else 4)


class TritonHead(TiledHead):
    """HeadKernels on the kernels of triton_kernels.py."""

    def workspace_dtype(self, head: Head) -> torch.dtype:
        weight = head.weight
        return weight.dtype if is_mixed(weight.dtype, weight.device) else head.dtype

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows(x)

    def reduce(
        self,
        head: Head,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        out: Tensor | None,
        scales: tuple[Tensor, Tensor] | tuple[None, None],
    ) -> Reduced:
        scale = 1 / head.temperature
        return head_statistics(
            hidden, weight, targets, out, *scales, scale, head.vocab_start, head.entropy
        )

    def turn_into_dlogits_(
        self, head: Head, out: Tensor, tile_max: Tensor, rows: RowStatistics, by_row: ByRow
    ) -> None:
        block_v = tiles_for(head.weight.dtype, True, out.device).block_v
        head_dlogits_(out, tile_max, rows.row_max, rows.log_sum, *by_row, block_v)


@torch.library.custom_op("flowrl_kernels::head_statistics", mutates_args={"out"})
def head_statistics(
    hidden: Tensor,  # (n, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (n,)
    out: Tensor | None,  # (n, V)
    hidden_scale: Tensor | None,  # (n,) FP8
    weight_scale: Tensor | None,  # (V,) FP8
    scale: float,
    vocab_start: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """row_max, sum_exp, target, sum_exp_z (empty without entropy): (n,) each; tile_max (S, n)."""
    hidden, weight = _rows(hidden), _rows(weight)
    (num_rows, dim), num_columns = hidden.shape, weight.shape[0]
    tiles = tiles_for(weight.dtype, out is not None, weight.device)
    num_tiles_v = ceil_div(num_columns, tiles.block_v)
    target, tile_max, partial_sums = allocate(hidden, num_tiles_v, entropy)
    if num_rows and num_columns:
        tma = allows_tma(hidden) and allows_tma(weight)
        blocks = ceil_div(num_rows, tiles.block_t) * num_tiles_v
        launch(
            hidden,
            _head_fwd_kernel,
            min(blocks, num_programs(weight.device)),
            _operand(hidden, tma, tiles.block_t, tiles.block_d),
            _operand(weight, tma, tiles.block_v, tiles.block_d),
            hidden_scale,
            weight_scale,
            targets.contiguous(),
            out,
            tile_max,
            partial_sums[0],
            partial_sums[1] if entropy else None,
            target,
            num_rows,
            num_columns,
            dim,
            hidden.stride(0),
            weight.stride(0),
            0 if out is None else out.stride(0),
            vocab_start,
            scale,
            **launch_options(tiles, weight.dtype, tma, out is not None, entropy),
        )
    return (*merge(tile_max, partial_sums, target), tile_max)


def allocate(hidden: Tensor, num_tiles_v: int, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """target (n,) at -inf, tile_max (S, n), partial sums (1 or 2, S, n)."""
    shape = (num_tiles_v, hidden.shape[0])
    target = hidden.new_full(shape[1:], float("-inf"), dtype=torch.float32)
    return target, target.new_empty(shape), target.new_empty((1 + entropy, *shape))


def merge(
    tile_max: Tensor,  # (S, n)
    partial_sums: Tensor,  # (1 or 2, S, n)
    target: Tensor,  # (n,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_max, sum_exp, target, sum_exp_z (empty without entropy)."""
    num_tiles_v, num_rows = tile_max.shape
    entropy = partial_sums.shape[0] == 2
    row_max, sum_exp = torch.empty_like(target), torch.empty_like(target)
    sum_exp_z = torch.empty_like(target) if entropy else target.new_empty(0)
    if num_rows:
        launch(
            target,
            _merge_kernel,
            ceil_div(num_rows, MERGE["BLOCK_T"]),
            tile_max,
            partial_sums[0],
            partial_sums[1] if entropy else None,
            row_max,
            sum_exp,
            sum_exp_z,
            num_rows,
            num_tiles_v,
            **{**MERGE, "ENTROPY": entropy},
        )
    return row_max, sum_exp, target, sum_exp_z


@head_statistics.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, out: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    entropy = rest[-1]
    per_row = [hidden.new_empty(targets.shape, dtype=torch.float32) for _ in range(3)]
    of_entropy = per_row[0].new_empty(targets.shape if entropy else 0)
    block_v = tiles_for(weight.dtype, out is not None, weight.device).block_v
    num_tiles_v = ceil_div(weight.shape[0], block_v)
    return (*per_row, of_entropy, per_row[0].new_empty(num_tiles_v, targets.shape[0]))


@torch.library.custom_op("flowrl_kernels::head_dlogits_", mutates_args={"out"})
def head_dlogits_(
    out: Tensor,  # (n, V) E, becomes dlogits
    tile_max: Tensor,  # (S, n)
    row_max: Tensor,  # (n,)
    log_sum: Tensor,  # (n,)
    factor: Tensor,  # (n,)
    slope: Tensor | None,  # (n,)
    at_target: Tensor,  # (n,)
    column: Tensor,  # (n,) -1 where this rank does not have the target
    block_v: int,  # of the forward pass that made tile_max
) -> None:
    """dlogits = p * factor - p log p * slope, and at_target at the target's column."""
    num_rows, num_columns = out.shape
    if num_rows == 0 or num_columns == 0:
        return
    launch(
        out,
        _dlogits_kernel,
        ceil_div(num_rows, DLOGITS["BLOCK_R"]) * tile_max.shape[0],
        out,
        tile_max,
        row_max.contiguous(),
        log_sum.contiguous(),
        factor.contiguous(),
        None if slope is None else slope.contiguous(),
        at_target.contiguous(),
        column,
        num_rows,
        num_columns,
        out.stride(0),
        **DLOGITS,
        **{"BLOCK_V": block_v, "ENTROPY": slope is not None},
    )


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 rows and their float32 scales: x = q * scale, |q| <= 448 and reached in every row."""
    x = _rows(x)
    quantized = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        args = (x, quantized, scale, x.shape[1], x.stride(0))
        launch(x, _quantize_rows_kernel, x.shape[0], *args, **QUANTIZE)
    return quantized, scale


def launch_options(
    tiles: Tiles, dtype: torch.dtype, tma: bool, store: bool, entropy: bool
) -> dict[str, Any]:
    """Compile-time arguments of _head_fwd_kernel."""
    return {
        "BLOCK_T": tiles.block_t,
        "BLOCK_V": tiles.block_v,
        "BLOCK_D": tiles.block_d,
        "GROUP_T": tiles.group_t,
        "TMA": tma,
        "STORE": store,
        "ENTROPY": entropy,
        "FP8": dtype == FP8,
        # Triton 3.7.1's interpreter multiplies the bit patterns of bfloat16 operands.
        "UPCAST": interpreting() and dtype == torch.bfloat16,
        "FLATTEN": not interpreting(),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def num_programs(device: torch.device) -> int:
    """Persistent programs: one per multiprocessor; in the interpreter few, so that each loops."""
    if device.type == "cpu":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def allows_tma(operand: Tensor) -> bool:
    """Whether the bulk copy engine takes this matrix: Hopper or newer, aligned rows."""
    if operand.device.type == "cpu":
        aligned_device = True  # the interpreter reads descriptors as well as pointers
    else:
        aligned_device = torch.cuda.get_device_capability(operand.device)[0] >= 9
    row_bytes = operand.stride(0) * operand.element_size()
    return aligned_device and operand.data_ptr() % 16 == 0 and row_bytes % 16 == 0


def _operand(matrix: Tensor, tma: bool, block_rows: int, block_d: int) -> Tensor | TensorDescriptor:
    if not tma:
        return matrix
    return TensorDescriptor(
        matrix, list(matrix.shape), list(matrix.stride()), [block_rows, block_d]
    )


def _rows(matrix: Tensor) -> Tensor:
    """`matrix` with contiguous rows."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
