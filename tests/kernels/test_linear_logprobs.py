"""linear_logprobs: the reference is proved, the fused backends are judged against it."""

from __future__ import annotations

import math

import pytest
import torch
from flowrl_kernels import linear_logprobs
from flowrl_kernels.head import Head, chunks
from head_cases import FUSED, HEADS, Case, Watch, backends_for, make_case, outputs_and_gradients
from numerics import assert_within_budget, max_error, ulp

CHUNK = {"max_logits_bytes": 4096}  # a few rows a chunk: every case crosses chunk borders


def judge(case: Case, dtype: torch.dtype, backend: str | None = None, **options) -> None:
    """Every output and gradient of `backend` (None: of all that take dtype) keeps the budget."""
    plain = outputs_and_gradients(case, dtype, backend="reference", **options)
    truth = outputs_and_gradients(case, torch.float64, backend="reference", **options)
    for judged in [backend] if backend else backends_for(dtype):
        fused = outputs_and_gradients(case, dtype, backend=judged, **{**CHUNK, **options})
        for name, value in fused.items():
            assert_within_budget(value, plain[name], truth[name], f"{judged} {name}")
        assert (fused["logprobs"] <= 0).all()


def test_reference_by_hand():
    hidden = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    result = linear_logprobs(
        hidden, weight, torch.tensor([1, 0]), temperature=2.0, entropy="metric", backend="reference"
    )
    root = math.sqrt(3)  # row 0: p = [1, sqrt 3] / (1 + sqrt 3); row 1: p = [1, 3] / 4
    torch.testing.assert_close(
        result.logprobs,
        torch.tensor([math.log(root / (1 + root)), -math.log(4)], dtype=torch.float64),
    )
    torch.testing.assert_close(
        result.lse, torch.tensor([math.log(1 + root), math.log(4)], dtype=torch.float64)
    )
    assert result.entropy is not None
    assert float(result.entropy[1]) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend):
    case = make_case(7, 11, 3).to(torch.float64)

    def all_outputs(hidden, weight):
        scores = linear_logprobs(
            hidden,
            weight,
            case.targets % 9,
            temperature=0.7,
            vocab_size=9,
            entropy="grad",
            max_logits_bytes=200,
            backend=backend,
        )
        return tuple(x for x in scores if x is not None)

    assert torch.autograd.gradcheck(all_outputs, (case.hidden, case.weight))


