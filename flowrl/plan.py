"""What a run needs, from its settings and the model's shape alone: memory per process, operations
per step, and the bound on speed that peak rates set. Imports no torch.

Exact: parameters, weights, gradients, optimizer, key-value cache per token, operations of matrices.
Estimates, marked as such in the table: activations, and the reserve for CUDA and its libraries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from flowrl.config import Config
from flowrl.model_shape import ModelShape

RESERVE_BYTES = 3e9  # CUDA context, NCCL buffers, fragmentation
CUDA_LOGITS_BYTES = 3 << 30  # of the fused head, where kernels.max_logits_mb is 0


@dataclass(frozen=True)
class Gpu:
    """Peak rates without sparsity, from the vendor's data sheets."""

    memory_bytes: float
    bf16_flops: float
    fp8_flops: float


GPUS = {
    "a100": Gpu(80e9, 312e12, 312e12),
    "h100": Gpu(80e9, 989e12, 1979e12),
    "h200": Gpu(141e9, 989e12, 1979e12),
    "b200": Gpu(180e9, 2250e12, 4500e12),
}


@dataclass(frozen=True)
class Assumptions:
    gpu: str
    num_gpus: int
    response_tokens: int  # mean length
    prompt_tokens: int  # mean length
    needs: frozenset[str]  # of the objective
    log_z_parameters: int
    old_pass: bool


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest process, and what the sampler on the same GPU takes."""

    kept: dict[str, float]  # of the trainer, always there
    passing: dict[str, float]  # of the trainer, while it computes
    sampling: dict[str, float]
    sleeps: bool  # the sampler gives its memory back while the policy trains

    @property
    def while_training(self) -> float:
        trainer = sum(self.kept.values()) + sum(self.passing.values())
        return trainer + (0 if self.sleeps else sum(self.sampling.values()))

    @property
    def while_sampling(self) -> float:
        return sum(self.kept.values()) + sum(self.sampling.values())

    @property
    def peak(self) -> float:
        return max(self.while_training, self.while_sampling)


@dataclass(frozen=True)
class Plan:
    parameters: int
    parameters_per_process: int  # on the fullest stage
    replicas: int
    memory: Memory
    host: dict[str, float]  # bytes of host memory per process
    tokens_per_step: float
    flops: dict[str, float]  # of one step, by pass
    step_s: float  # at peak rates, without waiting
    bubble: float  # share of a training pass that the pipeline waits
    fits: bool

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())


def make_plan(config: Config, shape: ModelShape, given: Assumptions) -> Plan:
    parallel = config.parallel
    replicas = max(1, given.num_gpus // parallel.model_size)
    kept, passing = _training_bytes(config, shape, given, replicas)
    memory = Memory(kept, passing, _sampling_bytes(config, shape, given), config.rollout.sleep)
    flops, slow, fast = _step_flops(config, shape, given)
    gpu = GPUS[given.gpu]
    sequences = config.batch.sequences_per_step
    mean = given.prompt_tokens + given.response_tokens
    rows = mean * config.batch.prompts_per_update * config.batch.group_size / replicas
    passes = math.ceil(rows / config.batch.tokens_per_microbatch)
    waits = parallel.pipeline - 1
    return Plan(
        parameters=shape.num_parameters,
        parameters_per_process=max(_stage_parameters(config, shape)),
        replicas=replicas,
        memory=memory,
        host=_host_bytes(config, shape, given),
        tokens_per_step=float(sequences * mean),
        flops=flops,
        step_s=(slow / gpu.bf16_flops + fast / gpu.fp8_flops) / given.num_gpus,
        bubble=waits / (passes * parallel.virtual_pipeline + waits),
        fits=memory.peak <= gpu.memory_bytes
        and engine_weights(config, shape) <= sum(memory.sampling.values()),
    )


def remedies(config: Config, shape: ModelShape, given: Assumptions) -> Iterator[str]:
    """Single settings that make the run fit, the cheapest first."""
    parallel, rollout, batch = config.parallel, config.rollout, config.batch
    megatron = config.model.backend == "megatron"
    tries: list[tuple[str, str, object]] = []
    if rollout.engine == "vllm" and not rollout.sleep:
        tries.append(("rollout", "sleep", True))
    if parallel.tensor > 1 and not parallel.sequence:
        tries.append(("parallel", "sequence", True))
    if megatron and parallel.recompute != "full":
        tries.append(("parallel", "recompute", "full"))
    if not megatron and not config.model.gradient_checkpointing:
        tries.append(("model", "gradient_checkpointing", True))
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    if batch.tokens_per_microbatch >= 2 * longest:
        tries.append(("batch", "tokens_per_microbatch", batch.tokens_per_microbatch // 2))
    if megatron and parallel.reference == "copy" and "ref" in given.needs:
        tries.append(("parallel", "reference", "swap"))
    if megatron and given.num_gpus % (2 * parallel.model_size) == 0:
        tries.append(("parallel", "tensor", 2 * parallel.tensor))
        tries.append(("parallel", "pipeline", 2 * parallel.pipeline))
    if rollout.engine == "vllm":
        share = round(0.75 * rollout.gpu_memory_utilization, 2)
        tries.append(("rollout", "gpu_memory_utilization", share))
    for section, name, value in tries:
        part = dataclasses.replace(getattr(config, section), **{name: value})
        changed = dataclasses.replace(config, **{section: part})
        if make_plan(changed, shape, given).fits:
            yield f"{section}.{name}={str(value).lower()}"


# --- memory


def _stage_parameters(config: Config, shape: ModelShape) -> list[int]:
    """Parameters of each stage on one tensor rank. Norms are whole on every one."""
    tensor, stages = config.parallel.tensor, config.parallel.pipeline
    bias = shape.queries_width + 2 * shape.keys_width if shape.qkv_bias else 0
    layer = (shape.layer_matrices + bias) // tensor + shape.layer_vectors - bias
    vocabulary = math.ceil(shape.vocab_size / tensor) * shape.hidden_size
    counts = [layer * shape.num_layers // stages] * stages
    counts[0] += vocabulary
    if stages > 1 or not shape.tied:
        counts[-1] += vocabulary  # a tied one is copied to the last stage
    counts[-1] += shape.hidden_size
    return counts


def _training_bytes(
    config: Config, shape: ModelShape, given: Assumptions, replicas: int
) -> tuple[dict[str, float], dict[str, float]]:
    """What stays, and what a pass needs."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    stage = max(range(config.parallel.pipeline), key=_stage_parameters(config, shape).__getitem__)
    count = _stage_parameters(config, shape)[stage]
    megatron = config.model.backend == "megatron"
    shards = replicas if megatron else 1  # Megatron's optimizer is shared out over replicas
    keeps_main = megatron and width == 2  # beside the weights; the hf backend trains float32 ones
    weights = count * (width if megatron else 4)
    moments = count * (8 + 4 * keeps_main) / shards
    head = given.log_z_parameters * (4 + 4 + 8 / shards)
    copies = "ref" in given.needs and config.parallel.reference == "copy"
    workspace = config.kernels.max_logits_mb << 20 or CUDA_LOGITS_BYTES
    shard = math.ceil(shape.vocab_size / config.parallel.tensor)
    rows = config.batch.tokens_per_microbatch
    head_gradient = 4 * shard * shape.hidden_size
    # Transformer Engine keeps each matrix in FP8, and once more transposed.
    layers = shape.num_layers * shape.layer_matrices / config.parallel.model_size
    fp8_copies = 2 * layers * (1 + copies) if config.model.fp8 != "off" else 0
    kept = {
        "weights": weights,
        "gradients (float32)": 4 * count,
        "optimizer, this replica's share": moments,
        "log Z head with its optimizer": head,
        "reference policy": width * count if copies else 0,
        "FP8 copies of matrices": fp8_copies,
        "reserve for CUDA and NCCL (estimate)": RESERVE_BYTES,
    }
    passing = {
        "activations (estimate)": activation_bytes(config, shape, width),
        "fused head: logits chunk, d(weight), hidden": (
            min(workspace, 16 * rows * shard) + head_gradient + 3 * width * rows * shape.hidden_size
        ),
    }
    return kept, passing


