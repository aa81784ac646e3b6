"""Weights that Megatron splits over two processes arrive in vLLM, and are those of its export.

The trainer runs in the main environment, which has megatron-core (FLOWRL_TRAINER_PYTHON, set by
`make test-vllm`); the engine runs in this test's Python, through rollout.server_python. So the two
ends have different pins here, as they may have at a user's.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from arguments import as_args

from flowrl.records import Prompt, Rollout

from .conftest import load_model, logp_abs_diff

pytestmark = pytest.mark.timeout(600)
TRAINER = os.environ.get("FLOWRL_TRAINER_PYTHON", "")
SETTINGS = {
    "task": {"num_numbers": 2, "min_solutions": 1, "target_high": 99},
    "base": {
        "hidden_size": 32, "num_layers": 2, "num_kv_heads": 2, "intermediate_size": 64,
        "pretrain_steps": 20,
    },
    "model": {"backend": "megatron", "device": "cpu"},
    "parallel": {"tensor": 2},
    "rollout": {"engine": "vllm", "server_python": sys.executable, "sync_bucket_mb": 1},
    "batch": {"prompts_per_step": 4, "tokens_per_microbatch": 512},
    "optimizer": {"lr": 1e-2, "warmup_updates": 0},  # far enough that old weights would show
    "trainer": {"steps": 2},
    "checkpoint": {"every": 1},
    "eval": {"num_prompts": 0},
}  # fmt: skip


def finish(*args):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [TRAINER, "-m", *args], env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    if not TRAINER:
        pytest.skip("FLOWRL_TRAINER_PYTHON names no Python with megatron-core: make test-vllm")
    folder = tmp_path_factory.mktemp("megatron")
    places = {"run": {"dir": str(folder / "run")}, "base": {"cache_dir": str(folder / "base")}}
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flowrl"]
    settings = {**SETTINGS, **places, "base": {**SETTINGS["base"], **places["base"]}}
    finish(*launcher, "train", "countdown_cpu", *as_args(settings))
    return folder / "run"


def rollouts(run_dir, step):
    lines = (run_dir / f"samples/step_{step:06d}.jsonl").read_text().splitlines()
    return [
        Rollout(
            prompt=Prompt(row["prompt_index"], row["prompt"], tuple(row["prompt_ids"])),
            sample=row["sample"],
            response_ids=tuple(row["response_ids"]),
            rollout_logprobs=tuple(row["rollout_logprobs"]),
            truncated=row["truncated"],
            policy_version=row["policy_version"],
            text=row["response"],
        )
        for row in map(json.loads, lines)
    ]


def test_the_engines_logprobs_are_the_split_trainers(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert row["mismatch/logp_abs_diff"] < 1e-4


def test_the_engines_logprobs_are_those_of_the_export(run_dir, tmp_path):
    """The rollouts of step 2 come from the weights after step 1, whose checkpoint is exported."""
    earlier = tmp_path / "earlier"
    shutil.copytree(run_dir, earlier)
    shutil.rmtree(earlier / "checkpoints/step_000002")
    finish("flowrl", "export", str(earlier), "--hf", str(tmp_path / "export"))
    exported = load_model(tmp_path / "export")
    second = rollouts(run_dir, 2)
    assert logp_abs_diff(exported, second, 1.0) < 1e-5
    assert logp_abs_diff(exported, rollouts(run_dir, 1), 1.0) > 1e-2  # other weights made those
