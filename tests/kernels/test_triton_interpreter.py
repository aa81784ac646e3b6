"""The Triton tests in Triton's interpreter, each file in a process of its own. On a GPU run them as
they are: `python -m pytest tests/kernels/on_triton_*.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import run_interpreted

pytest.importorskip("triton", reason="the Triton backend needs triton (Linux, x86-64)")
HERE = Path(__file__).parent
FILES = sorted(HERE.glob("on_triton_*.py"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_in_the_interpreter(file):
    status, output = run_interpreted(file)
    assert status == 0, output
    assert int(re.findall(r"(\d+) passed", output)[0]) >= 3, output


def test_a_failure_there_is_a_failure_here(tmp_path):
    """Negative control: the child's failure reaches this process."""
    (tmp_path / "on_triton_broken.py").write_text("def test_broken():\n    assert 1 == 2\n")
    status, output = run_interpreted(tmp_path / "on_triton_broken.py")
    assert status == 1
    assert "1 failed" in output


def test_without_the_variable_a_cpu_call_is_refused():
    code = (
        "import torch; from flowrl_kernels import linear_logprobs as f\n"
        "x = torch.zeros(2, 3); t = torch.tensor([0, 1])\n"
        "try: f(x, x, t, backend='triton')\n"
        "except ValueError as error: print(error)\n"
        "import sys; print('triton' in sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert "runs on CUDA devices, not on cpu" in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout
    assert done.stdout.endswith("False\n"), "flowrl_kernels imports triton only when it is used"
