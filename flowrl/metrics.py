"""Numbers of a run: how they are computed and where they are written.

metrics.jsonl holds only numbers that repeat bit for bit; clock and memory go to timing.jsonl.
"""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl.records import LossBatch
from flowrl.schema import ConfigError


class ScorerError(RuntimeError):
    """The scorer fails too often for its rewards to mean anything."""


def error_rate(num_errors: float, num_answers: float, errors: Sequence[str], limit: float) -> float:
    """Share of answers whose scorer failed. Raises ScorerError past `limit`, quoting the first."""
    rate = num_errors / num_answers
    if rate > limit:
        raise ScorerError(
            f"the scorer failed on {rate:.1%} of the answers, the limit is {limit:.1%} (first: "
            f"{errors[0] if errors else 'on another rank'}); mend it or raise reward.max_error_rate"
        )
    return rate


class JsonLines:
    """A file of one JSON object a line, flushed at each, which a resume can cut back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(row, allow_nan=False).encode() + b"\n")

    def sync(self) -> int:
        """Puts what was written on the disk; returns the length in bytes."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def cut(self, length: int) -> None:
        size = self.path.stat().st_size
        if size < length:
            raise ConfigError(
                f"{self.path} has {size} bytes and the checkpoint was written at {length}; put the "
                "file back, or start a new run with --run.dir DIR"
            )
        self.file.truncate(length)
        self.file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self.file.close()


class Stopwatch:
    """Seconds by phase of one step; waits for the device, so that a phase pays for its own work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[phase] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def take(self) -> dict[str, float]:
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory held so far: of the allocator on CUDA, of the process elsewhere. GB (1e9)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def reward_metrics(rewards: Tensor, group_size: int) -> dict[str, float]:
    """rewards (N,) of whole groups in order. Over all sequences of the step; zero_std_frac is the
    share of groups whose members all have the same reward."""
    groups = rewards.double().view(-1, group_size)
    return {
        "reward/mean": float(groups.mean()),
        "reward/std": float(groups.std(correction=0)),
        "reward/zero_std_frac": float((groups.amax(1) == groups.amin(1)).double().mean()),
    }


def length_metrics(lengths: Tensor, truncated: Tensor) -> dict[str, float]:
    """Response tokens, EOS included; truncated is the share of responses without EOS. (N,) each."""
    return {
        "response_length/mean": float(lengths.double().mean()),
        "response_length/max": float(lengths.max()),
        "response_length/truncated": float(truncated.double().mean()),
    }


def mismatch_rows(batch: LossBatch, trainer_logprobs: Tensor) -> dict[str, Tensor]:
    """Per sequence (N,), float64: what the mismatch metrics are made of. A token's log-ratio is
    trainer minus sampler, a sequence's is their sum."""
    assert batch.rollout_logprobs is not None
    log_ratio = (trainer_logprobs - batch.rollout_logprobs).double()  # (T,)
    log_ratio = torch.where(batch.mask, log_ratio, 0.0)
    return {
        "abs_diff": segment_sum(log_ratio.abs(), batch.cu_seqlens),
        "log_ratio": segment_sum(log_ratio, batch.cu_seqlens),
        "tokens": segment_sum(batch.mask.double(), batch.cu_seqlens),
    }


def mismatch_metrics(rows: Mapping[str, Tensor]) -> dict[str, float]:
    """logp_abs_diff: mean over tokens of |trainer - sampler|. kl: KL(sampler || trainer) per token,
    k1 estimate. max_ratio: largest sequence ratio. ess: effective share of sequences under it."""
    tokens = rows["tokens"].sum().clamp(min=1.0)
    log_ratio = rows["log_ratio"].clamp(max=80.0)
    ratio = (log_ratio - log_ratio.max()).exp()
    return {
        "mismatch/logp_abs_diff": float(rows["abs_diff"].sum() / tokens),
        "mismatch/kl": float(-rows["log_ratio"].sum() / tokens),
        "mismatch/max_ratio": float(log_ratio.max().exp()),
        "mismatch/ess": float(ratio.sum() ** 2 / (ratio.numel() * (ratio**2).sum())),
    }


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(T,) -> (N,): the sum of each segment, in float64 and in a fixed order."""
    lengths = cu_seqlens.diff().long()
    owner = torch.arange(lengths.numel(), device=values.device).repeat_interleave(lengths)
    return torch.zeros(lengths.numel(), dtype=torch.float64, device=values.device).index_add_(
        0, owner, values.double()
    )


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that one of k of the samples is right: 1 - C(n - c, k) / C(n, k)."""
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def distances(policy: Sequence[float], target: Sequence[float]) -> dict[str, float]:
    """Distances of two distributions over the same outcomes, in nats. What the policy's vector
    lacks of 1 is one more outcome, which the target gives no mass.

    l1 = sum |q - p|, jsd <= ln 2, kl_from = KL(p || q), kl = KL(q || p) of q given a listed outcome
    (it would be infinite otherwise; nan where no listed one has any mass)."""
    q = np.append(np.asarray(policy, dtype=np.float64), max(0.0, 1.0 - float(np.sum(policy))))
    p = np.append(np.asarray(target, dtype=np.float64), 0.0)
    middle = (p + q) / 2
    tiny = np.finfo(
        np.float64
    ).tiny  # an outcome of no mass: a large divergence, not an infinite one
    return {
        "l1": float(np.abs(q - p).sum()),
        "jsd": (_kl(q, middle, tiny) + _kl(p, middle, tiny)) / 2,
        "kl": _kl(q[:-1] / listed, p[:-1], tiny) if (listed := q[:-1].sum()) > 0 else math.nan,
        "kl_from": _kl(p, q, tiny),
    }


def _kl(p: np.ndarray, q: np.ndarray, tiny: float) -> float:
    held = p > 0
    return float((p[held] * (np.log(p[held]) - np.log(np.maximum(q[held], tiny)))).sum())
