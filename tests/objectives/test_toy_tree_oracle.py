"""Who matches: every objective trains a tabular policy on the toy tree, where the target is exact.

pi_ref success 0.057, beta 3: the target's is 0.547. 341 answers of 1 to 4 tokens, G = 8.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tabular_tree import LENGTHS, OUTCOMES, TabularPolicy

from flowrl import objectives
from flowrl.diversity import effective_modes, mode_masses
from flowrl.metrics import distances
from flowrl.objectives.base import FixedPoint
from flowrl.targets import target

BETA = 3.0
MATCHERS: dict[str, Any] = {  # name -> options
    "tb": {"beta": BETA},
    "vargrad": {"beta": BETA},
    "rloo_kl": {"beta": BETA},
    "gflowrl": {"beta": BETA},
    "ftb": {"beta": BETA},
    "subtb": {"beta": BETA},
}
MAXIMISERS: dict[str, dict[str, Any]] = {
    "grpo": {"kl_coef": 0.0},
    "rloo": {},
    "reinforce": {},
    "dr_grpo": {"max_tokens": 4},
    "dapo": {},
    "gspo": {},
    "gmpo": {},
    "cispo": {},
    "gvpo": {},
}


def distance_to(point: FixedPoint | None, policy: TabularPolicy) -> dict[str, float]:
    assert point is not None
    found = target(point, policy.table)
    assert found is not None
    return distances(policy.probabilities().tolist(), found.probabilities.tolist())


def success(policy: TabularPolicy) -> float:
    return sum(q for q, o in zip(policy.probabilities().tolist(), OUTCOMES, strict=True)
               if o.solution)  # fmt: skip


def modes(policy: TabularPolicy) -> float:
    solutions = [o.solution for o in OUTCOMES]
    masses = mode_masses(policy.probabilities().tolist(), solutions)
    return effective_modes(list(masses.values()))


def test_the_tree_is_a_distribution_and_starts_at_the_reference():
    policy = TabularPolicy(0)
    assert float(policy.probabilities().sum()) == pytest.approx(1.0)
    assert success(policy) == pytest.approx(0.0566, abs=1e-4)
    assert LENGTHS.min() == 1
    assert LENGTHS.max() == 4
    batch = policy.sample(4, 8)
    assert batch.logprobs is not None
    assert batch.ref_logprobs is not None
    assert torch.allclose(batch.logprobs, batch.ref_logprobs)


@pytest.mark.parametrize("name", sorted(MATCHERS))
def test_matchers_reach_the_target(name):
    policy = TabularPolicy(1).train(name, steps=500, **MATCHERS[name])
    declared = objectives.build(name, MATCHERS[name]).fixed_point
    assert declared == FixedPoint(BETA)
    found = distance_to(declared, policy)
    assert found["l1"] < 0.02
    assert found["kl"] < 0.001
    assert success(policy) == pytest.approx(0.5465, abs=0.005)


def test_flowrl_on_raw_rewards_ends_at_its_length_tilted_point():
    options = {"beta": BETA, "reward": "raw"}
    policy = TabularPolicy(2).train("flowrl", steps=1500, **options)
    declared = objectives.build("flowrl", options).fixed_point
    assert declared == FixedPoint(BETA, length_normalised=True)
    assert distance_to(declared, policy)["kl"] < 0.05
    nominal = distance_to(FixedPoint(BETA), policy)
    assert nominal["l1"] > 0.7
    assert nominal["kl"] > 0.4


def test_without_length_normalisation_flowrl_matches_too():
    """Negative control of the test above: it is the division by |y| that moves the point."""
    options = {"beta": BETA, "reward": "raw", "length_norm": False, "bound": "none"}
    policy = TabularPolicy(2).train("flowrl", steps=500, **options)
    assert distance_to(FixedPoint(BETA), policy)["l1"] < 0.02


@pytest.mark.parametrize(
    ("length_norm", "log_z"),
    [(False, "learned"), (True, "learned"), (False, "group_mean"), (False, "group_mean_old")],
)
def test_zscored_flowrl_ends_at_its_self_consistent_point(length_norm, log_z):
    """The reward gap depends on the policy's own success; the fixed point solves for both. The
    group's log Z takes its share of the log-ratio and nothing of the z-scores."""
    options = {"beta": 1.0, "reward": "zscore", "length_norm": length_norm, "log_z": log_z}
    policy = TabularPolicy(4).train("flowrl", steps=800, **options)
    declared = objectives.build("flowrl", options).fixed_point
    of_group = log_z != "learned"
    assert declared == FixedPoint(1.0, length_norm, "zscore", of_group)
    assert distance_to(declared, policy)["l1"] < (0.1 if length_norm else 0.05)
    if not length_norm:
        assert distance_to(FixedPoint(1.0, False, "zscore", not of_group), policy)["l1"] > 0.06
    raw = FixedPoint(1.0, length_norm)
    assert distance_to(raw, policy)["l1"] > 0.2


@pytest.mark.parametrize("name", sorted(MAXIMISERS))
def test_maximisers_do_not_match(name):
    policy = TabularPolicy(3).train(name, steps=300, **MAXIMISERS[name])
    assert objectives.build(name, MAXIMISERS[name]).fixed_point is None
    assert success(policy) > 0.95
    assert modes(policy) < 0.4 * modes(TabularPolicy(3))
    assert distance_to(FixedPoint(BETA), policy)["l1"] > 1.0
