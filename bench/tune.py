"""python -m bench tune [--shape qwen2.5-7b] [--json FILE]: tiles of the forward kernel, on a GPU.

Times _head_fwd_kernel with and without the store for each candidate. Nothing is picked at run time:
read the table, then write the best into tiles_for (kernels/flowrl_kernels/head/triton_head.py).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.problems import Shape, make

BLOCKS = {  # dtype -> (block_t, block_v, block_d, num_warps, stages)
    "bfloat16": [
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (256, 128, 64, 8, 3),
        (256, 128, 64, 8, 4),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 3),
    ],
    "fp8": [(128, 128, 128, 8, 4), (128, 256, 128, 8, 3), (128, 128, 128, 4, 4)],
}
GROUPS = (8, 16, 32)


def candidates(kind: str) -> list[Any]:
    from flowrl_kernels.head.triton_head import Tiles

    return [Tiles(t, v, d, g, warps, s) for t, v, d, warps, s in BLOCKS[kind] for g in GROUPS]


def measure_tiles(shape: Shape, kind: str, store: bool, repeats: int) -> list[dict[str, Any]]:
    from flowrl_kernels.head import triton_head

    device = torch.device("cuda")
    problem = make(shape, torch.bfloat16, device, "random")
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    scales: tuple[Any, Any] = (None, None)
    if kind == "fp8":
        (hidden, of_rows), (weight, of_columns) = map(triton_head.quantize_rows, (hidden, weight))
        scales = (of_rows, of_columns)
    out = (
        torch.empty(shape.rows, shape.vocab, dtype=torch.bfloat16, device=device) if store else None
    )
    original, results = triton_head.tiles_for, []
    first: dict[str, torch.Tensor] = {}
    rtol = 1e-2 if kind == "fp8" else 1e-3  # FP8 products keep 14 bits within a block_d
    for tiles in candidates(kind):
        triton_head.tiles_for = lambda *_, tiles=tiles: tiles

        def step() -> dict[str, torch.Tensor]:
            found = triton_head.head_statistics(
                hidden, weight, problem.targets, out, *scales, 1.0, 0, False
            )
            return {"row_max": found[0], "sum_exp": found[1]}

        try:
            found = step()
            first = first or found
            for name, value in found.items():
                torch.testing.assert_close(value, first[name], rtol=rtol, atol=1e-3, msg=name)
            timing = measure.interleaved({"": step}, repeats, device)[""]
            outcome = {"tflops": shape.flops(False) / timing.median_ms / 1e9, **asdict(timing)}
        # A candidate may need more shared memory than there is: its line says so.
        except Exception as error:
            outcome = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
        results.append({"kind": kind, "store": store, **asdict(tiles), **outcome})
        print(results[-1], flush=True)
    triton_head.tiles_for = original
    return results


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    parser.add_argument("--shape", default="qwen2.5-7b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune needs a CUDA GPU")
        return 2
    shape = Shape.parse(options.shape)
    results = []
    for kind, store in (("bfloat16", False), ("bfloat16", True), ("fp8", False)):
        results += measure_tiles(shape, kind, store, options.repeats)
        if options.json:  # also what was measured before the device was lost
            record = {"shape": asdict(shape), "machine": measure.machine(torch.device("cuda"))}
            options.json.write_text(json.dumps({**record, "tiles": results}, indent=1) + "\n")
    return 0
