"""Two and four ranks with a share of the vocabulary each, on Triton, against one rank."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from flowrl_kernels import Rows, linear_logprobs, linear_policy_loss
from head_cases import Case, combine
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


def run_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
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
        local = Case(case.hidden, weight[share], case.targets).to(torch.float32)
        options = {"vocab_start": share.start, "vocab_size": V, "backend": "triton"}
        results.append(evaluate(local, dist.group.WORLD, **options))
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one(tmp_path: Path, world: int):
    mp.spawn(run_rank, args=(world, str(tmp_path)), nprocs=world)  # type: ignore[attr-defined]
    of_rank = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world)]
    case = case_here(T, V, size=3)
    truth = evaluate(case.to(torch.float64), None, backend="reference")
    plain = evaluate(case.to(torch.float32), None, backend="reference")
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


def test_one_share_is_not_the_whole():
    """Negative control: half the vocabulary without the other ranks fails the same comparison."""
    case = case_here(T, V, size=3)
    half = Case(case.hidden, case.weight[: V // 2], case.targets.clamp(max=V // 2 - 1))
    whole = evaluate(case.to(torch.float64), None, backend="reference")
    plain = evaluate(case.to(torch.float32), None, backend="reference")
    alone = evaluate(half.to(torch.float32), None, backend="triton")
    with pytest.raises(AssertionError, match="lse: error"):
        assert_within_budget(alone["lse"], plain["lse"], whole["lse"], "lse")
