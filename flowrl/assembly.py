"""From a config to the parts of a run: task, objective, model, tokenizer, sampler, backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flowrl_kernels import backends

from flowrl import objectives
from flowrl.config import Config
from flowrl.models import Backend, base_model, hf_files
from flowrl.models.hf_backend import HFBackend
from flowrl.objectives.base import Objective
from flowrl.parallel import Parallel
from flowrl.rollout import Sampler, build_sampler
from flowrl.schema import ConfigError, nearest
from flowrl.tasks import Task, build_task


@dataclass(frozen=True)
class Parts:
    task: Task
    objective: Objective
    model_dir: Path
    tokenizer: Any
    sampler: Sampler
    backend: Backend

    def close(self) -> None:
        self.sampler.close()
        self.task.close()


def resolve(config: Config) -> tuple[Config, Objective]:
    """The config with what the objective's preset decides filled in, and the objective itself.

    Raises ConfigError for options that the objective or the kernels refuse."""
    backend = None if config.kernels.backend == "auto" else config.kernels.backend
    objective = objectives.build(config.objective.name, config.objective.options, backend=backend)
    defaults = objective.log_z_defaults
    given = {k: v for k, v in dataclasses.asdict(config.log_z).items() if v is not None}
    log_z = dataclasses.replace(config.log_z, **{**dataclasses.asdict(defaults), **given})
    available = backends.available()
    if config.kernels.backend not in ("auto", *available):
        raise ConfigError(
            f"kernels.backend={config.kernels.backend} cannot run here"
            f"{nearest(config.kernels.backend, ['auto', *available])}"
        )
    return dataclasses.replace(config, log_z=log_z), objective


def kernel_backend(config: Config) -> str:
    """Name of the backend that the fused head will use."""
    if config.kernels.backend != "auto":
        return config.kernels.backend
    use_cuda = config.model.device != "cpu" and torch.cuda.is_available()
    return backends.available("cuda" if use_cuda else "cpu")[0]


def model_dir(config: Config, task: Task, parallel: Parallel, say: Callable[[str], None]) -> Path:
    """The starting model's directory; where none is given rank 0 builds the task's base model."""
    if config.model.path:
        path = Path(config.model.path)
        hf_files.check_model_dir(path)
        return path
    if task.alphabet is None:
        raise ConfigError(
            f"task {task.name} has no base model of its own; give one with --model.path DIR"
        )
    built = base_model.build_base(task, config.base, say) if parallel.is_main else None
    path = parallel.broadcast(built)
    assert path is not None
    return path


def assemble(config: Config, parallel: Parallel, say: Callable[[str], None]) -> Parts:
    """All parts of a run. `config` is a resolved one."""
    _, objective = resolve(config)
    task = build_task(config.task.name, config.task.options, config.reward.timeout_s)
    directory = model_dir(config, task, parallel, say)
    tokenizer = hf_files.load_tokenizer(directory)
    backend = HFBackend(config, directory, objective.needs, parallel)
    sampler = build_sampler(config, directory, tokenizer, parallel.device)
    sampler.load_weights(backend.named_weights(), backend.policy_version)
    return Parts(task, objective, directory, tokenizer, sampler, backend)
