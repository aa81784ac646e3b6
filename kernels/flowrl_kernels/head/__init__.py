"""What both linear operators share: statistics of a chunk of rows under the output layer.

A backend of this kind is a pair of functions over one chunk (`HeadKernels`): `statistics` makes the
logits in a workspace and reduces them, `dlogits_` turns the same workspace into the gradient with
respect to the logits. The drivers (linear_logprobs/torch_chunked.py, policy_loss/torch_chunked.py)
own everything else: chunks, ranks, objectives, the two gradient products. Replace the pair, keep
the driver.

Legend: n rows of a chunk, D hidden, V_valid columns of this rank that are true vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from flowrl_kernels.checks import statistics_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Head:
    """The output layer of one call: z = hidden @ weight.T / temperature, over all ranks of
    `group`."""

    weight: Tensor  # (V_valid, D) this rank's columns of the vocabulary, padding cut off
    padded_columns: int  # V_local, padding included: the same on all ranks
    temperature: float
    vocab_start: int
    group: ProcessGroup | None
    entropy: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, statistics and gradient sums."""
        return statistics_dtype(self.weight.dtype)

    def columns(self, columns: slice) -> Head:
        """The output layer of these columns of `weight` alone."""
        weight = self.weight[columns]
        start = self.vocab_start + columns.start
        return replace(self, weight=weight, padded_columns=weight.shape[0], vocab_start=start)

    def own_targets(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target in this rank's weight (0 where another rank has it), and which
        rows' targets this rank has. (n,) int64 and (n,) bool."""
        column = targets - self.vocab_start
        owned = (column >= 0) & (column < self.weight.shape[0])
        return column.where(owned, 0), owned


@dataclass(frozen=True)
class LocalStatistics:
    """Sums over this rank's columns, with z relative to this rank's own maximum. 16 bytes a row."""

    row_max: Tensor  # (n,) max_j z_j; -inf where the rank has no column
    sum_exp: Tensor  # (n,) sum_j exp(z_j - row_max)
    target: Tensor  # (n,) z at the target; -inf where another rank has it
    sum_exp_z: Tensor | None  # (n,) sum_j exp(z_j - row_max) (z_j - row_max), for the entropy


@dataclass(frozen=True)
class RowStatistics:
    """The same of the whole vocabulary, finished."""

    row_max: Tensor  # (n,)
    log_sum: Tensor  # (n,) log sum_j exp(z_j - row_max) >= 0; lse = row_max + log_sum
    logprobs: Tensor  # (n,) <= 0
    entropy: Tensor | None  # (n,)


@dataclass(frozen=True)
class RowGradients:
    """Of the loss, with respect to the outputs of each row. None: zero."""

    logprobs: Tensor  # (n,)
    lse: Tensor | None = None  # (n,)
    entropy: Tensor | None = None  # (n,)


class Products(Protocol):
    """The two gradient products, from the dlogits that `HeadKernels.dlogits_` left."""

    def dhidden(
        self,
        dlogits: Tensor,  # (n, V)
        weight: Tensor,  # (V, D)
    ) -> Tensor:  # (n, D)
        """dlogits @ weight, summed in float32 (float64 for float64)."""
        ...

    def dweight_(
        self,
        total: Tensor,  # (V, D)
        dlogits: Tensor,  # (n, V)
        hidden: Tensor,  # (n, D)
        beta: int,
    ) -> None:
        """total = beta * total + dlogits.T @ hidden; for beta 0, total is not read, and may have
        hidden's dtype if `rounds_dweight`."""
        ...

    def rounds_dweight(self, weight: Tensor) -> bool:
        """Whether `dweight_` of operands like `weight` can round its sums once, as it writes."""
        ...


class HeadKernels(Protocol):
    products: Products

    def forward_needs_workspace(self, head: Head) -> bool:
        """Whether `statistics` needs `out` when no gradient follows."""
        ...

    def logit_bytes(self, head: Head) -> int:
        """What a logit costs at the height of a chunk: workspace, and copies of it."""
        ...

    def workspace(self, head: Head, num_rows: int) -> Tensor:  # (num_rows, V_valid)
        """A new `out` for chunks of up to `num_rows` rows."""
        ...

    def statistics(
        self,
        head: Head,
        hidden: Tensor,  # (n, D)
        targets: Tensor,  # (n,)
        out: Tensor | None,  # (n, V_valid) rows of a workspace; None: no `dlogits_` follows
    ) -> LocalStatistics:
        """Logits and their statistics; leaves in `out` what this backend's `dlogits_` reads."""
        ...

    def dlogits_(
        self,
        head: Head,
        targets: Tensor,  # (n,)
        out: Tensor,  # (n, V_valid)
        local: LocalStatistics,
        rows: RowStatistics,
        gradients: RowGradients,
    ) -> None:
        """`out` becomes dloss / d(hidden @ weight.T), 1 / temperature included:

        (p_j (g_lse - g_logprob - g_entropy (log p_j + H)) + g_logprob [j = target]) / temperature
        """
        ...
