"""The arithmetic of the CUDA kernels, on the processor: the functions of csrc/include that the GPU
calls too, against float64, and where CuTe says that each thread's results belong.

Of the GPU's own, only the base-2 exponential differs (2 ulp there, exp2f here). Trajectory balance
needs no test here: its CPU operator calls the same functions (test_native.py).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from numerics import assert_within_budget, max_error, ulp
from torch import Tensor

HERE = Path(__file__).parent
INCLUDE = HERE.parent.parent / "csrc/include"
WIDTH = 192  # of a tile
LISTS = 16  # of tiles that the merge adds up on their own


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("device") / "device_arithmetic.so"
    command = [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-pthread", f"-I{INCLUDE}"]
    subprocess.run([*command, str(HERE / "device_arithmetic.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(x: Tensor) -> ctypes.c_void_p:
    assert x.is_contiguous()
    return ctypes.c_void_p(x.data_ptr())


def reduced(functions: ctypes.CDLL, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E (n, V), tiles (n, S, 3) and rows (n, 3) of maximum, sum and sum of E (z - maximum)."""
    n, columns = z.shape
    e = torch.full_like(z, float("nan"))
    tiles, rows = torch.empty(n, -(-columns // WIDTH), 3), torch.empty(n, 3)
    for i in range(n):
        functions.reduce_row(pointer(z[i]), columns, WIDTH, pointer(e[i]), pointer(tiles[i]))
        functions.merge_row(pointer(tiles[i]), tiles.shape[1], LISTS, pointer(rows[i]))
    return e, tiles, rows


def dlogits(functions, e, tiles, rows, factor: Tensor, slope: Tensor | None) -> Tensor:
    dz = torch.empty_like(e)
    for i in range(e.shape[0]):
        numbers = (rows[i, 0], rows[i, 1].log(), factor[i], 0.0 if slope is None else slope[i])
        functions.dlogits_row(
            pointer(e[i]), e.shape[1], WIDTH, pointer(tiles[i]),
            *(ctypes.c_float(float(x)) for x in numbers), slope is not None, pointer(dz[i]),
        )  # fmt: skip
    return dz


def logits(size: float, columns: int) -> Tensor:
    z = torch.randn(9, columns, generator=torch.Generator().manual_seed(0)) * size
    z[1] = 0
    z[2] -= 1e4
    return z


@pytest.mark.parametrize("columns", [1, 191, 193, 5000])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_statistics_and_gradients(functions, size, columns):
    z = logits(size, columns)
    generator = torch.Generator().manual_seed(1)
    of_lse, of_entropy = (torch.randn(9, generator=generator) for _ in range(2))

    def plain(z: Tensor) -> dict[str, Tensor]:
        z = z.clone().requires_grad_()
        log_p = z.log_softmax(1)
        found = {"lse": z.logsumexp(1), "entropy": -(log_p.exp() * log_p).sum(1)}
        for name, factors in (("lse", of_lse), ("entropy", of_entropy)):
            loss = (found[name] * factors).sum()
            found["d" + name] = torch.autograd.grad(loss, z, retain_graph=True)[0]
        return {name: x.detach() for name, x in found.items()}

    e, tiles, rows = reduced(functions, z)
    assert (rows[:, 0] == z.amax(1)).all()
    assert (tiles[:, :, 1] >= 1).all()  # E is 1 at the tile's maximum: no log-prob is positive
    log_sum = rows[:, 1].log()
    entropy = log_sum - rows[:, 2] / rows[:, 1]
    ours = {
        "lse": rows[:, 0] + log_sum,
        "entropy": entropy,
        "dlse": dlogits(functions, e, tiles, rows, of_lse, None),
        "dentropy": dlogits(functions, e, tiles, rows, -of_entropy * entropy, of_entropy),
    }
    here, truth = plain(z), plain(z.double())
    for name, value in ours.items():
        assert_within_budget(value, here[name], truth[name], name)


def test_the_check_sees_a_wrong_tile_maximum(functions):
    """Negative control: E taken as if it were relative to the row's maximum."""
    z = logits(3.0, 1000)
    e, tiles, rows = reduced(functions, z)
    right = dlogits(functions, e, tiles, rows, torch.ones(9), None)
    assert max_error(right, z.double().softmax(1)) < 1e-6
    tiles[:, :, 0] = rows[:, :1]
    wrong = dlogits(functions, e, tiles, rows, torch.ones(9), None)
    assert max_error(wrong, z.double().softmax(1)) > 1e-3


def test_nan_is_not_lost(functions):
    z = logits(1.0, 400)
    z[3, 250] = float("nan")
    rows = reduced(functions, z)[2]
    assert rows[3, 1].isnan()
    assert rows[[0, 1, 2, 4]].isfinite().all()


def test_e4m3_scale(functions):
    functions.scale_of.restype = ctypes.c_float
    for largest in (1.0, 3e20, 1e-12):
        scale = functions.scale_of(ctypes.c_float(largest))
        assert abs(scale * 448 - largest) <= ulp(largest, torch.float32)
    assert functions.scale_of(ctypes.c_float(0.0)) > 0


def test_quad_transpose(functions):
    words = torch.arange(16, dtype=torch.int32).view(4, 4)
    turned = words.clone()
    functions.transpose_words(pointer(turned))
    assert torch.equal(turned, words.T)


def test_the_epilogue_finds_every_logit_where_the_tensor_core_leaves_it(tmp_path):
    """csrc/head_epilogue.cuh itself, lane by lane: see epilogue.cu."""
    nvcc, package = shutil.which("nvcc"), find_spec("cutlass_library")
    if nvcc is None or package is None:
        pytest.skip("needs nvcc and CUTLASS's headers (pip install --no-deps nvidia-cutlass)")
    assert package.submodule_search_locations is not None
    headers = Path(package.submodule_search_locations[0]) / "source/include"
    program = tmp_path / "epilogue"
    options = ["-std=c++20", "-arch=sm_90a", "-DNDEBUG", "--expt-relaxed-constexpr"]
    options += [f"-I{INCLUDE.parent}", f"-I{INCLUDE}", "-isystem", str(headers)]
    source = str(HERE / "epilogue.cu")
    subprocess.run([nvcc, *options, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "bfloat16: 128 threads, 128 x 192, 0 faults" in done.stdout
    assert "e4m3: 256 threads, 128 x 128, 0 faults" in done.stdout
    assert done.stdout.count("store: 0 faults") == 5
    wrong = subprocess.run([program, "wrong"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1  # negative control
    assert "the target of row 0 is" in wrong.stdout
