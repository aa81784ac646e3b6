"""linear_logprobs on Triton: small odd shapes, extremes, repeatability, and broken on purpose."""

from __future__ import annotations

import math

import pytest
import torch
from flowrl_kernels import linear_logprobs
from flowrl_kernels.head import triton_head
from flowrl_kernels.head.triton_head import Tiles, head_dlogits_, head_statistics
from flowrl_kernels.linear_logprobs import torch_chunked
from flowrl_kernels.triton_support import interpreting
from head_cases import Case, Watch, combine, outputs_and_gradients
from numerics import max_error, ulp
from torch import Tensor
from triton_cases import DEVICE, case_here, exact_products, judge, nan_in_new_memory

__all__ = ["nan_in_new_memory"]
interpreted = pytest.mark.skipif(DEVICE.type == "cuda", reason="counts the interpreter's tiles")


@pytest.mark.parametrize("num_rows", [1, 63, 65])
@pytest.mark.parametrize("vocab", [1, 127, 129, 257])
@pytest.mark.parametrize("dim", [16, 19], ids=["descriptors", "pointers"])
def test_error_budget(num_rows, vocab, dim):
    judge(case_here(num_rows, vocab, dim, size=3), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [24, 33], ids=["descriptors", "pointers"])
def test_low_precision_operands(dtype, dim):
    judge(case_here(33, 130, dim, size=3), dtype)


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_and_options(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    padding, vocab = draw(0, 70), draw(1, 200)
    case = case_here(draw(1, 90), vocab + padding, draw(1, 70), seed=seed, size=draw(1, 4))
    case.targets = case.targets.where(case.targets < vocab, 0)
    dtype = (torch.float32, torch.float16, torch.bfloat16)[seed % 3]
    rows = draw(1, 100) * (vocab + padding) * 4
    judge(case, dtype, vocab_size=vocab, temperature=draw(4, 20) / 10, max_logits_bytes=rows)


def test_many_rows():
    judge(case_here(1025, 129, size=2), torch.float32, max_logits_bytes=129 * 4 * 400)


@pytest.mark.parametrize("vocab", [1000, 50257])
def test_large_vocabulary(monkeypatch, vocab):
    if DEVICE.type == "cpu":
        wide = Tiles(16, 1024, 16, 2, 4, 1)
        monkeypatch.setattr(triton_head, "tiles_for", lambda *_: wide)
    judge(case_here(17, vocab, size=3), torch.float32)


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_temperature_and_padding(temperature):
    case = case_here(33, 130, size=3)
    case.targets = case.targets.where(case.targets < 100, 7)
    judge(case, torch.float32, temperature=temperature, vocab_size=100)


@pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
def test_extreme_logits(size):
    case = case_here(40, 257, size=size / 3)
    case.hidden[3] = 0  # entropies are not all below 1e-18
    judge(case, torch.float32)


@pytest.mark.parametrize("level", [-1e4, -50.0])
def test_all_logits_negative(level):
    case = exact_products(case_here(20, 127))
    case.hidden = torch.cat([case.hidden, torch.full((20, 1), level, device=DEVICE)], 1)
    case.weight = torch.cat([case.weight, torch.ones(127, 1, device=DEVICE)], 1)
    judge(case, torch.float32)


def confident_case() -> Case:
    """1 - p of 1e-6 .. 1e-3 at the target, where p has few digits left."""
    case = case_here(32, 64, masked=0)
    case.hidden = torch.zeros(32, 64, device=DEVICE)
    case.hidden[torch.arange(32), case.targets] = torch.linspace(11, 18, 32, device=DEVICE)
    case.weight = torch.eye(64, device=DEVICE)
    return case


def test_confident_rows_keep_their_small_gradient():
    judge_confident_rows()


def judge_confident_rows() -> None:
    """Log-prob and entropy hold the logarithm of a float32 sum just above 1: some ulp of 1."""
    case = confident_case()
    judge(case, torch.float32, but=("logprobs", "entropy"))
    ours, truth = (
        linear_logprobs(c.hidden, c.weight, c.targets, entropy="metric")
        for c in (case, case.to(torch.float64))
    )
    assert max_error(ours.logprobs, truth.logprobs) <= 8 * ulp(1.0, torch.float32)
    assert ours.entropy is not None
    assert truth.entropy is not None
    assert max_error(ours.entropy, truth.entropy) <= 8 * ulp(1.0, torch.float32)


@pytest.mark.parametrize("num_rows", [0, 5])
def test_nothing_counts(num_rows):
    case = case_here(num_rows, 10, masked=1.1).to(torch.float32)
    result = linear_logprobs(case.hidden, case.weight, case.targets, backend="triton")
    result.logprobs.sum().backward()
    assert result.logprobs.tolist() == [0.0] * num_rows
    assert case.weight.grad is not None
    assert not case.weight.grad.any()


def test_masked_rows_are_never_read():
    case = case_here(40, 70).to(torch.float32)
    with torch.no_grad():
        case.hidden[case.targets < 0] = float("nan")
    result = linear_logprobs(
        case.hidden, case.weight, case.targets, entropy="grad", backend="triton"
    )
    combine({"logprobs": result.logprobs, "lse": result.lse}).backward()
    assert case.hidden.grad is not None
    assert case.weight.grad is not None
    assert case.weight.grad.isfinite().all()
    assert not case.hidden.grad[case.targets < 0].any()
    assert not result.logprobs[case.targets < 0].any()


def test_padding_never_leaks():
    case = case_here(30, 50, size=2)
    case.targets = case.targets.where(case.targets < 40, 1)
    clean = outputs_and_gradients(
        Case(case.hidden, case.weight[:40], case.targets), torch.float32, backend="triton"
    )
    case.weight = case.weight.clone()
    case.weight[40:] = float("nan")
    padded = outputs_and_gradients(case, torch.float32, backend="triton", vocab_size=40)
    assert not padded["dweight"][40:].any()
    padded["dweight"] = padded["dweight"][:40]
    for name, value in clean.items():
        assert torch.equal(padded[name], value), name


def test_budget_sees_padding_that_counts(monkeypatch):
    """Negative control: the padded-vocabulary mask taken away."""
    case = case_here(30, 50, size=2)
    case.targets = case.targets.where(case.targets < 40, 1)
    judge(case, torch.float32, vocab_size=40)
    monkeypatch.setattr(torch_chunked, "valid_columns", lambda weight, *_: weight.shape[0])
    with pytest.raises(AssertionError, match="logprobs: error"):
        judge(case, torch.float32, vocab_size=40)


def change_dlogits(monkeypatch, **changes) -> None:
    """The kernel gets changed arguments: changes[name](old value)."""
    original = triton_head.head_dlogits_
    names = ("out", "tile_max", "row_max", "log_sum", "factor", "slope", "at_target", "column")

    def changed(*arguments):
        by_name = dict(zip(names, arguments, strict=False))
        rest = arguments[len(names) :]
        original(*(changes.get(n, lambda x: x)(x) for n, x in by_name.items()), *rest)

    monkeypatch.setattr(triton_head, "head_dlogits_", changed)


def test_budget_sees_a_lost_minus_one(monkeypatch):
    """Negative controls: p in the place of p - 1, and p - 1 from a p rounded to bfloat16."""
    change_dlogits(monkeypatch, column=lambda column: torch.full_like(column, -1))
    with pytest.raises(AssertionError, match="dhidden: error"):
        judge(case_here(33, 130), torch.float32)
    monkeypatch.undo()
    change_dlogits(monkeypatch, at_target=lambda x: ((1 + x).bfloat16() - 1).float())
    with pytest.raises(AssertionError, match="dhidden: error"):
        judge_confident_rows()


def test_budget_sees_a_wrong_tile_maximum(monkeypatch):
    """Negative control: E taken as if it were relative to the row's maximum."""
    change_dlogits(monkeypatch, tile_max=lambda x: x.amax(0, keepdim=True).expand_as(x).clone())
    with pytest.raises(AssertionError, match="dhidden: error"):
        judge(case_here(33, 300, size=3), torch.float32)


def logprobs_of(case: Case) -> Tensor:
    with torch.no_grad():
        scores = linear_logprobs(
            case.hidden, case.weight, case.targets, entropy="metric", backend="triton"
        )
    assert scores.entropy is not None
    return torch.stack([scores.logprobs, scores.lse, scores.entropy])


def test_repeats_are_bitwise():
    case = case_here(65, 1025, size=2)
    options = {"backend": "triton", "max_logits_bytes": 1025 * 4 * 30}
    once = outputs_and_gradients(case, torch.float32, **options)
    again = outputs_and_gradients(case, torch.float32, **options)
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


def test_bitwise_repeats_see_another_merge_order(monkeypatch):
    """Negative control: tiles merged in an order that differs from call to call."""
    case = case_here(65, 1025, size=2)
    if DEVICE.type == "cuda":
        case = case_here(300, 40_000, size=2)
    original, generator = triton_head.merge, torch.Generator().manual_seed(0)

    def shuffled(tile_max, partial_sums, target):
        order = torch.randperm(tile_max.shape[0], generator=generator).to(tile_max.device)
        return original(tile_max[order], partial_sums[:, order].contiguous(), target)

    straight = logprobs_of(case)
    assert torch.equal(straight, logprobs_of(case))
    monkeypatch.setattr(triton_head, "merge", shuffled)
    torch.testing.assert_close(logprobs_of(case), straight, rtol=1e-5, atol=1e-5)
    assert not torch.equal(logprobs_of(case), logprobs_of(case))


def test_a_row_does_not_depend_on_the_others():
    case = case_here(80, 300, size=2, masked=0)
    if interpreting():
        case = exact_products(case)
    together = logprobs_of(case)
    for rows in (slice(3, 4), slice(40, 77), slice(0, 80, 7)):
        part = Case(case.hidden[rows], case.weight, case.targets[rows])
        assert torch.equal(logprobs_of(part), together[:, rows])
    alone = Case(case.hidden.roll(1, 0), case.weight, case.targets)  # control: other rows differ
    assert not torch.equal(logprobs_of(alone), together)


def test_both_ways_to_load_agree(monkeypatch):
    case = case_here(65, 130, 32, size=2)
    descriptors = outputs_and_gradients(case, torch.float32, backend="triton")
    monkeypatch.setattr(triton_head, "allows_tma", lambda _: False)
    pointers = outputs_and_gradients(case, torch.float32, backend="triton")
    for name, value in descriptors.items():
        assert torch.equal(pointers[name], value), name


def test_non_contiguous_inputs():
    case = case_here(33, 90, size=2)
    strided = Case(
        case.hidden.T.contiguous().T,
        case.weight.repeat_interleave(2, 0)[::2],
        case.targets.repeat_interleave(2)[::2],
    )
    assert not strided.hidden.is_contiguous()
    straight = outputs_and_gradients(case, torch.float32, backend="triton")
    crooked = outputs_and_gradients(strided, torch.float32, backend="triton")
    for name, value in straight.items():
        assert max_error(crooked[name], value) <= 8 * ulp(float(value.abs().max()), value.dtype)


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "products"),
    [(True, True, 2), (True, False, 1), (False, True, 1)],
)
def test_frozen_operands_cost_no_product(hidden_grad, weight_grad, products):
    case = case_here(20, 30)
    case.hidden.requires_grad_(hidden_grad)
    case.weight.requires_grad_(weight_grad)
    loss = linear_logprobs(case.hidden, case.weight, case.targets, backend="triton").logprobs.sum()
    with Watch() as watch:
        loss.backward()
    assert watch.products == products


