"""Two and four ranks with a share of the vocabulary each, on Triton, against one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from head_cases import Case
from numerics import assert_within_budget
from triton_cases import case_here
from vocab_parallel_cases import T, V, evaluate, judge_ranks


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one(tmp_path: Path, world: int):
    judge_ranks(tmp_path, world, "triton", torch.float32)


def test_one_share_is_not_the_whole():
    """Negative control: half the vocabulary without the other ranks fails the same comparison."""
    case = case_here(T, V, size=3)
    half = Case(case.hidden, case.weight[: V // 2], case.targets.clamp(max=V // 2 - 1))
    whole = evaluate(case.to(torch.float64), None, backend="reference")
    plain = evaluate(case.to(torch.float32), None, backend="reference")
    alone = evaluate(half.to(torch.float32), None, backend="triton")
    with pytest.raises(AssertionError, match="lse: error"):
        assert_within_budget(alone["lse"], plain["lse"], whole["lse"], "lse")
