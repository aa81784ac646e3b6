"""Whole runs with the Megatron backend: the losses of one process, a killed rank, other layouts.

Adam's epsilon stands above rounding noise, which it would blow up to whole steps."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from arguments import as_args
from transformers import AutoModelForCausalLM

from flowrl.commands import export
from flowrl.settings import merge

pytestmark = pytest.mark.timeout(900)  # up to four processes each, on two cores

STEPS = 10
TP_PP = {"tensor": 2, "pipeline": 2}


def command(tiny, run_dir, layout=None, *more, **sections):
    settings = merge(
        tiny,
        {
            "run": {"dir": str(run_dir)},
            "trainer": {"steps": STEPS},
            "checkpoint": {"every": 5, "keep_last": 3},
            "optimizer": {"eps": 1e-3, "lr": 1e-3},
            "eval": {"num_prompts": 0},
            **sections,
        },
    )
    launcher = [sys.executable]
    if layout is not None:
        settings = merge(settings, {"model": {"backend": "megatron"}, "parallel": layout})
        count = layout.get("processes", layout.get("tensor", 1) * layout.get("pipeline", 1))
        nproc = ["--standalone", "--nproc-per-node", str(count)]
        launcher += ["-m", "torch.distributed.run", *nproc] if count > 1 else []
    learned = ["--objective.log_z", "learned"]
    return [*launcher, "-m", "flowrl", "train", *as_args(settings), *learned, *more]


def finish(args):
    done = subprocess.run(args, capture_output=True, text=True, timeout=480, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def rows(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


def samples(run_dir, step):
    text = (run_dir / f"samples/step_{step:06d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def assert_same(found, expected, rel=1e-4):
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        for name in ("actor/loss", "actor/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=rel), (one["step"], name)
        for name in ("actor/entropy", "actor/kl_ref", "reward/mean"):
            assert one[name] == pytest.approx(other[name], abs=1e-5), (one["step"], name)


@pytest.fixture(scope="module")
def recorded(tiny, base_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("recorded") / "run"
    finish(command(tiny, run_dir))
    return run_dir


@pytest.fixture(scope="module")
def replay(recorded):
    return {"rollout": {"engine": "replay", "replay_dir": str(recorded)}}


@pytest.fixture(scope="module")
def killed(tiny, recorded, replay, tmp_path_factory):
    """A run on 4 processes, of which the last is killed after the checkpoint of step 5."""
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    args = command(tiny, run_dir, TP_PP, **replay)
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(run_dir / "checkpoints/step_000005/manifest.json", process)
    victim = max(workers_of(process.pid))
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    _, errors = process.communicate(timeout=180)
    return run_dir, victim, process.returncode, time.monotonic() - start, errors


def wait_for(path, process):
    deadline = time.monotonic() + 360
    while not path.exists():
        assert process.poll() is None, process.stderr.read()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers_of(launcher):
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = [int(child) for child in children]
    assert len(found) == 4, found
    return found


def test_a_killed_rank_ends_the_job_within_a_minute_and_is_named(killed):
    _, victim, code, seconds, errors = killed
    assert code != 0
    assert seconds < 60
    assert f"Signal 9 (SIGKILL) received by PID {victim}" in errors


def test_a_resumed_run_has_the_losses_of_one_process(tiny, recorded, replay, killed):
    """Ten steps on replayed rollouts, the first five before the kill, at TP 2 x PP 2."""
    run_dir = killed[0]
    printed = finish(command(tiny, run_dir, TP_PP, "--resume", **replay))
    assert "resumed from step_000005" in printed
    assert_same(rows(run_dir), rows(recorded))


def copy_at_step_5(killed_run, run_dir):
    """Of the run when it was killed, whether or not it has gone on since."""
    subprocess.run(["cp", "-r", str(killed_run), str(run_dir)], check=True)
    for path in run_dir.glob("checkpoints/step_000010"):
        subprocess.run(["rm", "-r", str(path)], check=True)
    (run_dir / "report.html").unlink(missing_ok=True)
    return run_dir


@pytest.mark.matrix
def test_a_resumed_run_repeats_every_byte(tiny, replay, killed, tmp_path):
    """At the same layout, against a run that nobody interrupted."""
    finish(command(tiny, tmp_path / "whole", TP_PP, **replay))
    run_dir = copy_at_step_5(killed[0], tmp_path / "run")
    assert "resumed from step_000005" in finish(command(tiny, run_dir, TP_PP, "--resume", **replay))
    found, expected = (p / "metrics.jsonl" for p in (run_dir, tmp_path / "whole"))
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor": 1, "pipeline": 1, "processes": 2},
        pytest.param({"tensor": 1, "pipeline": 2}, marks=pytest.mark.matrix),
        pytest.param({"tensor": 1, "pipeline": 1}, marks=pytest.mark.matrix),
        pytest.param({"tensor": 4, "pipeline": 1}, marks=pytest.mark.matrix),
        pytest.param({"tensor": 2, "pipeline": 1, "processes": 4}, marks=pytest.mark.matrix),
    ],
)
def test_a_checkpoint_goes_on_at_another_layout(tiny, recorded, replay, killed, tmp_path, layout):
    """Written at TP 2 x PP 2; goes on as one process, with ranks, stages, replicas, or several."""
    run_dir = copy_at_step_5(killed[0], tmp_path / "run")
    printed = finish(command(tiny, run_dir, layout, "--resume", **replay))
    assert "resumed from step_000005" in printed
    assert_same(rows(run_dir), rows(recorded))
    resumed = json.loads((run_dir / "env.json").read_text())["resumes"][-1]
    processes = layout.get("processes", layout["tensor"] * layout["pipeline"])
    assert resumed["processes"] == processes
    assert resumed["world_size"] == processes // (layout["tensor"] * layout["pipeline"])


def test_sampling_does_not_depend_on_the_layout(tiny, recorded, tmp_path):
    """Rollouts of the first steps, drawn by one process of the replica with its weights."""
    run_dir = tmp_path / "run"
    finish(command(tiny, run_dir, {"tensor": 2, "sequence": True}, trainer={"steps": 2}))
    for step in (1, 2):
        for found, expected in zip(samples(run_dir, step), samples(recorded, step), strict=True):
            assert found["response_ids"] == expected["response_ids"]
            assert found["rollout_logprobs"] == pytest.approx(
                expected["rollout_logprobs"], abs=1e-5
            )
    assert_same(rows(run_dir), rows(recorded)[:2])


def test_a_split_policy_samples_ahead(tiny, tmp_path):
    """Two stages, the first of which samples in a thread, against one process that does."""
    ahead = {"rollout": {"max_staleness": 1}, "trainer": {"steps": 3}}
    finish(command(tiny, tmp_path / "one", **ahead))
    finish(command(tiny, tmp_path / "two", {"pipeline": 2}, **ahead))
    found, expected = rows(tmp_path / "two"), rows(tmp_path / "one")
    assert_same(found, expected)
    assert [row["rollout/staleness"] for row in found] == [0, 1, 1]
    for step in (1, 2, 3):
        one, two = (samples(tmp_path / name, step) for name in ("one", "two"))
        assert [row["response_ids"] for row in one] == [row["response_ids"] for row in two]
        assert {row["policy_version"] for row in two} == {max(0, step - 2) * 2}


def exported(run_dir, out, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes)]
    finish([*launcher, "-m", "flowrl", "export", str(run_dir), "--hf", str(out)])
    return AutoModelForCausalLM.from_pretrained(out)


def test_an_export_on_one_process_is_what_the_split_run_trained(recorded, killed, tmp_path):
    """Twenty updates apart, so rounding has grown; the export itself is exact (below)."""
    export.run(recorded, tmp_path / "one", {})
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    models = exported(killed[0], tmp_path / "split"), one
    split, one = (model(torch.arange(3, 15)[None]).logits.log_softmax(-1) for model in models)
    torch.testing.assert_close(split, one, atol=1e-3, rtol=0)


@pytest.mark.matrix
def test_an_export_does_not_depend_on_the_processes_that_read_the_checkpoint(killed, tmp_path):
    models = exported(killed[0], tmp_path / "one"), exported(killed[0], tmp_path / "four", 4)
    one, four = (model.state_dict() for model in models)
    assert one.keys() == four.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, four[name]), name


@pytest.mark.matrix
def test_two_agents_train_the_same_as_one(tiny, replay, tmp_path):
    """`--nnodes 2` on one machine, two processes each, against one agent with four."""
    steps = {"trainer": {"steps": 3}, **replay}
    finish(command(tiny, tmp_path / "one", TP_PP, **steps))
    program = command(tiny, tmp_path / "two", {}, **steps)[1:]
    program += ["--parallel.tensor", "2", "--parallel.pipeline", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launcher += ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    agents = [subprocess.Popen([*launcher, "--node-rank", str(n), *program]) for n in (0, 1)]
    assert [agent.wait(timeout=480) for agent in agents] == [0, 0]
    found, expected = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("two", "one"))
    assert found == expected
