"""The benchmarks themselves: the gate refuses what is wrong, and compare sees what got worse."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from bench import compare, measure, problems, run, table
from bench.problems import Shape
from bench.providers import Provider, Unavailable, providers

CPU = torch.device("cpu")
TINY = Shape.parse("24x8x61")


def bench(capsys, tmp_path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    common = ["--device", "cpu", "--dtype", "float32", "--repeats", "2", "--json", str(out)]
    assert run.main([*arguments, *common]) == 0
    return {**json.loads(out.read_text()), "printed": capsys.readouterr().out}


@pytest.mark.parametrize("inputs", ["random", "peaked"])
def test_policy_loss(capsys, tmp_path, inputs):
    arguments = ("policy_loss", "--shape", "24x8x61", "--inputs", inputs)
    record = bench(capsys, tmp_path, *arguments, "--providers", "flowrl,torch one,verl,liger FLCE")
    rows = {row["provider"]: row for row in record["providers"]}
    ours = rows["flowrl torch one pass"]
    assert ours["wrong"] is None
    assert ours["errors"].keys() == {"logprobs", "loss", "dhidden", "dweight"}
    assert ours["of_gemm"] == pytest.approx(
        rows["bare products"]["timing"]["median_ms"] / ours["timing"]["median_ms"], abs=1e-4
    )
    assert ours["tflops"] == pytest.approx(
        6 * 24 * 8 * 61 / ours["timing"]["median_ms"] / 1e9, abs=1e-4
    )
    assert "runs on CUDA" in rows["verl"]["skipped"]
    assert "no per-token" in rows["liger FLCE"]["skipped"]
    assert record["inputs"] == inputs
    assert "commit" in record["machine"]
    assert "flowrl torch one pass" in record["printed"]


def test_forward_alone_and_trajectory_balance(capsys, tmp_path):
    arguments = ("linear_logprobs", "--shape", "24x8x61", "--pass", "forward")
    record = bench(capsys, tmp_path, *arguments, "--providers", "flowrl,F.linear")
    rows = {row["provider"]: row for row in record["providers"]}
    assert rows["flowrl torch log-probs"]["errors"].keys() == {"logprobs"}
    assert rows["F.linear_cross_entropy"]["skipped"]
    record = bench(capsys, tmp_path, "trajectory_balance", "--providers", "torch")
    assert [row["wrong"] for row in record["providers"]] == [None]
    assert record["bytes"] == 18 * record["tokens"]
    assert "| flowrl torch | " in table.markdown(record)


def test_table_and_plot(capsys, tmp_path):
    arguments = ("policy_loss", "--shape", "24x8x61", "--providers", "flowrl torch,verl")
    record = bench(capsys, tmp_path, *arguments)
    figure = tmp_path / "bars.svg"
    assert table.main([str(tmp_path / "out.json"), "--plot", str(figure)]) == 0
    printed = capsys.readouterr().out.splitlines()
    ours = next(line for line in printed if "flowrl torch one pass" in line)
    timing = next(r for r in record["providers"] if "one pass" in r["provider"] and r["timing"])
    assert f"{timing['timing']['median_ms']:.4g} (" in ours
    assert printed[-1].startswith("Skipped, with the reason in the file: ")
    assert "verl" in printed[-1]
    assert "<svg" in figure.read_text()


def test_inputs_have_the_entropy_they_are_named_for():
    probability = {}
    for inputs in ("random", "peaked"):
        problem = problems.make(Shape.parse("200x256x1000"), torch.float32, CPU, inputs)
        truth = problems.solve(problem, mean=True)
        probability[inputs] = float(truth.logprobs.exp().median())
    assert probability["random"] < 0.01
    assert probability["peaked"] > 0.5


@pytest.mark.parametrize("mean", [True, False])
def test_truth_is_that_of_autograd(mean):
    problem = problems.make(TINY, torch.float64, CPU, "random")
    truth = problems.solve(problem, mean)
    log_p = (problem.hidden @ problem.weight.T).log_softmax(-1)
    logprobs = log_p.gather(1, problem.targets[:, None])[:, 0]
    loss = -logprobs.mean() if mean else problem.loss(logprobs)
    loss.backward()
    found = {"logprobs": logprobs, "loss": loss, "dhidden": problem.hidden.grad}
    found["dweight"] = problem.weight.grad
    for name, error in problems.errors(truth, found).items():  # type: ignore[arg-type]
        assert error < 1e-6, name


@pytest.mark.parametrize("wrong", ["dhidden", "dweight", "logprobs", "loss"])
@pytest.mark.parametrize("change", [1.01, float("nan")])
def test_the_gate_refuses_a_wrong_provider(wrong, change):
    """Negative control: results off by a hundredth, or NaN, are not timed."""
    problem = problems.make(TINY, torch.float32, CPU, "random")
    truth = problems.solve(problem, mean=True)
    good = providers("linear_logprobs", True)["torch"]

    class Wrong:
        limits = ""

        def step(self, *arguments):
            step = good.step(*arguments)

            def run():
                found = step()
                return {**found, wrong: found[wrong] * change}

            return run

    for provider, passes in ((good, True), (Wrong(), False)):
        row = run.Row("x")
        step = run.attempt(row, provider, "linear_logprobs", True, problem, truth)
        assert (step is not None) == passes
        assert (row.wrong is None) == passes


def test_a_peer_that_breaks_is_skipped_and_ours_is_wrong():
    problem = problems.make(TINY, torch.float32, CPU, "random")
    truth = problems.solve(problem, mean=True)

    def absent(device, problem):
        raise Unavailable("No module named 'peer'; pip install peer")

    def broken(device, problem):
        raise RuntimeError("no such kernel")

    for make, name, reason in ((absent, "peer", "pip install"), (broken, "peer", "no such kernel")):
        row = run.Row(name)
        provider = Provider(name, "logprobs", make)
        assert run.attempt(row, provider, "linear_logprobs", True, problem, truth) is None
        assert row.skipped is not None
        assert reason in row.skipped
    provider, row = Provider("flowrl x", "logprobs", broken), run.Row("flowrl x")
    assert run.attempt(row, provider, "linear_logprobs", True, problem, truth) is None
    assert row.skipped is None
    assert row.wrong == "RuntimeError: no such kernel"


def test_what_was_measured_before_a_crash_is_written(monkeypatch, tmp_path):
    def lost(*arguments):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(run.measure, "interleaved", lost)
    arguments = ["policy_loss", "--shape", "64x16x50", "--providers", "=torch", "--device", "cpu"]
    with pytest.raises(RuntimeError, match="the device is gone"):
        run.main([*arguments, "--json", str(tmp_path / "out.json")])
    record = json.loads((tmp_path / "out.json").read_text())
    assert [row["provider"] for row in record["providers"]] == ["bare products", "torch"]
    assert record["providers"][1]["errors"]["dhidden"] < 1e-4


def test_only_what_says_that_it_is_inexact_has_a_wider_gate():
    problem = problems.make(TINY, torch.bfloat16, CPU, "random")
    truth = problems.solve(problem, mean=True)
    good = _naive_off_by(0.5)
    for limits, passes in (("", False), ("inexact", True)):
        row, provider = run.Row("x"), Provider("x", "logprobs", good, limits)
        step = run.attempt(row, provider, "linear_logprobs", False, problem, truth)
        assert (step is not None) == passes


def _naive_off_by(shift):
    def make(device, problem):
        def head(hidden, weight, targets):
            logprobs = (hidden.float() @ weight.float().T).log_softmax(-1)
            return logprobs.gather(1, targets[:, None])[:, 0] + shift

        return head

    return make


def test_extra_memory_is_seen():
    size = 96 << 20

    def step() -> dict[str, torch.Tensor]:
        passing = torch.ones(size // 4)
        return {"kept": passing + 1}

    extra = measure.extra_bytes(step, CPU)
    if extra is None:
        pytest.skip("this system does not reset the high-water mark of a process")
    assert 0.9 * size < extra < 1.5 * size  # what passes, without what is returned


RECORD = {
    "benchmark": "policy_loss",
    "providers": [
        {
            "provider": "flowrl torch",
            "timing": {"median_ms": 10.0},
            "of_gemm": 0.8,
            "extra_bytes": 100 << 20,
        },
        {"provider": "verl", "timing": None, "of_gemm": None, "extra_bytes": None},
    ],
}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"of_gemm": 0.75}, None),
        ({"of_gemm": 0.7}, "1.14 times the baseline's time"),
        ({"of_gemm": None, "timing": {"median_ms": 12.0}}, "1.20 times"),
        ({"extra_bytes": 200 << 20}, "210 MB extra, was 105"),
        ({"timing": None}, "was timed, now is not"),
    ],
)
def test_compare(tmp_path, capsys, change, complaint):
    new = copy.deepcopy(RECORD)
    new["providers"][0].update(change)
    for name, record in (("old", RECORD), ("new", new)):
        (tmp_path / name).write_text(json.dumps(record))
    status = compare.main([str(tmp_path / "old"), str(tmp_path / "new")])
    assert status == int(complaint is not None)
    if complaint:
        assert complaint in capsys.readouterr().out


def test_compare_refuses_another_benchmark():
    with pytest.raises(ValueError, match="must be of one benchmark"):
        compare.compare(RECORD, {**RECORD, "benchmark": "x"}, 0.1)


def test_shapes():
    assert Shape.parse("qwen2.5-32b").dim == 5120
    with pytest.raises(ValueError, match="a shape is TxDxV"):
        Shape.parse("7b")
