"""Liger's layers against the plain ones, in Triton's interpreter or on a GPU: each function by the
error budget, then both backends whole, on the packed batch and the limits of the parity tests.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_cases as cases
import pytest
import torch
from flowrl_kernels.triton_support import interpreting
from megatron_worker import gradients as whole_gradients
from numerics import assert_within_budget
from torch import Tensor
from transformers.models.qwen3 import modeling_qwen3

from flowrl import parallel
from flowrl.models import hf_backend, liger_layers, megatron_layers
from flowrl.models.hf_backend import HFBackend
from flowrl.models.hf_files import load_causal_lm
from flowrl.models.megatron_backend import MegatronBackend
from flowrl.models.megatron_cpu_shim import silence_megatron
from flowrl.parallel import Parallel
from flowrl.schema import ConfigError

if not (interpreting() or torch.cuda.is_available()):
    raise RuntimeError("the tests of Liger's layers need a GPU or TRITON_INTERPRET=1")
if interpreting():
    from interpreter import interpret_liger

    interpret_liger()

DEVICE = torch.device("cpu" if interpreting() else "cuda")
ALONE = Parallel(0, 1, DEVICE)
NEEDS = cases.objective().needs
LIGER = {"liger": True}
EPS = 1e-6
LIMIT = 5e-5


@pytest.fixture(autouse=True)
def _one_process():
    silence_megatron()
    yield
    parallel.stop()


# --- each function


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt())


def plain_rotation(q: Tensor, k: Tensor, angles: Tensor) -> Tensor:
    return torch.cat(modeling_qwen3.apply_rotary_pos_emb(q, k, angles.cos(), angles.sin()), 1)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def liger_rotation(q: Tensor, k: Tensor, angles: Tensor) -> Tensor:
    # The kernel writes over its input, which is a leaf here.
    q, k = 1 * q, 1 * k
    return torch.cat(liger_layers.rotate(q, k, angles.cos(), angles.sin()), 1)


def in_one(gate: Tensor, up: Tensor) -> Tensor:
    return liger_layers.swiglu_of_both(torch.cat([gate, up], -1))


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "norm": (lambda x, w: liger_layers.rms_norm(x, w, EPS), plain_norm, [(2, 5, 24), (24,)]),
    "rotation": (liger_rotation, plain_rotation, [(1, 6, 7, 16), (1, 2, 7, 16)]),
    "swiglu": (
        # Backward writes over both.
        lambda gate, up: liger_layers.swiglu(1 * gate, 1 * up),
        plain_swiglu,
        [(2, 5, 21), (2, 5, 21)],
    ),
    "swiglu of both": (in_one, plain_swiglu, [(2, 5, 21), (2, 5, 21)]),
}


def output_and_gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], constants: list[Tensor], weights: Tensor
) -> list[Tensor]:
    dtype = inputs[0].dtype
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves, *(c.to(dtype) for c in constants))
    (out * weights.to(dtype)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_keeps_the_error_budget(name):
    liger, plain, shapes = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    constants = []
    if name == "rotation":
        half = 3 * torch.randn(1, 7, 8, generator=generator)
        constants = [torch.cat([half, half], -1).to(DEVICE)]
    exact = [x.double() for x in inputs]
    weights = torch.randn(plain(*exact, *constants).shape, generator=generator).to(DEVICE)
    found = output_and_gradients(liger, inputs, constants, weights)
    expected = output_and_gradients(plain, inputs, constants, weights)
    truth = output_and_gradients(plain, exact, constants, weights)
    for index, tensor in enumerate(found):
        assert_within_budget(tensor, expected[index], truth[index], f"{name} {index}")


# --- both backends


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in cases.CONFIGS:
        cases.make_model(folder / family, family, tied=False, layers=2)
    return folder


def score_and_differentiate(
    backend: Any, gradients: Callable[[Any], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Log-probs of policy and reference, loss and gradients of two packed sequences."""
    part = cases.microbatches(cases.batch())[0]
    found = scores(backend)
    found["reference"] = backend.logprobs([part.packed], reference=True).logprobs
    loss = backend.forward_backward([part], cases.objective()).loss
    return found | {"loss": torch.tensor(loss)} | gradients(backend)


def scores(backend: Any) -> dict[str, Tensor]:
    return {"policy": backend.logprobs([cases.microbatches(cases.batch())[0].packed]).logprobs}


def hf_gradients(backend: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in backend.params.items() if p.grad is not None}


