"""`flowrl plan RECIPE`: parameters, memory per process and a bound on speed.

Needs the shape of the model only: model.shape, or the config.json in model.path.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from flowrl import assembly
from flowrl.config import Config
from flowrl.model_shape import ModelShape, check_split, read_shape, shape_names
from flowrl.parallel import Parallel
from flowrl.plan import (
    GPUS,
    Assumptions,
    Plan,
    engine_weights,
    kv_bytes_per_token,
    make_plan,
    remedies,
)
from flowrl.schema import ConfigError, nearest, require
from flowrl.trainer import check_layout, needs_old_pass


@dataclass(frozen=True)
class Machine:
    gpu: str
    num_gpus: int  # 0: parallel.processes of the recipe
    response_tokens: int  # mean; 0: half of rollout.max_new_tokens


def run(config: Config, machine: Machine) -> None:
    config, objective = assembly.resolve(config)
    for flag, value in (("gpus", machine.num_gpus), ("response_tokens", machine.response_tokens)):
        require(value >= 0, f"--{flag} must be at least 0, got {value}; leave it out")
    require(
        machine.response_tokens <= config.rollout.max_new_tokens,
        f"--response_tokens is a mean and at most rollout.max_new_tokens, got "
        f"{machine.response_tokens} and {config.rollout.max_new_tokens}; set it lower",
    )
    if machine.gpu not in GPUS:
        raise ConfigError(f"no rates of a GPU called {machine.gpu!r}{nearest(machine.gpu, GPUS)}")
    shape = model_shape(config)
    check_split(shape, config.parallel)
    count = machine.num_gpus or config.parallel.processes or config.parallel.model_size
    replicas = config.parallel.replicas(count)
    check_layout(config, Parallel(0, replicas, torch.device("cpu")))
    hidden = shape.hidden_size
    blocks = config.log_z.layers * (hidden * hidden + 4 * hidden) - config.log_z.layers * hidden
    given = Assumptions(
        gpu=machine.gpu,
        num_gpus=count,
        response_tokens=machine.response_tokens or config.rollout.max_new_tokens // 2,
        prompt_tokens=config.rollout.max_prompt_tokens // 8,
        needs=objective.needs,
        log_z_parameters=blocks + hidden + 1 if "log_z" in objective.needs else 0,
        old_pass=needs_old_pass(config, objective),
    )
    show(config, shape, given, make_plan(config, shape, given), Console(soft_wrap=True))


def model_shape(config: Config) -> ModelShape:
    """Of the model in model.path where it is there, else of model.shape."""
    if config.model.path and Path(config.model.path).is_dir():
        found = read_shape(config.model.path)
        assembly.check_shape(config, Path(config.model.path))
        return found
    if not config.model.shape:
        raise ConfigError(
            "a plan needs the model's shape, got no model.shape and no directory in model.path; "
            f"set model.shape to {', '.join(shape_names())} or a config.json"
        )
    return read_shape(config.model.shape)


def show(
    config: Config, shape: ModelShape, given: Assumptions, plan: Plan, console: Console
) -> None:
    gpu = GPUS[given.gpu]
    console.print(_model_table(config, shape, given, plan))
    console.print(_memory_table(plan, gpu.memory_bytes))
    console.print(_speed_table(given, plan))
    if plan.fits:
        console.print(f"fits: {_gb(plan.memory.peak)} of {_gb(gpu.memory_bytes)}", highlight=False)
        return
    found = list(remedies(config, shape, given))
    what = f"set one of: {', '.join(found)}" if found else "take more or larger GPUs"
    console.print(
        f"does not fit: {_gb(plan.memory.peak)} of {_gb(gpu.memory_bytes)}; {what}",
        highlight=False,
    )


def _model_table(config: Config, shape: ModelShape, given: Assumptions, plan: Plan) -> Table:
    parallel = config.parallel
    width = 2 if config.model.dtype == "bfloat16" else 4
    rows = {
        "parameters": f"{plan.parameters:,} ({plan.parameters / 1e9:.1f}B)",
        "processes": (
            f"{given.num_gpus} {given.gpu}: tensor {parallel.tensor} x pipeline "
            f"{parallel.pipeline} x replicas {plan.replicas}"
        ),
        "parameters on the fullest process": f"{plan.parameters_per_process:,}",
        **_engine_rows(config, shape),
        "key-value cache": f"{kv_bytes_per_token(shape, width) / 1024:.0f} KiB a token",
        "assumed lengths": (
            f"prompt {given.prompt_tokens}, response {given.response_tokens} tokens on average"
        ),
    }
    return _table("model", rows)


def _engine_rows(config: Config, shape: ModelShape) -> dict[str, str]:
    if config.rollout.engine != "vllm":
        return {}
    size = engine_weights(config, shape)
    return {"vLLM's weights on one GPU, within its share": _gb(size)}


def _memory_table(plan: Plan, capacity: float) -> Table:
    memory = plan.memory
    rows = {name: _gb(size) for name, size in memory.kept.items() if size}
    rows |= {f"training: {name}": _gb(size) for name, size in memory.passing.items()}
    rows |= {f"sampling: {name}": _gb(size) for name, size in memory.sampling.items()}
    rows["sum while training" + (" (the engine sleeps)" if memory.sleeps else "")] = _gb(
        memory.while_training
    )
    rows["sum while sampling"] = _gb(memory.while_sampling)
    rows["memory of the GPU"] = _gb(capacity)
    rows |= {f"host, per process: {name}": _gb(size) for name, size in plan.host.items() if size}
    return _table("memory on the fullest process", rows)


def _speed_table(given: Assumptions, plan: Plan) -> Table:
    gpu = GPUS[given.gpu]
    rows = {name: f"{flops / 1e15:,.1f} PFLOP" for name, flops in plan.flops.items() if flops}
    rows["all training passes of a step"] = f"{plan.total_flops / 1e15:,.1f} PFLOP"
    rows["peak rates"] = f"{gpu.bf16_flops / 1e12:.0f} TFLOP/s bf16, {gpu.fp8_flops / 1e12:.0f} FP8"
    speed = plan.tokens_per_step / plan.step_s / given.num_gpus
    rows["least time of them"] = f"{plan.step_s:,.1f} s"
    rows["bound, without sampling and waiting"] = f"{speed:,.0f} tokens/s/GPU"
    rows["at 40% of peak"] = f"{0.4 * speed:,.0f} tokens/s/GPU, {plan.step_s / 0.4:,.0f} s a step"
    rows["the pipeline waits"] = f"{100 * plan.bubble:.1f}% of an update"
    return _table("operations and speed of one step", rows)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    return table
