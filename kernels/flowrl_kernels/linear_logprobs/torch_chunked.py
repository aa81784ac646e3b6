"""linear_logprobs: the logits are made, reduced and forgotten, twice.

Forward in chunks of rows, for a row's statistics are of all its columns; backward in blocks of
columns, for a block of d(weight) is then made by one product, while a sum over chunks of rows would
be as large as the weight, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowrl_kernels.checks import IGNORE_INDEX, valid_columns
from flowrl_kernels.head import Head, HeadKernels, RowGradients, RowStatistics
from flowrl_kernels.head.chunks import (
    BlockGradients,
    Rows,
    Workspace,
    column_blocks,
    counted_rows,
    rows_per_chunk,
    split,
)
from flowrl_kernels.head.torch_kernels import TorchHead
from flowrl_kernels.head.vocab_parallel import finish
from flowrl_kernels.linear_logprobs.contract import LinearLogprobs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_logprobs(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V_local, D)
    targets: Tensor,  # (T,)
    *,
    temperature: float,
    vocab_start: int,
    vocab_size: int | None,
    group: ProcessGroup | None,
    entropy: str,
    precision: str,
    max_logits_bytes: int | None,
    max_block_bytes: int | None = None,  # of a block in backward; None: max_logits_bytes
    kernels: HeadKernels | None = None,  # None: PyTorch's
) -> LinearLogprobs:
    if kernels is None:
        assert precision == "native", precision
        kernels = TorchHead()
    columns = valid_columns(weight, vocab_start, vocab_size)
    limits = max_logits_bytes, max_block_bytes or max_logits_bytes
    call = _Call(columns, temperature, vocab_start, group, entropy, *limits, kernels)
    return LinearLogprobs(*_LinearLogprobs.apply(call, hidden, weight, targets))


@dataclass(frozen=True)
class _Call:
    num_columns: int
    temperature: float
    vocab_start: int
    group: ProcessGroup | None
    entropy: str
    max_logits_bytes: int | None
    max_block_bytes: int | None
    kernels: HeadKernels

    def head(self, weight: Tensor) -> Head:
        return Head(
            weight[: self.num_columns],
            weight.shape[0],
            self.temperature,
            self.vocab_start,
            self.group,
            entropy=self.entropy != "none",
        )

    def chunks(self, head: Head, targets: Tensor) -> list[tuple[Rows, int]]:
        """Pieces of the rows that count, with their sizes."""
        num_counted = int((targets != IGNORE_INDEX).sum())
        rows = counted_rows(targets, slice(0, targets.numel()), num_counted)
        most = rows_per_chunk(head, self.kernels, self.max_logits_bytes)
        return list(split(rows, num_counted, most))

    def workspace(self, head: Head, chunks: list[tuple[Rows, int]]) -> Workspace:
        """For the largest of the chunks."""
        return Workspace(head, self.kernels, max((size for _, size in chunks), default=0))


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, call: _Call, hidden: Tensor, weight: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        head = call.head(weight)
        logprobs = hidden.new_zeros(targets.shape, dtype=head.dtype)  # masked rows stay 0
        row_max, log_sum, entropy = (torch.zeros_like(logprobs) for _ in range(3))
        chunks = call.chunks(head, targets)
        needed = call.kernels.forward_needs_workspace(head)
        workspace = call.workspace(head, chunks) if needed else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, size in chunks:
                out = None if workspace is None else workspace.rows(size)
                local = call.kernels.statistics(head, hidden[rows], targets[rows], out)
                done = finish(head, local)
                row_max[rows], log_sum[rows] = done.row_max, done.log_sum
                logprobs[rows] = done.logprobs
                if done.entropy is not None:
                    entropy[rows] = done.entropy
        ctx.call = call
        ctx.save_for_backward(hidden, weight, targets, logprobs, row_max, log_sum, entropy)
        ctx.set_materialize_grads(False)
        if call.entropy == "metric":
            ctx.mark_non_differentiable(entropy)
        return logprobs, row_max + log_sum, entropy if head.entropy else None

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dlogprobs: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None
    ) -> tuple[None, Tensor | None, Tensor | None, None]:
        call: _Call = ctx.call
        hidden, weight, targets, logprobs, row_max, log_sum, entropy = ctx.saved_tensors
        head = call.head(weight)
        wanted = (ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        if dlogprobs is None:
            dlogprobs = torch.zeros_like(logprobs)
        num_counted = int((targets != IGNORE_INDEX).sum())
        counted = counted_rows(targets, slice(0, targets.numel()), num_counted)
        most, blocks = column_blocks(head, call.kernels, call.max_block_bytes, num_counted)
        pieces = list(split(counted, num_counted, most))
        gradients = BlockGradients(head, call.kernels.products, hidden, weight, wanted)
        widest = head.columns(blocks[0]) if blocks else head  # none: this rank holds padding only
        buffer = call.kernels.workspace(widest, max((size for _, size in pieces), default=0))

        def dlogits(block: Head) -> Iterator[tuple[Rows, Tensor]]:
            for rows, size in pieces:
                out, of_rows = buffer[:size, : block.weight.shape[0]], targets[rows]
                local = call.kernels.statistics(block, hidden[rows], of_rows, out)
                done = RowStatistics(row_max[rows], log_sum[rows], logprobs[rows], entropy[rows])
                incoming = RowGradients(dlogprobs[rows], _at(dlse, rows), _at(dentropy, rows))
                call.kernels.dlogits_(block, of_rows, out, local, done, incoming)
                yield rows, out

        with torch.autocast(hidden.device.type, enabled=False):
            for columns in blocks:
                gradients.add(columns, dlogits(head.columns(columns)), len(pieces))
        return None, *gradients.finish(), None


def _at(gradient: Tensor | None, rows: Rows) -> Tensor | None:
    return None if gradient is None else gradient[rows]
