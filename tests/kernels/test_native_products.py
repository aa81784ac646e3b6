"""The compiled products of the output layer, on each instruction set that has them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from flowrl_kernels import linear_policy_loss, native_library
from head_cases import make_case
from native_levels import OPERATORS, has_products, levels_with_products, needs_library
from numerics import max_error
from torch import Tensor


def products(
    level: int, dtype: torch.dtype, rows: int, dim: int, vocab: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each product of operands of `dtype`, and the same of the same operands in float64."""
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(rows, dim, generator=generator).to(dtype)
    weight = torch.randn(vocab, dim, generator=generator).to(dtype)
    targets = torch.zeros(rows, dtype=torch.int64)
    padded = -(-rows // 16) * 16
    columns = torch.full((vocab, padded), float("nan"))
    OPERATORS.head_forward(hidden, weight, targets, 0, 1 / 0.7, False, columns, level)
    dlogits = torch.full((vocab, padded), float("nan"))  # whose padding nobody may use
    dlogits[:, :rows] = torch.randn(rows, vocab, generator=generator).T
    first = torch.full((vocab, dim), float("nan"))
    OPERATORS.head_dweight_(first, dlogits, hidden, False, level)
    second = first.clone()
    OPERATORS.head_dweight_(second, dlogits, hidden, True, level)
    x, w, dz = hidden.double(), weight.double(), dlogits[:, :rows].T.to(dtype).double()
    return {
        "logits": (columns[:, :rows].T, 0.7 * x @ w.T),
        "dhidden": (OPERATORS.head_dhidden(dlogits, weight, rows, level), dz @ w),
        "dweight": (first, dz.T @ x),
        "dweight twice": (second, 2 * dz.T @ x),
    }


# Around blocks of 32 and of 12 x 32, tiles of 96, depths of 256 and 512, groups of 384 rows and two
# slices of 8192.
@pytest.mark.parametrize(("level", "dtype"), levels_with_products())
@pytest.mark.parametrize(
    ("rows", "dim", "vocab"),
    [
        (1, 1, 1), (33, 16, 127), (32, 32, 128), (257, 31, 300), (40, 65, 16400), (0, 8, 40),
        (13, 530, 121), (520, 33, 250),
    ],
)  # fmt: skip
def test_products_sum_in_float32(level, dtype, rows, dim, vocab):
    for name, (found, truth) in products(level, dtype, rows, dim, vocab).items():
        depth = {"logits": dim, "dhidden": vocab}.get(name, 2 * rows)
        # Float32 sums of `depth` products err by sqrt(depth) roundings of their size, or so.
        allowed = 8 * 2.0**-24 * max(depth, 1) ** 0.5 * float(truth.abs().max()) if rows else 0
        error = max_error(found, truth)
        assert error <= allowed, f"{name}: {error}"


@pytest.mark.parametrize(("level", "dtype"), levels_with_products())
def test_the_bound_on_products_sees_bfloat16_results(level, dtype):
    """Negative control: one rounding to bfloat16 at the end is far outside."""
    found, truth = products(level, dtype, 33, 16, 127)["logits"]
    assert max_error(found.bfloat16(), truth) > 100 * 8 * 2.0**-24 * 4 * float(truth.abs().max())


@pytest.mark.parametrize("level", [i for i, t in levels_with_products() if t == torch.bfloat16])
@pytest.mark.parametrize(("rows", "dim", "vocab"), [(1, 1, 1), (40, 65, 127), (257, 31, 300)])
def test_a_product_is_rounded_as_it_is_written(level, rows, dim, vocab):
    hidden = torch.randn(rows, dim).bfloat16()
    dlogits = torch.randn(vocab, -(-rows // 16) * 16)
    total = torch.empty(vocab, dim)
    rounded = torch.full((vocab, dim), float("nan")).bfloat16()
    OPERATORS.head_dweight_(total, dlogits, hidden, False, level)
    OPERATORS.head_dweight_(rounded, dlogits, hidden, False, level)
    assert torch.equal(rounded, total.bfloat16())
    with pytest.raises(RuntimeError, match="total must be contiguous, of the operator's dtype"):
        OPERATORS.head_dweight_(rounded, dlogits, hidden, True, level)


def chunks_of(rows: int, vocab: int, dtype: torch.dtype, frozen: bool) -> int:
    """In how many parts linear_policy_loss takes single rows, by its own choice."""
    case = make_case(rows, vocab, 128, masked=0).to(dtype)
    case.weight.requires_grad_(not frozen)
    calls = []

    def objective(logprobs, entropy, rows):
        calls.append(len(logprobs))
        return logprobs.sum(), {}

    offsets = torch.arange(rows + 1, dtype=torch.int32)
    linear_policy_loss(
        case.hidden, case.weight, case.targets, offsets, objective, backend="native"
    ).loss.backward()
    return len(calls)


@needs_library
def test_one_chunk_takes_the_memory_of_the_sum_that_it_does_not_need():
    if not has_products(torch.bfloat16, -1):
        pytest.skip("bfloat16 is torch's on this processor")
    # 20 MiB of logits are 640 rows. The sum of d(weight) less d(weight) is 2 MiB, 64 rows more.
    assert chunks_of(704, 8192, torch.bfloat16, frozen=False) == 1
    assert chunks_of(705, 8192, torch.bfloat16, frozen=False) == 2
    assert chunks_of(704, 8192, torch.bfloat16, frozen=True) == 2
    assert chunks_of(704, 8192, torch.float32, frozen=False) == 2


@pytest.mark.parametrize(("level", "dtype"), levels_with_products())
def test_products_do_not_depend_on_the_number_of_threads(level, dtype):
    before = torch.get_num_threads()
    runs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        runs.append(products(level, dtype, 40, 65, 16400))
    torch.set_num_threads(before)
    for name in runs[0]:
        assert torch.equal(runs[0][name][0], runs[1][name][0]), name


@pytest.mark.parametrize(("level", "dtype"), levels_with_products())
def test_rows_of_logits_do_not_depend_on_other_rows(level, dtype):
    hidden, weight = torch.randn(30, 600).to(dtype), torch.randn(70, 600).to(dtype)
    targets = torch.arange(30)
    every, some = torch.empty(70, 32), torch.empty(70, 16)
    of_every = OPERATORS.head_forward(hidden, weight, targets, 0, 1.3, True, every, level)
    few = slice(17, 22)
    of_some = OPERATORS.head_forward(
        hidden[few].contiguous(), weight, targets[few].clone(), 0, 1.3, True, some, level
    )
    assert torch.equal(every[:, few], some[:, :5])
    for a, b in zip(of_every, of_some, strict=True):
        assert torch.equal(a[few], b)


@pytest.mark.parametrize(("level", "dtype"), levels_with_products())
def test_statistics_need_no_logits_in_memory(level, dtype):
    hidden, weight = torch.randn(500, 40).to(dtype), torch.randn(700, 40).to(dtype)
    call = (hidden, weight, torch.arange(500), 5, 0.7, True)
    kept = OPERATORS.head_forward(*call, torch.empty(700, 512), level)
    for a, b in zip(kept, OPERATORS.head_forward(*call, None, level), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("level", "dtype"), levels_with_products())
def test_a_rank_may_have_padding_only(level, dtype):
    hidden, weight = torch.randn(70, 8).to(dtype), torch.empty(0, 8, dtype=dtype)
    found = OPERATORS.head_forward(hidden, weight, torch.arange(70), 0, 1.0, True, None, level)
    row_max, sum_exp, target, sum_exp_z = found
    assert row_max.tolist() == target.tolist() == [-math.inf] * 70
    assert sum_exp.tolist() == sum_exp_z.tolist() == [0] * 70


@needs_library
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads /proc/cpuinfo")
def test_products_of_float32_are_ours_by_default_on_amd_with_avx512():
    amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    avx512 = OPERATORS.highest_level() >= native_library.LEVELS.index("avx512")
    assert has_products(torch.float32, -1) == (amd and avx512)


@needs_library
def test_levels_without_products_say_so():
    weight = torch.zeros(4, 8).bfloat16()
    with pytest.raises(RuntimeError, match="products of bfloat16 need level 3 or 4, got 0"):
        OPERATORS.head_dhidden(torch.zeros(4, 16), weight, 2, 0)
    with pytest.raises(RuntimeError, match="products of float32 need level 2 or higher, got 0"):
        OPERATORS.head_dhidden(torch.zeros(4, 16), weight.float(), 2, 0)
