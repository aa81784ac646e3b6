"""Section [parallel]: how one policy is split over processes. Imports no torch.

tensor * pipeline processes hold one replica of the policy; the other processes hold further
replicas, each with its share of every update's prompts. Used by model.backend = "megatron".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flowrl.schema import ConfigError, require

if TYPE_CHECKING:
    from flowrl.config import ModelConfig


@dataclass(frozen=True)
class ParallelConfig:
    processes: int = 0
    """Processes that the settings are made for, which plan and --dry-run assume; 0: one replica's.
    A run takes what torchrun starts."""
    tensor: int = 1
    """Processes that share every matrix (tensor parallelism, TP); within one node."""
    pipeline: int = 1
    """Stages of consecutive layers (pipeline parallelism, PP)."""
    virtual_pipeline: int = 1
    """Chunks of layers per stage, interleaved (VPP): smaller bubbles, more messages."""
    sequence: bool = False
    """Split the activations between tensor-parallel matrices along the tokens, too."""
    context: int = 1
    """Context parallelism. Only 1: it needs Transformer Engine's attention, untested here."""
    overlap_p2p: bool = True
    """Interleaved schedule: send activations while computing."""
    overlap_grad_reduce: bool = False
    """Sum gradients over replicas in buckets while the last backward pass runs."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations made again in backward: none, those of attention, or every layer's."""
    reference: Literal["copy", "swap"] = "copy"
    """Reference policy: a frozen copy on the device, or one in host memory that changes places with
    the policy for its pass."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "virtual_pipeline", "context"):
            value = getattr(self, name)
            require(value >= 1, f"parallel.{name} must be >= 1, got {value}; set parallel.{name}=1")
        require(
            self.context == 1,
            "parallel.context must be 1: Megatron splits attention over ranks only with "
            "Transformer Engine, and log-probs over split sequences are not implemented, got "
            f"{self.context}; raise parallel.tensor and set parallel.sequence=true instead",
        )
        require(
            not self.sequence or self.tensor > 1,
            "parallel.sequence splits activations over the tensor-parallel ranks, got "
            "parallel.tensor=1; set parallel.tensor=2 or parallel.sequence=false",
        )
        require(
            self.virtual_pipeline == 1 or self.pipeline > 1,
            "parallel.virtual_pipeline interleaves pipeline stages, got parallel.pipeline=1 and "
            f"virtual_pipeline={self.virtual_pipeline}; set parallel.virtual_pipeline=1",
        )
        require(
            self.virtual_pipeline == 1 or self.pipeline > 2 or self.overlap_p2p,
            "two interleaved stages give wrong gradients in megatron-core 0.16.1 unless messages "
            "overlap, got parallel.pipeline=2, virtual_pipeline="
            f"{self.virtual_pipeline} and overlap_p2p=false; set parallel.overlap_p2p=true",
        )

        nearest = max(1, round(self.processes / self.model_size)) * self.model_size
        require(
            self.processes >= 0 and self.processes % self.model_size == 0,
            "parallel.processes must be a multiple of parallel.tensor * parallel.pipeline, got "
            f"{self.processes} and {self.tensor} * {self.pipeline}; set "
            f"parallel.processes={nearest}",
        )

    @property
    def model_size(self) -> int:
        """Processes of one replica."""
        return self.tensor * self.pipeline

    @property
    def splits(self) -> bool:
        """Whether anything but replicas is asked for."""
        return self.model_size > 1 or self.sequence

    def replicas(self, num_processes: int) -> int:
        """Replicas that the processes make. Raises ConfigError unless they divide."""
        if num_processes % self.model_size:
            raise ConfigError(
                "the processes must be a multiple of parallel.tensor * parallel.pipeline, got "
                f"{num_processes} and {self.tensor} * {self.pipeline}; start "
                f"{self.model_size} with torchrun --nproc-per-node {self.model_size}"
            )
        return num_processes // self.model_size

    def fitting(self, num_processes: int) -> ParallelConfig:
        """This layout, or one process per replica where the processes do not make whole ones: what
        reads a checkpoint may do so at any layout."""
        return ParallelConfig() if num_processes % self.model_size else self


def check_backend(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises ConfigError for settings that model.backend would not read."""
    megatron = model.backend == "megatron"
    require(
        megatron or parallel == ParallelConfig(),
        "parallel.* splits the policy with megatron-core, got model.backend=hf; "
        "set model.backend=megatron or leave parallel.* out",
    )
    require(
        megatron or model.fp8 == "off",
        f"model.fp8 needs model.backend=megatron, got fp8={model.fp8}; set model.fp8=off",
    )
    require(
        model.fp8 == "off" or model.dtype == "bfloat16",
        f"model.fp8={model.fp8} needs model.dtype=bfloat16, got {model.dtype}; set it",
    )
    require(
        model.fp8 == "off" or not model.liger,
        f"model.fp8={model.fp8} takes Transformer Engine's layers, which have their own norms and "
        "SwiGLU, got model.liger=true; set model.liger=false",
    )
    require(
        not megatron or not model.gradient_checkpointing,
        "model.gradient_checkpointing is the hf backend's, got true with model.backend=megatron; "
        "set parallel.recompute=full instead",
    )
