"""linear_policy_loss on Triton: trajectory balance in one pass, judged against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from flowrl_kernels import Rows, linear_logprobs, linear_policy_loss
from flowrl_kernels.head import triton_head
from head_cases import Watch
from mixed_objective import OFFSETS, N, T, V, flow, inputs_for
from policy_loss_cases import evaluate, judge
from triton_cases import DEVICE, case_here, nan_in_new_memory

__all__ = ["nan_in_new_memory"]


# Rows a chunk: all; several sequences; less than the longest sequence (25 rows).
@pytest.mark.parametrize("rows", [100, 30, 10])
@pytest.mark.parametrize("entropy", ["none", "metric", "grad"])
def test_error_budget(rows, entropy):
    judge(torch.float32, entropy, rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_operands(dtype):
    judge(dtype, "grad", 30)


def test_equals_linear_logprobs_and_objective():
    case = case_here(T, V, size=2).to(torch.float32)
    sequence, token = inputs_for(torch.float32, DEVICE)
    scores = linear_logprobs(
        case.hidden, case.weight, case.targets, entropy="grad", backend="triton"
    )
    offsets = torch.tensor(OFFSETS, dtype=torch.int32, device=DEVICE)
    rows = Rows(slice(0, N), slice(0, T), offsets, {**sequence, **token})
    loss, _ = flow(scores.logprobs, scores.entropy, rows, "triton")
    leaves = [case.hidden, case.weight, sequence["log_z"], token["values"]]
    expected = torch.autograd.grad(loss, leaves)
    found = evaluate(case, torch.float32, "triton", entropy="grad", max_logits_bytes=V * 4 * 20)
    for name, gradient in zip(("dhidden", "dweight", "dlog_z", "dvalues"), expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_main_grad_is_added_to_in_place():
    case = case_here(T, V).to(torch.float32)
    main_grad = torch.full((V, 16), 2.0, device=DEVICE)
    found = evaluate(case, torch.float32, "triton", main_grad=main_grad)
    plain = evaluate(case, torch.float32, "triton")
    assert "dweight" not in found
    torch.testing.assert_close(main_grad - 2, plain["dweight"])


def test_repeats_are_bitwise():
    case = case_here(T, V, size=2)
    options = {"entropy": "grad", "max_logits_bytes": V * 4 * 10}
    once = evaluate(case, torch.float32, "triton", **options)
    again = evaluate(case, torch.float32, "triton", **options)
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "products"),
    [(True, True, 2), (True, False, 1), (False, True, 1), (False, False, 0)],
)
def test_frozen_operands_cost_no_product(hidden_grad, weight_grad, products):
    case = case_here(T, V)
    case.hidden.requires_grad_(hidden_grad)
    case.weight.requires_grad_(weight_grad)
    sequence, token = inputs_for(torch.float32, DEVICE)
    with Watch() as watch:
        linear_policy_loss(
            case.hidden,
            case.weight,
            case.targets,
            torch.tensor(OFFSETS, dtype=torch.int32, device=DEVICE),
            partial(flow, backend="triton"),
            sequence_inputs=sequence,
            token_inputs=token,
            backend="triton",
        ).loss.backward()
    assert watch.products == products


def test_budget_sees_gradients_of_the_wrong_row(monkeypatch):
    """Negative control: per-token gradients moved by one row."""
    original = triton_head.head_dlogits_

    def moved(out, tile_max, row_max, log_sum, factor, *rest):
        original(out, tile_max, row_max, log_sum, factor.roll(1), *rest)

    monkeypatch.setattr(triton_head, "head_dlogits_", moved)
    with pytest.raises(AssertionError, match="dhidden: error"):
        judge(torch.float32, "none", 30)
