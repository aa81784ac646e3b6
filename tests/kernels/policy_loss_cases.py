"""A case of linear_policy_loss with every kind of input, and its judge: trajectory balance, a value
loss and an entropy bonus over ragged sequences, on the device of triton_cases.py."""

from __future__ import annotations

from typing import Any

import torch
from flowrl_kernels import Rows, WeightBound, linear_policy_loss, trajectory_balance
from head_cases import Case
from numerics import assert_within_budget
from torch import Tensor
from triton_cases import DEVICE, case_here

OFFSETS = [0, 5, 5, 30, 31, 48, 65]  # one sequence is empty
N, T, V = 6, 65, 130


def objective_on(backend: str, dtype: torch.dtype):
    """Trajectory balance by the backend under test, a value loss and an entropy bonus."""

    def flow(logprobs: Tensor, entropy: Tensor | None, rows: Rows):
        inputs = rows.inputs
        balance = trajectory_balance(
            logprobs,
            inputs["old"],
            inputs["ref"],
            inputs["log_z"],
            inputs["rewards"],
            rows.cu_seqlens,
            beta=2.0,
            weight_bound=WeightBound(0.5, 2.0),
            scale=1 / N,
            backend=backend if dtype != torch.float64 else "reference",
        )
        loss = balance.loss + ((inputs["values"] - logprobs.detach()) ** 2).sum() / T
        if entropy is not None:
            loss = loss - 0.1 * entropy.sum()
        return loss, {"residual": balance.residual}

    return flow


def inputs_for(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)

    def draw(size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    sequence = {"log_z": draw(N).requires_grad_(), "rewards": draw(N)}
    token = {"old": draw(T) * 0.01 - 5, "ref": draw(T) - 5, "values": draw(T).requires_grad_()}
    return sequence, token


def evaluate(case: Case, dtype: torch.dtype, backend: str, **options: Any) -> dict[str, Tensor]:
    case = case.to(dtype)
    sequence, token = inputs_for(torch.float64 if dtype == torch.float64 else torch.float32)
    result = linear_policy_loss(
        case.hidden,
        case.weight,
        case.targets,
        torch.tensor(OFFSETS, dtype=torch.int32, device=DEVICE),
        objective_on(backend, dtype),
        sequence_inputs=sequence,
        token_inputs=token,
        backend=backend,
        **options,
    )
    result.loss.backward()
    found = {
        "loss": result.loss.detach(),
        "logprobs": result.logprobs,
        "entropy": result.entropy,
        "residual": result.metrics["residual"],
        "dhidden": case.hidden.grad,
        "dweight": case.weight.grad,
        "dlog_z": sequence["log_z"].grad,
        "dvalues": token["values"].grad,
    }
    return {name: x for name, x in found.items() if x is not None}


def judge(dtype: torch.dtype, entropy: str, rows: int, backend: str = "triton") -> None:
    """Every output and gradient of the backend keeps the error budget, with room for `rows`."""
    case = case_here(T, V, size=2)
    case.targets = case.targets.where(case.targets < V - 7, 0)
    options = {"temperature": 0.8, "vocab_size": V - 7, "entropy": entropy}
    limit = V * (2 if dtype == torch.bfloat16 and DEVICE.type == "cuda" else 4) * rows
    fused = evaluate(case, dtype, backend, max_logits_bytes=limit, **options)
    plain = evaluate(case, dtype, "reference", **options)
    truth = evaluate(case, torch.float64, "reference", **options)
    assert fused.keys() == truth.keys()
    for name, value in fused.items():
        assert_within_budget(value, plain[name], truth[name], name)
