"""End to end: VarGrad reaches the exact target that a maximiser passes by."""

import json

import pytest
from arguments import as_args

from flowrl.cli import main

WORLD = {
    "task": {"p": 3},
    "base": {
        "hidden_size": 32,
        "num_layers": 2,
        "intermediate_size": 64,
        "pretrain_rows": 128,
        "pretrain_steps": 150,
    },
    "batch": {"prompts_per_step": 18},
    "optimizer": {"lr": 1e-3},
    "eval": {"every": 0, "num_prompts": 9, "samples": 4, "exact_prompts": 9},
    "trainer": {"steps": 160},
    "checkpoint": {"every": 0},
    "run": {"samples": "text"},
}


def distances(objective, base_cache, run_dir):
    settings = {**WORLD, "objective": {"name": objective}}
    settings["run"] = {"samples": "text", "dir": str(run_dir)}
    settings["base"] = {**WORLD["base"], "cache_dir": str(base_cache)}
    main(["train", "modular_cpu", *as_args(settings)])
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evals = [row for row in rows if row["kind"] == "eval"]
    return evals[0], evals[-1]


@pytest.fixture(scope="module")
def found(base_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("matching")
    return {name: distances(name, base_cache, folder / name) for name in ("vargrad", "grpo")}


def test_both_find_the_right_answers(found):
    for before, after in found.values():
        assert before["diversity/success_exact"] < 0.65
        assert after["diversity/success_exact"] > 0.85


def test_vargrad_matches_the_target_and_grpo_does_not(found):
    before, after = found["vargrad"]
    assert before["diversity/l1_to_target"] > 0.5
    assert after["diversity/l1_to_target"] <= 0.25
    assert after["diversity/kl_to_target"] < 0.1
    _, grpo = found["grpo"]
    assert grpo["diversity/l1_to_target"] > 0.4
