"""Methods that vLLM's workers get beside their own (`worker_extension_cls`): reading weights back.

Runs inside vLLM's processes; vllm itself is not imported here, its layers are known by what they
have.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.rollout.weight_broadcast import Meeting, WeightGroup
from flowrl.rollout.weight_check import Report, columns, fingerprint, sampled


class WorkerExtension:
    """Mixed into vLLM's worker class."""

    model_runner: Any
    rank: int  # among the engine's workers
    device: torch.device
    reload_weights: Callable[..., None]  # into the model as it stands

    def flowrl_die_with_parent(self) -> int:
        """A worker whose engine core was killed would wait for it for ever. Returns its pid."""
        watch_parent(lambda: os.kill(os.getpid(), signal.SIGKILL))
        return os.getpid()

    def flowrl_join_weights(self, meeting: dict[str, Any]) -> None:
        """Meets the trainer and the other workers in the group that weights are broadcast in."""
        self._flowrl_group = WeightGroup(Meeting(**meeting), 1 + self.rank, self.device)

    def flowrl_receive_weights(self) -> None:
        """Loads the weights that the trainer broadcasts."""
        self.reload_weights(weights_iterator=self._flowrl_group.receive())

    def flowrl_read_back(self, names: Sequence[str], lap: int) -> list[dict[str, Any]]:
        """Reports of what this worker holds of the named Hugging Face tensors. A tensor that it
        holds in another form (quantised, merged experts) has none."""
        model, dtype = self.model_runner.get_model(), self.model_runner.model_config.dtype
        return [asdict(r) for name in names for r in _read_back(model, name, lap, dtype)]


def watch_parent(act: Any, interval_s: float = 0.5) -> None:
    """Calls `act` once this process's parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval_s)
        act()

    threading.Thread(target=watch, daemon=True, name="flowrl-watch-parent").start()


@torch.inference_mode()
def _read_back(model: nn.Module, name: str, lap: int, dtype: torch.dtype) -> Iterator[Report]:
    module_name, _, kind = name.rpartition(".")
    place = _find(model, module_name)
    if place is None:
        return
    module, part = place
    parameter = getattr(module, kind, None)
    rows, row_start, first = _rows(module, part, parameter)
    if not rows:
        return
    if kind == "weight" and hasattr(module, "cpu_linear"):
        yield _applied(module, name, lap, (first, rows, row_start), dtype)
    if isinstance(parameter, Tensor) and parameter.numel() and parameter.is_floating_point():
        if parameter.dtype.itemsize < 2:  # quantised
            return
        held, positions = _local_columns(module, parameter[first : first + rows], lap)
        if positions is None or positions:
            held = held.to(dtype)  # some CPU kernels keep the bias wider
            yield Report(name, row_start, held.shape[0], positions, fingerprint(held))


def _find(model: nn.Module, name: str) -> tuple[nn.Module, int | None] | None:
    """The module of that name, or the fused one and which part of it: q_proj is part 0 of
    qkv_proj."""
    parent_name, _, leaf = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
    except AttributeError:
        return None
    found = getattr(parent, leaf, None)
    if isinstance(found, nn.Module):
        return found, None
    for fused, parts in (getattr(model, "packed_modules_mapping", None) or {}).items():
        whole = getattr(parent, fused, None)
        if leaf in parts and isinstance(whole, nn.Module):
            return whole, list(parts).index(leaf)
    return None


def _rows(module: Any, part: int | None, parameter: Any) -> tuple[int, int, int]:
    """(rows that this worker holds, where they start in the whole tensor, where they start in the
    module's own output). 0 rows: none, as of a small vocabulary the last worker's are padding."""
    size, rank = getattr(module, "tp_size", 1), getattr(module, "tp_rank", 0)
    sizes = getattr(module, "output_sizes", None)
    if part is not None and sizes is not None:
        local = [n // size for n in sizes]
        replicas = getattr(module, "num_kv_head_replicas", 1) if part else 1
        return local[part], rank // replicas * local[part], sum(local[:part])
    vocabulary = getattr(module, "org_vocab_size", None)
    if vocabulary is not None:  # padded beyond the vocabulary
        indices = module.shard_indices
        start = indices.org_vocab_start_index
        return indices.org_vocab_end_index - start, start, 0
    if hasattr(module, "input_size_per_partition") and getattr(module, "input_size", 0):
        per_rank = getattr(module, "output_size_per_partition", 0)
        is_row_parallel = module.input_size_per_partition != module.input_size
        return per_rank, 0 if is_row_parallel else rank * per_rank, 0
    return (parameter.shape[0] if isinstance(parameter, Tensor) else 0), 0, 0


def _applied(
    module: Any, name: str, lap: int, rows: tuple[int, int, int], dtype: torch.dtype
) -> Report:
    """Columns of a packed weight, by applying the layer to unit vectors."""
    first, count, row_start = rows
    width = getattr(module, "input_size", None) or module.embedding_dim
    local = getattr(module, "input_size_per_partition", width)
    chosen = columns(width, lap)
    start = getattr(module, "tp_rank", 0) * local if local != width else 0
    here = ((chosen >= start) & (chosen < start + local)).nonzero().squeeze(1)
    units = torch.zeros(here.numel(), local, dtype=dtype)
    units[torch.arange(here.numel()), chosen[here] - start] = 1
    values = module.quant_method.apply(module, units, bias=None)[:, first : first + count].T
    positions = None if local == width else here.tolist()
    return Report(name, row_start, count, positions, fingerprint(values))


def _local_columns(module: Any, held: Tensor, lap: int) -> tuple[Tensor, list[int] | None]:
    """The sampled columns of what this worker holds, and which of the sampled ones they are."""
    width = getattr(module, "input_size", None)
    if held.ndim != 2 or width is None or held.shape[1] == width:
        return sampled(held, lap), None
    start = module.tp_rank * held.shape[1]
    chosen = columns(width, lap)
    here = ((chosen >= start) & (chosen < start + held.shape[1])).nonzero().squeeze(1)
    return held[:, (chosen[here] - start).to(held.device)], here.tolist()
