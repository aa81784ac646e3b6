"""A study file and the runs that it names. Imports no torch.

study = read_study("laptop")                   a shipped study, or the path of a TOML file
runs = plan_runs(study, Path("runs/studies"))  one `Run` per arm, world, sweep value and seed
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from flowrl.config import Config, TaskConfig
from flowrl.overrides import as_arguments
from flowrl.schema import ConfigError, build, nearest, read_toml, require
from flowrl.settings import RECIPES_DIR, load, merge

STUDIES_DIR = RECIPES_DIR / "studies"
Family = Literal["maximiser", "regularised", "matcher", "flowrl"]


@dataclass(frozen=True)
class World:
    recipe: str
    """Shipped recipe or TOML file that all arms of this world start from."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings on top of the recipe, as in a recipe."""


@dataclass(frozen=True)
class Arm:
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings on top of the world's."""
    family: Family = "maximiser"
    """What it aims at; the plots colour by it."""
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    """Dotted option -> further values, each a run beside the arm's own; several options: all
    combinations."""
    worlds: tuple[str, ...] = ()
    """Worlds it runs in. Empty: all."""


@dataclass(frozen=True)
class Controls:
    """Points that need no training of their own."""

    temperatures: tuple[float, ...] = ()
    """Exact evaluation of trained policies at these temperatures."""
    temperature_arms: tuple[str, ...] = ()
    """Arms whose final policies are evaluated so."""
    rejection_tries: tuple[int, ...] = ()
    """Most draws from pi_ref until one is right."""
    target_betas: tuple[float, ...] = ()
    """Inverse temperatures of the exact target pi_ref exp(beta r) / Z itself."""


@dataclass(frozen=True)
class Study:
    name: str
    worlds: dict[str, World]
    arms: dict[str, Arm]
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep_seeds: tuple[int, ...] = ()
    """Seeds of swept values. Empty: all seeds."""
    about: str = ""
    """A sentence for the page."""
    controls: Controls = field(default_factory=Controls)

    def __post_init__(self) -> None:
        require(bool(self.seeds), "a study needs a seed, got none; set seeds = [0, 1, 2]")
        require(bool(self.worlds), "a study needs a world, got none; add [worlds.NAME] with recipe")
        require(bool(self.arms), "a study needs an arm, got none; add [arms.NAME.settings]")
        for name, arm in self.arms.items():
            for world in arm.worlds:
                if world not in self.worlds:
                    where = f"arms.{name}.worlds: no world called {world!r}"
                    raise ConfigError(where + nearest(world, self.worlds))
        for arm in self.controls.temperature_arms:
            if arm not in self.arms:
                where = f"controls.temperature_arms: no arm called {arm!r}"
                raise ConfigError(where + nearest(arm, self.arms))


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    world: str
    arm: str
    point: dict[str, Any]  # the sweep's values; empty for the arm's own settings
    seed: int
    directory: Path
    config: Config
    arguments: tuple[str, ...]  # of `flowrl`

    @property
    def command(self) -> str:
        return shlex.join(["flowrl", *self.arguments])

    @property
    def label(self) -> str:
        return f"{self.world}/{arm_label(self.arm, self.point)} seed {self.seed}"


def arm_label(arm: str, point: Mapping[str, Any]) -> str:
    """ "vargrad", or "vargrad beta=5" for a swept value."""
    return " ".join([arm, *(f"{key.split('.')[-1]}={value}" for key, value in point.items())])


def study_names() -> list[str]:
    return sorted(p.stem for p in STUDIES_DIR.glob("*.toml"))


