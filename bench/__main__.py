"""python -m bench NAME ...: NAME picks the module, which takes the rest."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

# The checkout's kernels, also where the project is not installed.
sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))

BENCHMARKS = ("linear_logprobs", "policy_loss", "trajectory_balance")
OTHERS = ("aot", "cuda_code", "tune", "compare", "table", "weight_sync")


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in BENCHMARKS:
        from bench.run import main as run

        return run(arguments)
    if arguments and arguments[0] in OTHERS:
        return import_module(f"bench.{arguments[0]}").main(arguments[1:])
    print(f"usage: python -m bench {{{','.join(BENCHMARKS + OTHERS)}}} [--help]")
    return 0 if arguments in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
