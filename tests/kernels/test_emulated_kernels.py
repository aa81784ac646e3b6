"""The CUDA kernels, but for the logits product, on the processor: see emulated_device.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_device import CSRC, toolkit_headers

HERE = Path(__file__).parent

if shutil.which("c++") is None or toolkit_headers() is None:
    pytest.skip("needs a C++ compiler and the CUDA toolkit's headers", allow_module_level=True)


def run_emulated(*arguments: str, change: str = "=>") -> tuple[int, str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(HERE), "EMULATED_CHANGE": change}
    command = [sys.executable, "-m", "pytest", "-p", "emulated_device", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-W", "ignore", *map(str, sorted(HERE.glob("on_cuda_*.py"))), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=HERE.parent.parent,
    )
    return done.returncode, done.stdout + done.stderr


def test_on_the_processor():
    status, output = run_emulated()
    assert status == 0, output
    assert int(re.findall(r"(\d+) passed", output)[0]) >= 90, output


def test_a_wrong_kernel_fails():
    """Negative control: the merge loses one of its lists of tiles."""
    line = "for (int list = 1; list"
    assert line in (CSRC / "linear_logprobs.cu").read_text()
    change = f"{line}=>{line.replace('1', '2')}"
    status, output = run_emulated("-k", "test_error_budget and 257-65", change=change)
    assert status == 1, output
    assert "lse: error" in output or "logprobs: error" in output
