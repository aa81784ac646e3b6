"""`flowrl make-base`: build the recipe's tiny base model."""

from __future__ import annotations

from flowrl.config import Config
from flowrl.models.base_model import build_base
from flowrl.tasks import build_task


def run(config: Config) -> None:
    task = build_task(config.task.name, config.task.options, config.reward.timeout_s)
    try:
        print(build_base(task, config.base, print))
    finally:
        task.close()