@interpreted
def test_forward_stores_no_logits():
    case = case_here(64, 640, masked=0)
    with torch.no_grad(), Watch() as watch:
        linear_logprobs(case.hidden, case.weight, case.targets, backend="triton")
    tiles = 640 // triton_head.INTERPRETED.block_v
    assert watch.largest <= max(64 * tiles, case.weight.numel())
    with torch.no_grad(), Watch() as watch:  # negative control: the watch sees such a tensor
        linear_logprobs(case.hidden, case.weight, case.targets, backend="torch")
    assert watch.largest == 64 * 640


def stored_in(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dlogits of sum(logprobs) by way of E stored in `dtype`, and the truth."""
    case = case_here(40, 200, size=4, masked=0)
    out = torch.full((40, 200), float("nan"), dtype=dtype, device=DEVICE)
    row_max, sum_exp, target, _, tile_max = head_statistics(
        case.hidden, case.weight, case.targets, out, None, None, 1.0, 0, False
    )
    log_sum = sum_exp.log()
    at_target = -torch.expm1(target - row_max - log_sum)
    factor = torch.full_like(row_max, -1.0)
    block_v = triton_head.tiles_for(torch.float32, True, DEVICE).block_v
    head_dlogits_(out, tile_max, row_max, log_sum, factor, None, at_target, case.targets, block_v)
    z = (case.hidden.double() @ case.weight.double().T).requires_grad_()
    logprobs = z.log_softmax(-1).gather(1, case.targets[:, None])
    return out, torch.autograd.grad(logprobs.sum(), z)[0]


def test_sixteen_bit_workspace_costs_two_roundings():
    """E and dlogits in 16 bits: half an ulp of each value twice, whatever the size of the logits.

    float16 in the interpreter, whose cast to bfloat16 loses carries (Triton 3.7.1); it has a floor
    of 6e-8."""
    dtype, relative, floor = torch.bfloat16, 2.0**-7.9, 1e-12
    if DEVICE.type == "cpu":
        dtype, relative, floor = torch.float16, 2.0**-9.9, 2e-7
    out, truth = stored_in(dtype)
    assert ((out.double() - truth).abs() <= relative * truth.abs() + floor).all()
    exact, truth = stored_in(torch.float32)
    assert ((exact.double() - truth).abs() <= 1e-4 * truth.abs() + 1e-9).all()
    assert not torch.equal(out.float(), exact)  # negative control: the first check could fail


def test_operators_are_registered_as_torch_expects():
    case = case_here(20, 70, masked=0)
    out = torch.empty(20, 70, device=DEVICE)
    arguments = (case.hidden, case.weight, case.targets, out, None, None, 1.0, 0, True)
    torch.library.opcheck(head_statistics, arguments)
    row_max, _, target, _, tile_max = head_statistics(*arguments)
    block_v = triton_head.tiles_for(torch.float32, True, DEVICE).block_v
    gradients = (row_max, target, target, None, target, case.targets, block_v)
    torch.library.opcheck(head_dlogits_, (out, tile_max, *gradients))


def test_float64_is_refused():
    case = case_here(9, 20).to(torch.float64)
    with pytest.raises(ValueError, match="'triton' takes float32, bfloat16 and float16"):
        linear_logprobs(case.hidden, case.weight, case.targets, backend="triton")


def test_confident_log_probs_are_never_positive():
    case = confident_case()
    case.hidden = case.hidden * 100
    values = linear_logprobs(case.hidden, case.weight, case.targets, backend="triton").logprobs
    assert (values <= 0).all()
    assert math.isclose(float(values.max()), 0.0, abs_tol=1e-6)
