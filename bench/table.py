"""python -m bench table FILE... [--plot OUT.svg]: JSON results as Markdown tables and bars."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def markdown(record: dict[str, Any]) -> str:
    """One table: a row for each provider that was timed, then a line on those that were not."""
    head = ["provider", "ms (p20-p80)"]
    if record["benchmark"] != "trajectory_balance":
        head += ["GFLOP/s", "of bare products"]
    head += ["extra MB", "error of log-probs", "of gradients"]
    lines = [f"**{title(record)}**", "", *(_line(cells) for cells in (head, ["---"] * len(head)))]
    timed = [row for row in record["providers"] if row["timing"]]
    lines += [_line(_cells(row, len(head) == 7)) for row in timed]
    wrong = [f"{row['provider']} ({row['wrong']})" for row in record["providers"] if row["wrong"]]
    skipped = [row["provider"] for row in record["providers"] if row["skipped"]]
    if wrong:
        lines += ["", "Refused by the gate: " + ", ".join(wrong) + "."]
    if skipped:
        lines += ["", "Skipped, with the reason in the file: " + ", ".join(skipped) + "."]
    return "\n".join(lines)


def _cells(row: dict[str, Any], products: bool) -> list[str]:
    timing, errors = row["timing"], dict(row["errors"])
    cells = [row["provider"]]
    cells.append(f"{timing['median_ms']:.4g} ({timing['p20_ms']:.4g}-{timing['p80_ms']:.4g})")
    of_logprobs = ""
    if products:
        cells += [f"{1e3 * row['tflops']:.4g}", f"{row['of_gemm']:.2f}"]
        of_logprobs = f"{errors.pop('logprobs'):.1e}" if "logprobs" in errors else ""
    cells.append("" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.0f}")
    gradients = [error for name, error in errors.items() if name != "loss"]
    return [*cells, of_logprobs, f"{max(gradients):.1e}" if gradients else ""]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def title(record: dict[str, Any]) -> str:
    machine = record["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    if record["benchmark"] == "trajectory_balance":
        count = f"{record['tokens']} tokens, {record['sequences']} sequences"
        return f"trajectory_balance, {count}, {where}"
    shape = record["shape"]
    size = f"T {shape['rows']}, D {shape['dim']}, V {shape['vocab']}, {record['dtype']}"
    passes = "forward" if record["pass"] == "forward" else "forward and backward"
    return f"{record['benchmark']}, {passes}, {size}, {record['inputs']} inputs, {where}"


def plot(records: list[dict[str, Any]], out: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(records), 1, figsize=(8, 2.6 * len(records)), squeeze=False)
    for axis, record in zip(axes[:, 0], records, strict=True):
        rows = [row for row in record["providers"] if row["timing"]][::-1]
        low = [row["timing"]["median_ms"] - row["timing"]["p20_ms"] for row in rows]
        high = [row["timing"]["p80_ms"] - row["timing"]["median_ms"] for row in rows]
        colors = ["tab:blue" if row["provider"].startswith("flowrl") else "silver" for row in rows]
        times = [row["timing"]["median_ms"] for row in rows]
        axis.barh([row["provider"] for row in rows], times, xerr=[low, high], color=colors)
        axis.set_title(title(record), fontsize=8)
        axis.set_xlabel("ms, median, bars p20 to p80")
    figure.tight_layout()
    figure.savefig(out)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench table", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path, help="figure to write")
    options = parser.parse_args(arguments)
    records = [json.loads(path.read_text()) for path in options.files]
    print("\n\n".join(markdown(record) for record in records))
    if options.plot:
        plot(records, options.plot)
    return 0
