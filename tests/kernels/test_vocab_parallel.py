"""Two ranks with a share of the vocabulary each against one rank that has it all."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from flowrl_kernels import Rows, linear_logprobs, linear_policy_loss
from flowrl_kernels.head import chunks
from head_cases import Case, backends_for, combine, leave_ranks, make_case
from numerics import assert_within_budget
from torch import Tensor
from torch.distributed import ProcessGroup

V, T = 90, 40
CU_SEQLENS = torch.tensor([0, 3, 25, 40], dtype=torch.int32)
# Weight rows of both ranks with padding: halves; 26 true rows on the second rank; padding only.
LAYOUTS = [90, 128, 180]
RUNS = [
    (dtype, backend, padded)
    for dtype in (torch.float64, torch.float32)
    for backend in backends_for(dtype)
    for padded in LAYOUTS
]


def objective(logprobs: Tensor, entropy: Tensor | None, rows: Rows):
    assert entropy is not None
    share = rows.inputs["log_z"].repeat_interleave(rows.cu_seqlens.diff())
    return ((logprobs + share) ** 2).sum() - entropy.sum(), {"n": rows.cu_seqlens.diff()}


def evaluate(case: Case, group: ProcessGroup | None, **options: Any) -> dict[str, Tensor]:
    """Every output and gradient of both operators; `case` has this rank's rows of the weight."""
    options |= {"group": group, "entropy": "grad", "temperature": 0.7, "max_logits_bytes": 1500}
    scores = linear_logprobs(case.hidden, case.weight, case.targets, **options)._asdict()
    combine(scores).backward()
    fused = Case(case.hidden.detach(), case.weight.detach(), case.targets).to(case.hidden.dtype)
    log_z = torch.linspace(1, 3, 3, dtype=scores["lse"].dtype, requires_grad=True)
    result = linear_policy_loss(
        fused.hidden,
        fused.weight,
        fused.targets,
        CU_SEQLENS,
        objective,
        sequence_inputs={"log_z": log_z},
        **options,
    )
    (2 * result.loss).backward()
    gradients = {
        "dhidden": case.hidden.grad,
        "dweight": case.weight.grad,
        "dhidden of loss": fused.hidden.grad,
        "dweight of loss": fused.weight.grad,
        "dlog_z": log_z.grad,
    }
    outputs = {**scores, "loss": result.loss, "of loss": result.logprobs}
    return {name: x.detach() for name, x in {**outputs, **gradients}.items() if x is not None}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    chunks.COLUMN_STEP, chunks.FEWEST_COLUMNS = 16, 32  # several blocks in backward
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    results = []
    for dtype, backend, padded in RUNS:
        case = make_case(T, V, size=3)
        weight = torch.full((padded, case.weight.shape[1]), float("nan"))
        weight[:V] = case.weight
        share = slice(rank * padded // 2, (rank + 1) * padded // 2)
        local = Case(case.hidden, weight[share], case.targets).to(dtype)
        results.append(
            evaluate(
                local, dist.group.WORLD, vocab_start=share.start, vocab_size=V, backend=backend
            )
        )
    torch.save(results, f"{folder}/rank{rank}.pt")
    leave_ranks()


def test_two_ranks_equal_one(tmp_path: Path):
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    of_rank = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    case = make_case(T, V, size=3)
    truth = evaluate(case.to(torch.float64), None, backend="reference")
    plains = {
        dtype: evaluate(case.to(dtype), None, backend="reference")
        for dtype in (torch.float64, torch.float32)
    }
    for (dtype, backend, _), first, second in zip(RUNS, *of_rank, strict=True):
        for name, expected in truth.items():
            if name.startswith("dweight"):
                joined = torch.cat([first[name], second[name]])
                assert not joined[V:].any(), f"{name} of the padding"
                joined = joined[:V]
            else:
                joined = first[name]
                assert torch.equal(joined, second[name]), f"{name} differs between ranks"
            what = f"{backend} {name}, {dtype}"
            assert_within_budget(joined, plains[dtype][name], expected, what)


def test_one_share_is_not_the_whole():
    """Negative control: half the vocabulary without the other rank fails the same comparison."""
    case = make_case(T, V, size=3)
    half = Case(case.hidden, case.weight[: V // 2], case.targets.clamp(max=V // 2 - 1))
    whole = evaluate(case.to(torch.float64), None, backend="reference")
    alone = evaluate(half.to(torch.float64), None)
    assert (whole["lse"] - alone["lse"]).abs().max() > 0.1
