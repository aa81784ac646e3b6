"""The compiled operators: instruction sets, numbers of threads, the library and its build."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flowrl_kernels import backends, linear_logprobs, linear_policy_loss, native_library
from flowrl_kernels.head import Head, RowGradients
from flowrl_kernels.head.native_kernels import NativeHead
from flowrl_kernels.head.torch_kernels import TorchHead
from flowrl_kernels.head.vocab_parallel import finish
from head_cases import FUSED, make_case, outputs_and_gradients
from numerics import assert_within_budget, max_error
from torch import Tensor

ROOT = Path(__file__).parents[2]
OPERATORS = torch.ops.flowrl_native
needs_library = pytest.mark.skipif("native" not in FUSED, reason=str(native_library.PROBLEM))
# Around the four columns of a step and the 96 of a tile.
COLUMNS = [1, 3, 4, 5, 95, 96, 97, 191, 193, 2048, 5003]
# Around the widths of registers (4, 8, 16), and the 1024 rows of a strip.
ROWS = [1, 4, 7, 8, 9, 15, 16, 17, 1024, 1025, 2100]


def levels() -> list[int]:
    return list(range(OPERATORS.highest_level() + 1)) if "native" in FUSED else []


def levels_with_products() -> list[tuple[int, torch.dtype]]:
    dtypes = (torch.bfloat16, torch.float32)
    return [(i, t) for i in levels() for t in dtypes if has_products(t, i)]


def has_products(dtype: torch.dtype, level: int) -> bool:
    return OPERATORS.has_products(dtype == torch.bfloat16, level)


def outputs(kernels: NativeHead | TorchHead, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Statistics of these logits and the gradient of a combination of them, by kernels whose
    product is with the identity: hidden = logits, weight = 1."""
    identity = torch.eye(logits.shape[1], dtype=logits.dtype)
    head = Head(identity, logits.shape[1], 1.0, 0, None, entropy=True)
    out = kernels.workspace(head, len(targets)).fill_(float("nan"))
    local = kernels.statistics(head, logits, targets, out)
    rows = finish(head, local)
    assert rows.entropy is not None
    slopes = torch.linspace(-2, 1.5, len(targets), dtype=logits.dtype)
    kernels.dlogits_(head, targets, out, local, rows, RowGradients(slopes, slopes * 2, slopes**2))
    lse = rows.row_max + rows.log_sum
    return {"logprobs": rows.logprobs, "lse": lse, "entropy": rows.entropy, "dlogits": out}


@needs_library
@pytest.mark.parametrize("columns", COLUMNS)
def test_every_instruction_set_keeps_the_budget(columns):
    generator = torch.Generator().manual_seed(columns)
    logits = torch.randn(9, columns, generator=generator) * 4
    logits[1] += torch.linspace(0, 30, columns)  # the running maximum moves in every block
    logits[2, ::2] = -1e30
    logits[2, -1] = 1.0
    logits[3] = 1e4
    targets = torch.randint(columns, (9,), generator=generator)
    targets[2] = columns - 1
    targets[4] = columns + 5  # another rank's
    plain = outputs(TorchHead(), logits, targets)
    truth = outputs(TorchHead(), logits.double(), targets)
    finite = [n for n in range(9) if n != 4]
    for level in levels():
        found = outputs(NativeHead(level), logits, targets)
        assert found["logprobs"][4] == -math.inf
        for name, value in found.items():
            what = f"{native_library.LEVELS[level]} {name}"
            assert_within_budget(value[finite], plain[name][finite], truth[name][finite], what)


@needs_library
@pytest.mark.parametrize("rows", ROWS)
def test_every_number_of_rows_keeps_the_budget(rows):
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, 5, generator=generator) * 4
    targets = torch.randint(5, (rows,), generator=generator)
    plain = outputs(TorchHead(), logits, targets)
    truth = outputs(TorchHead(), logits.double(), targets)
    for level in levels():
        for name, value in outputs(NativeHead(level), logits, targets).items():
            what = f"{native_library.LEVELS[level]} {name}"
            assert_within_budget(value, plain[name], truth[name], what)


