"""`flowrl make-base`: build the recipe's tiny base model."""

from __future__ import annotations

import torch

from flowrl.config import Config
from flowrl.models.base_model import build_base
from flowrl.schema import ConfigError
from flowrl.tasks import build_task


def run(config: Config) -> None:
    task = build_task(config.task.name, config.task.options, config.reward.timeout_s)
    if task.alphabet is None:
        raise ConfigError(
            f"task {task.name} has no base model of its own; make-base serves countdown and modular"
        )
    torch.manual_seed(config.base.seed)
    print(build_base(task, config.base, print))
    task.close()
