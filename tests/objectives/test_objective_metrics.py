"""Logged numbers, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from loss_batches import assert_close, evaluate, one_group_of_four

from flowrl.objectives import build
from flowrl.records import LossBatch

LOG_WEIGHTS = [0.1, 3.0, -0.2, 0.0]
RESIDUALS = [-12.623703, 13.140370, 13.207036, -12.940370]


def test_flow_metrics_of_the_paper_preset():
    result, _, _ = evaluate("flowrl", one_group_of_four(), preset="paper")
    weights = [math.exp(0.1), 1.2, math.exp(-0.2), 1.0]
    assert_close(result.metrics["importance_weight"], weights)
    assert_close(result.metrics["log_weight"], LOG_WEIGHTS)
    assert result.metrics["clipped"].tolist() == [0, 1, 0, 0]
    assert_close(result.metrics["z_estimate"], [0.25 - r for r in RESIDUALS], atol=1e-6)
    total, squares = sum(weights), sum(w * w for w in weights)
    assert result.summary == pytest.approx(
        {
            "flow/residual_abs": sum(map(abs, RESIDUALS)) / 4,
            "flow/log_z_mean": 0.25,
            "flow/log_z_gap": sum(RESIDUALS) / 4,
            "flow/log_z_gap_abs": abs(sum(RESIDUALS)) / 4,
            "flow/iw_mean": total / 4,
            "flow/iw_max": 1.2,
            "flow/iw_ess": total**2 / (4 * squares),
            "flow/iw_clip_frac": 0.25,
        },
        abs=1e-6,
    )
    assert all(type(value) is float for value in result.summary.values())


def test_a_weight_below_the_lower_bound_counts_as_clipped():
    """exp(-0.2) = 0.819 is below 1 - 0.1; without a lower bound only exp(3) is clipped, at 10."""
    result, _, _ = evaluate("flowrl", one_group_of_four(), bound="paper", clip_eps_low=0.1)
    assert result.metrics["clipped"].tolist() == [0, 1, 1, 0]
    result, _, _ = evaluate("flowrl", one_group_of_four(), bound="recipe")
    assert result.metrics["clipped"].tolist() == [0, 1, 0, 0]


def test_log_z_gap_is_taken_group_by_group():
    """Two prompts, off by +1 and -1: the signed gap is 0, the absolute one is 1."""
    objective = build("tb")
    batch = LossBatch(
        rewards=torch.zeros(4),
        group_ids=torch.tensor([0, 1, 0, 1]),
        cu_seqlens=torch.arange(5, dtype=torch.int32),
    )
    ones = torch.ones(4, dtype=torch.float64)
    metrics = {
        "residual": ones,
        "importance_weight": ones,
        "clipped": 0 * ones,
        "log_z": torch.tensor([2.0, 5.0, 2.0, 5.0], dtype=torch.float64),
        "z_estimate": torch.tensor([0.0, 4.0, 2.0, 8.0], dtype=torch.float64),
    }
    summary = objective.summarize(metrics, batch)
    assert summary["flow/log_z_gap"] == 0.0
    assert summary["flow/log_z_gap_abs"] == 1.0


def test_grpo_counts_the_tokens_without_policy_gradient():
    """Row 1 has A < 0: its ratios of e^1.5 are not clipped. Row 2's 0.8187 is, below 1 - 0.1."""
    result, gradient, _ = evaluate("grpo", one_group_of_four(), kl_coef=0.0, clip_eps_low=0.1)
    assert_close(result.metrics["clip_frac"], [0.0, 0.0, 1 / 3, 0.0])
    assert (gradient == 0).tolist() == [False] * 5 + [True] + [False] * 3
    assert result.summary["actor/clip_frac"] == pytest.approx(1 / 12)
