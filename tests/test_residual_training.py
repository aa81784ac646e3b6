"""Objectives of the squared-residual family and the flows of prefixes, through the normal trainer:
they train, resume exactly and read the same numbers on two processes as on one."""

import json
import shutil
import subprocess
import sys

import pytest
from arguments import as_args

from flowrl.cli import main
from flowrl.settings import merge

NAMES = ["db", "ftb", "gflowrl", "gvpo", "kimi_pmd", "subtb", "tb", "tba", "vargrad"]


def arguments(tiny, name, run_dir, steps):
    changes = {
        "run": {"dir": str(run_dir)},
        "trainer": {"steps": steps},
        "objective": {"name": name, "beta": 2.0},
        "optimizer": {"lr": 1e-4, "eps": 1e-3, "warmup_updates": 0},
        "eval": {"every": 0, "num_prompts": 0},
    }
    return ["train", "countdown_cpu", *as_args(merge(tiny, changes))]


def rows(run_dir):
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == "train"]


@pytest.mark.parametrize("name", NAMES)
def test_trains(name, tiny, base_dir, tmp_path):
    main(arguments(tiny, name, tmp_path / "run", 2))
    steps = rows(tmp_path / "run")
    assert len(steps) == 2
    assert all(row["flow/residual_abs"] >= 0 and row["actor/grad_norm"] > 0 for row in steps)


@pytest.mark.parametrize("name", ["subtb", "tba"])
def test_resumes_to_the_same_bytes(name, tiny, base_dir, tmp_path):
    """The value head's weights, and TBA's replay buffer, are part of what is resumed."""
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    more = ["--loop.replay_fraction", "0.5"] if name == "tba" else []
    main([*arguments(tiny, name, straight, 4), *more])
    shutil.copytree(straight, halved)
    shutil.rmtree(halved / "checkpoints" / "step_000004")
    main(["train", "--resume", "--run.dir", str(halved)])
    assert (halved / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    state = "checkpoints/step_000004/state.safetensors"
    assert (halved / state).read_bytes() == (straight / state).read_bytes()
    if name == "tba":
        assert [row["reward/replayed_frac"] for row in rows(straight)] == [0.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("name", ["gvpo", "subtb"])
def test_two_processes_read_the_numbers_of_one(name, tiny, base_dir, tmp_path):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for folder, launcher in (("one", []), ("two", torchrun)):
        args = arguments(tiny, name, tmp_path / folder, 2)
        command = [sys.executable, "-m", *launcher, "flowrl", *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"kind"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key
