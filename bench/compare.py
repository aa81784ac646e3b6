"""python -m bench compare BASELINE NEW [--tolerance 0.1]: fails where a provider got worse.

Compares two JSON files of one benchmark. Speed is compared as a share of the bare products of the
same run where both have it, so that another machine or a slow hour do not count as a change; else
as milliseconds. A provider that was timed in the baseline and is not any more fails too, and so
does one whose extra memory grew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SAME = ("benchmark", "shape", "dtype", "pass", "inputs", "device")
MEMORY_FLOOR_BYTES = 32 << 20  # below, allocators' own habits dominate


def compare(baseline: dict[str, Any], new: dict[str, Any], tolerance: float) -> list[str]:
    """One line for everything that got worse by more than `tolerance`, a fraction."""
    for key in SAME:
        if baseline.get(key) != new.get(key):
            raise ValueError(
                f"both files must be of one {key}, got {baseline.get(key)} and {new.get(key)}; "
                "run the benchmark with the baseline's options"
            )
    found = {row["provider"]: row for row in new["providers"]}
    worse = []
    for old in baseline["providers"]:
        name, row = old["provider"], found.get(old["provider"])
        if old["timing"] is None or old["of_gemm"] == 1.0:
            continue
        if row is None or row["timing"] is None:
            worse.append(f"{name}: was timed, now is not")
            continue
        slower = _slowdown(old, row)
        if slower > 1 + tolerance:
            worse.append(f"{name}: {slower:.2f} times the baseline's time")
        before, after = (r["extra_bytes"] or 0 for r in (old, row))
        if after > max(before * (1 + tolerance), before + MEMORY_FLOOR_BYTES):
            worse.append(f"{name}: {after / 1e6:.0f} MB extra, was {before / 1e6:.0f}")
    return worse


def _slowdown(old: dict[str, Any], new: dict[str, Any]) -> float:
    if old["of_gemm"] and new["of_gemm"]:
        return old["of_gemm"] / new["of_gemm"]
    return new["timing"]["median_ms"] / old["timing"]["median_ms"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="fraction, default 0.1")
    options = parser.parse_args(arguments)
    baseline, new = (json.loads(p.read_text()) for p in (options.baseline, options.new))
    worse = compare(baseline, new, options.tolerance)
    print("\n".join(worse) or f"nothing is more than {options.tolerance:.0%} worse")
    return 1 if worse else 0
