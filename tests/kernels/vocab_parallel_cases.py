"""Ranks with a share of the vocabulary each against one rank, on the device of triton_cases.py."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from flowrl_kernels import Rows, linear_logprobs, linear_policy_loss
from flowrl_kernels.head import chunks
from head_cases import Case, combine, leave_ranks
from numerics import assert_within_budget
from torch import Tensor
from torch.distributed import ProcessGroup
from triton_cases import DEVICE, case_here

V, T = 90, 40
LAYOUTS = [92, 180]  # weight rows of all ranks: 2 of padding; ranks that hold padding only


def objective(logprobs: Tensor, entropy: Tensor | None, rows: Rows):
    assert entropy is not None
    return (logprobs.square().sum() - entropy.sum()), {"n": rows.cu_seqlens.diff()}


def evaluate(case: Case, group: ProcessGroup | None, **options: Any) -> dict[str, Tensor]:
    """Every output and gradient of both operators; `case` has this rank's rows of the weight."""
    options |= {"group": group, "entropy": "grad", "temperature": 0.7, "max_logits_bytes": 6000}
    scores = linear_logprobs(case.hidden, case.weight, case.targets, **options)._asdict()
    combine(scores).backward()
    fused = Case(case.hidden.detach(), case.weight.detach(), case.targets).to(case.hidden.dtype)
    cu_seqlens = torch.tensor([0, 3, 25, 40], dtype=torch.int32, device=DEVICE)
    result = linear_policy_loss(
        fused.hidden, fused.weight, fused.targets, cu_seqlens, objective, **options
    )
    result.loss.backward()
    found = {
        **scores,
        "loss": result.loss,
        "dhidden": case.hidden.grad,
        "dweight": case.weight.grad,
        "dhidden of loss": fused.hidden.grad,
        "dweight of loss": fused.weight.grad,
    }
    return {name: x.detach() for name, x in found.items() if x is not None}


def run_rank(rank: int, world: int, folder: str, backend: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    chunks.COLUMN_STEP, chunks.FEWEST_COLUMNS = 16, 32  # several blocks in backward
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    results = []
    for padded in LAYOUTS:
        case = case_here(T, V, size=3)
        weight = torch.full((padded, case.weight.shape[1]), float("nan"), device=DEVICE)
        weight[:V] = case.weight
        share = slice(rank * padded // world, (rank + 1) * padded // world)
        local = Case(case.hidden, weight[share], case.targets).to(dtype)
        options = {"vocab_start": share.start, "vocab_size": V, "backend": backend}
        results.append(evaluate(local, dist.group.WORLD, **options))
    torch.save(results, f"{folder}/rank{rank}.pt")
    leave_ranks()


def judge_ranks(folder: Path, world: int, backend: str, dtype: torch.dtype) -> None:
    """`world` gloo processes give what one rank gives, within the error budget."""
    arguments = (world, str(folder), backend, dtype)
    mp.spawn(run_rank, args=arguments, nprocs=world)  # type: ignore[attr-defined]
    of_rank = [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]
    case = case_here(T, V, size=3)
    truth = evaluate(case.to(torch.float64), None, backend="reference")
    plain = evaluate(case.to(dtype), None, backend="reference")
    for parts in zip(*of_rank, strict=True):
        for name, expected in truth.items():
            joined = parts[0][name]
            if name.startswith("dweight"):
                joined = torch.cat([part[name] for part in parts])
                assert not joined[V:].any(), f"{name} of the padding"
                joined = joined[:V]
            else:
                assert all(torch.equal(joined, part[name]) for part in parts), name
            assert_within_budget(joined, plain[name], expected, f"{name}, {world} ranks")
