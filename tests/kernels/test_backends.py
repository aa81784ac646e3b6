"""The registry: what can run, what is picked, and what a refusal says."""

from __future__ import annotations

import pytest
import torch
from flowrl_kernels import backends, linear_logprobs
from flowrl_kernels.backends import Call, register, resolve

CPU = Call(torch.device("cpu"), torch.float32)


def test_available_here():
    assert {"torch", "reference"} <= set(backends.available("cpu"))
    assert set(backends.available("cpu")) <= set(backends.available())
    if not torch.cuda.is_available():
        assert backends.available("cuda") == []


@pytest.fixture
def native(monkeypatch):
    """A backend of linear_logprobs, which takes float32 only, in the place of the compiled one;
    gone after the test."""
    registry = {name: dict(entries) for name, entries in backends._registry.items()}
    del registry["linear_logprobs"]["native"]
    monkeypatch.setattr(backends, "_registry", registry)

    def only_float32(call: Call) -> str | None:
        return None if call.dtype == torch.float32 else f"takes float32, not {call.dtype}"

    @register("linear_logprobs", "native", only_float32)
    def run(hidden, weight, targets, **options):
        return "native"


def test_the_best_that_can_run_is_picked(native):
    case = (torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4]))
    assert linear_logprobs(*case) == "native"
    assert linear_logprobs(*case, backend="torch") != "native"
    doubles = (case[0].double(), case[1].double(), case[2])
    assert linear_logprobs(*doubles).logprobs.dtype == torch.float64
    assert backends.available("cpu")[0] == "native"


def test_a_named_backend_that_cannot_run_says_why_and_what_can(native):
    doubles = (torch.zeros(2, 3).double(), torch.zeros(5, 3).double(), torch.tensor([0, 4]))
    with pytest.raises(
        ValueError, match=r"'native' takes float32, not torch\.float64; use.*'torch'"
    ):
        linear_logprobs(*doubles, backend="native")
    with pytest.raises(ValueError, match="'fast' must be one of native, torch"):
        resolve("linear_logprobs", "fast", CPU)


def test_a_backend_registers_once(native):
    with pytest.raises(ValueError, match="got a second 'native'"):
        register("linear_logprobs", "native", lambda call: None)(print)
    with pytest.raises(ValueError, match="backend must be one of"):
        register("linear_logprobs", "numpy", lambda call: None)


def test_the_reference_takes_no_group():
    call = Call(CPU.device, CPU.dtype, frozenset({"group"}))
    with pytest.raises(ValueError, match="takes no group; use backend='(native|torch)'"):
        resolve("linear_policy_loss", "reference", call)
