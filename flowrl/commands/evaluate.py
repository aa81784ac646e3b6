"""`flowrl eval`: sampled and exact evaluation of a checkpoint, or of any model directory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flowrl import assembly, parallel
from flowrl.config import Config, EvalConfig
from flowrl.evaluation import Evaluator
from flowrl.run_dir import read_config, restore_newest
from flowrl.schema import ConfigError


def run(run_dir: Path, model: str, options: EvalConfig, out: str) -> None:
    """Prints the metrics; writes them to `out`, too, if it is given."""
    config = _config(read_config(run_dir), model, options)
    ranks = parallel.start(config.model.device, config.parallel)
    console = Console(quiet=not ranks.is_main, soft_wrap=True)
    parts = assembly.assemble(config, ranks, console.print)
    step = None if model else restore_newest(run_dir, parts.backend)
    parts.sampler.load_weights(parts.backend.named_weights(), parts.backend.policy_version)
    evaluator = Evaluator(config, parts.task, parts.tokenizer, ranks)
    if not evaluator.problems:
        raise ConfigError(
            f"{config.task.name} has no held-out problems with these settings; give --num_prompts, "
            "or let the task hold some out"
        )
    found = evaluator.run(parts.sampler, None if model else parts.backend).metrics
    parts.close()
    if ranks.is_main:
        who = model or f"{run_dir} at step {step}"
        table = Table(
            title=f"{who}: {len(evaluator.problems)} problems, {options.samples} samples each, "
            f"temperature {options.temperature}, top_p {options.top_p}",
            title_justify="left",
            box=None,
        )
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in found.items():
            table.add_row(name, f"{value:.4f}")
        console.print(table)
        if out:
            Path(out).write_text(json.dumps(found, indent=1) + "\n")
    parallel.stop()


def _config(recorded: Config, model: str, options: EvalConfig) -> Config:
    changed = dataclasses.replace(
        recorded,
        eval=dataclasses.replace(
            recorded.eval,
            samples=options.samples,
            temperature=options.temperature,
            top_p=options.top_p,
            num_prompts=options.num_prompts or recorded.eval.num_prompts,
        ),
        rollout=recorded.rollout.by_transformers(),
        model=dataclasses.replace(recorded.model, path=model or recorded.model.path),
        parallel=recorded.parallel.fitting(parallel.num_processes()),
    )
    return assembly.resolve(changed)[0]
