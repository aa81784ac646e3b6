"""Policy gradients through the normal trainer: they train, resume exactly and read the same numbers
on two processes as on one."""

import json
import shutil
import subprocess
import sys

import pytest
from arguments import as_args

from flowrl.cli import main
from flowrl.objectives import POLICY_GRADIENTS
from flowrl.settings import merge

RESETS = {"loop": {"reference_reset_patience": 0, "reference_reset_every": 1}}  # not by evaluations


def arguments(tiny, name, run_dir, steps, **objective):
    changes = {
        "run": {"dir": str(run_dir)},
        "trainer": {"steps": steps},
        "objective": {"name": name, **objective},
        "optimizer": {"lr": 1e-4, "eps": 1e-3, "warmup_updates": 0},
        "eval": {"every": 0, "num_prompts": 0},
    }
    if name == "prorl" and "preset" not in objective:
        changes |= RESETS
    return ["train", "countdown_cpu", *as_args(merge(tiny, changes))]


def rows(run_dir):
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == "train"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((cls.name, {}) for cls in POLICY_GRADIENTS if cls.name not in ("ppo", "trpo")),
        ("trpo", {"method": "conjugate_gradient"}),
        ("trpo", {"method": "line_search", "critic": "true"}),
        ("prorl", {"preset": "v2"}),
    ],
)
def test_trains(name, options, tiny, base_dir, tmp_path):
    main(arguments(tiny, name, tmp_path / "run", 1, **options))
    (row,) = rows(tmp_path / "run")
    assert row["actor/advantage_abs"] > 0
    assert row["actor/grad_norm"] > 0


@pytest.mark.parametrize(
    ("name", "options", "adapted"),
    [("ppo", {"kl_controller": "adaptive"}, "kl_coef"), ("trpo", {}, "kl_penalty")],
)
def test_resumes_to_the_same_bytes(name, options, adapted, tiny, base_dir, tmp_path):
    """The value head's weights and the adaptive coefficient are part of what is resumed."""
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    main(arguments(tiny, name, straight, 4, **options))
    shutil.copytree(straight, halved)
    shutil.rmtree(halved / "checkpoints" / "step_000004")
    main(["train", "--resume", "--run.dir", str(halved)])
    assert (halved / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    state = "checkpoints/step_000004/state.safetensors"
    assert (halved / state).read_bytes() == (straight / state).read_bytes()
    coefficients = [row[f"actor/{adapted}"] for row in rows(straight)]
    assert len(set(coefficients)) == 4


def test_two_processes_read_the_numbers_of_one(tiny, base_dir, tmp_path):
    """PPO has all that ranks share: whitening, the critic, the controller's KL."""
    main(arguments(tiny, "ppo", tmp_path / "one", 2, kl_controller="adaptive"))
    args = arguments(tiny, "ppo", tmp_path / "two", 2, kl_controller="adaptive")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flowrl"]
    command = [sys.executable, "-m", *torchrun, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        assert one["actor/kl_coef"] != 0.001
        for key in one.keys() - {"kind"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key