def activation_bytes(config: Config, shape: ModelShape, width: int) -> float:
    """Of the first stage, which holds the most micro-batches at once. Full recompute keeps each
    layer's input, and one layer at a time. Selective recompute makes attention again, which keeps
    nothing of its own in its fused forms."""
    parallel, rows = config.parallel, config.batch.tokens_per_microbatch
    per_stage = shape.num_layers / parallel.pipeline
    chunks = parallel.pipeline * parallel.virtual_pipeline
    in_flight = parallel.pipeline * (
        1 + (parallel.pipeline - 1) / chunks if parallel.virtual_pipeline > 1 else 1
    )
    if config.model.backend == "megatron":
        spread = parallel.tensor if parallel.sequence else 1
        given = width * shape.hidden_size / spread
        layer = rows * _megatron_layer(shape, parallel.tensor, spread, width)
    else:
        given = 4 * shape.hidden_size
        layer = _hf_layer(shape, rows, width)
    if parallel.recompute == "full" or config.model.gradient_checkpointing:
        return rows * given * per_stage * in_flight + layer
    return layer * per_stage * in_flight


def _megatron_layer(shape: ModelShape, tensor: int, spread: int, width: int) -> float:
    """Bytes per token that a layer keeps for backward: inputs and outputs of both norms; q, k and v
    as one tensor, q and k turned, attention's output; gate and up as one tensor, and their product;
    sine and cosine of the angles."""
    whole = 4 * shape.hidden_size / spread + 2 * shape.head_dim
    split = 3 * (shape.queries_width + shape.keys_width + shape.intermediate_size)
    return width * (whole + split / tensor)


