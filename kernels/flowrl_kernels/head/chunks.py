"""How many rows a chunk has, and the buffers that chunks share."""

from __future__ import annotations

from collections.abc import Iterator

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

Rows = slice | Tensor  # consecutive rows, or (n,) int64 positions


def rows_per_chunk(head: Head, kernels: HeadKernels, max_logits_bytes: int | None) -> int:
    """Rows whose logits fit in `max_logits_bytes`, at least one. Counted with padding, so that
    ranks with unlike shares of it have the same chunks: each chunk is a collective."""
    if max_logits_bytes is None:
        max_logits_bytes = DEFAULT_LOGITS_BYTES[head.weight.device.type]
    row_bytes = head.padded_columns * kernels.logit_bytes(head)
    return max(max_logits_bytes // max(row_bytes, 1), 1)


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


class HeadGradients:
    """d(hidden) and d(weight), summed chunk by chunk. Either may be unwanted: then it costs
    nothing.

    d(weight) is added to `weight_sum` (V_local, D), of head.dtype, if that is given. Otherwise it
    is made in the dtype of the weight, rounded once, as the last of `num_rows` rows are added."""

    def __init__(
        self,
        head: Head,
        products: Products,
        hidden: Tensor,  # (T, D)
        padded_weight: Tensor,  # (V_local, D)
        wanted: tuple[bool, bool],
        num_rows: int,
        weight_sum: Tensor | None = None,
    ) -> None:
        self._head, self._products = head, products
        self._hidden, self._rows_left = hidden, num_rows
        want_hidden, want_weight = wanted
        # Parts of several ranks are summed before they are rounded to the dtype of hidden.
        dtype = hidden.dtype if head.group is None else head.dtype
        self._dhidden = hidden.new_zeros(hidden.shape, dtype=dtype) if want_hidden else None
        self._dweight = self._sum = weight_sum if want_weight else None
        self._beta = 1
        if want_weight and weight_sum is None:
            # Not filled: the first chunk overwrites the sum (0.2 s of 5 s at 151936 x 896).
            self._dweight = torch.empty_like(padded_weight, memory_format=torch.contiguous_format)
            self._dweight[head.weight.shape[0] :] = 0
            self._sum = self._dweight
            if self._dweight.dtype != head.dtype:
                self._sum = hidden.new_empty(head.weight.shape, dtype=head.dtype)
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
        self._rows_left -= dlogits.shape[0]
        if self._dweight is not None and self._sum is not None:
            valid = slice(dlogits.shape[1])
            last = self._rows_left == 0 and self._sum is not self._dweight
            rounded = self._dweight[valid] if last else None
            total, hidden = self._sum[valid], self._hidden[rows]
            self._products.dweight_(total, dlogits, hidden, self._beta, rounded)
            self._beta = 1

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """d(hidden) in the dtype of hidden, d(weight) in that of the weight or of weight_sum."""
        assert self._rows_left == 0 or not self.wanted, self._rows_left
        if self._dweight is not None and self._beta == 0:  # no row counted
            self._dweight.zero_()
        if self._dhidden is None:
            return None, self._dweight
        summed = sum_over_ranks_(self._head, self._dhidden)
        return summed.to(self._hidden.dtype), self._dweight
