"""Checkpoints: written aside, hashed, fsynced and renamed; the newest valid one is resumed.

    checkpoints/step_000050/   trainer.json, the backend's files, manifest.json with their hashes

A checkpoint has its name only when it is whole. One whose hashes do not fit is passed over.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flowrl.files import sha256
from flowrl.parallel import Parallel

MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    state: Mapping[str, Any]  # what the trainer stored


def save(
    run_dir: Path,
    step: int,
    state: Mapping[str, Any],
    write_backend: Callable[[Path], None],
    parallel: Parallel,
    keep_last: int,
) -> Path:
    """Writes the checkpoint of `step`; every rank calls it. Raises CheckpointError on every rank if
    any rank could not write (a full disk, say); earlier checkpoints are untouched then."""
    final = run_dir / "checkpoints" / f"step_{step:06d}"
    aside = final.with_name(f".{final.name}.partial")
    errors = parallel.gather_all(_attempt(lambda: _prepare(aside, parallel)))
    if not any(errors):
        errors = parallel.gather_all(_attempt(lambda: write_backend(aside)))
    if not any(errors):
        errors = [parallel.broadcast(_attempt(lambda: _finish(aside, final, state, parallel)))]
    failed = next((error for error in errors if error), None)
    if failed:
        if parallel.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint of step {step} could not be written ({failed}); earlier ones are whole: "
            "free the disk and continue with --resume"
        )
    if parallel.is_main:
        others = [p for p in sorted(final.parent.glob("step_*")) if p != final]
        for old in others[: max(0, len(others) - keep_last + 1)]:
            shutil.rmtree(old)
    return final


def newest_valid(run_dir: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose hashes fit; `say` is told of each that is passed over."""
    for path in sorted((run_dir / "checkpoints").glob("step_*"), reverse=True):
        problem = find_problem(path)
        if problem is None:
            state = json.loads((path / "trainer.json").read_text())
            return Checkpoint(path, state["step"], state)
        say(f"checkpoint {path.name} is corrupt ({problem}); looking for an older one")
    return None


def find_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    found = {name: file for name, file in _files(path).items() if name != MANIFEST}
    if not isinstance(manifest, dict) or manifest.keys() != found.keys() or not found:
        return f"{MANIFEST} does not list its files"
    for name, file in found.items():
        if manifest[name] != _describe(file):
            return f"{name} does not have the size and hash of {MANIFEST}"
    return None


def drop_newer(run_dir: Path, step: int) -> None:
    """Removes the checkpoints of later steps: corrupt ones, when an older one is resumed."""
    for path in (run_dir / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)


def _files(path: Path) -> dict[str, Path]:
    return {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file()}


def _describe(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _attempt(action: Callable[[], None]) -> str | None:
    try:
        action()
    except (OSError, SafetensorError) as error:
        return str(error)
    return None


def _prepare(aside: Path, parallel: Parallel) -> None:
    if parallel.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)


def _finish(aside: Path, final: Path, state: Mapping[str, Any], parallel: Parallel) -> None:
    if not parallel.is_main:
        return
    (aside / "trainer.json").write_text(json.dumps(state))
    files = _files(aside)
    manifest = {name: _describe(file) for name, file in files.items()}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files.values(), aside / MANIFEST, aside]:
        _fsync(path)
    if final.exists():  # a corrupt one of the same step, passed over at resume
        shutil.rmtree(final)
    aside.rename(final)
    _fsync(final.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
