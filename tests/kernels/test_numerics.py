"""The error budget itself: it must be able to fail."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import assert_within_budget, max_error, ulp

TRUTH = torch.tensor([1.0, -3.0], dtype=torch.float64)


def test_ulp():
    assert ulp(3.0, torch.float32) == 2 * torch.finfo(torch.float32).eps
    assert ulp(-1.0, torch.bfloat16) == 2**-7
    assert ulp(0.0, torch.float32) < 1e-40


@pytest.mark.parametrize(("error", "allowed"), [(7, True), (9, False)])
def test_eight_ulp_where_plain_is_exact(error, allowed):
    fused = TRUTH.float()
    fused[0] += error * ulp(3.0, torch.float32)
    if allowed:
        assert_within_budget(fused, TRUTH.float(), TRUTH, "x")
    else:
        with pytest.raises(AssertionError, match="x: error"):
            assert_within_budget(fused, TRUTH.float(), TRUTH, "x")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_results_never_pass(value):
    fused = TRUTH.float()
    fused[1] = value
    assert max_error(fused, TRUTH) == math.inf
    with pytest.raises(AssertionError):
        assert_within_budget(fused, TRUTH.float(), TRUTH, "x")


def test_a_wrong_plain_form_excuses_nothing_unbounded():
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(torch.ones(3), TRUTH.float(), TRUTH, "x")
    with pytest.raises(AssertionError, match="truth is float64"):
        assert_within_budget(TRUTH.float(), TRUTH.float(), TRUTH.float(), "x")
