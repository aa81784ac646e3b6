"""What every objective is: an `Options` dataclass, a `prepare`, a `loss` and what they need.

The trainer drives all objectives through this one interface and never asks for a name:

    prepared = objective.prepare(whole_step)                 once a step, before any split
    group_log_z = objective.group_statistic(whole_update)    where coupling == "group"
    loss, metrics = objective.loss(microbatch)               sums over its sequences; add them up
    numbers = objective.summarize(all_metrics, whole_update)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from flowrl.records import LossBatch, Totals

Value = TypeVar("Value")

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the data-parallel ranks."""

Metrics = dict[str, Tensor]
"""Per sequence (N,), without gradient."""


def identity(tensor: Tensor) -> Tensor:
    """The all-reduce of a single rank."""
    return tensor


@dataclass(frozen=True)
class LogZDefaults:
    """What a preset says about the partition head; the [log_z] section overrides it."""

    dropout: float = 0.0
    include_last_prompt_token: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class TrustRegion:
    """A bound on how far one update may move the policy; the trainer measures and enforces it."""

    max_kl: float
    """Largest mean KL(old || new) per response token, in nats."""
    method: Literal["line_search", "conjugate_gradient"]
    """line_search: shorten the optimizer's step until the bound holds and the surrogate improves.
    conjugate_gradient: a natural-gradient step of that length first; for small models."""
    max_backtracks: int = 10
    backtrack: float = 0.5
    """Factor of each shortening."""
    damping: float = 0.1
    """Added to the Fisher matrix's diagonal."""
    cg_iterations: int = 10


@dataclass(frozen=True)
class FixedPoint:
    """The policy at which an objective's expected gradient vanishes, as a formula over a prompt's
    answers: prior exp(c (beta rhat - log Z)), log Z such that it sums to 1. See targets.py."""

    beta: float
    length_normalised: bool = False
    """c is |y| instead of 1: the log-ratio is a mean over tokens."""
    reward: Literal["raw", "zscore"] = "raw"
    """rhat: the reward, or its mean z-score among the groups that the policy itself draws."""
    group_log_z: bool = False
    """log Z is the mean of the group, where z-scores have mean 0 and log-ratios have not: z-scores
    count G / (G - 1) times then."""
    prior: Literal["reference", "backward", "uniform"] = "reference"
    """pi_ref; or of trajectories of legal actions, the product of P_B = 1 / number of parents, or
    the same for all of them."""


class Objective(ABC):
    """A loss over packed sequences that is a sum of per-sequence terms divided by `batch.totals`.

    `loss` is sequence-local by construction: whatever couples sequences is computed beforehand, by
    `prepare` from rewards (and old log-probs) and by `group_statistic` from current log-probs. So a
    batch may be split and packed in any way, and losses and gradients of the parts add up.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    coupling: Literal["sequence", "group"] = "sequence"
    policy: Literal["tokens", "legal_actions"] = "tokens"
    """What is drawn: tokens, or whole legal actions by a softmax over their scores. Then sequences
    of a batch are the legal actions of the states visited (`LossBatch.actions`)."""
    loop_defaults: Mapping[str, Any] = {}
    """What the published method sets in [loop]; the section's own values override it."""

    def __init__(self, options: Any, backend: str | None = None) -> None:
        self.options = options
        self.backend = backend  # of the fused operators that the objective calls; None: the best

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """Subset of: "ref", "log_z", "entropy", "values" (a scalar head over the states before each
        token), "old" (a ratio to the old policy; None in `old_logprobs` means on-policy),
        "old_pass" (`prepare` reads `old_logprobs`) and "kl_old_new" (`after_update` is called)."""

    @property
    def compares_group(self) -> bool:
        """Whether a prompt with one response teaches nothing of what the objective is about."""
        return self.coupling == "group"

    @property
    def beta(self) -> float | None:
        """Inverse temperature of the nominal target, prior exp(beta r) / Z with the prior of the
        fixed point (pi_ref, where there is none); or None."""
        return None

    @property
    def fixed_point(self) -> FixedPoint | None:
        """Where training ends with enough samples, if that is known; by default the nominal target.

        It differs from that target where the loss normalises by length or z-scores the reward."""
        return None if self.beta is None else FixedPoint(self.beta)

    @property
    def log_z_defaults(self) -> LogZDefaults:
        return LogZDefaults()

    @property
    def trust_region(self) -> TrustRegion | None:
        """The bound that the trainer enforces on every update, or None."""
        return None

    def after_update(self, kl_old_new: float) -> None:
        """Called after each update where `needs` holds "kl_old_new": the mean over the update's
        tokens, all ranks, of k3 for KL(old || new). Adapts coefficients, the same on every rank."""
        raise ValueError(f"{self.name} adapts nothing; leave kl_old_new out of its needs")

    def state(self) -> dict[str, float]:
        """What updates have adapted; part of a checkpoint."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Continues from what `state` gave."""
        if state:
            raise ValueError(f"{self.name} has no state to load, got {sorted(state)}")

    @abstractmethod
    def prepare(self, batch: LossBatch, all_reduce: AllReduce = identity) -> LossBatch:
        """`batch` with `advantages`: the only place that centres, z-scores or whitens.

        Sees this rank's share of the whole step; a group is never split over ranks."""

    def group_statistic(self, batch: LossBatch) -> Tensor:
        """(N,) for `group_log_z`, from current log-probs, without gradient; whole groups only."""
        raise ValueError(
            f"{self.name} has no group statistic (coupling {self.coupling!r}); "
            "call group_statistic only where coupling is 'group'"
        )

    @abstractmethod
    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        """The sum over the batch's sequences divided by `batch.totals`, and per-sequence metrics.

        Differentiable in `logprobs` and in whatever else of `needs` carries a gradient."""

    def summarize(self, metrics: Metrics, batch: LossBatch) -> dict[str, float]:
        """Metric names and numbers of a whole update, from what `loss` measured on its parts.

        Every metric is the mean over sequences, under actor/."""
        return {f"actor/{name}": float(values.mean()) for name, values in metrics.items()}


def count_totals(batch: LossBatch) -> Totals:
    """Sizes of `batch` alone. Over several ranks, sum them before the batch is split."""
    return Totals(
        sequences=float(batch.num_sequences),
        tokens=float(batch.mask.sum()),
        groups=float(torch.unique(batch.group_ids).numel()),
    )


def given(value: Value | None, name: str) -> Value:
    """`value`, or ValueError when the batch lacks a field that the objective needs."""
    if value is None:
        raise ValueError(f"the objective needs LossBatch.{name}, got None; set it before loss()")
    return value
