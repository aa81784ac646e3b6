"""Interleaved timing, peak memory, this machine's own matrix-product rate, and what it is."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from flowrl_kernels.head.chunks import DEFAULT_LOGITS_BYTES
from flowrl_kernels.head.products import is_mixed
from torch import Tensor

from bench.problems import Problem, Step

PROC = Path("/proc/self")


@dataclass(frozen=True)
class Timing:
    median_ms: float
    p20_ms: float
    p80_ms: float


def interleaved(
    steps: Mapping[str, Step], repeats: int, device: torch.device, calls: int = 1
) -> dict[str, Timing]:
    """`repeats` rounds of every step: a slow spell hits all of them alike. Each time the mean of
    `calls` in a row, with no wait of ours between them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                step()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: _timing(values) for name, values in seconds.items()}


def _timing(seconds: list[float]) -> Timing:
    quantiles = torch.tensor(seconds, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    )
    return Timing(*(round(1e3 * float(q), 4) for q in quantiles))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_bytes(step: Step, device: torch.device) -> int | None:
    """Peak memory during a call beyond what stood before it and what it returns. On a CPU the
    kernel's own high-water mark of the process; None where it cannot be reset."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        returned = _bytes(step())
        return torch.cuda.max_memory_allocated(device) - before - returned
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc keeps freed blocks of up to 32 MB, which would look free of charge
        trim(0)
    try:
        (PROC / "clear_refs").write_text("5")  # the high-water mark falls to what is resident
    except OSError:
        return None
    before = _resident("VmRSS")
    returned = _bytes(step())
    return max(_resident("VmHWM") - before - returned, 0)


def _bytes(found: dict[str, Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in found.values())


def _resident(field: str) -> int:
    for line in (PROC / "status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/self/status must have {field}; run on Linux")


def bare_products(problem: Problem, backward: bool) -> Step:
    """The products alone, in as few chunks as a backend that stores logits could take: what 100%
    is.

    In the operands' own dtype; on a CPU low precision is raised to float32 first, as there."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    device, vocab = hidden.device, weight.shape[0]
    mixed = is_mixed(hidden.dtype, device)
    if not mixed:
        hidden, weight = hidden.float(), weight.float()
    row_bytes = vocab * hidden.element_size()
    rows = min(max(DEFAULT_LOGITS_BYTES[device.type] // row_bytes, 1), hidden.shape[0])
    pieces = -(-hidden.shape[0] // rows)
    cuts = [hidden.shape[0] * i // pieces for i in range(pieces + 1)]
    height = max(stop - start for start, stop in pairwise(cuts))
    buffer = torch.empty(height, vocab, dtype=hidden.dtype, device=device)
    dhidden = torch.empty_like(hidden)
    dweight = torch.empty(weight.shape, device=device)

    def run() -> dict[str, Tensor]:
        for i in range(pieces):
            part = slice(cuts[i], cuts[i + 1])
            out = buffer[: cuts[i + 1] - cuts[i]]
            torch.mm(hidden[part], weight.T, out=out)
            if not backward:
                continue
            torch.mm(out, weight, out=dhidden[part])
            if mixed:
                beta = int(i > 0)
                torch.addmm(
                    dweight, out.T, hidden[part], out_dtype=torch.float32, beta=beta, out=dweight
                )
            else:
                dweight.addmm_(out.T, hidden[part], beta=int(i > 0))
        return {"dhidden": dhidden, "dweight": dweight}

    return run


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, versions and commit; neither a host's name nor a path."""
    record = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {"gpu": properties.name, "cuda": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=clocks.max.sm,driver_version", "--format=csv,noheader"]
        record["gpu_clock_and_driver"] = _output(query).split("\n")[0]
    return record


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _commit() -> str:
    root = Path(__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    return _output(command)


def _output(command: list[str]) -> str:
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no such program here
        return "unknown"
    return found.stdout.strip() or "unknown"
