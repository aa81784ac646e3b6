"""What the assembler made of the CUDA operators in the native library, on any machine.

    python -m bench cuda_code [--json FILE]

Prints registers a thread, spilled bytes (LOCAL and instructions that read or write it), stack and
HGMMA (or QGMMA, FP8) instructions of each kernel for sm_90a. Needs a library built with nvcc and
CUTLASS, and the cuobjdump of triton's wheel or of the toolkit. Runs nothing: neither speed nor
results follow from it. Shared memory is checked when csrc/head_gemm.cuh is compiled.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from flowrl_kernels import cuda_support, native_library

EPILOGUE = re.compile(r"HeadEpilogueILb([01])ELb([01])E")  # <kStore, kScaled>
KERNEL = re.compile(r"\d+([a-z_]+_kernel)(?:ILb([01])E)?")
PRODUCTS = ("head_forward", "head_forward_store", "head_forward_e4m3")


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    stack_bytes: int
    local_bytes: int
    local_accesses: int
    wgmma: int

    def faults(self) -> list[str]:
        """What breaks the gate."""
        found = []
        if self.local_bytes or self.local_accesses:
            found.append(f"{self.name} spills ({self.local_accesses} accesses of local memory)")
        if self.stack_bytes:
            found.append(f"{self.name} has a stack of {self.stack_bytes} bytes")
        if self.name in PRODUCTS and not self.wgmma:
            found.append(f"{self.name} has no warpgroup product")
        return found


def cuobjdump() -> str | None:
    """The program, of triton's wheel or of the toolkit."""
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        program = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        if program.exists():
            return str(program)
    return shutil.which("cuobjdump")


def kernels(library: Path = native_library.LIBRARY) -> list[Kernel]:
    program = cuobjdump()
    assert program is not None, "needs cuobjdump"

    def dump(option: str) -> str:
        command = [program, option, str(library)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    code = dict(_by_function(dump("-sass"), r"^[ \t]*Function : (\S+)"))
    found = []
    for symbol, text in _by_function(dump("-res-usage"), r"^[ \t]*Function (\S+):"):
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
        instructions = code[symbol]
        found.append(
            Kernel(
                name_of(symbol),
                int(usage["REG"]),
                int(usage["STACK"]),
                int(usage["LOCAL"]),
                len(re.findall(r"\b(?:STL|LDL)\b", instructions)),
                len(re.findall(r"\b[HQ]GMMA\b", instructions)),
            )
        )
    return sorted(found, key=lambda kernel: kernel.name)


def name_of(symbol: str) -> str:
    """The kernel's name in csrc/, from the linker's."""
    epilogue = EPILOGUE.search(symbol)
    if epilogue:
        store, scaled = epilogue.groups()
        return "head_forward" + "_store" * (store == "1") + "_e4m3" * (scaled == "1")
    kernel = KERNEL.search(symbol)
    assert kernel is not None, symbol
    return kernel[1] + {"1": " entropy"}.get(kernel[2], "")


def _by_function(text: str, heading: str) -> list[tuple[str, str]]:
    parts = re.split(heading, text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench cuda_code", description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write")
    chosen = parser.parse_args(arguments)
    problem = cuda_support.build_problem()
    if problem is None and cuobjdump() is None:
        problem = "needs cuobjdump (pip install triton, or the CUDA toolkit)"
    if problem is not None:
        print(f"cuda {problem}")
        return 2
    found = kernels()
    print(f"{'kernel':32} {'regs':>4} {'local':>5} {'stack':>5} {'wgmma':>5}")
    for k in found:
        print(f"{k.name:32} {k.registers:4} {k.local_bytes:5} {k.stack_bytes:5} {k.wgmma:5}")
    faults = [fault for kernel in found for fault in kernel.faults()]
    if chosen.json:
        record = {"target": "sm_90a", "kernels": [asdict(kernel) for kernel in found]}
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(faults) or "no spill, no stack, warpgroup products in every logits product")
    return 1 if faults else 0
