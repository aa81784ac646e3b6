"""trajectory_balance on Triton: judged against the reference in float64, and broken on purpose."""

from __future__ import annotations

import pytest
import torch
from balance_cases import BOUNDS, evaluate, judge, random_batch
from flowrl_kernels import WeightBound, trajectory_balance
from flowrl_kernels.trajectory_balance import triton_kernels
from flowrl_kernels.trajectory_balance.triton_kernels import trajectory_balance_triton
from triton_cases import nan_in_new_memory

__all__ = ["nan_in_new_memory"]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("length_norm", [True, False])
def test_error_budget(bound, length_norm):
    judge([7, 0, 1, 12, 3, 17], weight_bound=bound, length_norm=length_norm)


@pytest.mark.parametrize("lengths", [[1], [16], [15, 33], [2] * 9, [200, 1, 65], [0, 0, 5, 0]])
@pytest.mark.parametrize("masked", [0.0, 0.4, 1.1])
def test_lengths_around_the_blocks(lengths, masked):
    judge(lengths, masked, weight_bound=WeightBound(0.5, 2.0))


@pytest.mark.parametrize("missing", ["old_logprobs", "response_mask"])
def test_optional_tensors(missing):
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        batch = {**random_batch([7, 0, 5], dtype, masked=0.0), missing: None}
        results.append(evaluate(batch, backend=backend, weight_bound=WeightBound()))
    for name, value in results[0].items():
        torch.testing.assert_close(value.double(), results[1][name].double(), rtol=1e-6, atol=1e-6)
    if missing == "old_logprobs":
        assert results[0]["weight"].tolist() == [1.0] * 3


def test_an_empty_batch():
    batch = random_batch([], torch.float32)
    result = trajectory_balance(**batch, beta=1.0, weight_bound=None, backend="triton")
    result.loss.backward()
    assert float(result.loss) == 0
    assert result.residual.shape == (0,)


def test_the_loss_repeats_bit_for_bit():
    lengths = [3, 0, 20, 1, 40] * 5
    options = {"weight_bound": WeightBound(), "backend": "triton"}
    runs = [evaluate(random_batch(lengths, torch.float32), **options) for _ in range(3)]
    for name, value in runs[0].items():
        assert all(torch.equal(value, run[name]) for run in runs[1:]), name


def test_log_weight_is_bounded_before_the_exponential():
    batch = random_batch([300, 4], torch.float32, masked=0.0)
    batch["old_logprobs"] = batch["old_logprobs"] - 4
    options = {"beta": 1.0, "backend": "triton"}
    result = trajectory_balance(**batch, **options, weight_bound=WeightBound(None, 10.0))
    assert result.weight[0] == pytest.approx(10)
    assert result.loss.isfinite()
    assert trajectory_balance(**batch, **options, weight_bound=WeightBound()).weight[0].isinf()


def test_budget_sees_a_mask_that_is_not_read(monkeypatch):
    """Negative control: NaN at masked tokens reaches the loss once they count."""
    original = triton_kernels.trajectory_balance_triton

    def unmasked(*arguments):
        return original(*arguments[:6], None, *arguments[7:])

    monkeypatch.setattr(triton_kernels, "trajectory_balance_triton", unmasked)
    with pytest.raises(AssertionError):
        judge([7, 5], weight_bound=None)


def test_budget_sees_a_neighbours_token(monkeypatch):
    """Negative control: segments moved by one token."""
    original = triton_kernels.trajectory_balance_triton

    def shifted(*arguments):
        offsets = arguments[5].clone()
        offsets[1:-1] += 1
        return original(*arguments[:5], offsets, *arguments[6:])

    monkeypatch.setattr(triton_kernels, "trajectory_balance_triton", shifted)
    with pytest.raises(AssertionError):
        judge([7, 5, 9], masked=0.0, weight_bound=WeightBound())


def test_operator_is_registered_as_torch_expects():
    batch = random_batch([7, 0, 5], torch.float32, masked=0.0)
    names = ("old_logprobs", "ref_logprobs", "log_z", "rewards", "cu_seqlens", "response_mask")
    arguments = [batch["logprobs"], *(batch[name] for name in names)]
    torch.library.opcheck(trajectory_balance_triton, (*arguments, 2.0, None, 2.3, True, 0.5))


def test_float64_is_refused():
    batch = random_batch([3], torch.float64)
    with pytest.raises(ValueError, match="'triton' takes float32 log-probs"):
        trajectory_balance(**batch, beta=1.0, weight_bound=None, backend="triton")