@pytest.mark.parametrize("num_rows", [1, 63, 65])
@pytest.mark.parametrize("vocab", [1, 127, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_budget(num_rows, vocab, dtype):
    judge(make_case(num_rows, vocab, size=3), dtype)


@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_temperature_and_padding(temperature, dtype):
    case = make_case(33, 130, size=3)
    case.targets %= 100
    judge(case, dtype, temperature=temperature, vocab_size=100)


@pytest.mark.parametrize("backend", FUSED)
def test_bfloat16_inputs_are_taken_as_exact(backend):
    case = make_case(64, 1000, 512, size=8)
    exact = outputs_and_gradients(case, torch.float64, backend="reference")
    ours = outputs_and_gradients(case, torch.bfloat16, backend=backend)
    assert max_error(ours["logprobs"], exact["logprobs"]) <= 1e-4
    with torch.no_grad():  # negative control: logits rounded to bfloat16 are far outside
        rounded = case.hidden.bfloat16() @ case.weight.bfloat16().T
        counted = case.targets.where(case.targets >= 0, 0)[:, None]
        logprobs = rounded.float().log_softmax(-1).gather(1, counted)[:, 0]
    logprobs = logprobs.where(case.targets >= 0, 0)
    assert max_error(logprobs, exact["logprobs"]) > 1e-3


@pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
def test_extreme_logits(size):
    """Logits from -1e4 to 1e4; all of them equal; p -> 1 on most rows."""
    case = make_case(40, 257, size=size / 3)
    judge(case, torch.float32)
    if size == 0:
        result = linear_logprobs(case.hidden, case.weight, case.targets)
        counted = case.targets >= 0
        assert (
            max_error(result.logprobs[counted], torch.full((40,), -math.log(257))[counted]) < 1e-6
        )


@pytest.mark.parametrize("level", [-1e4, -50.0])
def test_all_logits_negative(level):
    case = make_case(20, 127)
    case.hidden = torch.cat([case.hidden, torch.full((20, 1), level)], 1)
    case.weight = torch.cat([case.weight, torch.ones(127, 1)], 1)
    assert float((case.hidden @ case.weight.T).max()) < -40
    judge(case, torch.float32)


def test_confident_rows_keep_their_small_gradient():
    """1 - p of 1e-6 .. 1e-3 at the target, where p has few digits left."""
    case = make_case(32, 64, masked=0)
    case.hidden = torch.zeros(32, 64)
    case.hidden[torch.arange(32), case.targets] = torch.linspace(11, 18, 32)
    case.weight = torch.eye(64)
    judge(case, torch.float32)


@pytest.mark.parametrize("backend", ["reference", *FUSED])
def test_masked_rows_are_never_read(backend):
    case = make_case(12, 30).to(torch.float32)
    case.targets[:] = -100
    case.targets[4] = 3
    with torch.no_grad():
        case.hidden[5:] = float("nan")
    result = linear_logprobs(
        case.hidden, case.weight, case.targets, entropy="grad", backend=backend
    )
    assert result.entropy is not None
    (result.logprobs.sum() + result.lse.sum() + result.entropy.sum()).backward()
    for x in result:
        assert x is not None
        assert x.nonzero()[:, 0].tolist() == [4]
    assert case.hidden.grad is not None
    assert case.weight.grad is not None
    assert case.hidden.grad.abs().sum(1).nonzero()[:, 0].tolist() == [4]
    assert case.weight.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", *FUSED])
@pytest.mark.parametrize("num_rows", [0, 5])
def test_nothing_counts(backend, num_rows):
    case = make_case(num_rows, 10, masked=1.1).to(torch.float32)
    result = linear_logprobs(case.hidden, case.weight, case.targets, backend=backend)
    result.logprobs.sum().backward()
    assert result.logprobs.tolist() == [0.0] * num_rows
    assert case.weight.grad is not None
    assert not case.weight.grad.any()


@pytest.mark.parametrize("backend", FUSED)
def test_padding_never_leaks(backend):
    """NaN in padded columns changes nothing; counting the padding changes the result (control)."""
    case = make_case(30, 50, size=2)
    case.targets = case.targets.where(case.targets < 40, 1)
    clean = outputs_and_gradients(
        Case(case.hidden, case.weight[:40], case.targets), torch.float32, backend=backend
    )
    poisoned = Case(case.hidden, case.weight.clone(), case.targets)
    poisoned.weight[40:] = float("nan")
    padded = outputs_and_gradients(poisoned, torch.float32, backend=backend, vocab_size=40)
    assert not padded["dweight"][40:].any()
    padded["dweight"] = padded["dweight"][:40]
    for name, value in clean.items():
        assert torch.equal(padded[name], value), name
    counted = outputs_and_gradients(case, torch.float32, backend=backend)
    truth = clean["logprobs"].double()
    with pytest.raises(AssertionError, match="logprobs: error"):
        assert_within_budget(counted["logprobs"], clean["logprobs"], truth, "logprobs")


@pytest.mark.parametrize("backend", FUSED)
def test_budget_sees_a_lost_minus_one(monkeypatch, backend):
    """Negative control: p in the place of p - 1 breaks the budget, and only in the gradients."""

    def without_the_target(self, head, targets, out, local, rows, gradients):
        elsewhere = torch.full_like(targets, head.weight.shape[0])  # as if another rank had it
        original(self, head, elsewhere, out, local, rows, gradients)

    original = HEADS[backend].dlogits_
    case = make_case(33, 130)
    judge(case, torch.float32, backend)
    monkeypatch.setattr(HEADS[backend], "dlogits_", without_the_target)
    with pytest.raises(AssertionError, match="dhidden: error"):
        judge(case, torch.float32, backend)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(name, dtype) for dtype in (torch.float64, torch.float32) for name in backends_for(dtype)],
)
def test_non_contiguous_inputs(backend, dtype):
    case = make_case(33, 90, size=2)
    strided = Case(
        case.hidden.T.contiguous().T,
        case.weight.repeat_interleave(2, 0)[::2],
        case.targets.repeat_interleave(2)[::2],
    )
    assert not strided.hidden.is_contiguous()
    assert not strided.weight.is_contiguous()
    straight = outputs_and_gradients(case, dtype, backend=backend)
    crooked = outputs_and_gradients(strided, dtype, backend=backend)
    for name, value in straight.items():
        assert max_error(crooked[name], value) <= 32 * ulp(float(value.abs().max()), value.dtype)


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "products"),
    [(True, True, 3), (True, False, 2), (False, True, 2)],
)
@pytest.mark.parametrize("backend", FUSED)
def test_frozen_operands_cost_no_product(hidden_grad, weight_grad, products, backend):
    """Backward makes the logits once more, and one product per gradient that is wanted."""
    case = make_case(20, 30)
    case.hidden.requires_grad_(hidden_grad)
    case.weight.requires_grad_(weight_grad)
    loss = linear_logprobs(case.hidden, case.weight, case.targets, backend=backend).logprobs.sum()
    with Watch() as watch:
        loss.backward()
    assert watch.products == products
    assert (case.hidden.grad is not None) == hidden_grad
    assert (case.weight.grad is not None) == weight_grad


