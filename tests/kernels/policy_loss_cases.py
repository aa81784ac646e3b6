"""linear_policy_loss of mixed_objective.py on the device of triton_cases.py, and its judge."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from flowrl_kernels import linear_policy_loss
from head_cases import Case
from mixed_objective import OFFSETS, T, V, flow, inputs_for
from numerics import assert_within_budget
from torch import Tensor
from triton_cases import DEVICE, case_here


def evaluate(case: Case, dtype: torch.dtype, backend: str, **options: Any) -> dict[str, Tensor]:
    case = case.to(dtype)
    exact = dtype == torch.float64
    sequence, token = inputs_for(torch.float64 if exact else torch.float32, DEVICE)
    result = linear_policy_loss(
        case.hidden,
        case.weight,
        case.targets,
        torch.tensor(OFFSETS, dtype=torch.int32, device=DEVICE),
        partial(flow, backend="reference" if exact else backend),
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
