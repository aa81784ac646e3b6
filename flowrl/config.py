"""Configuration of a run: frozen dataclasses, read from TOML recipes and dotted overrides.

Imports no torch, so that a bad setting fails before anything heavy is loaded. Every section
checks itself in `__post_init__`. The resolved config is written to the run directory as
`config.toml` and is enough to start the same run again.

Recipes, overrides and TOML: flowrl/settings.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flowrl.loop_config import LoopConfig
from flowrl.parallel_config import ParallelConfig, check_backend
from flowrl.rollout_config import MIN_TEMPERATURE, RolloutConfig
from flowrl.schema import ConfigError, build, require
from flowrl.step_config import StepsConfig


@dataclass(frozen=True)
class RunConfig:
    dir: str = ""
    """Run directory. Empty: runs/<recipe>."""
    samples: Literal["full", "text"] = "full"
    """What samples/step_*.jsonl keeps: full (with token ids and log-probs, for replay) or text."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers beside metrics.jsonl, which is always written."""


@dataclass(frozen=True)
class TaskConfig:
    name: str = "countdown"
    """Task: countdown, modular, toy_tree, hypergrid, game24, blocksworld, jsonl, or the path of a
    Python file."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the task; its own Options dataclass checks them."""


@dataclass(frozen=True)
class BaseConfig:
    """The tiny base model that `flowrl make-base` builds when model.path is empty."""

    cache_dir: str = "runs/base"
    """Directory of built base models, one folder per hash of what made it."""
    hidden_size: int = 96
    """Hidden size D."""
    num_layers: int = 4
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads."""
    num_kv_heads: int = 4
    """Key-value heads; divides num_heads."""
    head_dim: int = 0
    """Width of a head, even; 0: hidden_size / num_heads."""
    intermediate_size: int = 256
    """Width of the MLP."""
    pretrain_steps: int = 400
    """Supervised steps on the task's well-formed answers."""
    pretrain_rows: int = 96
    """Examples per supervised step."""
    pretrain_lr: float = 3e-3
    """Peak learning rate of the supervised steps (linear warm-up, cosine decay)."""
    seed: int = 0
    """Seed of initialisation and examples."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "num_kv_heads", "intermediate_size",
                     "pretrain_steps", "pretrain_rows", "hidden_size"):  # fmt: skip
            _positive("base", name, getattr(self, name))
        require(
            self.pretrain_lr > 0,
            f"base.pretrain_lr must be > 0, got {self.pretrain_lr}; set base.pretrain_lr=3e-3",
        )
        _seed("base.seed", self.seed)
        require(
            self.head_dim >= 0 and self.head_dim % 2 == 0,
            f"base.head_dim must be even, or 0, got {self.head_dim}; set base.head_dim=32",
        )
        require(
            self.head_dim > 0 or self.hidden_size % (2 * self.num_heads) == 0,
            f"base.hidden_size must be a multiple of 2 * base.num_heads, got {self.hidden_size} "
            f"and {self.num_heads}; set base.hidden_size={2 * self.num_heads * 12}",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"base.num_kv_heads must divide base.num_heads, got {self.num_kv_heads} and "
            f"{self.num_heads}; set base.num_kv_heads={self.num_heads}",
        )


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""
    """Hugging Face causal LM directory. Empty: the base model that [base] describes."""
    shape: str = ""
    """What the model must look like, for plan and --dry-run where its files are not at hand: a
    shipped name (qwen2.5-7b, qwen2.5-32b) or a config.json."""
    backend: Literal["hf", "megatron"] = "hf"
    """Training backend: hf (one process per replica) or megatron (tensor and pipeline parallel)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products, reference and sampler; trained weights are always float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: cuda where torch sees one."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in backward (hf; megatron: parallel.recompute)."""
    fp8: Literal["off", "hybrid", "e4m3"] = "off"
    """FP8 products in the layers, with Transformer Engine; never in the log-prob head."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 scales are found: from the tensor at hand, from blocks of it, or (delayed) from
    earlier updates, without scales in the first one and in the first after a resume."""
    liger: bool = False
    """Norms, rotary embedding and SwiGLU of policy and reference by liger-kernel, on CUDA."""


