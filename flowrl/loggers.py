"""Optional loggers beside metrics.jsonl: TensorBoard and Weights & Biases.

A run never needs one: a logger shows the numbers that the run directory holds anyway. Files lie
under <run>/logs. W&B follows its own settings: WANDB_MODE=offline writes to
<run>/logs/wandb without a network, for `wandb sync` later.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from flowrl.schema import ConfigError, nearest


class Logger(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Steps never decrease; several calls may share one."""
        ...

    def close(self) -> None: ...


def build_loggers(names: Sequence[str], run_dir: Path) -> list[Logger]:
    """The loggers called `names`, in order. Raises as check_loggers does, before one is opened."""
    check_loggers(names)
    return [_LOGGERS[name](run_dir) for name in dict.fromkeys(names)]


def check_loggers(names: Sequence[str]) -> None:
    """Raises ConfigError for an unknown name or for a missing package (with the command that
    installs it)."""
    for name in names:
        if name not in _LOGGERS:
            raise ConfigError(f"no logger called {name!r}{nearest(name, _LOGGERS)}")
        _import(name)


class TensorBoardLogger:
    """Scalars in <run>/logs/tensorboard."""

    def __init__(self, run_dir: Path) -> None:
        _import("tensorboard")
        self.directory = run_dir / "logs" / "tensorboard"
        self._writer: Any = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is None:
            # Opened at the first number, to hide what an interrupted run wrote from here on.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.directory), purge_step=step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbLogger:
    """One W&B run per run directory: its id is kept in <run>/logs/wandb_id, for a resume. W&B takes
    no step twice, so what an interrupted run logged past its checkpoint stays as it was."""

    def __init__(self, run_dir: Path) -> None:
        wandb = _import("wandb")
        logs = run_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        kept_id = logs / "wandb_id"
        known = kept_id.read_text().strip() if kept_id.is_file() else None
        try:
            self._run = wandb.init(
                project="flowrl",
                name=run_dir.resolve().name,
                dir=str(logs),
                id=known,
                resume="allow" if known else None,
            )
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases could not start: {error}; log in with: wandb login, or set "
                "WANDB_MODE=offline"
            ) from error
        kept_id.write_text(f"{self._run.id}\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


_LOGGERS: dict[str, Callable[[Path], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}


def _import(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the logger {package} needs the package {error.name}, which is not installed; "
            f"add it with: pip install {package}"
        ) from error
