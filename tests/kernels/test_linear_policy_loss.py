"""linear_policy_loss: equal to linear_logprobs followed by the objective, in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flowrl_kernels import PolicyLoss, Rows, linear_logprobs, linear_policy_loss
from head_cases import FUSED, HEADS, Case, Watch, backends_for, make_case
from mixed_objective import OFFSETS, N, T, V, flow, inputs_for
from numerics import assert_within_budget
from torch import Tensor

CU_SEQLENS = torch.tensor(OFFSETS, dtype=torch.int32)


def evaluate(
    case: Case, dtype: torch.dtype, *, entropy: Any = "grad", **options: Any
) -> tuple[PolicyLoss, dict[str, Tensor]]:
    """The result, and every output and gradient by name."""
    case = case.to(dtype)
    sequence, token = inputs_for(torch.float64 if dtype == torch.float64 else torch.float32)
    result = linear_policy_loss(
        case.hidden,
        case.weight,
        case.targets,
        CU_SEQLENS,
        flow,
        sequence_inputs=sequence,
        token_inputs=token,
        entropy=entropy,
        **options,
    )
    (result.loss * 3).backward()
    tensors = {
        "loss": result.loss.detach(),
        "logprobs": result.logprobs,
        "residual": result.metrics["residual"],
        "dhidden": case.hidden.grad,
        "dweight": case.weight.grad,
        "dlog_z": sequence["log_z"].grad,
        "dvalues": token["values"].grad,
    }
    if result.entropy is not None:
        tensors["entropy"] = result.entropy
    assert all(tensor is not None for tensor in tensors.values())
    return result, tensors  # type: ignore[return-value]


# Rows a chunk: all; several sequences; less than the longest sequence (25 rows); one.
@pytest.mark.parametrize("rows", [100, 30, 10, 1])
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (dtype, name)
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
        for name in backends_for(dtype)
    ],
)
def test_error_budget(rows, dtype, backend):
    case = make_case(T, V, size=2)
    options = {"temperature": 0.8, "vocab_size": V - 7}
    case.targets = case.targets.where(case.targets < V - 7, 0)
    element_bytes = 8 if dtype == torch.float64 else 4
    limit = (V - 7) * element_bytes * rows
    result, fused = evaluate(case, dtype, backend=backend, max_logits_bytes=limit, **options)
    _, plain = evaluate(case, dtype, backend="reference", **options)
    _, truth = evaluate(case, torch.float64, backend="reference", **options)
    for name, value in fused.items():
        assert_within_budget(value, plain[name], truth[name], name)
    assert result.metrics["length"].tolist() == CU_SEQLENS.diff().tolist()


def test_equals_linear_logprobs_and_objective():
    case = make_case(T, V, size=2).to(torch.float64)
    sequence, token = inputs_for(torch.float64)
    scores = linear_logprobs(case.hidden, case.weight, case.targets, entropy="grad")
    rows = Rows(slice(0, N), slice(0, T), CU_SEQLENS, {**sequence, **token})
    loss, metrics = flow(scores.logprobs, scores.entropy, rows)
    leaves = [case.hidden, case.weight, sequence["log_z"], token["values"]]
    expected = torch.autograd.grad(3 * loss, leaves)
    _, tensors = evaluate(case, torch.float64, backend="torch", max_logits_bytes=V * 8 * 20)
    torch.testing.assert_close(tensors["residual"], metrics["residual"])
    for name, gradient in zip(("dhidden", "dweight", "dlog_z", "dvalues"), expected, strict=True):
        torch.testing.assert_close(tensors[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", FUSED)
def test_budget_sees_dlogits_that_are_not_of_the_objective(monkeypatch, backend):
    """Negative control: chunks whose per-token gradients are moved by one row."""
    original = HEADS[backend].dlogits_

    def shifted(self, head, targets, out, local, rows, gradients):
        moved = type(gradients)(gradients.logprobs.roll(1), gradients.lse, gradients.entropy)
        original(self, head, targets, out, local, rows, moved)

    monkeypatch.setattr(HEADS[backend], "dlogits_", shifted)
    with pytest.raises(AssertionError, match="dhidden: error"):
        test_error_budget(30, torch.float32, backend)


@pytest.mark.parametrize("backend", FUSED)
def test_objective_sees_whole_sequences_in_order(backend):
    seen = []

    def watching(logprobs, entropy, rows):
        seen.append((rows.sequences, rows.tokens, rows.cu_seqlens.tolist()))
        assert rows.inputs["rewards"].shape == (rows.sequences.stop - rows.sequences.start,)
        assert logprobs.shape == rows.inputs["ref"].shape == (rows.cu_seqlens[-1],)
        return flow(logprobs, entropy, rows)

    case = make_case(T, V, masked=0)
    sequence, token = inputs_for(torch.float32)
    linear_policy_loss(
        case.hidden,
        case.weight,
        case.targets,
        CU_SEQLENS,
        watching,
        sequence_inputs=sequence,
        token_inputs=token,
        max_logits_bytes=V * 4 * 20,
        backend=backend,
    )
    assert seen == [
        (slice(0, 2), slice(0, 5), [0, 5, 5]),
        (slice(2, 3), slice(5, 30), [0, 25]),
        (slice(3, 5), slice(30, 48), [0, 1, 18]),
        (slice(5, 6), slice(48, 65), [0, 17]),
    ]


def call(case: Case, objective=flow, **options) -> PolicyLoss:
    sequence, token = inputs_for(torch.float32)
    defaults = {"sequence_inputs": sequence, "token_inputs": token, "backend": "torch"}
    return linear_policy_loss(
        case.hidden, case.weight, case.targets, CU_SEQLENS, objective, **{**defaults, **options}
    )


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "products"),
    [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)],
)
def test_frozen_operands_cost_no_product(hidden_grad, weight_grad, products, backend):
    case = make_case(T, V)
    case.hidden.requires_grad_(hidden_grad)
    case.weight.requires_grad_(weight_grad)
    with Watch() as watch:
        call(case, backend=backend).loss.backward()  # log_z still has its gradient
    assert watch.products == products
    assert (case.hidden.grad is not None) == hidden_grad
    assert (case.weight.grad is not None) == weight_grad


@pytest.mark.parametrize("backend", FUSED)
def test_a_long_sequence_alone_is_computed_twice(backend):
    """Rows of 10: only sequences longer than that (25, 17 and 17 of the 65 rows) are made twice."""
    case = make_case(T, V, masked=0).to(torch.float32)
    with Watch() as watch:
        call(case, max_logits_bytes=V * 4 * 10)
    pieces = 1 + 3 + 1 + 2 + 2  # [5, 0], [25], [1], [17], [17]
    assert watch.products == 3 * pieces + (3 + 2 + 2)


def test_without_gradients_only_the_forward_product_is_made():
    case = make_case(T, V).to(torch.float32)
    with torch.no_grad(), Watch() as watch:
        result = call(case, main_grad=torch.zeros(V, 16))
    assert watch.products == 1
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, call(case).loss.detach())


def test_no_tensor_of_all_logits():
    case = make_case(256, 500, masked=0)
    largest = {}
    for backend in (*FUSED, "reference"):
        fresh = case.to(torch.float32)
        with Watch() as watch:
            linear_policy_loss(
                fresh.hidden,
                fresh.weight,
                fresh.targets,
                torch.tensor([0, 100, 256]),
                lambda logprobs, entropy, rows: (logprobs.sin().sum(), {}),
                max_logits_bytes=4 * 500 * 32,
                backend=backend,
            ).loss.backward()
        largest[backend] = watch.largest
    for backend in FUSED:
        assert largest[backend] <= 32 * 500
    assert largest["reference"] >= 256 * 500  # negative control


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_takes_the_weight_gradient(dtype, backend):
    case = make_case(T, V).to(dtype)
    main_grad = torch.full((V, 16), 2.0)
    call(case, main_grad=main_grad, grad_scale=4.0, backend=backend).loss.backward()
    assert case.weight.grad is None
    plain = case.to(dtype)
    call(plain, grad_scale=4.0, backend=backend).loss.backward()
    assert plain.weight.grad is not None
    torch.testing.assert_close((main_grad - 2).to(dtype), plain.weight.grad)
    torch.testing.assert_close(case.hidden.grad, plain.hidden.grad)
    with pytest.raises(ValueError, match=r"incoming gradient of 1, got 2\.0; pass grad_scale"):
        (call(case, main_grad=main_grad, backend=backend).loss * 2).backward()


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_grad_scale_scales_gradients_and_not_the_loss(backend):
    cases = [make_case(T, V).to(torch.float32) for _ in range(2)]
    once = call(cases[0], backend=backend)
    scaled = call(cases[1], backend=backend, grad_scale=8.0)
    once.loss.backward()
    scaled.loss.backward()
    assert torch.equal(once.loss, scaled.loss)
    assert cases[0].weight.grad is not None
    torch.testing.assert_close(cases[1].weight.grad, 8 * cases[0].weight.grad)


def test_gradient_reaches_the_graph_behind_an_input():
    case = make_case(T, V)
    head = torch.nn.Linear(4, 1)
    features = torch.randn(N, 4, generator=torch.Generator().manual_seed(1))
    sequence, token = inputs_for(torch.float32)
    grads = {}
    for backend in (*FUSED, "reference"):
        head.zero_grad()
        log_z = head(features)[:, 0]
        sequence_inputs = {**sequence, "log_z": log_z}
        call(
            case, sequence_inputs=sequence_inputs, token_inputs=token, backend=backend
        ).loss.backward()
        assert head.weight.grad is not None
        grads[backend] = head.weight.grad.clone()
    for backend in FUSED:
        torch.testing.assert_close(grads[backend], grads["reference"])
    assert grads["reference"].abs().max() > 0.1


def test_entropy_metric_has_no_gradient():
    case = make_case(T, V, size=2)
    _, metric = evaluate(case, torch.float64, entropy="metric", backend="torch")
    _, plain = evaluate(case, torch.float64, entropy="metric", backend="reference")
    _, grad = evaluate(case, torch.float64, entropy="grad", backend="torch")
    torch.testing.assert_close(metric["dhidden"], plain["dhidden"])
    assert not torch.allclose(metric["dhidden"], grad["dhidden"])
    torch.testing.assert_close(metric["entropy"], grad["entropy"])


@pytest.mark.parametrize("backend", FUSED)
def test_repeat_is_bitwise(backend):
    case = make_case(T, V)
    options = {"backend": backend, "max_logits_bytes": V * 4 * 10}
    _, once = evaluate(case, torch.float32, **options)
    _, again = evaluate(case, torch.float32, **options)
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_empty_batch(backend, offsets, dtype):
    case = make_case(0, 20).to(dtype)
    result = linear_policy_loss(
        case.hidden,
        case.weight,
        case.targets,
        torch.tensor(offsets),
        lambda logprobs, entropy, rows: (logprobs.sum(), {"n": rows.cu_seqlens.diff()}),
        backend=backend,
    )
    result.loss.backward()
    assert float(result.loss.detach()) == 0
    assert result.metrics["n"].tolist() == [0] * (len(offsets) - 1)
    assert case.weight.grad is not None
    assert case.weight.grad.dtype == dtype
    assert not case.weight.grad.any()


@pytest.mark.parametrize("backend", FUSED)
def test_chunks_of_the_default_size_take_every_dtype(backend):
    case = make_case(T, V, size=2)
    _, truth = evaluate(case, torch.float64, backend="reference")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _, fused = evaluate(case, dtype, backend=backend)
        _, plain = evaluate(case, dtype, backend="reference")
        for name, value in fused.items():
            assert_within_budget(value, plain[name], truth[name], f"{name} of {dtype}")


def test_second_backward_is_refused():
    case = make_case(T, V).to(torch.float32)
    loss = call(case).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gives its gradients to one backward"):
        loss.backward()


def fickle(logprobs, entropy, rows):
    """An objective that reports another metric in its second call."""
    name = "a" if rows.sequences.start == 0 else "b"
    return logprobs.sum(), {name: rows.cu_seqlens.diff()}


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (lambda lp, h, rows: (lp, {}), {}, "the objective's loss must have shape"),
        (lambda lp, h, rows: (lp.sum(), {"m": lp}), {}, r"metrics\['m'\] must have shape"),
        (fickle, {"max_logits_bytes": V * 4 * 20}, "same metrics for every part"),
        (flow, {"sequence_inputs": {"log_z": torch.zeros(N + 1)}}, r"sequence_inputs\['log_z'\]"),
        (flow, {"token_inputs": {"ref": torch.zeros(3)}}, r"token_inputs\['ref'\] must have shape"),
        (flow, {"sequence_inputs": {"ref": torch.zeros(N)}}, "per sequence or per token"),
        (flow, {"main_grad": torch.zeros(V, 16)}, "main_grad needs a weight that requires grad"),
        (flow, {"main_grad": torch.zeros(V, 16).double()}, "main_grad must be contiguous"),
    ],
)  # fmt: skip
def test_bad_arguments(objective, options, message):
    with pytest.raises(ValueError, match=message):
        call(make_case(T, V, masked=0), objective, **options)


def test_bad_cu_seqlens():
    case = make_case(5, 10)
    for offsets in ([0, 4], [1, 5], [0, 4, 3, 5]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 5 rows"):
            linear_policy_loss(case.hidden, case.weight, case.targets, torch.tensor(offsets), flow)