@dataclass(frozen=True)
class LogZConfig:
    """The partition head log Z(x); used when the objective needs it."""

    layers: int = 2
    """Hidden blocks [Linear, GELU, LayerNorm, Dropout] before the output layer."""
    dropout: float | None = None
    """Dropout of the head. Unset: what the objective's preset says (0 without one)."""
    include_last_prompt_token: bool | None = None
    """Pool the last prompt token too. Unset: what the preset says (true without one)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the head's output. Unset: what the preset says (float32 without one)."""
    detach_hidden: bool = False
    """Stop the head's gradient at the backbone's hidden states."""
    lr: float | None = None
    """Learning rate of the head. Unset: optimizer.lr."""

    def __post_init__(self) -> None:
        _positive("log_z", "layers", self.layers)
        require(
            self.dropout is None or 0 <= self.dropout < 1,
            f"log_z.dropout must be in [0, 1), got {self.dropout}; set log_z.dropout=0",
        )
        _check_head_lr("log_z", self.lr)


@dataclass(frozen=True)
class ValueHeadConfig:
    """The value (or flow) head; used when the objective needs it."""

    detach_hidden: bool = False
    """Stop the head's gradient at the backbone's hidden states."""
    lr: float | None = None
    """Learning rate of the head. Unset: optimizer.lr."""

    def __post_init__(self) -> None:
        _check_head_lr("value_head", self.lr)


def _check_head_lr(section: str, lr: float | None) -> None:
    require(
        lr is None or lr >= 0,
        f"{section}.lr must be >= 0, got {lr}; set {section}.lr=1e-3, or leave it out",
    )


@dataclass(frozen=True)
class BatchConfig:
    """The four batch numbers; all else is derived."""

    prompts_per_step: int = 32
    """Prompts per step, over all data-parallel ranks."""
    group_size: int = 8
    """Samples per prompt, G."""
    updates_per_step: int = 1
    """Optimizer updates per step; each takes prompts_per_step / updates_per_step prompts."""
    tokens_per_microbatch: int = 8192
    """Packed tokens per forward-backward pass on one rank."""

    def __post_init__(self) -> None:
        for name in (f.name for f in dataclasses.fields(self)):
            _positive("batch", name, getattr(self, name))
        if self.prompts_per_step % self.updates_per_step:
            best = max(
                d for d in range(1, self.updates_per_step + 1) if self.prompts_per_step % d == 0
            )
            raise ConfigError(
                "batch.updates_per_step must divide batch.prompts_per_step, got "
                f"{self.updates_per_step} and {self.prompts_per_step}; "
                f"set batch.updates_per_step={best}"
            )

    @property
    def prompts_per_update(self) -> int:
        return self.prompts_per_step // self.updates_per_step

    @property
    def sequences_per_step(self) -> int:
        return self.prompts_per_step * self.group_size


@dataclass(frozen=True)
class ObjectiveConfig:
    name: str = "flowrl"
    """Objective by name; docs/math.md has them all. Its options: --objective.KEY."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the objective; its own Options dataclass checks them."""


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-6
    """Learning rate of the policy (AdamW)."""
    warmup_updates: int = 10
    """Linear warm-up, in updates; the first update runs at lr / warmup_updates, never at 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors (norms, biases) and the log Z head have none."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        for name in ("lr", "grad_clip", "weight_decay", "eps", "warmup_updates"):
            _at_least("optimizer", name, getattr(self, name), 0)
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas must be in [0, 1), got {self.betas}; set optimizer.betas=[0.9,0.99]",
        )


@dataclass(frozen=True)
class TrainerConfig:
    steps: int = 200
    """Steps to train."""
    max_skipped_updates: int = 10
    """Consecutive updates skipped for a non-finite gradient norm before the run stops."""

    def __post_init__(self) -> None:
        _positive("trainer", "steps", self.steps)
        _at_least("trainer", "max_skipped_updates", self.max_skipped_updates, 0)


@dataclass(frozen=True)
class EvalConfig:
    every: int = 50
    """Steps between evaluations. One is always before step 1, one after the last step."""
    num_prompts: int = 64
    """Held-out problems per evaluation; 0: no evaluation."""
    samples: int = 16
    """Samples per problem, n of avg@n; pass@k is reported for k of 4, 16 and 64 up to n."""
    temperature: float = 0.6
    """Temperature of evaluation (the paper: 0.6)."""
    top_p: float = 0.95
    """Nucleus of evaluation (the paper: 0.95)."""
    target_beta: float | None = None
    """Inverse temperature of the exact target pi_ref exp(beta r)/Z, where it can be enumerated.
    Unset: the objective's own beta, or 3 where it has no such target."""
    exact_prompts: int = 64
    """Prompts over which the distance to the exact target is averaged."""

    def __post_init__(self) -> None:
        _positive("eval", "samples", self.samples)
        for name in ("every", "num_prompts", "exact_prompts"):
            _at_least("eval", name, getattr(self, name), 0)
        require(
            self.temperature >= MIN_TEMPERATURE,
            f"eval.temperature must be >= {MIN_TEMPERATURE}, got {self.temperature}; "
            "set eval.temperature=0.6",
        )
        require(
            0 < self.top_p <= 1, f"eval.top_p must be in (0, 1], got {self.top_p}; set eval.top_p=1"
        )


