"""Where an objective's optimum lies, as a table over a prompt's answers.

    target(FixedPoint(beta=3.0), table)                        pi_ref exp(beta r) / Z
    target(FixedPoint(3.0, length_normalised=True), table)     pi_ref exp(|y| (beta r - log Z))
    target(FixedPoint(3.0, prior="backward"), table)           P_B exp(beta r) / Z

An objective declares its `FixedPoint` (objectives/base.py); nothing here knows objectives by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowrl.objectives.base import FixedPoint

ZSCORE_EPS = 1e-6  # as objectives/groups.py adds to the standard deviation
PRIORS = {"reference": "pi_ref ", "backward": "P_B ", "uniform": ""}  # as formulas write them
MAX_ROUNDS = 10_000  # of the self-consistent success of z-scored rewards
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Table:
    """All answers to one prompt."""

    reference: Sequence[float]  # pi_ref(y)
    rewards: Sequence[float]
    lengths: Sequence[int]  # response tokens, EOS included
    log_backward: Sequence[float] | None = None  # of trajectories of legal actions: sum of log P_B


@dataclass(frozen=True)
class Target:
    """`log_z` is None where the rewards are z-scored: it belongs to no reward of the task."""

    probabilities: np.ndarray
    log_z: float | None
    prior: np.ndarray  # what exp(beta r) is multiplied by; need not sum to 1


def target(point: FixedPoint, table: Table, group_size: int = 8) -> Target | None:
    """The fixed point over the answers of `table`; None for z-scored rewards of more than two
    values, where the group's statistics have no closed form.

    Raises ValueError for a table whose reference is nowhere positive, and for a prior that the
    table lacks."""
    log_prior = _log_prior(point, table)
    prior = np.exp(log_prior)
    rewards = np.asarray(table.rewards, dtype=np.float64)
    lengths = np.asarray(table.lengths, dtype=np.float64) if point.length_normalised else None
    if point.reward == "raw":
        log_q, log_z = _solve(log_prior, point.beta * rewards, lengths)
        return Target(np.exp(log_q), log_z, prior)
    levels = np.unique(rewards)
    if len(levels) > 2:
        return None
    right = rewards == levels[-1]
    if len(levels) < 2 or right.all():
        return Target(np.exp(_solve(log_prior, 0.0 * rewards, lengths)[0]), None, prior)
    beta = point.beta * (group_size / (group_size - 1) if point.group_log_z else 1.0)
    found = _self_consistent(beta, log_prior, right, lengths, group_size)
    return Target(found, None, prior)


def _log_prior(point: FixedPoint, table: Table) -> np.ndarray:
    if point.prior == "reference":
        return _log(table.reference)
    if point.prior == "uniform":
        return np.zeros(len(table.rewards))
    if table.log_backward is None:
        raise ValueError("the table must hold log_backward for prior='backward', got None")
    return np.asarray(table.log_backward, dtype=np.float64)


def _solve(
    log_ref: np.ndarray, scaled: np.ndarray, lengths: np.ndarray | None
) -> tuple[np.ndarray, float]:
    """log of pi_ref exp(c (scaled - log Z)) with c = 1 or the lengths, and log Z."""
    if lengths is None:
        log_z = float(np.logaddexp.reduce(log_ref + scaled))
        return log_ref + scaled - log_z, log_z
    log_z = length_normalised_log_z(log_ref, scaled, lengths)
    return log_ref + lengths * (scaled - log_z), log_z


def length_normalised_log_z(log_ref: np.ndarray, scaled: np.ndarray, lengths: np.ndarray) -> float:
    """The log Z at which sum_y pi_ref exp(|y| (beta r - log Z)) = 1, by bisection: the sum falls in
    log Z. `scaled` is beta r. A sum of pi_ref below 1 (ill-formed text) counts as it stands."""
    mass = float(np.logaddexp.reduce(log_ref))
    low = float(scaled.min()) + min(0.0, mass)
    high = float(scaled.max()) + max(0.0, mass)
    while high - low > TOLERANCE * max(1.0, abs(low), abs(high)):
        middle = (low + high) / 2
        if float(np.logaddexp.reduce(log_ref + lengths * (scaled - middle))) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _self_consistent(
    beta: float,
    log_ref: np.ndarray,
    right: np.ndarray,
    lengths: np.ndarray | None,
    group_size: int,
) -> np.ndarray:
    """The policy whose own success p gives the z-scores it is fitted to. Starts at pi_ref, from
    which training starts, and follows p upwards: each round raises it until it stays."""
    weight = np.exp(log_ref)
    success = float(weight[right].sum() / weight.sum())
    for _ in range(MAX_ROUNDS):
        high, low = expected_zscores(success, group_size)
        log_q, _ = _solve(log_ref, beta * np.where(right, high, low), lengths)
        found = float(np.exp(log_q[right]).sum())
        if abs(found - success) < TOLERANCE:
            break
        success = min(1.0, max(0.0, found))
    return np.exp(log_q)


def expected_zscores(success: float, group_size: int) -> tuple[float, float]:
    """(E[rhat | right], E[rhat | wrong]) of z-scored binary rewards: the other G - 1 members of the
    group are right with probability `success` each.

        rhat of a right answer = (1 - k / G) / (std + 1e-6),  std^2 = k (G - k) / (G (G - 1))

    with k members right; 0 in a uniform group."""
    others = range(group_size)
    chance = [
        math.comb(group_size - 1, k) * success**k * (1.0 - success) ** (group_size - 1 - k)
        for k in others
    ]
    high = sum(p * _zscore(k + 1, group_size)[0] for p, k in zip(chance, others, strict=True))
    low = sum(p * _zscore(k, group_size)[1] for p, k in zip(chance, others, strict=True))
    return high, low


def _zscore(num_right: int, group_size: int) -> tuple[float, float]:
    share = num_right / group_size
    if num_right in (0, group_size):
        return 0.0, 0.0
    std = math.sqrt(num_right * (group_size - num_right) / (group_size * (group_size - 1)))
    return (1.0 - share) / (std + ZSCORE_EPS), -share / (std + ZSCORE_EPS)


def _log(probabilities: Sequence[float]) -> np.ndarray:
    found = np.asarray(probabilities, dtype=np.float64)
    if not (found > 0).any():
        raise ValueError("the reference must give some answer a positive probability, got none")
    tiny = np.finfo(np.float64).tiny
    return np.log(np.maximum(found, tiny))
