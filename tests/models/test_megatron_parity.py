"""The Megatron backend on two and four processes against the Hugging Face backend on one: weights,
log-probs, loss, every gradient, three updates. `pytest -m matrix` runs every combination."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import megatron_cases as cases
import pytest
import torch

from flowrl.models.hf_backend import HFBackend
from flowrl.parallel import Parallel

# Measured at most: log-probs 1.2e-6, loss 9e-7, gradients 7e-6 relative, weights 3e-7.
LIMITS = {
    "weights_in_and_out": 0.0,
    "loss": 1e-5,
    "gradients": 5e-5,
    "grad_norm": 1e-5,
    "lr": 1e-12,
    "trained_weights": 1e-5,
}
LOGPROBS = 1e-5
pytestmark = pytest.mark.timeout(900)  # up to four processes each, on two cores
METRICS = 1e-3  # squares of residuals of up to 15


def write_expected(folder: Path, case: cases.Case) -> None:
    """The model and what one process of the Hugging Face backend makes of it."""
    directory = folder / case.model
    if directory.exists():
        return
    cases.make_model(directory, case.family, case.tied, layers=case.layers)
    config = cases.config_of({}, "hf")
    alone = Parallel(0, 1, torch.device("cpu"))
    backend = HFBackend(config, directory, cases.objective().needs, alone)
    packed = cases.batch()
    scores = backend.logprobs([packed], entropy=True)
    expected = {
        "weights": {n: p.clone() for n, p in backend.named_weights()},
        "logprobs": scores.logprobs,
        "entropy": scores.entropy,
        "updates": [],
    }
    for _ in range(case.updates):
        output = backend.forward_backward(cases.microbatches(packed), cases.objective())
        grads = {n: p.grad.clone() for n, p in backend.params.items() if p.grad is not None}
        info = backend.step()
        expected["updates"].append(
            {
                "loss": output.loss, "logprobs": output.logprobs, "metrics": output.metrics,
                "gradients": grads, "grad_norm": info.grad_norm, "lr": info.lr,
            }
        )  # fmt: skip
    expected["trained"] = {n: p.clone() for n, p in backend.named_weights()}
    torch.save(expected, folder / f"{case.model}.pt")


def launch(folder: Path, wanted: list[cases.Case], processes: int) -> dict[str, dict[str, float]]:
    for case in wanted:
        write_expected(folder, case)
    listed, out = folder / f"cases{processes}.json", folder / f"report{processes}.json"
    listed.write_text(cases.to_json(wanted))
    worker = Path(__file__).with_name("megatron_worker.py")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(processes), str(worker), str(folder), str(listed), str(out),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(worker.parent.parent)}
    if any(case.liger for case in wanted):
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=840, check=False,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def too_far(found: dict[str, float]) -> dict[str, float]:
    """The differences past their limit."""

    def limit(name: str) -> float:
        return LIMITS.get(name, METRICS if name.startswith("metric_") else LOGPROBS)

    return {name: value for name, value in found.items() if not value <= limit(name)}


def check(report: dict[str, dict[str, float]], wanted: list[cases.Case]) -> None:
    for case in wanted:
        if not case.breaks:
            assert not too_far(report[case.name]), case.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("megatron")


HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None


@pytest.fixture(scope="module")
def two(folder):
    return launch(folder, [*cases.TWO, *[cases.LIGER] * HAS_LIGER], 2)


def test_two_processes_compute_what_one_does(two):
    check(two, cases.TWO)


@pytest.mark.skipif(not HAS_LIGER, reason="liger-kernel is not installed")
def test_two_processes_with_ligers_layers_compute_what_one_does(two):
    check(two, [cases.LIGER])


@pytest.mark.parametrize("case", [c for c in cases.TWO if c.breaks], ids=lambda c: c.breaks)
def test_the_comparison_sees_a_gradient_that_is_not_summed(two, case):
    """A norm without the flag of sequence parallelism; a head whose ranks do not add up."""
    assert two[case.name]["gradients"] > 1e-2
    assert "loss" not in too_far(two[case.name])


def test_four_processes_compute_what_one_does(folder):
    check(launch(folder, cases.FOUR, 4), cases.FOUR)


@pytest.mark.matrix
@pytest.mark.parametrize(("wanted", "processes"), [(cases.ALL_TWO, 2), (cases.ALL_FOUR, 4)])
def test_every_layout_of_every_family(folder, wanted, processes):
    check(launch(folder, wanted, processes), wanted)
