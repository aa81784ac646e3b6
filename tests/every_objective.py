"""Two steps of every objective through the real trainer, their numbers as JSON.

python tests/every_objective.py BASE_CACHE OUT.json          (or under torchrun)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from flowrl import assembly, objectives, parallel
from flowrl.experience import Collector
from flowrl.metrics import Stopwatch
from flowrl.settings import load, merge
from flowrl.trainer import Trainer

# Adam's epsilon keeps rounding noise from moving whole learning rates: tests/test_torchrun.py.
WORLD: dict[str, Any] = {
    "task": {"num_numbers": 2, "min_solutions": 1, "target_high": 99},
    "base": {"hidden_size": 32, "num_layers": 2, "intermediate_size": 64, "pretrain_steps": 120},
    "batch": {
        "prompts_per_step": 4,
        "group_size": 4,
        "updates_per_step": 2,
        "tokens_per_microbatch": 128,
    },
    "eval": {"num_prompts": 4},
    "optimizer": {"lr": 1e-4, "eps": 1e-3, "warmup_updates": 0},
}
VARIANTS = {
    "trpo line_search": {"objective": {"name": "trpo", "method": "line_search"}},
    "trpo conjugate_gradient": {"objective": {"name": "trpo", "method": "conjugate_gradient"}},
    "trpo critic": {"objective": {"name": "trpo", "critic": True}},
    "ppo adaptive": {"objective": {"name": "ppo", "kl_controller": "adaptive"}},
    "tba replay": {"objective": {"name": "tba"}, "loop": {"replay_fraction": 0.5}},
    "prorl v2": {"objective": {"name": "prorl", "preset": "v2"}},
}
OTHER_WORLDS = {"flow_of_reasoning"}  # needs a task with legal actions


def cases() -> dict[str, dict[str, Any]]:
    plain = {name: {"objective": {"name": name}} for name in objectives.names()}
    return {k: v for k, v in {**plain, **VARIANTS}.items() if k not in OTHER_WORLDS}


def trainer(overrides: dict[str, Any], cache: str, ranks: parallel.Parallel) -> Trainer:
    world = merge(WORLD, {"base": {"cache_dir": cache}})
    config, _ = assembly.resolve(load("countdown_cpu", merge(world, overrides)))
    parts = assembly.assemble(config, ranks, lambda _: None)
    watch = Stopwatch(ranks.device)
    collector = Collector(config, ranks, parts.task, parts.tokenizer, parts.sampler, watch)
    return Trainer(config, ranks, collector, parts.sampler, parts.backend, parts.objective, watch)


def main(cache: str, out: str) -> None:
    torch.set_num_threads(1)
    ranks = parallel.start("cpu")
    found = {}
    for name, overrides in cases().items():
        made = trainer(overrides, cache, ranks)
        found[name] = [made.step(number).metrics for number in (1, 2)]
    if ranks.is_main:
        Path(out).write_text(json.dumps(found))
    parallel.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
