"""Chunks of rows and blocks of columns: how large, the buffers that they share, gradient sums."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from flowrl_kernels.checks import IGNORE_INDEX
from flowrl_kernels.head import Head, HeadKernels, Products
from flowrl_kernels.head.products import is_mixed
from flowrl_kernels.head.vocab_parallel import sum_over_ranks_

# The default of max_logits_bytes. CPU: the products reach their full rate from about 256 rows of
# 151936 columns on (64 rows: 40% slower; 512: 4% faster), and the naive form's memory is a multiple
# of it.
DEFAULT_LOGITS_BYTES = {"cpu": 256 << 20, "cuda": 3 << 30}

COLUMN_STEP = 768  # blocks of columns start at multiples: of every backend's tiles
FEWEST_COLUMNS = 4 * COLUMN_STEP  # of a block, unless the vocabulary has fewer

Rows = slice | Tensor  # consecutive rows, or (n,) int64 positions


def rows_per_chunk(head: Head, kernels: HeadKernels, max_logits_bytes: int | None) -> int:
    """Rows whose logits fit in `max_logits_bytes`, at least one. Counted with padding, so that
    ranks with unlike shares of it have the same chunks: each chunk is a collective."""
    if max_logits_bytes is None:
        max_logits_bytes = DEFAULT_LOGITS_BYTES[head.weight.device.type]
    row_bytes = head.padded_columns * kernels.logit_bytes(head)
    return max(max_logits_bytes // max(row_bytes, 1), 1)


def column_blocks(
    head: Head, kernels: HeadKernels, max_logits_bytes: int | None, num_rows: int
) -> tuple[int, list[slice]]:
    """Blocks of this rank's columns, and how many of `num_rows` rows go with each at a time: all of
    them where logits of FEWEST_COLUMNS fit in `max_logits_bytes`, so that a block of d(weight) is
    made by one product. Of a small vocabulary pieces of rows are those of `rows_per_chunk`. A block
    of d(weight) that is summed in a wider dtype counts too."""
    if max_logits_bytes is None:
        max_logits_bytes = DEFAULT_LOGITS_BYTES[head.weight.device.type]
    (columns, dim), logit_bytes = head.weight.shape, kernels.logit_bytes(head)
    fewest = max(min(head.padded_columns, FEWEST_COLUMNS), 1)
    rows = max(min(num_rows, max_logits_bytes // (fewest * logit_bytes)), 1)
    rounds = rows >= num_rows and kernels.products.rounds_dweight(head.weight)
    is_wider = head.dtype != head.weight.dtype and not rounds
    column_bytes = rows * logit_bytes + dim * head.dtype.itemsize * is_wider
    widest = max(max_logits_bytes // column_bytes // COLUMN_STEP, 1) * COLUMN_STEP
    count = max(-(-columns // widest), 1)
    width = max(-(-columns // count // COLUMN_STEP), 1) * COLUMN_STEP
    return rows, [slice(i, min(i + width, columns)) for i in range(0, columns, width)]


def counted_rows(targets: Tensor, tokens: slice, num_counted: int) -> Rows:
    """Rows of `tokens` that are not masked; a slice, hence no copies, where all count."""
    if num_counted == tokens.stop - tokens.start:
        return tokens
    return (targets[tokens] != IGNORE_INDEX).nonzero()[:, 0] + tokens.start


def split(rows: Rows, num_rows: int, most: int) -> Iterator[tuple[Rows, int]]:
    """`rows` in the fewest pieces of at most `most`, of nearly equal size, each with its size."""
    pieces = -(-num_rows // most)
    for i in range(pieces):
        start, stop = num_rows * i // pieces, num_rows * (i + 1) // pieces
        if isinstance(rows, slice):
            yield slice(rows.start + start, rows.start + stop), stop - start
        else:
            yield rows[start:stop], stop - start


class Workspace:
    """One (rows, V_valid) buffer for the logits of every chunk; the largest tensor alive."""

    def __init__(self, head: Head, kernels: HeadKernels, num_rows: int) -> None:
        self._buffer = kernels.workspace(head, num_rows)

    def rows(self, num_rows: int) -> Tensor:  # (num_rows, V_valid)
        return self._buffer[:num_rows]


class BlockGradients:
    """d(hidden) and d(weight), block by block of the vocabulary. Either may be unwanted: then it
    costs nothing. A block of d(weight) is summed over its pieces of rows before it is rounded, so
    d(weight) needs no second, wider copy; d(hidden) is summed over the blocks in head.dtype."""

    def __init__(
        self,
        head: Head,
        products: Products,
        hidden: Tensor,  # (T, D)
        padded_weight: Tensor,  # (V_local, D)
        wanted: tuple[bool, bool],
    ) -> None:
        self._head, self._products, self._hidden = head, products, hidden
        want_hidden, want_weight = wanted
        self._dhidden = hidden.new_zeros(hidden.shape, dtype=head.dtype) if want_hidden else None
        self._dweight = torch.zeros_like(padded_weight[:0])
        self._wants_weight = want_weight
        if want_weight:
            self._dweight = padded_weight.new_empty(padded_weight.shape)  # contiguous
            self._dweight[head.weight.shape[0] :] = 0

    def add(self, columns: slice, pieces: Iterable[tuple[Rows, Tensor]], num_pieces: int) -> None:
        """`pieces` of rows, each with its dlogits (n, columns), which may be overwritten when the
        next is asked for."""
        block = self._dweight[columns]
        rounds = num_pieces == 1 and self._products.rounds_dweight(self._head.weight)
        summed = block
        if self._wants_weight and block.dtype != self._head.dtype and not rounds:
            summed = torch.empty_like(block, dtype=self._head.dtype)
        beta = 0
        for rows, dlogits in pieces:
            if is_mixed(self._hidden.dtype, self._hidden.device):
                dlogits = dlogits.to(self._hidden.dtype)  # once for both products
            if self._dhidden is not None:
                self._dhidden[rows] += self._products.dhidden(dlogits, self._head.weight[columns])
            if self._wants_weight:
                self._products.dweight_(summed, dlogits, self._hidden[rows], beta)
            beta = 1
        if beta == 0:  # no row counted
            summed.zero_()
        if summed is not block:
            block.copy_(summed)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """d(hidden) in the dtype of hidden, d(weight) in that of the weight."""
        dweight = self._dweight if self._wants_weight else None
        if self._dhidden is None:
            return None, dweight
        return sum_over_ranks_(self._head, self._dhidden).to(self._hidden.dtype), dweight


class HeadGradients:
    """d(hidden) and d(weight), summed chunk by chunk of rows. Either may be unwanted: then it costs
    nothing.

    `weight_sum` (V_local, D), of head.dtype, receives d(weight); None: a new one is made, for
    `one_chunk` in the weight's own dtype where the products can round to it."""

    def __init__(
        self,
        head: Head,
        products: Products,
        hidden: Tensor,  # (T, D)
        padded_weight: Tensor,  # (V_local, D)
        wanted: tuple[bool, bool],
        one_chunk: bool,
        weight_sum: Tensor | None = None,
    ) -> None:
        self._head, self._products = head, products
        self._hidden = hidden
        want_hidden, want_weight = wanted
        # Parts of several ranks are summed before they are rounded to the dtype of hidden.
        dtype = hidden.dtype if head.group is None else head.dtype
        self._dhidden = hidden.new_zeros(hidden.shape, dtype=dtype) if want_hidden else None
        self._dweight = weight_sum if want_weight else None
        self._beta = 1
        if want_weight and weight_sum is None:
            # Not filled: the first chunk overwrites it (0.2 s of 5 s at 151936 x 896).
            rounds = one_chunk and products.rounds_dweight(head.weight)
            sums = padded_weight.dtype if rounds else head.dtype
            self._dweight = hidden.new_empty(padded_weight.shape, dtype=sums)
            self._dweight[head.weight.shape[0] :] = 0
            self._beta = 0

    @property
    def wanted(self) -> bool:
        return self._dhidden is not None or self._dweight is not None

    def add(self, rows: Rows, dlogits: Tensor) -> None:
        """dlogits (n, V_valid) of `rows`; the rows of d(hidden) are set, d(weight) is added to."""
        if is_mixed(self._hidden.dtype, self._hidden.device):
            dlogits = dlogits.to(self._hidden.dtype)  # once for both products
        if self._dhidden is not None:
            found = self._products.dhidden(dlogits, self._head.weight)
            self._dhidden[rows] = found.to(self._dhidden.dtype)
        if self._dweight is not None:
            valid = self._dweight[: dlogits.shape[1]]
            self._products.dweight_(valid, dlogits, self._hidden[rows], self._beta)
            self._beta = 1

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """d(hidden) in the dtype of hidden, d(weight) in head.dtype or its own."""
        if self._dweight is not None and self._beta == 0:  # no row counted
            self._dweight.zero_()
        if self._dhidden is None:
            return None, self._dweight
        summed = sum_over_ranks_(self._head, self._dhidden)
        return summed.to(self._hidden.dtype), self._dweight
