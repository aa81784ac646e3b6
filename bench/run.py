"""python -m bench linear_logprobs|policy_loss|trajectory_balance: the gate, then the clock.

    python -m bench policy_loss --shape qwen2.5-7b --dtype bfloat16 --json out.json
    python -m bench linear_logprobs --shape 1024x896x151936 --pass forward --providers torch,flowrl

A provider is timed only after its results agree with float64 (bench/problems.py, GATES). Calls of
all providers alternate. TFLOP/s count 2 T D V forward and 6 T D V with both gradients, whatever is
computed. "of GEMM" is the time of the bare products over a provider's time, in the same run.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import balance, measure
from bench.problems import Problem, Shape, Step, Truth, errors, make, refusal, solve
from bench.providers import Unavailable, providers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GEMM = "bare products"


@dataclass
class Row:
    provider: str
    limits: str = ""
    skipped: str | None = None
    wrong: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    extra_bytes: int | None = None
    timing: measure.Timing | None = None
    tflops: float | None = None
    of_gemm: float | None = None

    def fail(self, error: Exception) -> None:
        """A peer's failure is its own; one of ours is wrong, and `main` says so."""
        text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
        if self.provider.startswith("flowrl"):
            self.wrong = text
        else:
            self.skipped = text


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("benchmark")
    parser.add_argument("--shape", default="small", help="a name of bench/problems.py, or TxDxV")
    parser.add_argument("--pass", dest="passes", choices=("forward", "both"), default="both")
    parser.add_argument(
        "--providers", default="", help="parts of their names, comma separated; =NAME for all of it"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="")
    parser.add_argument("--inputs", choices=("random", "peaked"), default="random")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    record: dict[str, Any] = {
        "benchmark": options.benchmark,
        "device": device.type,
        "inputs": options.inputs,
        "repeats": options.repeats,
        "machine": measure.machine(device),
    }
    rows: list[Row] = []
    try:
        if options.benchmark == "trajectory_balance":
            record |= balance.run(device, options.repeats, options.providers, rows)
        else:
            shape = Shape.parse(options.shape)
            record |= {"shape": asdict(shape), "dtype": str(dtype).removeprefix("torch.")}
            record["pass"] = options.passes
            run(options, shape, dtype, device, rows)
        print_table(record, rows)
    finally:  # also what was measured before the device was lost
        if options.json and rows:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            record["providers"] = [asdict(row) for row in rows]
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(row.wrong for row in rows if row.provider.startswith("flowrl")))


def run(
    options: argparse.Namespace, shape: Shape, dtype: torch.dtype, device: torch.device,
    rows: list[Row],
) -> None:  # fmt: skip
    """Appends to `rows`."""
    backward = options.passes == "both"
    problem = make(shape, dtype, device, options.inputs)
    truth = solve(problem, mean=options.benchmark == "linear_logprobs")
    steps: dict[str, Step] = {GEMM: measure.bare_products(problem, backward)}
    rows.append(Row(GEMM))
    for name, provider in providers(options.benchmark, backward).items():
        if not wanted(name, options.providers):
            continue
        row = Row(name, provider.limits)
        rows.append(row)
        step = attempt(row, provider, options.benchmark, backward, problem, truth)
        if step is not None:
            steps[name] = step
    del truth
    steps[GEMM]()
    timings = measure.interleaved(steps, options.repeats, device)
    bare = timings[GEMM].median_ms
    for row in rows:
        row.timing = timings.get(row.provider)
        if row.timing is not None:
            row.tflops = round(shape.flops(backward) / row.timing.median_ms / 1e9, 4)
            row.of_gemm = round(bare / row.timing.median_ms, 4)


def wanted(name: str, providers: str) -> bool:
    return any(
        part[1:] == name if part.startswith("=") else part in name for part in providers.split(",")
    )


def attempt(
    row: Row, provider: Any, benchmark: str, backward: bool, problem: Problem, truth: Truth
) -> Step | None:
    """The step if the provider takes part and agrees with the truth; else the row says why not."""
    try:
        step = provider.step(benchmark, backward, problem)
        found = step()
        row.extra_bytes = measure.extra_bytes(step, problem.hidden.device)
    except Unavailable as reason:
        row.skipped = str(reason)
        return None
    # Anything may fail in any way, also inside its compiler: its row says so, the others go on.
    except Exception as error:
        row.fail(error)
        return None
    row.errors = {k: float(f"{v:.3g}") for k, v in errors(truth, found).items()}
    row.wrong = refusal(row.errors, problem.hidden.dtype, provider.limits == "inexact")
    return None if row.wrong else step


def print_table(record: dict[str, Any], rows: list[Row]) -> None:
    machine = record["machine"]
    print(f"{record['benchmark']} on {machine.get('gpu', machine['cpu'])}, {record['device']}")
    print({k: record[k] for k in ("shape", "dtype", "pass", "inputs") if k in record})
    head = ("provider", "ms", "p20", "p80", "TFLOP/s", "of GEMM", "extra MB", "errors")
    print("{:30} {:>9} {:>9} {:>9} {:>8} {:>7} {:>8}  {}".format(*head))
    for row in rows:
        if row.timing is None:
            why = f"wrong: {row.wrong}" if row.wrong else f"skipped: {row.skipped}"
            print(f"{row.provider:30} {why}")
            continue
        t = row.timing
        tflops = "" if row.tflops is None else f"{row.tflops:.3f}"
        share = "" if row.of_gemm is None else f"{row.of_gemm:.3f}"
        extra = "" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:.0f}"
        wrong = " ".join(f"{k} {v:.1e}" for k, v in row.errors.items())
        print(
            f"{row.provider:30} {t.median_ms:9.2f} {t.p20_ms:9.2f} {t.p80_ms:9.2f} "
            f"{tflops:>8} {share:>7} {extra:>8}  {wrong}"
        )
