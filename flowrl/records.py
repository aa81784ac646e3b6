"""What crosses a layer: prompts, rollouts, packed batches and the objectives' record.

Legend, used everywhere: N sequences, T response tokens (rows of the loss), T_model packed tokens
(prompts and responses), P prompts, G samples per prompt (`group_size`), D hidden, V vocabulary,
V_local this rank's share of it. Batches are packed: one row of tokens and `cu_seqlens`, no padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100  # target of a response token that takes no part in the loss


Message = Mapping[str, str]
"""Of a chat: {"role": "user", "content": ...}."""


@dataclass(frozen=True)
class Prompt:
    """One problem. `index` identifies it within its split and keys the sampling noise."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)  # the task's own payload, JSON-able
    messages: tuple[Message, ...] = ()  # become `text` when token ids are made; then empty


@dataclass(frozen=True)
class SampleRequest:
    """What a sampler is asked for. Its noise is a function of (seed, step, stream, prompt.index,
    sample, position), never of rank or batch layout; `stream` keeps training and evaluation apart.
    """

    prompts: Sequence[Prompt]
    group_size: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    step: int
    stream: str = "train"


@dataclass(frozen=True)
class Rollout:
    """One sampled response. Prompt-major order: a group's members stand together."""

    prompt: Prompt
    sample: int  # 0 .. G-1 within the group
    response_ids: tuple[int, ...]  # up to and including the first EOS
    rollout_logprobs: tuple[float, ...]  # of the distribution that was sampled from
    truncated: bool  # reached the limit without EOS
    policy_version: int
    text: str  # decoded response without special tokens


@dataclass(frozen=True)
class Score:
    """A scorer's verdict on one response. `error` is set when the scorer itself failed."""

    reward: float
    correct: bool
    solution: str | None = None  # canonical form of a correct answer, for distinct solutions
    error: str | None = None


@dataclass(frozen=True)
class PackedBatch:
    """N sequences, prompt and response, without padding. The last response token is not fed to the
    model: it predicts nothing. `hidden_rows[t]` is the packed position whose state predicts
    `targets[t]`: the packer shifts, never a kernel."""

    token_ids: Tensor  # (T_model,) int64
    model_cu_seqlens: Tensor  # (N + 1,) int32, over T_model
    prompt_lengths: Tensor  # (N,) int32
    targets: Tensor  # (T,) int64, IGNORE_INDEX where masked
    cu_seqlens: Tensor  # (N + 1,) int32, over T

    @property
    def num_sequences(self) -> int:
        return self.prompt_lengths.numel()

    @property
    def position_ids(self) -> Tensor:  # (T_model,)
        return ragged_arange(self.model_cu_seqlens.diff())

    @property
    def hidden_rows(self) -> Tensor:  # (T,) int64
        first = self.model_cu_seqlens[:-1] + self.prompt_lengths - 1  # (N,)
        lengths = self.cu_seqlens.diff()
        return first.long().repeat_interleave(lengths.long()) + ragged_arange(lengths)

    def select(self, indices: Tensor) -> PackedBatch:
        """The sequences at `indices` (n,), in that order."""
        model_rows, model_cu_seqlens = take_segments(self.model_cu_seqlens, indices)
        rows, cu_seqlens = take_segments(self.cu_seqlens, indices)
        return PackedBatch(
            self.token_ids[model_rows],
            model_cu_seqlens,
            self.prompt_lengths[indices],
            self.targets[rows],
            cu_seqlens,
        )

    def to(self, device: torch.device) -> PackedBatch:
        return _to(self, device)


@dataclass(frozen=True)
class Totals:
    """Sizes of one whole update over all ranks; every loss is a sum divided by one of them."""

    sequences: float
    tokens: float  # response tokens that are not masked
    groups: float


@dataclass(frozen=True)
class Actions:
    """Sequences that are legal actions: which step of which trajectory each is a candidate for."""

    trajectory_ids: Tensor  # (N,) int64
    step_ids: Tensor  # (N,) int64, unique to a step of a trajectory
    chosen: Tensor  # (N,) bool: the candidate that was taken
    log_backward: Tensor  # (N,) log P_B of the taken one, on all candidates of the step

    def select(self, indices: Tensor) -> Actions:
        return Actions(*(getattr(self, f.name)[indices] for f in fields(self)))

    def to(self, device: torch.device) -> Actions:
        return _to(self, device)