@dataclass(frozen=True)
class RewardConfig:
    max_error_rate: float = 0.05
    """Share of a step's answers whose scorer may fail (raise or time out) before the run stops."""
    timeout_s: float = 10.0
    """Time limit of one call of a user's scorer, in seconds; its process is killed past it."""

    def __post_init__(self) -> None:
        _at_least("reward", "max_error_rate", self.max_error_rate, 0)
        require(
            self.timeout_s > 0,
            f"reward.timeout_s must be > 0, got {self.timeout_s}; set reward.timeout_s=10",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 50
    """Steps between checkpoints; one is always written after the last step. 0: only that one."""
    keep_last: int = 2
    """Checkpoints kept."""

    def __post_init__(self) -> None:
        _positive("checkpoint", "keep_last", self.keep_last)
        _at_least("checkpoint", "every", self.every, 0)


@dataclass(frozen=True)
class KernelsConfig:
    backend: str = "auto"
    """Backend of the fused operators: auto, or one that `flowrl doctor` lists as available."""
    max_logits_mb: int = 0
    """Largest logits chunk alive at a time, in MiB. 0: 256 on CPU, 3072 on CUDA."""

    def __post_init__(self) -> None:
        _at_least("kernels", "max_logits_mb", self.max_logits_mb, 0)


@dataclass(frozen=True)
class Config:
    recipe: str = "countdown_cpu"
    """Name of the recipe that this config came from."""
    seed: int = 0
    """Seed of sampling noise, dropout and log Z. Problems and their order have task.seed."""
    run: RunConfig = field(default_factory=RunConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    log_z: LogZConfig = field(default_factory=LogZConfig)
    value_head: ValueHeadConfig = field(default_factory=ValueHeadConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    steps: StepsConfig = field(default_factory=StepsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        _seed("seed", self.seed)
        longest = self.rollout.max_prompt_tokens + self.rollout.max_new_tokens - 1
        require(
            self.batch.tokens_per_microbatch >= longest,
            "batch.tokens_per_microbatch must hold the longest sequence that rollout.* allows, got "
            f"{self.batch.tokens_per_microbatch} and {longest}; "
            f"set batch.tokens_per_microbatch={longest}",
        )
        require(
            self.rollout.engine != "replay" or not self.eval.num_prompts,
            "a replay has no answers to evaluation problems, got rollout.engine=replay and "
            f"eval.num_prompts={self.eval.num_prompts}; set eval.num_prompts=0",
        )
        check_backend(self.model, self.parallel)
        require(
            self.rollout.dtype != "fp8" or self.model.dtype == "bfloat16",
            "rollout.dtype=fp8 quantises bfloat16 weights, got model.dtype="
            f"{self.model.dtype}; set model.dtype=bfloat16",
        )

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir or f"runs/{self.recipe}")


def _positive(section: str, name: str, value: int) -> None:
    _at_least(section, name, value, 1)


def _seed(name: str, value: int) -> None:
    require(
        0 <= value < 2**63,
        f"{name} must be in [0, 2^63), got {value}; set {name}=0",
    )


def _at_least(section: str, name: str, value: float, low: float) -> None:
    dotted = f"{section}.{name}"
    require(value >= low, f"{dotted} must be >= {low}, got {value}; set {dotted}={low}")


def build_options(cls: type, options: Mapping[str, Any], where: str) -> Any:
    """An objective's or task's frozen Options from a mapping; unknown keys name the nearest."""
    return build(cls, options, where)
