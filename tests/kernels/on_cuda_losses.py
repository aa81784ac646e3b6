"""linear_policy_loss and trajectory_balance on the CUDA operators: see on_cuda_head.py."""

from __future__ import annotations

import math

import pytest
import torch
from balance_cases import BOUNDS, OPTIONS, evaluate, judge, random_batch
from flowrl_kernels import WeightBound, backends, cuda_support, trajectory_balance
from flowrl_kernels.trajectory_balance import native
from mixed_objective import T, V
from policy_loss_cases import evaluate as evaluate_policy_loss
from policy_loss_cases import judge as judge_policy_loss
from triton_cases import DEVICE, case_here, nan_in_new_memory

__all__ = ["nan_in_new_memory"]
BF16 = torch.bfloat16

refused = cuda_support.refusal(backends.Call(DEVICE, BF16))
if refused is not None:
    raise RuntimeError(f"the tests of the CUDA operators cannot run: cuda {refused}")


# Rows a chunk: all; several sequences; less than the longest sequence (25 rows).
@pytest.mark.parametrize("rows", [100, 30, 10])
@pytest.mark.parametrize("entropy", ["none", "metric", "grad"])
def test_policy_loss_error_budget(rows, entropy):
    judge_policy_loss(BF16, entropy, rows, "cuda")


def test_policy_loss_adds_to_main_grad():
    case = case_here(T, V).to(BF16)
    main_grad = torch.full((V, 16), 2.0, device=DEVICE)
    found = evaluate_policy_loss(case, BF16, "cuda", main_grad=main_grad)
    plain = evaluate_policy_loss(case, BF16, "cuda")
    assert "dweight" not in found
    torch.testing.assert_close((main_grad - 2).to(BF16), plain["dweight"], rtol=1e-2, atol=1e-4)


def test_policy_loss_repeats_bitwise():
    case = case_here(T, V, size=2)
    options = {"entropy": "grad", "max_logits_bytes": V * 2 * 10}
    once = evaluate_policy_loss(case, BF16, "cuda", **options)
    again = evaluate_policy_loss(case, BF16, "cuda", **options)
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("length_norm", [True, False])
def test_balance_error_budget(bound, length_norm):
    judge([7, 0, 1, 12, 3, 17], backend="cuda", weight_bound=bound, length_norm=length_norm)


LENGTHS = [[1], [127], [128, 129], [2] * 300, [2000, 1, 650], [0, 0, 5, 0]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)}of{max(x)}")
@pytest.mark.parametrize("masked", [0.0, 0.4, 1.1])
def test_balance_lengths(lengths, masked):
    judge(lengths, masked, backend="cuda", weight_bound=WeightBound(0.5, 2.0))


def test_balance_of_an_empty_batch():
    batch = random_batch([], torch.float32)
    result = trajectory_balance(**batch, beta=1.0, weight_bound=None, backend="cuda")
    result.loss.backward()
    assert float(result.loss) == 0


def test_balance_repeats_bit_for_bit():
    lengths = [3, 0, 20, 1, 400] * 50
    options = {"weight_bound": WeightBound(), "backend": "cuda"}
    runs = [evaluate(random_batch(lengths, torch.float32), **options) for _ in range(3)]
    for name, value in runs[0].items():
        assert all(torch.equal(value, run[name]) for run in runs[1:]), name


def test_balance_without_old_log_probs_and_mask():
    batch = {**random_batch([7, 0, 5], torch.float32, masked=0.0), "old_logprobs": None}
    batch["response_mask"] = None
    found = evaluate(batch, backend="cuda", weight_bound=WeightBound())
    assert found["weight"].tolist() == [1.0] * 3
    assert all(x.isfinite().all() for x in found.values())


def test_budget_sees_a_mask_that_is_not_read(monkeypatch):
    """Negative control: NaN at masked tokens reaches the loss once they count."""
    original = native.trajectory_balance

    def unmasked(*args, response_mask, **options):
        return original(*args, response_mask=None, **options)

    monkeypatch.setattr(native, "trajectory_balance", unmasked)
    batch = random_batch([7, 5], torch.float32)
    result = trajectory_balance(**batch, **OPTIONS, weight_bound=None, backend="cuda")
    assert math.isnan(float(result.loss))