@dataclass(frozen=True)
class LossBatch:
    """The one record that every objective reads. Per token (T,), per sequence (N,)."""

    rewards: Tensor  # (N,) raw, after shaping
    group_ids: Tensor  # (N,) int64; members of a group share the prompt
    cu_seqlens: Tensor  # (N + 1,) int32, over T
    logprobs: Tensor | None = None  # (T,) current policy; set where the loss is evaluated
    old_logprobs: Tensor | None = None  # (T,); None: on-policy, equal to logprobs
    ref_logprobs: Tensor | None = None  # (T,)
    rollout_logprobs: Tensor | None = None  # (T,) the sampler's own
    response_mask: Tensor | None = None  # (T,) bool; None: every token counts
    entropy: Tensor | None = None  # (T,)
    values: Tensor | None = None  # (T,) value of the state before each token
    old_values: Tensor | None = None  # (T,) the same before the step's first update
    rollout_weights: Tensor | None = None  # (T,) correction of sampler against trainer; None: 1
    rollout_factors: Tensor | None = None  # (N,) the same of a sequence, where it is one number
    advantages: Tensor | None = None  # (N,) or (T,), from prepare
    returns: Tensor | None = None  # (T,) what values are fitted to, from prepare
    log_z: Tensor | None = None  # (N,) a group's members share the prompt's value
    group_log_z: Tensor | None = None  # (N,) or (N, k) from the group's pass, without gradient
    truncated: Tensor | None = None  # (N,) bool
    actions: Actions | None = None  # where sequences are legal actions
    totals: Totals | None = None  # of the whole update, filled before it is split

    @property
    def num_sequences(self) -> int:
        return self.rewards.numel()

    @property
    def lengths(self) -> Tensor:  # (N,) int64: response tokens, masked ones included
        return self.cu_seqlens.diff().long()

    @property
    def mask(self) -> Tensor:  # (T,) bool
        if self.response_mask is not None:
            return self.response_mask
        if self.logprobs is not None:  # without a wait for the GPU
            return torch.ones_like(self.logprobs, dtype=torch.bool)
        size = int(self.cu_seqlens[-1])
        return torch.ones(size, dtype=torch.bool, device=self.cu_seqlens.device)

    def replace(self, **changes: Any) -> LossBatch:
        return replace(self, **changes)

    def select(self, indices: Tensor) -> LossBatch:
        """The sequences at `indices` (n,), in that order; totals stay those of the update."""
        rows, cu_seqlens = take_segments(self.cu_seqlens, indices)
        num_tokens = int(self.cu_seqlens[-1])
        changes: dict[str, Any] = {"cu_seqlens": cu_seqlens}
        if self.actions is not None:
            changes["actions"] = self.actions.select(indices)
        whole = ("cu_seqlens", "totals", "actions")
        for name in (f.name for f in fields(self) if f.name not in whole):
            value = getattr(self, name)
            if value is not None:
                per_token = name in _PER_TOKEN or (
                    name == "advantages" and value.numel() == num_tokens != self.num_sequences
                )
                changes[name] = value[rows if per_token else indices]
        return replace(self, **changes)

    def to(self, device: torch.device) -> LossBatch:
        return _to(self, device)


_PER_TOKEN = {
    "logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "response_mask", "entropy",
    "values", "old_values", "rollout_weights", "returns",
}  # fmt: skip


def ragged_arange(lengths: Tensor, total: int | None = None) -> Tensor:
    """0 .. length-1 for each segment, concatenated: [2, 3] -> [0, 1, 0, 1, 2]. int64. `total`, the
    sum of the lengths, spares the host from waiting for it."""
    lengths = lengths.long()
    ends = lengths.cumsum(0)
    if total is None:
        total = int(ends[-1]) if lengths.numel() else 0
    starts = (ends - lengths).repeat_interleave(lengths, output_size=total)
    return torch.arange(total, device=lengths.device) - starts


def take_segments(cu_seqlens: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the segments at `indices` (n,), concatenated, and their cu_seqlens (n + 1,)."""
    lengths = cu_seqlens.diff()[indices]
    starts = cu_seqlens[:-1][indices].long()
    rows = starts.repeat_interleave(lengths.long()) + ragged_arange(lengths)
    return rows, to_cu_seqlens(lengths)


def to_cu_seqlens(lengths: Tensor) -> Tensor:
    """(n,) lengths -> (n + 1,) int32 offsets, starting at 0."""
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
    offsets[1:] = lengths.cumsum(0)
    return offsets


def _to(record: Any, device: torch.device) -> Any:
    moved = {
        f.name: value.to(device)
        for f in fields(record)
        if isinstance(value := getattr(record, f.name), Tensor | Actions)
    }
    return replace(record, **moved)
