"""TensorBoard and W&B: what is logged can be read back; a missing package names its command."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from flowrl.config import ConfigError
from flowrl.loggers import build_loggers

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "logs" / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@needs_tensorboard
def test_tensorboard_events_can_be_read(tmp_path):
    (logger,) = build_loggers(("tensorboard",), tmp_path)
    logger.log(0, {"eval/countdown/avg@16": 0.0625})
    logger.log(1, {"reward/mean": 0.25, "actor/loss": 2.0})
    logger.log(2, {"reward/mean": 0.5})
    logger.close()
    assert scalars(tmp_path) == {
        "eval/countdown/avg@16": [(0, 0.0625)],
        "reward/mean": [(1, 0.25), (2, 0.5)],
        "actor/loss": [(1, 2.0)],
    }


@needs_tensorboard
def test_tensorboard_hides_what_a_resume_repeats(tmp_path):
    for steps, value in (((1, 2, 3), 0.25), ((2, 3), 0.5)):
        (logger,) = build_loggers(("tensorboard",), tmp_path)
        for step in steps:
            logger.log(step, {"reward/mean": value})
        logger.close()
    assert scalars(tmp_path)["reward/mean"] == [(1, 0.25), (2, 0.5), (3, 0.5)]


def test_closing_a_logger_that_never_logged(tmp_path):
    (logger,) = build_loggers(("tensorboard",), tmp_path)
    logger.close()
    assert not (tmp_path / "logs").exists()


def test_missing_package_names_its_command(tmp_path):
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed here")
    with pytest.raises(
        ConfigError, match="logger wandb needs the package wandb.*pip install wandb"
    ):
        build_loggers(("tensorboard", "wandb"), tmp_path)
    assert list(tmp_path.iterdir()) == []  # refused before the first one was opened


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (logger,) = build_loggers(("wandb",), tmp_path)
    logger.log(1, {"reward/mean": 0.25})
    logger.close()
    assert (tmp_path / "logs/wandb_id").read_text().strip()
    assert list((tmp_path / "logs/wandb").glob("offline-run-*"))


def test_unknown_logger(tmp_path):
    with pytest.raises(
        ConfigError, match="no logger called 'tensorbord'; did you mean tensorboard"
    ):
        build_loggers(("tensorbord",), tmp_path)


def test_no_loggers(tmp_path):
    assert build_loggers((), tmp_path) == []
