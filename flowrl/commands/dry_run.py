"""`flowrl train --dry-run`: every check that needs no training, the batch, the memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from flowrl_kernels.head.chunks import DEFAULT_LOGITS_BYTES
from rich.console import Console
from rich.table import Table

from flowrl import assembly, parallel
from flowrl.config import Config
from flowrl.loggers import check_loggers
from flowrl.model_shape import ModelShape, check_fp8, check_split, read_shape
from flowrl.models import base_model, hf_files
from flowrl.models.liger_layers import check_liger
from flowrl.parallel import Parallel
from flowrl.rollout.model_limits import check_length, eos_ids
from flowrl.rollout.replay_sampler import ReplaySampler
from flowrl.rollout.vllm_start import check_device, check_vllm
from flowrl.run_dir import check_free, check_writable
from flowrl.schema import ConfigError
from flowrl.settings import to_toml
from flowrl.tasks import Task, build_task
from flowrl.trainer import check_layout


def run(config: Config) -> None:
    """Prints what a run would do; raises ConfigError where it could not."""
    config, objective = assembly.resolve(config)
    expected = config.parallel.processes or config.parallel.model_size
    processes = parallel.num_processes() if "WORLD_SIZE" in os.environ else expected
    ranks = Parallel(0, config.parallel.replicas(processes), torch.device("cpu"))
    check_layout(config, ranks)
    missing = _missing_here(config)
    if missing and not is_elsewhere(config):
        raise ConfigError(missing[0])
    task = build_task(config.task.name, config.task.options, config.reward.timeout_s)
    num_problems = task.num_prompts("train"), task.num_prompts("eval")
    task.close()
    check_model(config, task)
    if not is_elsewhere(config):
        _check_prompts(config, task)
    console = Console(soft_wrap=True)
    console.print(to_toml(config), markup=False, highlight=False)
    console.print(_batch_table(config, ranks.world_size, num_problems))
    if is_elsewhere(config):
        console.print(
            f"model.path {config.model.path} is not on this machine, model.shape stands for it: "
            "weights and tokenizer have not been looked at", highlight=False,
        )  # fmt: skip
    for note in assembly.notes(config, task):
        console.print(note, highlight=False)
    for line in missing:
        console.print(f"not on this machine: {line}", markup=False, highlight=False)
    if config.model.backend == "megatron":
        console.print("memory: flowrl plan, with the same settings", highlight=False)
    else:
        size = base_model.model_size(config.model.path, config.base, task.alphabet or "")
        assembly.check_step(objective, size.parameters)
        console.print(_memory_table(config, size, objective.needs))
    console.print(f"kernels: {assembly.kernel_backend(config)}", highlight=False)
    check_free(config.run_dir)
    check_writable(config.run_dir)
    console.print(f"run directory {config.run_dir} is free", highlight=False)


def _missing_here(config: Config) -> list[str]:
    """What the run needs and this machine lacks, as errors with their remedies."""
    found = []
    checks: list[Callable[[], object]] = [lambda: check_loggers(config.run.loggers)]
    checks.append(lambda: parallel.check_device(config.model.device))
    if config.model.liger:
        checks.append(lambda: check_liger(assembly.device(config)))
    if config.model.backend == "megatron":
        checks.append(lambda: _check_megatron(config))
    if config.rollout.engine == "vllm":
        if not is_elsewhere(config):
            checks.append(lambda: check_device(config.rollout, assembly.device(config)))
        checks.append(lambda: check_vllm(config.rollout))
    if config.rollout.engine == "replay":
        checks.append(lambda: ReplaySampler(Path(config.rollout.replay_dir)))
    for check in checks:
        try:
            check()
        except ConfigError as error:
            found.append(str(error))
    return found


def _check_megatron(config: Config) -> None:
    assembly.check_megatron()
    if config.model.fp8 != "off":
        from flowrl.models.megatron_layers import check_transformer_engine

        check_transformer_engine()


def _check_prompts(config: Config, task: Task) -> None:
    """Every prompt through the tokenizer, and that responses end."""
    if not config.model.path:
        tokenizer = base_model.character_tokenizer(task.alphabet or "")
        return assembly.check_prompts(config, task, None, tokenizer)
    directory = Path(config.model.path)
    tokenizer = hf_files.load_tokenizer(directory)
    eos_ids(directory, tokenizer)
    assembly.check_prompts(config, task, directory, tokenizer)


def is_elsewhere(config: Config) -> bool:
    """Whether only the model's shape is known here."""
    return bool(config.model.shape) and not Path(config.model.path).is_dir()


