"""`flowrl eval`: sampled and exact evaluation of a checkpoint, or of any model directory.

By the engine of the run or the recipe; --rollout.engine names another one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flowrl import assembly, parallel
from flowrl.config import Config, EvalConfig
from flowrl.evaluation import Evaluator
from flowrl.option_tables import load_checked
from flowrl.parallel import Parallel
from flowrl.rollout_config import VLLM_ONLY, RolloutConfig
from flowrl.run_dir import read_config, restore_newest
from flowrl.schema import ConfigError
from flowrl.settings import from_mapping, merge, recipe_names, to_mapping

ENGINE = ("engine", *VLLM_ONLY)  # of [rollout]: what samples, not what is sampled
OF_A_RUN = {"rollout": ENGINE, "model": ("path",), "task": ("train", "eval")}
"""Settings that an evaluation of a run may have of its own: the engine, and where files lie now."""


@dataclasses.dataclass(frozen=True)
class Request:
    source: Path  # a run directory, or a recipe
    model: str  # directory to evaluate instead of the run's newest checkpoint; empty: none
    options: EvalConfig
    overrides: Mapping[str, Any]  # of a run those of OF_A_RUN, of a recipe any
    out: str  # file for the metrics; empty: none


def run(request: Request) -> None:
    """Prints the metrics; writes them to `out`, too, if it is given."""
    run_dir, model, options = request.source, request.model, request.options
    config = _config(request)
    ranks = parallel.start(config.model.device, config.parallel, config.rollout.longest_wait_s)
    ranks.agree(lambda: _check_out(request.out) if ranks.is_main else None)
    console = Console(quiet=not ranks.is_main, soft_wrap=True)
    parts = assembly.assemble(config, ranks, console.print)
    try:
        step = None if model else restore_newest(run_dir, parts.backend)
        evaluator = _evaluator(config, parts, ranks)
        parts.sampler.load_weights(parts.backend.named_weights(), parts.backend.policy_version)
        found = evaluator.run(parts.sampler, None if model else parts.backend).metrics
    finally:
        parts.close()
    if ranks.is_main:
        who = model or f"{run_dir} at step {step}"
        table = Table(
            title=f"{who}: {len(evaluator.problems)} problems, {options.samples} samples each, "
            f"temperature {options.temperature}, top_p {options.top_p}, "
            f"engine {config.rollout.engine}",
            title_justify="left",
            box=None,
        )
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in found.items():
            table.add_row(name, f"{value:.4f}")
        console.print(table)
        if request.out:
            Path(request.out).write_text(json.dumps(found, indent=1) + "\n")
    parallel.stop()


def _check_out(out: str) -> None:
    """Raises ConfigError where the metrics could not be written, before there are any."""
    path = Path(out)
    written = os.access(path if path.exists() else path.resolve().parent, os.W_OK)
    if out and (path.is_dir() or not written):
        raise ConfigError(
            f"--json {out} cannot be written; name a file in a directory that is there"
        )


def _evaluator(config: Config, parts: assembly.Parts, ranks: Parallel) -> Evaluator:
    evaluator = Evaluator(config, parts.task, parts.tokenizer, ranks)
    if not evaluator.problems:
        raise ConfigError(
            f"{config.task.name} has no held-out problems with these settings; give --num_prompts, "
            "or let the task hold some out"
        )
    return evaluator


def _config(request: Request) -> Config:
    options = request.options
    recorded, overrides = _recorded(request)
    changed = dataclasses.replace(
        recorded,
        eval=dataclasses.replace(
            recorded.eval,
            samples=options.samples,
            temperature=options.temperature,
            top_p=options.top_p,
            num_prompts=options.num_prompts or recorded.eval.num_prompts,
        ),
        rollout=_rollout(recorded.rollout, overrides),
        model=dataclasses.replace(recorded.model, path=request.model or recorded.model.path),
        parallel=recorded.parallel.fitting(parallel.num_processes()),
    )
    return assembly.resolve(from_mapping(merge(to_mapping(changed), overrides)))[0]


def _recorded(request: Request) -> tuple[Config, Mapping[str, Any]]:
    """The settings of a run or of a recipe, and the overrides that are left to apply. The engine's
    log goes to `run.dir`."""
    name, overrides = str(request.source), request.overrides
    if request.model and "path" in overrides.get("model", {}):
        raise ConfigError(
            "--model is the model to evaluate, --model.path where a run's starting model lies now; "
            "leave one out"
        )
    if request.source.is_dir() or not (name in recipe_names() or name.endswith(".toml")):
        recorded = read_config(request.source)
        _check_of_a_run(overrides)
        run = dataclasses.replace(recorded.run, dir=name)
        return dataclasses.replace(recorded, run=run), overrides
    if not request.model:
        raise ConfigError(
            f"flowrl eval {name} evaluates a model on the recipe's problems, got no model; give "
            "--model DIR, or a run directory instead of the recipe"
        )
    given = overrides.get("rollout", {})
    engine = {name: value for name, value in given.items() if name in ENGINE}
    rest = {name: value for name, value in given.items() if name not in ENGINE}
    logs = {"run": {"dir": str(Path(tempfile.gettempdir()) / f"flowrl_eval_{os.getpid()}")}}
    return load_checked(name, {**overrides, "rollout": rest, **logs}), {"rollout": engine}


def _check_of_a_run(overrides: Mapping[str, Any]) -> None:
    """Raises ConfigError for what an evaluation of a run cannot change."""
    takes = [f"{section}.{name}" for section, names in OF_A_RUN.items() for name in names]
    for section, values in overrides.items():
        names = list(values) if isinstance(values, Mapping) else [""]
        if section == "task" and names == ["options"]:
            names = list(values["options"])
        for name in names:
            if name not in OF_A_RUN.get(section, ()):
                raise ConfigError(
                    f"flowrl eval has the run's settings, got {section}{name and '.'}{name}; leave "
                    f"it out; it takes {', '.join(takes)}"
                )


def _rollout(recorded: RolloutConfig, overrides: Mapping[str, Any]) -> RolloutConfig:
    """The run's own settings of an engine, as far as the one that samples here reads them."""
    engine = overrides.get("rollout", {}).get("engine", "vllm")
    if recorded.engine == "vllm" and engine == "vllm":
        return dataclasses.replace(recorded, max_staleness=0)
    return recorded.by_transformers()
