"""A pytest plugin: the backend cuda with the processor in the place of the GPU.

    TRITON_INTERPRET=1 PYTHONPATH=tests/kernels pytest -p emulated_device \\
        tests/kernels/on_cuda_head.py

csrc/operators_cuda.cpp and csrc/*.cu are compiled for the processor with the launch.cuh and the
head_gemm.cuh of emulated/: the threads of a block are threads, and the logits product, which is
CUTLASS's on a GPU, is a loop over the same tiles with the same arithmetic. So the other kernels,
the operators' checks and the drivers above them run as they are, in small sizes. Needs a C++
compiler and the headers of the CUDA toolkit. test_emulated_kernels.py starts it, and to see that a
wrong kernel fails changes a line by EMULATED_CHANGE="old=>new".
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from flowrl_kernels import cuda_support
from flowrl_kernels.head import cuda_head
from flowrl_kernels.trajectory_balance import cuda_kernels
from torch import Tensor

HEADERS = Path(__file__).with_name("emulated")
CSRC = Path(__file__).parent.parent.parent / "csrc"


def toolkit_headers() -> Path | None:
    """The folder with cuda_bf16.h."""
    nvcc = shutil.which("nvcc")
    roots = [Path("/usr/local/cuda"), *([Path(nvcc).resolve().parent.parent] if nvcc else [])]
    found = [root / "include" for root in roots if (root / "include/cuda_bf16.h").exists()]
    return found[0] if found else None


def build(folder: Path) -> Path:
    """The library: torch.ops.flowrl_emulated, for tensors on a CPU."""
    old, new = os.environ.get("EMULATED_CHANGE", "=>").split("=>")
    for source in CSRC.glob("*.cu"):
        text = source.read_text()
        (folder / f"{source.stem}.cpp").write_text(text.replace(old, new) if old else text)
    for header in HEADERS.glob("*.cuh"):  # found before csrc/'s
        shutil.copy(header, folder)
    operators = (CSRC / "operators_cuda.cpp").read_text()
    operators = operators.replace("(flowrl_cuda, CUDA,", "(flowrl_emulated, CPU,")
    operators = operators.replace("(flowrl_cuda,", "(flowrl_emulated,")
    (folder / "operators_cuda.cpp").write_text(operators)
    torch_root, library = Path(torch.__path__[0]), folder / "emulated.so"
    headers = [torch_root / "include", toolkit_headers()]
    command = ["c++", "-std=c++20", "-O2", "-shared", "-fPIC", "-pthread", "-w"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{folder}", f"-I{CSRC / 'include'}"]
    command += [part for header in headers for part in ("-isystem", str(header))]
    command += [*map(str, folder.glob("*.cpp")), str(torch_root / "lib/libtorch_cpu.so")]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


class CpuProducts:
    """Of bfloat16 operands with float32 sums, which torch has on CUDA only."""

    def dhidden(self, dlogits: Tensor, weight: Tensor) -> Tensor:
        return dlogits.float() @ weight.float()

    def dweight_(self, total: Tensor, dlogits: Tensor, hidden: Tensor, beta: int) -> None:
        total.addmm_(dlogits.float().T, hidden.float(), beta=beta)

    def rounds_dweight(self, weight: Tensor) -> bool:
        return False


def pytest_configure() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.ops.load_library(build(Path(folder)))
    torch.library.register_autograd(
        "flowrl_emulated::trajectory_balance",
        cuda_kernels._backward,
        setup_context=cuda_kernels.keep_gradients,
    )
    torch.ops.flowrl_cuda = torch.ops.flowrl_emulated  # type: ignore[attr-defined]
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment]
    cuda_support._device_problem = lambda call: None
    cuda_support.stream_of = cuda_head.stream_of = lambda tensor: 0
    cuda_head.CudaHead.products = CpuProducts()
