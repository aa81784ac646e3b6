"""Bounded steps: the longest share that keeps the KL and improves the loss, or none."""

import pytest
import torch

from flowrl.models import UpdateInfo
from flowrl.objectives.base import TrustRegion
from flowrl.records import LossBatch, Totals
from flowrl.trust_region import kl_old_new, take_step


class Line:
    """One weight that `step` moves from 0 to 1; KL is its square, the loss a parabola."""

    def __init__(self, best, skipped=False):
        self.weight = 0.0
        self.best = best
        self.skipped = skipped

    def snapshot(self):
        return self.weight

    def step(self):
        self.weight = self.weight if self.skipped else 1.0
        return UpdateInfo(1.0, 0.1, self.skipped)

    def natural_step(self, microbatches, region):
        self.weight = 0.8
        return UpdateInfo(1.0, 0.1, False)

    def interpolate(self, start, share):
        self.weight = start + share * (self.weight - start)

    def measure(self):
        return self.weight**2, (self.weight - self.best) ** 2


def step(line, max_kl, backtracks=10, natural=False):
    method = "conjugate_gradient" if natural else "line_search"
    region = TrustRegion(max_kl, method, backtracks, backtrack=0.5)
    return take_step(line, region, [], line.measure, line.best**2)


def test_the_whole_step_is_taken_where_it_may_be():
    line = Line(best=1.0)
    moved = step(line, max_kl=1.0)
    assert (moved.share, moved.kl, line.weight) == (1.0, 1.0, 1.0)


def test_the_step_is_halved_until_the_kl_holds():
    line = Line(best=1.0)
    moved = step(line, max_kl=0.07)  # 1, 1/4, 1/16
    assert (moved.share, moved.kl, line.weight) == (0.25, 0.0625, 0.25)


def test_the_step_is_halved_until_the_loss_improves():
    line = Line(best=0.2)  # better than at 0 below 0.4
    assert step(line, max_kl=9.0).share == 0.25
    assert line.weight == 0.25


def test_a_step_that_never_helps_is_taken_back():
    line = Line(best=-1.0)
    moved = step(line, max_kl=9.0)
    assert (moved.share, moved.kl, line.weight) == (0.0, 0.0, 0.0)
    line = Line(best=1.0)
    assert step(line, max_kl=1e-9, backtracks=3).share == 0.0
    assert line.weight == 0.0


def test_conjugate_gradient_proposes_the_natural_step():
    line = Line(best=1.0)
    assert step(line, max_kl=0.2, natural=True).share == 0.5
    assert line.weight == pytest.approx(0.4)


def test_a_skipped_update_moves_nothing():
    line = Line(best=1.0, skipped=True)
    moved = step(line, max_kl=1.0)
    assert moved.update.skipped
    assert (moved.share, line.weight) == (0.0, 0.0)


def test_the_kl_is_the_tokens_mean_of_k3():
    """rho - 1 - log rho at log rho = 0.5 and -0.5; the masked third token is far off."""
    batch = LossBatch(
        torch.zeros(1),
        torch.zeros(1, dtype=torch.int64),
        torch.tensor([0, 3]),
        response_mask=torch.tensor([True, True, False]),
        totals=Totals(1, 2, 1),
    )
    new, old = torch.tensor([0.5, -0.5, float("nan")]), torch.zeros(3)
    expected = (0.1487212707 + 0.1065306597) / 2
    assert float(kl_old_new(new, old, batch)) == pytest.approx(expected, rel=1e-7)
