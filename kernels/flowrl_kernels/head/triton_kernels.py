"""Device code of the output layer: logits and their statistics, the merge, dlogits, FP8 rows.

A tile is BLOCK_T rows by BLOCK_V columns of the vocabulary. The forward kernel makes one tile after
the other and leaves, per row and tile, the maximum m and the sum of exp(z - m); nothing depends on
which program made a tile, so the merge in tile order repeats bit for bit, and a row's results do
not depend on the other rows. What it stores for the gradient is E = exp(z - m) of the tile's own
maximum: in [0, 1], hence 2^-9 relative in bfloat16 whatever the size of the logits.

Legend: n rows, V columns of this rank that are true vocabulary, D hidden, S = ceil(V / BLOCK_V).
Equations and bytes: docs/kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FP8_MAX = tl.constexpr(448.0)  # of e4m3
ROWS = ["num_rows"]  # one program for every number of rows: another layout adds in another order
NO_LOGIT = tl.constexpr(-1e38)  # past the last column: exp gives 0, and 0 * (NO_LOGIT - m) too


@triton.jit
def _tile_position(tile, num_row_blocks, num_tiles_v, GROUP_T: tl.constexpr):
    """Tiles in groups of GROUP_T row blocks, along the vocabulary: the group's rows stay in L2
    while the weight passes by once."""
    per_group = GROUP_T * num_tiles_v
    first = tile // per_group * GROUP_T
    size = tl.minimum(num_row_blocks - first, GROUP_T)
    within = tile % per_group
    return first + within % size, within // size


@triton.jit
def _product(
    x,  # (n, D) pointer, or descriptor of (BLOCK_T, BLOCK_D)
    w,  # (V, D) pointer, or descriptor of (BLOCK_V, BLOCK_D)
    row_start,
    column_start,
    num_rows,
    num_columns,
    dim,
    x_stride,
    w_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    IMPRECISE: tl.constexpr,
):
    """Accumulators (BLOCK_T, BLOCK_V) float32 of x @ w.T; rows and columns past the end are 0."""
    acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    rows = row_start + tl.arange(0, BLOCK_T)
    columns = column_start + tl.arange(0, BLOCK_V)
    inner = tl.arange(0, BLOCK_D)
    if not TMA:
        x_ptrs = x + rows[:, None].to(tl.int64) * x_stride + inner[None, :]
        w_ptrs = w + columns[:, None].to(tl.int64) * w_stride + inner[None, :]
    for k in range(0, dim, BLOCK_D):
        if TMA:
            a = x.load([row_start, k])
            b = w.load([column_start, k])
        else:
            in_dim = k + inner[None, :] < dim
            a = tl.load(x_ptrs + k, mask=(rows[:, None] < num_rows) & in_dim, other=0.0)
            b = tl.load(w_ptrs + k, mask=(columns[:, None] < num_columns) & in_dim, other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision="ieee", max_num_imprecise_acc=IMPRECISE)
    return acc


@triton.jit(do_not_specialize=ROWS)
def _head_fwd_kernel(
    x,  # (n, D)
    w,  # (V, D)
    x_scale_ptr,  # (n,) FP8 only
    w_scale_ptr,  # (V,) FP8 only
    target_ptr,  # (n,) int64
    out_ptr,  # (n, V) E; STORE only
    tile_max_ptr,  # (S, n)
    tile_sum_ptr,  # (S, n)
    tile_sum_z_ptr,  # (S, n) ENTROPY only
    target_logit_ptr,  # (n,) written where this rank has the target
    num_rows,
    num_columns,
    dim,
    x_stride,
    w_stride,
    out_stride,
    vocab_start,
    scale,  # 1 / temperature
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
    TMA: tl.constexpr,
    STORE: tl.constexpr,
    ENTROPY: tl.constexpr,
    FP8: tl.constexpr,
    UPCAST: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    num_row_blocks = tl.cdiv(num_rows, BLOCK_T)
    num_tiles_v = tl.cdiv(num_columns, BLOCK_V)
    # Hopper's FP8 products keep 14 bits while they accumulate: into float32 every BLOCK_D.
    IMPRECISE: tl.constexpr = BLOCK_D if FP8 else 0
    for tile in tl.range(
        tl.program_id(0), num_row_blocks * num_tiles_v, tl.num_programs(0), flatten=FLATTEN
    ):
        row_block, tile_v = _tile_position(  # type: ignore
            tile, num_row_blocks, num_tiles_v, GROUP_T
        )
        row_start, column_start = row_block * BLOCK_T, tile_v * BLOCK_V
        acc = _product(
            x, w, row_start, column_start, num_rows, num_columns, dim, x_stride, w_stride,
            BLOCK_T, BLOCK_V, BLOCK_D, TMA, UPCAST, IMPRECISE,
        )  # fmt: skip
        rows = row_start + tl.arange(0, BLOCK_T)
        offsets = tl.arange(0, BLOCK_V)
        in_rows = rows < num_rows
        in_columns = column_start + offsets < num_columns
        if FP8:
            of_row = tl.load(x_scale_ptr + rows, mask=in_rows, other=0.0)
            of_column = tl.load(w_scale_ptr + column_start + offsets, mask=in_columns, other=0.0)
            acc = acc * of_row[:, None] * of_column[None, :]
        z = acc * scale
        if column_start + BLOCK_V > num_columns:
            z = tl.where(in_columns[None, :], z, NO_LOGIT)
        # z - m before the scaling to base 2: exactly 0 at the maximum, so that the sum is >= 1 and
        # no log-prob is positive.
        tile_max = tl.max(z, 1)
        place = tile_v.to(tl.int64) * num_rows + rows
        tl.store(tile_max_ptr + place, tile_max, mask=in_rows)
        column = tl.load(target_ptr + rows, mask=in_rows, other=-1) - vocab_start - column_start
        owned = (column >= 0) & (column < BLOCK_V) & (column_start + column < num_columns)
        if tl.max(owned.to(tl.int32), 0) > 0:  # one tile in five has any target at V = 152064
            at_target = tl.sum(tl.where(offsets[None, :] == column[:, None], z, 0.0), 1)
            tl.store(target_logit_ptr + rows, at_target, mask=owned)
        below = z - tile_max[:, None]
        e = tl.exp2(below * LOG2E)
        tl.store(tile_sum_ptr + place, tl.sum(e, 1), mask=in_rows)
        if ENTROPY:
            tl.store(tile_sum_z_ptr + place, tl.sum(e * below, 1), mask=in_rows)
        if STORE:
            out_ptrs = out_ptr + rows[:, None].to(tl.int64) * out_stride
            tl.store(
                out_ptrs + column_start + offsets[None, :],
                e.to(out_ptr.dtype.element_ty),
                mask=in_rows[:, None] & in_columns[None, :],
            )


@triton.jit(do_not_specialize=ROWS)
def _merge_kernel(
    tile_max_ptr,  # (S, n)
    tile_sum_ptr,  # (S, n)
    tile_sum_z_ptr,  # (S, n) ENTROPY only
    row_max_ptr,  # (n,)
    sum_exp_ptr,  # (n,)
    sum_exp_z_ptr,  # (n,) ENTROPY only
    num_rows,
    num_tiles_v,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Tiles of a row into one: strided partial sums of BLOCK_S tiles, then a tree, always alike."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    tiles = tl.arange(0, BLOCK_S)
    in_rows = rows < num_rows
    largest = tl.full((BLOCK_S, BLOCK_T), float("-inf"), tl.float32)
    for first in range(0, num_tiles_v, BLOCK_S):
        place = (first + tiles)[:, None].to(tl.int64) * num_rows + rows[None, :]
        mask = (first + tiles < num_tiles_v)[:, None] & in_rows[None, :]
        m = tl.load(tile_max_ptr + place, mask=mask, other=float("-inf"))
        largest = tl.maximum(largest, m, propagate_nan=tl.PropagateNan.ALL)
    row_max = tl.max(largest, 0)
    total = tl.zeros((BLOCK_S, BLOCK_T), tl.float32)
    total_z = tl.zeros((BLOCK_S, BLOCK_T), tl.float32)
    for first in range(0, num_tiles_v, BLOCK_S):
        place = (first + tiles)[:, None].to(tl.int64) * num_rows + rows[None, :]
        mask = (first + tiles < num_tiles_v)[:, None] & in_rows[None, :]
        shift = tl.load(tile_max_ptr + place, mask=mask, other=float("-inf")) - row_max[None, :]
        factor = tl.where(mask, tl.exp2(shift * LOG2E), 0.0)
        s = tl.load(tile_sum_ptr + place, mask=mask, other=0.0)
        total += factor * s
        if ENTROPY:
            s_z = tl.load(tile_sum_z_ptr + place, mask=mask, other=0.0)
            total_z += tl.where(factor > 0, factor * (s_z + s * shift), 0.0)
    tl.store(row_max_ptr + rows, row_max, mask=in_rows)
    tl.store(sum_exp_ptr + rows, tl.sum(total, 0), mask=in_rows)
    if ENTROPY:
        tl.store(sum_exp_z_ptr + rows, tl.sum(total_z, 0), mask=in_rows)


@triton.jit(do_not_specialize=ROWS)
def _dlogits_kernel(
    out_ptr,  # (n, V) E in, dlogits out
    tile_max_ptr,  # (S, n)
    row_max_ptr,  # (n,)
    log_sum_ptr,  # (n,)
    factor_ptr,  # (n,) dlogits = p * factor - p log p * slope, but at the target
    slope_ptr,  # (n,) ENTROPY only
    at_target_ptr,  # (n,) dlogits at the target: (p - 1) was made in float32 there
    column_ptr,  # (n,) int64 column of the target, -1 where another rank has it
    num_rows,
    num_columns,
    out_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,  # that of the forward kernel: one tile_max per row
    ENTROPY: tl.constexpr,
):
    num_tiles_v = tl.cdiv(num_columns, BLOCK_V)
    tile_v = tl.program_id(0) % num_tiles_v
    rows = tl.program_id(0) // num_tiles_v * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    in_rows = rows < num_rows
    mask = in_rows[:, None] & (columns < num_columns)[None, :]
    out_ptrs = out_ptr + rows[:, None].to(tl.int64) * out_stride + columns[None, :]
    e = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    tile_max = tl.load(
        tile_max_ptr + tile_v.to(tl.int64) * num_rows + rows, mask=in_rows, other=0.0
    )
    row_max = tl.load(row_max_ptr + rows, mask=in_rows, other=0.0)
    log_sum = tl.load(log_sum_ptr + rows, mask=in_rows, other=0.0)
    log_p_of_max = tile_max - row_max - log_sum  # of the tile's largest logit
    p = e * tl.exp2(log_p_of_max * LOG2E)[:, None]
    dz = p * tl.load(factor_ptr + rows, mask=in_rows, other=0.0)[:, None]
    if ENTROPY:
        slope = tl.load(slope_ptr + rows, mask=in_rows, other=0.0)
        log_p = tl.log(e) + log_p_of_max[:, None]
        dz -= tl.where(p > 0, p * log_p, 0.0) * slope[:, None]
    column = tl.load(column_ptr + rows, mask=in_rows, other=-1)
    at_target = tl.load(at_target_ptr + rows, mask=in_rows, other=0.0)
    dz = tl.where(columns[None, :] == column[:, None], at_target[:, None], dz)
    tl.store(out_ptrs, dz.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_rows_kernel(
    x_ptr,  # (n, D)
    q_ptr,  # (n, D) e4m3
    scale_ptr,  # (n,) float32; x = q * scale
    dim,
    x_stride,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, BLOCK_D)
    largest = tl.zeros((BLOCK_D,), tl.float32)
    for k in range(0, dim, BLOCK_D):
        x = tl.load(x_ptr + row * x_stride + k + inner, mask=k + inner < dim, other=0.0)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
    # a row of zeros stays zeros; div_rn: the plain division of a GPU is off by an ulp or two
    scale = tl.div_rn(tl.maximum(tl.max(largest, 0), 1e-30), tl.full((), FP8_MAX, tl.float32))
    tl.store(scale_ptr + row, scale)
    for k in range(0, dim, BLOCK_D):
        x = tl.load(x_ptr + row * x_stride + k + inner, mask=k + inner < dim, other=0.0)
        q = tl.clamp(tl.div_rn(x.to(tl.float32), scale), -FP8_MAX, FP8_MAX)
        tl.store(q_ptr + row * dim + k + inner, q.to(q_ptr.dtype.element_ty), mask=k + inner < dim)