def hf_backend_of(directory: Path, **model: Any) -> HFBackend:
    config = cases.config_of({}, "hf", model={"backend": "hf", **model})
    return HFBackend(config, directory, NEEDS, ALONE)


def megatron_backend_of(directory: Path, layout: dict[str, Any]) -> MegatronBackend:
    config = cases.config_of(layout, "megatron", model={"backend": "megatron", **LIGER})
    return MegatronBackend(config, directory, NEEDS, ALONE)


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference: of log-probs as it is, of all else relative to the largest entry."""
    large = max(float(x.abs().max()) for n, x in expected.items() if n.endswith("weight"))
    errors = []
    for name, value in found.items():
        error = float((value - expected[name]).abs().max())
        if name not in ("policy", "reference"):  # a bias of the keys has rounding noise only
            error /= float(expected[name].abs().max()) + 1e-3 * large
        errors.append(error)
    return max(errors)


@pytest.fixture(scope="module")
def plain(models):
    return {
        family: score_and_differentiate(hf_backend_of(models / family), hf_gradients)
        for family in cases.CONFIGS
    }


@pytest.mark.parametrize(
    ("family", "recompute"),
    [
        ("qwen2", False),
        ("llama", False),
        ("qwen3", True),
        pytest.param("qwen3", False, marks=pytest.mark.matrix),
    ],
)
def test_the_hugging_face_backend_computes_the_same(models, plain, family, recompute):
    backend = hf_backend_of(models / family, gradient_checkpointing=recompute, **LIGER)
    found = score_and_differentiate(backend, hf_gradients)
    assert found.keys() == plain[family].keys()
    assert worst(found, plain[family]) < LIMIT


@pytest.mark.parametrize(
    ("family", "recompute"),
    [
        ("qwen3", "selective"),
        ("qwen2", "full"),
        pytest.param("qwen2", "selective", marks=pytest.mark.matrix),
        pytest.param("qwen3", "full", marks=pytest.mark.matrix),
        pytest.param("llama", "none", marks=pytest.mark.matrix),
    ],
)
def test_the_megatron_backend_computes_the_same(models, plain, family, recompute):
    backend = megatron_backend_of(models / family, {"recompute": recompute})
    found = score_and_differentiate(backend, whole_gradients)
    assert found.keys() >= {n for n in plain[family] if not n.startswith("log_z.")}
    assert worst(found, plain[family]) < LIMIT


BROKEN: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, w, eps: 1.1 * w * torch.nn.functional.rms_norm(x, x.shape[-1:]),
    "rotate": lambda q, k, cos, sin: (q, k),
    "swiglu": lambda gate, up: plain_swiglu(up, gate),
    "swiglu_of_both": lambda both: plain_swiglu(*both.chunk(2, -1)[::-1]),
}


@pytest.mark.parametrize("name", ["rms_norm", "rotate", "swiglu"])
def test_the_hugging_face_backend_refuses_a_wrong_layer(models, plain, name, monkeypatch):
    """By its check at the start; and the comparison above would have seen it."""
    monkeypatch.setattr(liger_layers, name, BROKEN[name])
    with pytest.raises(ConfigError, match="does not give hidden @ weight"):
        hf_backend_of(models / "qwen3", **LIGER)
    monkeypatch.setattr(hf_backend, "check_forward", lambda *_: None)
    assert worst(scores(hf_backend_of(models / "qwen3", **LIGER)), plain["qwen3"]) > 1e-2


@pytest.mark.parametrize("name", ["rms_norm", "rotate", "swiglu_of_both"])
def test_the_megatron_comparison_sees_a_wrong_layer(models, plain, name, monkeypatch):
    monkeypatch.setattr(megatron_layers, name, BROKEN[name])
    assert worst(scores(megatron_backend_of(models / "qwen3", {})), plain["qwen3"]) > 1e-2


def test_another_model_of_the_class_stays_as_it_is(models, monkeypatch):
    """The sampler's: with a wrong rotation in one, the other still computes what it did."""
    one, other = (load_causal_lm(models / "qwen3", torch.float32, DEVICE) for _ in range(2))
    ids = torch.arange(3, 12, device=DEVICE)[None]
    before = other(ids).logits
    monkeypatch.setattr(liger_layers, "rotate", BROKEN["rotate"])
    liger_layers.use_liger(one)
    assert not torch.allclose(one(ids).logits, before, atol=1e-2)
    assert torch.equal(other(ids).logits, before)