def check_model(config: Config, task: Task) -> None:
    """Raises ConfigError for a model that cannot be trained with these settings."""
    path, megatron = Path(config.model.path), config.model.backend == "megatron"
    if is_elsewhere(config):
        shape = read_shape(config.model.shape)
        if not megatron:
            raise ConfigError(
                f"model.path {path} is not a directory; only the megatron backend's settings can "
                "be checked with model.shape alone"
            )
        if config.rollout.engine == "vllm":
            lengths = config.rollout.max_prompt_tokens, config.rollout.max_new_tokens
            check_length(shape.max_positions, *lengths)
        return _check_split(config, shape)
    if not config.model.path and task.alphabet is None:
        raise ConfigError(
            f"task {task.name} has no base model of its own; give one with --model.path DIR"
        )
    if config.model.path:
        hf_files.check_model_dir(path)
        assembly.check_shape(config, path)
        if megatron:
            _check_split(config, read_shape(path))


def _check_split(config: Config, shape: ModelShape) -> None:
    check_split(shape, config.parallel)
    if config.model.fp8 != "off":
        check_fp8(shape, config.parallel, config.model.fp8_recipe)


def _batch_table(config: Config, world_size: int, num_problems: tuple[int, int]) -> Table:
    batch = config.batch
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    table = _table("batch")
    rows = {
        "problems, training / held out": "{:,} / {:,}".format(*num_problems),
        "prompts x samples = sequences per step": (
            f"{batch.prompts_per_step} x {batch.group_size} = {batch.sequences_per_step}"
        ),
        "updates per step x sequences each": (
            f"{batch.updates_per_step} x {batch.prompts_per_update * batch.group_size}"
        ),
        "ranks x sequences per update each": (
            f"{world_size} x {batch.prompts_per_update * batch.group_size // world_size}"
        ),
        "packed tokens per micro-batch / longest sequence": (
            f"{batch.tokens_per_microbatch:,} / {longest:,} at most"
        ),
        "updates in the run": f"{config.trainer.steps * batch.updates_per_step:,}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _memory_table(config: Config, size: base_model.ModelSize, needs: frozenset[str]) -> Table:
    """Bytes per rank of what can be counted; activations are not among them."""
    width = 4 if config.model.dtype == "float32" else 2
    hidden = size.hidden
    blocks = config.log_z.layers * (hidden * hidden + 3 * hidden) + hidden + 1
    head = blocks * ("log_z" in needs) + (hidden + 1) * ("values" in needs)
    rows = 16 * config.batch.tokens_per_microbatch * size.vocabulary
    limit = config.kernels.max_logits_mb << 20 or DEFAULT_LOGITS_BYTES[assembly.device(config).type]
    table = _table("memory per rank, without activations")
    parts = {
        f"policy, {size.parameters:,} parameters: weights, gradients, moments (float32)": (
            16 * (size.parameters + head)
        ),
        f"reference policy ({config.model.dtype})": width * size.parameters * ("ref" in needs),
        f"sampler's copy ({config.model.dtype})": width * size.parameters,
        "logits chunk, about": min(limit, rows),
    }
    for name, value in {**parts, "sum": sum(parts.values())}.items():
        table.add_row(name, f"{value / 1e9:.3f} GB")
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    return table