def _hf_layer(shape: ModelShape, rows: int, width: int) -> float:
    """Bytes that a layer keeps for backward: two float32 states of each norm, the inputs of its
    matrices, q, k, v and attention's output, gate before and after its activation, up, the product.
    In 16 bits every matrix has its own copy of its input, and a copy of the matrix beside it."""
    inputs = 5 if width == 2 else 2
    kept = 2 * (shape.queries_width + shape.keys_width) + 4 * shape.intermediate_size
    token = 16 * shape.hidden_size + width * (inputs * shape.hidden_size + kept)
    return rows * token + (width * shape.layer_matrices if width == 2 else 0)


def _host_bytes(config: Config, shape: ModelShape, given: Assumptions) -> dict[str, float]:
    sleeping = {
        "a sleeping engine's weights": engine_weights(config, shape) * config.rollout.sleep,
    }
    if config.model.backend != "megatron":
        return sleeping
    width = 2 if config.model.dtype == "bfloat16" else 4
    count = max(_stage_parameters(config, shape))
    swaps = "ref" in given.needs and config.parallel.reference == "swap"
    return {
        "reference, and the policy in its place": 2.0 * width * count * swaps,
        **sleeping,
        "weights and moments, while a checkpoint is written": 12.0 * count,
    }


def _sampling_bytes(config: Config, shape: ModelShape, given: Assumptions) -> dict[str, float]:
    """On the process that samples. The cache for all of the replica's sequences at once is what
    speed asks for; an engine with less makes them wait."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    rollout = config.rollout
    if rollout.engine == "replay":
        return {}
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    sequences = min(rollout.max_batch_sequences, config.batch.sequences_per_step)
    if rollout.engine == "vllm":  # what it takes for itself, weights and cache together
        gpu = GPUS[given.gpu].memory_bytes
        return {"vLLM: rollout.gpu_memory_utilization": rollout.gpu_memory_utilization * gpu}
    return {
        "sampler's copy of the weights": width * shape.num_parameters,
        "key-value cache": sequences * longest * kv_bytes_per_token(shape, width),
    }


def engine_weights(config: Config, shape: ModelShape) -> float:
    """Of vLLM on one GPU, within its share; 0 for the other samplers, which are listed whole."""
    if config.rollout.engine != "vllm":
        return 0.0
    width = 1 if config.rollout.dtype == "fp8" else 2 if config.model.dtype == "bfloat16" else 4
    return width * shape.num_parameters / config.rollout.tensor_parallel_size


def kv_bytes_per_token(shape: ModelShape, width: int) -> int:
    """Over all layers, of the whole model."""
    return 2 * shape.num_layers * shape.keys_width * width


# --- operations


def _step_flops(
    config: Config, shape: ModelShape, given: Assumptions
) -> tuple[dict[str, float], float, float]:
    """By pass; then those at the bf16 rate and those at the FP8 rate. A multiplication and an
    addition are two."""
    sequences = config.batch.sequences_per_step
    mean = given.prompt_tokens + given.response_tokens
    tokens = sequences * mean
    layers = 2.0 * shape.num_layers * shape.layer_matrices * tokens
    attention = 2.0 * shape.num_layers * shape.queries_width * mean * tokens  # causal
    head = 2.0 * shape.vocab_size * shape.hidden_size * sequences * given.response_tokens
    recomputes = config.parallel.recompute == "full" or config.model.gradient_checkpointing
    scorings = int(given.old_pass) + int("ref" in given.needs)
    forwards = 3 + int(recomputes) + scorings
    flops = {
        "old policy's pass": given.old_pass * (layers + attention + head),
        "reference's pass": ("ref" in given.needs) * (layers + attention + head),
        "updates: layers, forward and backward": (3 + recomputes) * (layers + attention),
        "updates: fused head, one pass": 3 * head,
    }
    if config.model.fp8 == "off":
        return flops, sum(flops.values()), 0.0
    return flops, sum(flops.values()) - forwards * layers, forwards * layers
