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
from flowrl_kernels import backends, linear_logprobs, native_library
from flowrl_kernels.head import Head, RowGradients
from flowrl_kernels.head.native_kernels import NativeHead
from flowrl_kernels.head.torch_kernels import TorchHead
from flowrl_kernels.head.vocab_parallel import finish
from head_cases import make_case, outputs_and_gradients
from native_levels import OPERATORS, levels, needs_library
from numerics import assert_within_budget
from torch import Tensor

ROOT = Path(__file__).parents[2]
# Around the four columns of a step and the 96 of a tile.
COLUMNS = [1, 3, 4, 5, 95, 96, 97, 191, 193, 2048, 5003]
# Around the widths of registers (4, 8, 16), and the 1024 rows of a strip.
ROWS = [1, 4, 7, 8, 9, 15, 16, 17, 1024, 1025, 2100]


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
