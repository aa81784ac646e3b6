"""One tiny base model for the whole test session, and the settings that go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowrl.assembly import resolve
from flowrl.config import Config
from flowrl.models.base_model import build_base
from flowrl.settings import load, merge
from flowrl.tasks import build_task

TINY = {
    # One random answer in five is right, so there is a signal.
    "task": {"num_numbers": 2, "min_solutions": 1, "target_high": 99},
    "base": {"hidden_size": 32, "num_layers": 2, "intermediate_size": 64, "pretrain_steps": 120},
    "batch": {
        "prompts_per_step": 4,
        "group_size": 4,
        "updates_per_step": 2,
        "tokens_per_microbatch": 512,
    },
    "eval": {"num_prompts": 4, "samples": 4},
    "trainer": {"steps": 4},
    "checkpoint": {"every": 2},
}


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="session")
def tiny(base_cache: Path) -> dict[str, Any]:
    """Overrides that make a recipe run in seconds; the base model is built once."""
    return merge(TINY, {"base": {"cache_dir": str(base_cache)}})


@pytest.fixture(scope="session")
def tiny_config(tiny: dict[str, Any]) -> Config:
    return resolve(load("countdown_cpu", tiny))[0]


@pytest.fixture(scope="session")
def base_dir(tiny_config: Config) -> Path:
    task = build_task(tiny_config.task.name, tiny_config.task.options, 1.0)
    return build_base(task, tiny_config.base, lambda _: None)
