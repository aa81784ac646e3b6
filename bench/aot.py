"""Compiles every Triton kernel for sm_90 at its production block sizes, on any machine.

    python -m bench aot [--json FILE]

Prints what the assembler and the machine code say: registers a thread, spilled bytes (LOCAL),
stack, shared memory, HGMMA (or QGMMA, FP8) instructions. Needs triton and no GPU. Runs nothing:
neither speed nor results follow from it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from flowrl_kernels.head import triton_head, triton_kernels
from flowrl_kernels.trajectory_balance import triton_kernels as balance
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SM_90 = GPUTarget("cuda", 90, 32)
SHARED_LIMIT_BYTES = 227 << 10  # of one block
MODELS = {"qwen2.5-7b": (3584, 152064), "qwen2.5-32b": (5120, 152064)}  # D, V
# triton 3.6 leaves stacks of 8 and 128 bytes that its spill count does not explain; 3.7 none.
STACK_COUNTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TYPES[triton_head.FP8] = "fp8e4nv"


@dataclass(frozen=True)
class Variant:
    """One compilation: types by argument name (None: an absent tensor), compile-time arguments."""

    name: str
    kernel: Any
    types: dict[str, str | None]
    constants: dict[str, Any]
    strides: dict[str, int]  # whole numbers whose divisibility by 16 the launcher passes on
    gemm: bool = False


@dataclass(frozen=True)
class Compiled:
    name: str
    registers: int
    local_bytes: int
    stack_bytes: int
    shared_bytes: int
    hgmma: int
    gemm: bool

    def faults(self) -> list[str]:
        """What breaks the gate."""
        found = []
        if self.local_bytes:
            found.append(f"{self.name} spills {self.local_bytes} bytes")
        if self.stack_bytes and STACK_COUNTS:
            found.append(f"{self.name} has a stack of {self.stack_bytes} bytes")
        if self.shared_bytes > SHARED_LIMIT_BYTES:
            found.append(f"{self.name} needs {self.shared_bytes} bytes of shared memory")
        if self.gemm and not self.hgmma:
            found.append(f"{self.name} has no warpgroup product")
        return found


def head_variants() -> Iterator[Variant]:
    for model, (dim, vocab) in MODELS.items():
        for store, entropy, tma in (
            (0, 0, 1),
            (0, 1, 1),
            (1, 0, 1),
            (1, 1, 1),
            (0, 0, 0),
            (1, 0, 0),
        ):
            for dtype in (torch.bfloat16, torch.float16):
                if dtype == torch.bfloat16 or (store, entropy, tma) == (1, 0, 1):
                    yield forward(model, dim, vocab, dtype, bool(store), bool(entropy), bool(tma))
        yield forward(model, dim, vocab, triton_head.FP8, False, False, True)
        yield forward(model, dim, vocab, triton_head.FP8, False, True, True)
        yield forward(model, dim, vocab, torch.float32, True, False, True)


def forward(
    model: str, dim: int, vocab: int, dtype: torch.dtype, store: bool, entropy: bool, tma: bool
) -> Variant:
    tiles = triton_head.tiles_for(dtype, store, torch.device("cuda"))
    fp8 = dtype == triton_head.FP8
    kind = TYPES[dtype]
    stored = "bf16" if dtype == torch.bfloat16 else "fp32"
    operand = f"tensordesc<{kind}[{{}}, {tiles.block_d}]>" if tma else f"*{kind}"
    options = triton_head.launch_options(tiles, dtype, tma, store, entropy)
    types: dict[str, str | None] = {
        "x": operand.format(tiles.block_t),
        "w": operand.format(tiles.block_v),
        "x_scale_ptr": "*fp32" if fp8 else None,
        "w_scale_ptr": "*fp32" if fp8 else None,
        "target_ptr": "*i64",
        "out_ptr": f"*{stored}" if store else None,
        "tile_sum_z_ptr": "*fp32" if entropy else None,
        "scale": "fp32",
    }
    traits = [
        kind,
        "store" if store else "",
        "entropy" if entropy else "",
        "" if tma else "pointers",
    ]
    name = f"head_fwd {model} " + " ".join(t for t in traits if t)
    strides = {"dim": dim, "x_stride": dim, "w_stride": dim, "out_stride": vocab}
    strides["num_columns"] = vocab
    gemm = dtype != torch.float32
    return Variant(name, triton_kernels._head_fwd_kernel, types, options, strides, gemm)


def other_variants() -> Iterator[Variant]:
    block_v = triton_head.tiles_for(torch.bfloat16, True, torch.device("cuda")).block_v
    for entropy in (False, True):
        suffix = " entropy" if entropy else ""
        of_entropy = "*fp32" if entropy else None
        merge = triton_kernels._merge_kernel
        types: dict[str, str | None] = {"tile_sum_z_ptr": of_entropy}
        constants = {**triton_head.MERGE, "ENTROPY": entropy}
        yield Variant(f"merge{suffix}", merge, types, constants, {})
        types = {"out_ptr": "*bf16", "slope_ptr": of_entropy, "column_ptr": "*i64"}
        constants = {**triton_head.DLOGITS, "BLOCK_V": block_v, "ENTROPY": entropy}
        strides = {"out_stride": 152064, "num_columns": 152064}
        yield Variant(f"dlogits{suffix}", triton_kernels._dlogits_kernel, types, constants, strides)
    types = {"x_ptr": "*bf16", "q_ptr": "*fp8e4nv"}
    quantize = triton_kernels._quantize_rows_kernel
    yield Variant("quantize_rows", quantize, types, triton_head.QUANTIZE, {"x_stride": 5120})
    flags = ("HAS_OLD", "HAS_MASK", "HAS_LOW", "HAS_HIGH", "LENGTH_NORM")
    for on in (True, False):
        types = {
            "old_ptr": "*fp32" if on else None,
            "cu_seqlens_ptr": "*i32",
            "mask_ptr": "*u8" if on else None,
            "num_tokens_ptr": "*i64",
            "terms_ptr": "*fp64",
            "arrived_ptr": "*i32",
            **dict.fromkeys(("beta", "log_low", "log_high", "scale"), "fp32"),
        }
        sizes = {"BLOCK": balance.BLOCK_TOKENS, "BLOCK_N": balance.BLOCK_SEQUENCES}
        constants = {**dict.fromkeys(flags, on), **sizes}
        name = "trajectory_balance" + (" every option" if on else " plain")
        yield Variant(name, balance._trajectory_balance_kernel, types, constants, {})


def variants() -> list[Variant]:
    return [*head_variants(), *other_variants()]


def compile_variant(variant: Variant) -> Compiled:
    kernel = variant.kernel
    types: dict[str, str] = {}
    constants = dict(variant.constants)
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
    for name in kernel.arg_names:
        kind = variant.types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        if name in constants or kind is None:
            constants.setdefault(name, None)
            kind = "constexpr"
        types[name] = kind
    divisible = [name for name, value in variant.strides.items() if value % 16 == 0]
    divisible += [name for name, kind in types.items() if kind.startswith("*")]
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in divisible
        if types[name] != "constexpr"
    }
    source = ASTSource(kernel, types, constants, attributes)
    compiled = triton.compile(source, target=SM_90, options=options)
    return inspect_binary(variant, compiled.asm["cubin"], compiled.metadata.shared)


def inspect_binary(variant: Variant, cubin: bytes, shared_bytes: int) -> Compiled:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(name: str, *arguments: str) -> str:
            command = [str(tools / name), *arguments, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(
            re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "--dump-resource-usage"))
        )
        code = tool("nvdisasm", "-c")
    return Compiled(
        variant.name,
        int(usage["REG"]),
        int(usage["LOCAL"]),
        int(usage["STACK"]),
        shared_bytes,
        len(re.findall(r"\b[HQ]GMMA\b", code)),
        variant.gemm,
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench aot", description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--only", default="", help="part of the names to compile")
    chosen = parser.parse_args(arguments)
    results = []
    print(f"triton {triton.__version__}, sm_90")
    print(f"{'kernel':44} {'regs':>4} {'local':>5} {'stack':>5} {'shared':>7} {'wgmma':>5}")
    for variant in variants():
        if chosen.only not in variant.name:
            continue
        c = compile_variant(variant)
        results.append(c)
        print(
            f"{c.name:44} {c.registers:4} {c.local_bytes:5} {c.stack_bytes:5} "
            f"{c.shared_bytes:7} {c.hgmma:5}",
            flush=True,
        )
    faults = [fault for result in results for fault in result.faults()]
    if chosen.json:
        record = {"triton": triton.__version__, "target": "sm_90"}
        chosen.json.write_text(
            json.dumps({**record, "kernels": [asdict(r) for r in results]}, indent=1) + "\n"
        )
    sound = "no spill, " + "no stack, " * STACK_COUNTS + "shared memory within 227 KiB"
    print("\n".join(faults) or sound)
    return 1 if faults else 0
