"""Triton's interpreter: tests in a process of their own, and what Liger's kernels need of it.

Triton reads TRITON_INTERPRET when it is imported, and the rest of the suite needs it unset: the
ahead-of-time gate compiles the same kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_interpreted(file: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output of pytest on the file."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [*command, str(file), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
    )
    return done.returncode, done.stdout + done.stderr


def interpret_liger() -> None:
    """Gives Liger's kernels what the compiler gives them and the interpreter of triton 3.7.1 does
    not: float arguments as float32 tensors, for they call `.to` on them, and an rsqrt (libdevice's
    is an empty declaration)."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats_too(argument: object) -> object:
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = convert_floats_too
    rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)  # looked up late: a launch patches tl
