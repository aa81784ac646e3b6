"""`flowrl eval`: sampled and exact evaluation of a checkpoint, or of any model directory.

By the engine that made the run's rollouts; --rollout.engine names another one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flowrl import assembly, parallel
from flowrl.config import Config, EvalConfig
from flowrl.evaluation import Evaluator
from flowrl.parallel import Parallel
from flowrl.rollout_config import VLLM_ONLY, RolloutConfig
from flowrl.run_dir import read_config, restore_newest
from flowrl.schema import ConfigError
from flowrl.settings import from_mapping, merge, to_mapping


@dataclasses.dataclass(frozen=True)
class Request:
    run_dir: Path
    model: str  # directory to evaluate instead of the run's newest checkpoint; empty: none
    options: EvalConfig
    overrides: Mapping[str, Any]  # of the engine's settings
    out: str  # file for the metrics; empty: none


def run(request: Request) -> None:
    """Prints the metrics; writes them to `out`, too, if it is given."""
    run_dir, model, options = request.run_dir, request.model, request.options
    config = _config(read_config(run_dir), request)
    ranks = parallel.start(config.model.device, config.parallel, config.rollout.longest_wait_s)
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


def _evaluator(config: Config, parts: assembly.Parts, ranks: Parallel) -> Evaluator:
    evaluator = Evaluator(config, parts.task, parts.tokenizer, ranks)
    if not evaluator.problems:
        raise ConfigError(
            f"{config.task.name} has no held-out problems with these settings; give --num_prompts, "
            "or let the task hold some out"
        )
    return evaluator


def _config(recorded: Config, request: Request) -> Config:
    options = request.options
    changed = dataclasses.replace(
        recorded,
        eval=dataclasses.replace(
            recorded.eval,
            samples=options.samples,
            temperature=options.temperature,
            top_p=options.top_p,
            num_prompts=options.num_prompts or recorded.eval.num_prompts,
        ),
        rollout=_rollout(recorded.rollout, request.overrides),
        model=dataclasses.replace(recorded.model, path=request.model or recorded.model.path),
        run=dataclasses.replace(recorded.run, dir=str(request.run_dir)),  # for the engine's log
        parallel=recorded.parallel.fitting(parallel.num_processes()),
    )
    wanted = from_mapping(merge(to_mapping(changed), request.overrides))
    return assembly.resolve(wanted)[0]


def _rollout(recorded: RolloutConfig, overrides: Mapping[str, Any]) -> RolloutConfig:
    """The run's own settings of an engine, as far as the one that samples here reads them.

    Raises ConfigError for overrides of anything but the engine."""
    given = overrides.get("rollout", {})
    others = [name for name in overrides if name != "rollout"]
    others += [f"rollout.{name}" for name in given if name not in ("engine", *VLLM_ONLY)]
    if others:
        raise ConfigError(
            f"flowrl eval has the run's settings and changes the engine alone, got {others[0]}; "
            f"leave it out; it takes rollout.engine, rollout.{', rollout.'.join(VLLM_ONLY)}"
        )
    if recorded.engine == "vllm" and given.get("engine", "vllm") == "vllm":
        return dataclasses.replace(recorded, max_staleness=0)
    return recorded.by_transformers()
