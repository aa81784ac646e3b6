"""The three products of the output layer, each summed in float32 (float64 for float64).

On a CPU `torch.mm` of bfloat16 rounds its result to bfloat16, which costs up to 0.06 in a logit of
16: operands are raised to float32 instead, the weight tile by tile so that no float32 copy of it
exists. On CUDA bfloat16 operands stay as they are and the product is written in float32; dlogits
are rounded to bfloat16 there, after (p - 1). float16 has too little range for dlogits and is raised
everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_COLUMNS = 8192  # of the vocabulary; a float32 tile is 29 MB at D = 896


def logits_(out: Tensor, hidden: Tensor, weight: Tensor, scale: float) -> None:
    """out (n, V) = scale * hidden (n, D) @ weight (V, D).T"""
    if _mixed(weight, out):
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
        if scale != 1:
            out.mul_(scale)
        return
    hidden = hidden.to(out.dtype)
    for columns, tile in _tiles(weight, out.dtype):
        part = out[:, columns]
        torch.addmm(part, hidden, tile.T, beta=0, alpha=scale, out=part)


def dhidden(dlogits: Tensor, weight: Tensor) -> Tensor:
    """(n, V) @ (V, D) -> (n, D), in float32 (float64 for float64). dlogits may be low precision
    already where the products are."""
    if is_mixed(weight.dtype, weight.device):
        return torch.mm(dlogits.to(weight.dtype), weight, out_dtype=torch.float32)
    if weight.dtype == dlogits.dtype:
        return dlogits @ weight
    total = dlogits.new_zeros(dlogits.shape[0], weight.shape[1])
    for columns, tile in _tiles(weight, dlogits.dtype):
        total.addmm_(dlogits[:, columns], tile)
    return total


def dweight_(total: Tensor, dlogits: Tensor, hidden: Tensor, beta: int) -> None:
    """total (V, D) = beta * total + dlogits (n, V).T @ hidden (n, D); beta 0: total is not read."""
    if _mixed(hidden, total):
        dlogits = dlogits.to(hidden.dtype)
        torch.addmm(total, dlogits.T, hidden, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(dlogits.T, hidden.to(total.dtype), beta=beta)


def rounds_dweight(weight: Tensor) -> bool:
    return False  # PyTorch's own products in bfloat16 promise no float32 sums


def is_mixed(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this dtype run on low-precision operands with float32 results."""
    return device.type == "cuda" and dtype == torch.bfloat16


def _mixed(operand: Tensor, result: Tensor) -> bool:
    return operand.dtype != result.dtype and is_mixed(operand.dtype, operand.device)


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in `dtype`, by blocks of vocabulary; in one piece where nothing is converted."""
    step = max(weight.shape[0], 1) if weight.dtype == dtype else TILE_COLUMNS
    for start in range(0, weight.shape[0], step):
        columns = slice(start, min(start + step, weight.shape[0]))
        yield columns, weight[columns].to(dtype)
