"""Batches of trajectory_balance on the device of triton_cases.py, and their judge."""

from __future__ import annotations

import math
from typing import Any

import torch
from flowrl_kernels import WeightBound, trajectory_balance
from numerics import assert_within_budget
from torch import Tensor
from triton_cases import DEVICE

BOUNDS = [None, WeightBound(0.8, 1.2), WeightBound(None, 10), WeightBound(0.5, None), WeightBound()]
OPTIONS: dict[str, Any] = {"beta": 3.0, "scale": 0.2}


def random_batch(lengths: list[int], dtype: torch.dtype, *, masked: float = 0.3) -> dict[str, Any]:
    """NaN stands at masked tokens, which must not be read."""
    generator = torch.Generator().manual_seed(5)
    total, count = sum(lengths), len(lengths)
    mask = torch.rand(total, generator=generator) >= masked
    logprobs = -torch.rand(total, generator=generator) * 3
    old = logprobs + torch.randn(total, generator=generator) * 0.3 / max(lengths, default=1) ** 0.5
    ref = logprobs + torch.randn(total, generator=generator)
    nan = torch.full((total,), math.nan)
    batch = {
        "logprobs": logprobs.where(mask, nan),
        "old_logprobs": old.where(mask, nan),
        "ref_logprobs": ref.where(mask, nan),
        "log_z": torch.randn(count, generator=generator),
        "rewards": torch.randn(count, generator=generator),
    }
    batch = {name: x.to(DEVICE, dtype) for name, x in batch.items()}
    batch["logprobs"].requires_grad_()
    batch["log_z"].requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    return {**batch, "cu_seqlens": cu_seqlens, "response_mask": mask.to(DEVICE)}


def evaluate(batch: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    result = trajectory_balance(**batch, **OPTIONS, **options)
    gradients = torch.autograd.grad(result.loss * 1.5, [batch["logprobs"], batch["log_z"]])
    found = {**result._asdict(), "dlogprobs": gradients[0], "dlog_z": gradients[1]}
    return {name: x.detach() for name, x in found.items()}


def judge(lengths: list[int], masked: float = 0.3, backend: str = "triton", **options: Any) -> None:
    """Every output and gradient of the backend keeps the error budget."""
    batches = [random_batch(lengths, torch.float32, masked=masked) for _ in range(2)]
    fused = evaluate(batches[0], backend=backend, **options)
    plain = evaluate(batches[1], backend="reference", **options)
    exact = random_batch(lengths, torch.float64, masked=masked)
    truth = evaluate(exact, backend="reference", **options)
    assert torch.equal(fused.pop("num_tokens"), truth["num_tokens"])
    for name, value in fused.items():
        assert_within_budget(value, plain[name], truth[name], name)
