"""The gate on the machine code of the CUDA operators, on any machine that has built them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from flowrl_kernels import cuda_support

from bench import cuda_code

if cuda_support.build_problem() is not None:
    pytest.skip(f"cuda {cuda_support.build_problem()}", allow_module_level=True)
if cuda_code.cuobjdump() is None:
    pytest.skip("needs cuobjdump (pip install triton)", allow_module_level=True)


@pytest.fixture(scope="module")
def kernels() -> dict[str, cuda_code.Kernel]:
    return {kernel.name: kernel for kernel in cuda_code.kernels()}


def test_no_spill_no_stack_and_warpgroup_products(kernels):
    assert [fault for kernel in kernels.values() for fault in kernel.faults()] == []
    assert all(kernels[name].wgmma >= 8 for name in cuda_code.PRODUCTS)


def test_every_kernel_is_there(kernels):
    others = ("merge", "quantize", "dlogits", "balance", "loss")
    expected = {*cuda_code.PRODUCTS, *(f"{name}_kernel" for name in others)}
    assert set(kernels) == {*expected, "dlogits_kernel entropy"}


def test_the_gate_sees_what_it_is_for(kernels):
    forward = kernels["head_forward"]
    assert replace(forward, wgmma=0).faults() == ["head_forward has no warpgroup product"]
    assert replace(forward, local_accesses=3).faults()
    assert replace(forward, stack_bytes=16).faults()


def test_the_command_prints_a_table(capsys, tmp_path):
    assert cuda_code.main(["--json", str(tmp_path / "code.json")]) == 0
    assert "head_forward_e4m3" in capsys.readouterr().out
    assert '"target": "sm_90a"' in (tmp_path / "code.json").read_text()