@needs_library
def test_budget_sees_a_column_that_is_left_out():
    """Negative control: the same comparison without the last of 65 columns."""
    logits = torch.randn(9, 65, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(9)
    plain = outputs(TorchHead(), logits, targets)
    truth = outputs(TorchHead(), logits.double(), targets)
    short = outputs(NativeHead(), logits[:, :64], targets)
    with pytest.raises(AssertionError, match="lse: error"):
        assert_within_budget(short["lse"], plain["lse"], truth["lse"], "lse")


@needs_library
@pytest.mark.parametrize("level", levels())
def test_nan_is_not_hidden(level):
    logits = torch.zeros(3, 70)
    logits[1, 40] = math.nan
    logprobs = outputs(NativeHead(level), logits, torch.zeros(3, dtype=torch.int64))["logprobs"]
    assert logprobs.isnan().tolist() == [False, True, False]


@needs_library
@pytest.mark.parametrize("level", levels())
def test_infinitely_unlikely_columns_take_no_part(level):
    logits = torch.full((300, 16), -math.inf)  # four tiles, of which only the second has more
    logits[100:108] = 0
    targets = torch.tensor([103])
    row_max, sum_exp, target, sum_exp_z = OPERATORS.head_statistics(logits, targets, 0, True, level)
    assert [float(x) for x in (row_max, sum_exp, target, sum_exp_z)] == [0, 8, 0, 0]
    log_sum, one = sum_exp.log(), torch.ones(1)
    OPERATORS.head_dlogits_(logits, targets, 0, 1.0, row_max, log_sum, one, None, one, one, level)
    assert logits[:, 0].isfinite().all()
    assert logits[:, 0].nonzero()[:, 0].tolist() == list(range(100, 108))


@needs_library
def test_a_level_that_is_not_there_is_refused():
    logits, targets = torch.zeros(4, 16), torch.zeros(1, dtype=torch.int64)
    for level in (len(native_library.LEVELS), -2):
        with pytest.raises(RuntimeError, match=f"level must be -1 or one .* got {level}"):
            OPERATORS.head_statistics(logits, targets, 0, False, level)
    assert native_library.level() in native_library.LEVELS


@needs_library
def test_the_number_of_threads_changes_no_bit():
    logits = torch.randn(40, 5003, generator=torch.Generator().manual_seed(2))
    targets = torch.arange(40)
    before = torch.get_num_threads()
    found = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found[threads] = outputs(NativeHead(), logits, targets)
    torch.set_num_threads(before)
    for name, value in found[1].items():
        assert torch.equal(value, found[2][name]), name
        assert torch.equal(value, found[3][name]), name


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


@needs_library
@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_instruction_set_serves_the_whole_operator(monkeypatch, level, dtype):
    """linear_logprobs through the driver, on each level's softmax and products."""
    monkeypatch.setattr(NativeHead.__init__, "__defaults__", (level,))
    assert NativeHead().level == level
    case = make_case(33, 130, 48, size=3)
    runs = {
        name: outputs_and_gradients(case, dtype, backend=backend)
        for name, dtype, backend in (
            ("native", dtype, "native"),
            ("plain", dtype, "reference"),
            ("truth", torch.float64, "reference"),
        )
    }
    for name, value in runs["native"].items():
        assert_within_budget(value, runs["plain"][name], runs["truth"][name], name)


@needs_library
def test_operators_are_registered_as_torch_expects():
    logits, targets = torch.randn(10, 16), torch.tensor([0, 5, 9])
    tests = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(
        OPERATORS.head_statistics.default, (logits, targets, 0, True, -1), test_utils=tests
    )
    if OPERATORS.has_products(False, -1):
        torch.library.opcheck(
            OPERATORS.head_forward.default,
            (torch.randn(3, 8), torch.randn(10, 8), targets, 0, 1.0, True, logits, -1),
            test_utils=tests,
        )
    rows = [torch.rand(3) for _ in range(6)]
    torch.library.opcheck(
        OPERATORS.head_dlogits_.default, (logits, targets, 0, 0.7, *rows, -1), test_utils=tests
    )
    leaf = (-torch.rand(5)).requires_grad_()
    offsets = torch.tensor([0, 2, 2, 5])
    per_sequence = (torch.rand(3).requires_grad_(), torch.rand(3), offsets)
    torch.library.opcheck(
        OPERATORS.trajectory_balance.default,
        (leaf, -torch.rand(5), -torch.rand(5), *per_sequence, None, 2.0, None, 1.0, True, 0.5),
    )


@needs_library
def test_operators_refuse_what_they_cannot_read():
    with pytest.raises(RuntimeError, match="logits must be contiguous, of the operator's dtype"):
        OPERATORS.head_statistics(torch.zeros(16, 4).T, torch.zeros(2).long(), 0, False, -1)
    with pytest.raises(RuntimeError, match="logits must be .* at least 32 rows.* got 16"):
        OPERATORS.head_statistics(torch.zeros(4, 16), torch.zeros(17).long(), 0, False, -1)
    with pytest.raises(RuntimeError, match="dlogits must be .* at least 16 rows.* got 2"):
        OPERATORS.head_dhidden(torch.zeros(4, 2), torch.zeros(4, 8), 2, -1)
    with pytest.raises(RuntimeError, match="targets must have one element .* of 2 rows .* got 3"):
        OPERATORS.head_forward(
            torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(3).long(), 0, 1.0, False, None, -1
        )


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
def test_the_library_exports_nothing_and_needs_only_the_stable_abi():
    def names(*options: str) -> list[str]:
        command = ["nm", "-D", "--format=posix", "-C", *options, str(native_library.LIBRARY)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )

    assert names("--defined-only") == [""]
    needed = names("--undefined-only")
    assert any("torch_library_impl" in name for name in needed)  # the listing is not empty
    assert not [name for name in needed if "at::" in name or "c10::" in name or "Py" in name]


def test_without_the_library_the_backend_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(native_library, "LIBRARY", tmp_path / "_C.abi3.so")
    monkeypatch.setattr(native_library, "PROBLEM", native_library._load())
    case = make_case(4, 9)
    with pytest.raises(
        ValueError, match="'native' is not built .*pip install.*use backend='torch'"
    ):
        linear_logprobs(case.hidden, case.weight, case.targets, backend="native")
    assert backends.available("cpu") == ["torch", "reference"]
    linear_logprobs(case.hidden, case.weight, case.targets)


def test_a_library_that_does_not_load_says_why(monkeypatch, tmp_path):
    broken = tmp_path / "_C.abi3.so"
    broken.write_text("not a library")
    monkeypatch.setattr(native_library, "LIBRARY", broken)
    assert "does not load" in str(native_library._load())


@pytest.mark.parametrize("call", [{"dtype": torch.float64}, {"features": frozenset({"fp8"})}])
def test_refusals(call):
    complete = backends.Call(**{"device": torch.device("cpu"), "dtype": torch.float32, **call})
    reason = native_library.can_run(complete)
    assert reason is not None
    assert "float64" in reason or "FP8" in reason


@pytest.mark.parametrize(
    ("setting", "path", "message"),
    [
        ("yes", None, "FLOWRL_BUILD_NATIVE must be auto, 0 or 1, got 'yes'"),
        ("1", "", "FLOWRL_BUILD_NATIVE=1 needs a C++ compiler"),
    ],
)
def test_build_setting(setting, path, message):
    environment = {**os.environ, "FLOWRL_BUILD_NATIVE": setting}
    if path is not None:
        environment["PATH"] = path
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert message in done.stderr
