"""Micro-batches through Megatron's pipeline schedules, and results back to every stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from flowrl.models.megatron_model import HeadUse
from flowrl.records import PackedBatch, ragged_arange


@dataclass(frozen=True)
class Job:
    """One micro-batch: its packed tokens, and what the last stage does with the states. `use`
    returns (loss, result); without a gradient the loss is not looked at, but has a device."""

    packed: PackedBatch
    use: HeadUse


def run(
    chunks: Sequence[Any], jobs: Sequence[Job], row_multiple: int, *, forward_only: bool
) -> list[Any]:
    """Results of the jobs in order, on every stage; gradients are in the chunks' buffers then."""
    config = chunks[0].config
    for chunk in chunks:  # recomputation and delayed FP8 scales are for passes with a gradient
        chunk.train(not forward_only)
    if len(chunks) > 1:
        jobs = [*_fillers(jobs, config.pipeline_model_parallel_size), *jobs]

    def forward_step(iterator: Iterator[Job], chunk: Any) -> tuple[Any, Callable[[Any], Any]]:
        job = next(iterator)
        inputs = _inputs(job.packed, row_multiple)
        return chunk(**inputs, attention_mask=None, labels=job.use), _as_loss

    streams = [iter(jobs) for _ in chunks]
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=streams if len(chunks) > 1 else streams[0],  # type: ignore
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(jobs),
        seq_length=1,  # not read: the stages tell each other how long each message is
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return [result for result in _from_last_stage(found) if result is not None]


def _as_loss(output: tuple[Tensor, Any]) -> tuple[Tensor, Tensor, Any]:
    """(loss, tokens to divide by, which is nobody's business here, result)."""
    loss, result = output
    return loss, torch.zeros((), dtype=torch.int32, device=loss.device), result


def _fillers(jobs: Sequence[Job], stages: int) -> list[Job]:
    """Empty micro-batches in front, until the interleaved schedule takes their number: a multiple
    of the stages. In front, so that the last one has every gradient."""
    first = jobs[0].packed.select(torch.tensor([0]))
    return [Job(first, _nothing)] * (-len(jobs) % stages)


def _nothing(hidden: Tensor, weight: Tensor, heads: Mapping[str, Any]) -> tuple[Tensor, None]:
    return 0.0 * hidden.sum().float(), None


def _inputs(packed: PackedBatch, row_multiple: int) -> dict[str, Any]:
    """The model's arguments. The row is filled up with one more sequence, whose states nobody
    reads, where its length has to be a multiple of something."""
    tokens, offsets = packed.token_ids, packed.model_cu_seqlens
    missing = -tokens.numel() % row_multiple
    if missing:
        tokens = torch.cat([tokens, tokens.new_zeros(missing)])
        offsets = torch.cat([offsets, offsets[-1:] + missing])
    lengths = offsets.diff()
    longest = int(lengths.max())
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=longest,  # type: ignore
        max_seqlen_kv=longest,  # type: ignore
    )
    return {
        "input_ids": tokens.unsqueeze(0),
        "position_ids": ragged_arange(lengths).unsqueeze(0),
        "packed_seq_params": params,
    }


def _from_last_stage(found: list[Any]) -> list[Any]:
    """The last stage's results on every stage, moved over as CPU tensors."""
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return found
    box = [_to_cpu(found)]
    dist.broadcast_object_list(box, group=group, group_src=group.size() - 1)
    return box[0]


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_cpu(item) for item in value)
    return value