def test_no_tensor_of_all_logits():
    case = make_case(256, 500, masked=0)
    largest = {}
    for backend in (*FUSED, "reference"):
        with Watch() as watch:
            outputs_and_gradients(
                case, torch.float32, backend=backend, max_logits_bytes=4 * 500 * 32
            )
        largest[backend] = watch.largest
    for backend in FUSED:
        assert largest[backend] <= 32 * 500
    assert largest["reference"] >= 256 * 500  # negative control: the watch sees such a tensor


@pytest.mark.parametrize("backend", FUSED)
def test_chunks_change_nothing_and_repeats_are_bitwise(backend):
    case = make_case(65, 257, size=2)
    once = outputs_and_gradients(case, torch.float32, backend=backend, **CHUNK)
    again = outputs_and_gradients(case, torch.float32, backend=backend, **CHUNK)
    whole = outputs_and_gradients(case, torch.float32, backend=backend)
    for name, value in once.items():
        assert torch.equal(value, again[name]), name
        assert max_error(whole[name], value) <= 32 * ulp(float(value.abs().max()), value.dtype), (
            name
        )


@pytest.mark.parametrize(("limit", "pieces"), [(12_000, True), (60_000, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_the_vocabulary(monkeypatch, dtype, limit, pieces):
    """In backward: with all rows, or with some of them at a time."""
    monkeypatch.setattr(chunks, "COLUMN_STEP", 32)
    monkeypatch.setattr(chunks, "FEWEST_COLUMNS", 64)
    case = make_case(80, 300, size=3, masked=0.2)
    for backend in FUSED:
        head = Head(case.weight.to(dtype), 300, 1.0, 0, None, entropy=True)
        most, blocks = chunks.column_blocks(head, HEADS[backend](), limit, 64)
        assert (most < 64) == pieces
        assert len(blocks) > 1
    case.targets = case.targets.clamp(max=289)
    judge(case, dtype, max_logits_bytes=limit, temperature=0.7, vocab_size=290)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_contiguous(dtype):
    case = make_case(33, 4096)
    case.weight = case.weight.T.contiguous().T
    assert not case.weight.to(dtype).is_contiguous()
    judge(case, dtype)


def test_a_weights_gradient_needs_no_float32_sum():
    """Of a vocabulary of several blocks. Control: in one block there is such a sum."""
    case = make_case(32, 8 * chunks.FEWEST_COLUMNS, masked=0).to(torch.bfloat16)
    largest = {}
    for limit in (4 * 32 * chunks.FEWEST_COLUMNS, 1 << 30):
        for backend in backends_for(torch.bfloat16):
            with Watch() as watch:
                outputs_and_gradients(case, torch.bfloat16, backend=backend, max_logits_bytes=limit)
            largest[backend, limit] = watch.numels[torch.float32]
    for (backend, limit), numel in largest.items():
        if limit < 1 << 30:
            assert numel < case.weight.numel() / 2, backend
    assert largest["torch", 1 << 30] >= case.weight.numel()


@pytest.mark.parametrize("backend", FUSED)
def test_autocast_does_not_round_the_logits(backend):
    case = make_case(30, 100, size=4)
    straight = outputs_and_gradients(case, torch.float32, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = outputs_and_gradients(case, torch.float32, backend=backend)
        control = (case.hidden @ case.weight.T).dtype
    assert control == torch.bfloat16
    for name, value in straight.items():
        assert torch.equal(cast[name], value), name


def test_metric_entropy_is_detached():
    case = make_case(9, 20).to(torch.float32)
    for backend in (*FUSED, "reference"):
        scores = linear_logprobs(
            case.hidden, case.weight, case.targets, entropy="metric", backend=backend
        )
        assert scores.entropy is not None
        assert not scores.entropy.requires_grad
        assert scores.logprobs.requires_grad
        assert (
            linear_logprobs(case.hidden, case.weight, case.targets, backend=backend).entropy is None
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"entropy": "yes"}, "entropy must be"),
        ({"vocab_start": 3}, "vocab_start must be 0"),
        ({"vocab_size": 99}, "vocab_size must be in"),
        ({"vocab_size": 2}, r"targets must be -100 or in \[0, 2\)"),
        ({"max_logits_bytes": 0}, "max_logits_bytes must be positive"),
        ({"precision": "fp8"}, "no backend of linear_logprobs can run.*FP8"),
        ({"precision": "fp8", "backend": "torch"}, "'torch' has no FP8 product"),
        ({"precision": "int4"}, "precision must be"),
        ({"weight": torch.ones(20, 3)}, "hidden must be"),
        ({"weight": torch.ones(20, 16).half()}, "must share a dtype"),
        ({"targets": torch.zeros(9)}, "targets must be int64"),
    ],
)
def test_bad_arguments(change, message):
    case = make_case(9, 20)
    arguments = {"hidden": case.hidden, "weight": case.weight, "targets": case.targets}
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**{**arguments, **change})
