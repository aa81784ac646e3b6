"""Moving weights by name: from a trainer into a sampler's copy, or into a model to be exported."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHECKED_AT_ONCE = 1 << 24  # elements


@torch.no_grad()
def copy_weights(module: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> int:
    """Copies named tensors into the module's parameters and buffers, in place and in their dtype.

    Tied parameters are copied once: any of their names will do. Returns a checksum of all weights.
    Raises ValueError for an unknown name, another shape, a parameter that did not come, or if what
    the module holds afterwards is not what came (bit by bit, by checksum)."""
    targets = module.state_dict(keep_vars=True)  # every name, also those of tied parameters
    arrived: dict[str, int] = {}
    filled: set[int] = set()
    for name, tensor in weights:
        target = targets.get(name)
        if target is None:
            raise ValueError(f"the model has no weight called {name}; send weights of this model")
        if target.shape != tensor.shape:
            raise ValueError(
                f"{name} must have shape {tuple(target.shape)}, got {tuple(tensor.shape)}; "
                "send weights of this model"
            )
        target.copy_(tensor)
        arrived[name] = checksum(tensor.to(target.dtype))
        filled.add(id(target))
    missing = [name for name, p in module.named_parameters() if id(p) not in filled]
    if missing:
        raise ValueError(
            f"{len(missing)} weights did not come, {missing[0]} for one; send every weight"
        )
    held = {name: checksum(targets[name]) for name in arrived}  # read back when all are there
    if held != arrived:
        wrong = [name for name in arrived if held[name] != arrived[name]]
        raise ValueError(
            f"{len(wrong)} weights are not what was sent, {wrong[0]} for one; send tensors that "
            "nobody changes meanwhile, and tied ones with equal values"
        )
    return sum(held[name] * (i + 1) for i, name in enumerate(sorted(held))) % 2**63


def checksum(tensor: Tensor) -> int:
    """Sum over i of bits(x_i) * (2 i + 1) modulo 2^64: exact, and sensitive to order."""
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _CHECKED_AT_ONCE):  # int64 copies of a part, not of all
        part = bits[start : start + _CHECKED_AT_ONCE].long()
        ends = 2 * start + 1, 2 * (start + part.numel()) + 1
        total += (part * torch.arange(*ends, 2, device=bits.device)).sum()
    return int(total)
