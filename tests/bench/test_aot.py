"""The ahead-of-time gate: what the assembler makes of every kernel on Hopper, on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton backend needs triton (Linux, x86-64)")

from flowrl_kernels.head import triton_kernels
from flowrl_kernels.trajectory_balance import triton_kernels as balance

from bench import aot

ROOT = Path(__file__).parent.parent.parent
VARIANTS = aot.variants()


@pytest.fixture(scope="module")
def compiled() -> dict[str, aot.Compiled]:
    return {variant.name: aot.compile_variant(variant) for variant in VARIANTS}


def test_no_spill_no_stack_and_warpgroup_products(compiled):
    assert [fault for result in compiled.values() for fault in result.faults()] == []
    products = [c for c in compiled.values() if c.gemm]
    assert len(products) >= 2 * 8  # both models
    assert all(c.hgmma >= 4 for c in products)


def test_every_kernel_is_compiled():
    kernels = {
        name
        for module in (triton_kernels, balance)
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "arg_names")
    }
    assert kernels == {variant.kernel.__name__ for variant in VARIANTS}


def test_no_kernel_of_rows_is_compiled_for_some_numbers_of_them():
    """The compiler would lay out rows that 16 divides in another way, and sum them in another
    order: a row's log-prob would depend on how many others there are."""
    for kernel in (v.kernel for v in VARIANTS if "num_rows" in v.kernel.arg_names):
        assert [p.name for p in kernel.params if p.do_not_specialize] == ["num_rows"]


def test_the_gate_sees_what_it_is_for():
    """Negative controls: a tile too large for the registers, and float32 without wgmma."""
    forward = next(v for v in VARIANTS if v.name == "head_fwd qwen2.5-7b bf16")
    constants = {**forward.constants, "num_warps": 4, "num_stages": 2}
    crowded = aot.compile_variant(replace(forward, constants=constants))
    assert any("spills" in fault or "stack" in fault for fault in crowded.faults())
    float32 = aot.compile_variant(next(v for v in VARIANTS if "7b fp32" in v.name))
    assert replace(float32, gemm=True).faults() == [f"{float32.name} has no warpgroup product"]
    assert replace(float32, shared_bytes=228 << 10).faults()


def test_the_command_prints_a_table(tmp_path):
    command = [sys.executable, "-m", "bench", "aot", "--only", "merge", "--json"]
    done = subprocess.run(
        [*command, str(tmp_path / "aot.json")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert "merge entropy" in done.stdout
    assert '"hgmma": 0' in (tmp_path / "aot.json").read_text()