def read_study(name: str) -> Study:
    """Raises ConfigError for an unknown name (naming the nearest), a wrong key or type."""
    path = Path(name) if name.endswith(".toml") else STUDIES_DIR / f"{name}.toml"
    if not path.is_file() and not name.endswith(".toml"):
        raise ConfigError(f"no study called {name!r}{nearest(name, study_names())}")
    require(path.is_file(), f"study file not found: {path}; shipped: {', '.join(study_names())}")
    data = {"name": path.stem, **read_toml(path)}
    for key, cls in (("worlds", World), ("arms", Arm)):
        tables = data.get(key, {})
        require(
            isinstance(tables, Mapping) and all(isinstance(t, Mapping) for t in tables.values()),
            f"{key} must be tables, got {tables!r}; write [{key}.NAME]",
        )
        data[key] = {k: build(cls, table, f"{key}.{k}") for k, table in tables.items()}
    return build(Study, data, "")


def plan_runs(study: Study, out: Path, arms: Sequence[str] = ()) -> list[Run]:
    """All runs, seed by seed, so that a study cut short has every arm once. `arms` limits them.

    Raises ConfigError for settings that a recipe refuses, and where an arm of a world would not
    start from the same base model as the others."""
    for arm in arms:
        if arm not in study.arms:
            raise ConfigError(f"study {study.name} has no arm {arm!r}{nearest(arm, study.arms)}")
    runs = [
        _run(study, out, world, arm, point, seed)
        for seed in sorted({*study.seeds, *study.sweep_seeds})
        for world in study.worlds
        for arm in (arms or study.arms)
        if world in (study.arms[arm].worlds or study.worlds)
        for point in _points(study.arms[arm])
        if seed in ((study.sweep_seeds or study.seeds) if point else study.seeds)
    ]
    for world in study.worlds:
        _check_same_start([run for run in runs if run.world == world])
    return runs


def _points(arm: Arm) -> list[dict[str, Any]]:
    for option, values in arm.sweep.items():
        require(
            isinstance(values, list) and bool(values),
            f"sweep of {option} must be a list of values, got {values!r}; write [1, 2]",
        )
    swept = [dict(zip(arm.sweep, v, strict=True)) for v in product(*arm.sweep.values())]
    return [{}, *swept] if arm.sweep else [{}]


def _run(study: Study, out: Path, world: str, arm: str, point: dict[str, Any], seed: int) -> Run:
    name = arm_label(arm, point).replace(" ", "_")
    directory = out / study.name / world / name / f"seed_{seed}"
    settings = merge(study.worlds[world].settings, study.arms[arm].settings)
    for option, value in point.items():
        settings = merge(settings, nested(option, value))
    settings = merge(settings, {"seed": seed, "run": {"dir": str(directory)}})
    recipe = study.worlds[world].recipe
    try:
        config = load(recipe, settings)
    except ConfigError as error:
        raise ConfigError(f"arm {name} in world {world}: {error}") from error
    require(
        config.eval.num_prompts > 0,
        f"arm {name} in world {world}: a study compares evaluations, got "
        "eval.num_prompts=0; set it",
    )
    arguments = ("train", recipe, *as_arguments(settings))
    return Run(world, arm, point, seed, directory, config, arguments)


def nested(option: str, value: Any) -> dict[str, Any]:
    """("a.b", 1) -> {"a": {"b": 1}}"""
    for part in reversed(option.split(".")):
        value = {part: value}
    return value


def _check_same_start(runs: Sequence[Run]) -> None:
    for run in runs[1:]:
        for section in ("base", "model"):
            first, other = (getattr(r.config, section) for r in (runs[0], run))
            for name in (f.name for f in dataclasses.fields(first)):
                require(
                    getattr(first, name) == getattr(other, name),
                    f"all arms of a world start from one model, but {section}.{name} is "
                    f"{getattr(first, name)!r} for {runs[0].arm} and {getattr(other, name)!r} for "
                    f"{run.arm}; set it in [worlds.{run.world}.settings.{section}]",
                )
        first, other = runs[0].config.task, run.config.task
        require(
            first == other,
            f"all arms of a world have one task, got {_told(first)} for {runs[0].arm} and "
            f"{_told(other)} for {run.arm}; make it a world of its own",
        )


def _told(task: TaskConfig) -> str:
    options = ", ".join(f"{name}={value}" for name, value in task.options.items())
    return f"{task.name} ({options})" if options else task.name
