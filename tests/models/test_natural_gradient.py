"""The natural-gradient step against the Fisher matrix written out."""

import pytest
import torch
from torch import nn

from flowrl.models.natural_gradient import Fisher, conjugate_gradient, natural_gradient
from flowrl.objectives.base import TrustRegion
from flowrl.parallel import Parallel
from flowrl.records import IGNORE_INDEX, PackedBatch, to_cu_seqlens
from flowrl.schema import ConfigError

ALONE = Parallel(0, 1, torch.device("cpu"))
REGION = TrustRegion(max_kl=1e-6, method="conjugate_gradient", damping=0.1, cg_iterations=40)


class World:
    """Logits tanh(x A) B of six rows, one of them masked; 12 + 15 parameters, in float64."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x = draw(6, 4)
        self.params = {"a": nn.Parameter(draw(4, 3)), "b": nn.Parameter(draw(3, 5))}
        targets = torch.tensor([0, 1, IGNORE_INDEX, 2, 3, 4])
        offsets = to_cu_seqlens(torch.tensor([6]))
        self.batch = PackedBatch(targets, offsets, torch.tensor([1]), targets, offsets)

    def logits(self, batch):
        return (self.x @ self.params["a"]).tanh() @ self.params["b"]

    def mean_kl(self, flat):
        """KL(old || new) per unmasked row as a function of the flat parameters; differentiable."""
        a, b = flat[:12].view(4, 3), flat[12:].view(3, 5)
        held = self.batch.targets != IGNORE_INDEX
        old = self.logits(self.batch).detach().log_softmax(1)[held]
        new = ((self.x @ a).tanh() @ b).log_softmax(1)[held]
        return (old.exp() * (old - new)).sum() / held.sum()

    def flat(self):
        return torch.cat([p.detach().flatten() for p in self.params.values()])

    def fisher(self):
        """The Hessian of the mean KL at new = old, (27, 27)."""
        found = torch.autograd.functional.hessian(self.mean_kl, self.flat())
        assert isinstance(found, torch.Tensor)
        return found


def test_the_product_is_that_of_the_kls_hessian():
    world = World()
    product = Fisher(list(world.params.values()), world.logits, [world.batch], ALONE)
    vector = torch.linspace(-1, 1, 27, dtype=torch.float64)
    expected = world.fisher() @ vector
    # A central difference at a step of 1% is off by its third derivative, about 1e-4.
    torch.testing.assert_close(product(vector), expected, rtol=2e-3, atol=2e-4)
    assert not torch.allclose(product(vector), 2 * expected, rtol=1e-1)


def test_conjugate_gradients_solve_the_system():
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(8, dtype=torch.float64)
    target = torch.arange(8, dtype=torch.float64)
    found = conjugate_gradient(lambda v: matrix @ v, target, iterations=50, tolerance=1e-24)
    torch.testing.assert_close(matrix @ found, target)


def test_the_step_has_the_kl_that_was_asked_for_and_descends():
    world = World()
    gradient = torch.linspace(-1, 1, 27, dtype=torch.float64)
    for param, part in zip(world.params.values(), gradient.split([12, 15]), strict=True):
        param.grad = part.view_as(param).clone()
    start = world.flat()
    fisher = world.fisher()
    old = World()  # the same weights, kept as they were
    natural_gradient(world.params, world.logits, [world.batch], REGION, ALONE)
    step = world.flat() - start
    direction = torch.linalg.solve(fisher + 0.1 * torch.eye(27, dtype=torch.float64), gradient)
    length = (2 * REGION.max_kl / (direction @ fisher @ direction)) ** 0.5
    torch.testing.assert_close(step, -length * direction, rtol=2e-2, atol=1e-6)
    assert float(old.mean_kl(world.flat())) == pytest.approx(REGION.max_kl, rel=0.1)
    assert float(step @ gradient) < 0
    assert all(param.grad is None for param in world.params.values())


def test_a_large_model_is_refused():
    params = {"a": nn.Parameter(torch.empty(60_000_000, device="meta"))}
    with pytest.raises(ConfigError, match="at most 50,000,000 parameters"):
        natural_gradient(params, lambda _: torch.empty(0), [], REGION, ALONE)
