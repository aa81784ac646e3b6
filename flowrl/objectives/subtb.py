"""Sub-trajectory and detailed balance: a learned flow of every prefix instead of one log Z.

The state before token t has flow V_t = values[t], log F relative to pi_ref; the state after the
last token has beta r. Every sub-trajectory balances where, for all i < j,

    V_i + sum_{i <= s < j} (log pi_theta - log pi_ref)_s = V_j,    that is u_i = u_j
    u_t = V_t - sum_{s < t} (log pi_theta - log pi_ref)_s

The fixed point is pi_ref exp(beta r) / Z, with V_0 = log Z. Text is a tree: the backward policy is
1. Sources: arXiv:2209.12782 (subtb), Bengio et al., GFlowNet Foundations, arXiv:2111.09266 (db).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flowrl.objectives.aggregation import response_lengths, rollout_correction
from flowrl.objectives.base import AllReduce, Metrics, Objective, given, identity
from flowrl.objectives.returns import discounted_sums
from flowrl.records import LossBatch, ragged_arange
from flowrl.schema import require


class Potentials(NamedTuple):
    """u of all states of all sequences, |y| + 1 a sequence, one after another."""

    values: Tensor  # (S,) float64
    sequence: Tensor  # (S,) int64
    position: Tensor  # (S,) int64, 0 at the prompt
    lengths: Tensor  # (N,) int64, states of each sequence


class FlowBalance(Objective):
    """What detailed and sub-trajectory balance share: the potentials u, and a mean of squared
    differences within each sequence; loss = mean over sequences."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref", "values"})

    @property
    def beta(self) -> float | None:
        return self.options.beta

    def prepare(self, batch: LossBatch, all_reduce: AllReduce = identity) -> LossBatch:
        return batch.replace(advantages=batch.rewards)

    @abstractmethod
    def imbalance(self, potentials: Potentials) -> Tensor:
        """(N,) mean of squared differences of u within each sequence."""

    def loss(self, batch: LossBatch) -> tuple[Tensor, Metrics]:
        logprobs = given(batch.logprobs, "logprobs")
        found = potentials(batch, self.options.beta)
        imbalance = self.imbalance(found)  # (N,)
        weight = rollout_correction(batch)
        loss = (weight * imbalance).sum() / given(batch.totals, "totals").sequences
        first = found.lengths.cumsum(0) - found.lengths  # (N,)
        ends = found.values.detach()[torch.stack([first, first + found.lengths - 1])]  # (2, N)
        counted = found.lengths > 1
        metrics = {
            "imbalance": imbalance.detach(),
            "residual": torch.where(counted, ends[0] - ends[1], 0.0),
            "log_z": torch.where(counted, ends[0], 0.0),
            "importance_weight": weight,
        }
        return loss.to(logprobs.dtype), {k: v.to(logprobs.dtype) for k, v in metrics.items()}

    def summarize(self, metrics: Metrics, batch: LossBatch) -> dict[str, float]:
        """flow/*: residual is that of trajectory balance, V_0 + sum (lp - lr) - beta r."""
        numbers = {
            "flow/imbalance": metrics["imbalance"].mean(),
            "flow/residual_abs": metrics["residual"].abs().mean(),
            "flow/log_z_mean": metrics["log_z"].mean(),
            "flow/iw_mean": metrics["importance_weight"].mean(),
        }
        return {name: float(value) for name, value in numbers.items()}


def potentials(batch: LossBatch, beta: float) -> Potentials:
    """u of every state. A masked token is no step: its state falls together with the next one."""
    keep = batch.mask
    num_tokens = response_lengths(batch)  # (N,)
    logprobs, ref = given(batch.logprobs, "logprobs"), given(batch.ref_logprobs, "ref_logprobs")
    log_ratio = (logprobs[keep] - ref[keep]).double()  # (T',)
    flows = given(batch.values, "values")[keep].double()  # (T',)
    owner = torch.arange(batch.num_sequences, device=keep.device).repeat_interleave(num_tokens)
    before = discounted_sums(log_ratio, ragged_arange(num_tokens), 1.0)  # (T',) of earlier tokens
    moved = torch.segment_reduce(log_ratio, "sum", lengths=num_tokens)  # (N,)
    final = beta * given(batch.advantages, "advantages").double() - moved  # (N,)
    token_places = torch.arange(owner.numel(), device=keep.device) + owner
    final_places = num_tokens.cumsum(0) + torch.arange(batch.num_sequences, device=keep.device)
    order = torch.cat([token_places, final_places]).argsort()
    lengths = num_tokens + 1
    return Potentials(
        torch.cat([flows - before, final])[order],
        torch.arange(batch.num_sequences, device=keep.device).repeat_interleave(lengths),
        ragged_arange(lengths),
        lengths,
    )


class DB(FlowBalance):
    """imbalance = mean_t (V_t + (log pi_theta - log pi_ref)_t - V_{t+1})^2."""

    name = "db"

    @dataclass(frozen=True)
    class Options:
        beta: float = 3.0
        """Inverse temperature of the target pi_ref exp(beta r) / Z: 1 / KL coefficient."""

        def __post_init__(self) -> None:
            require(
                self.beta > 0, f"objective.beta must be > 0, got {self.beta}; set objective.beta=3"
            )

    def imbalance(self, potentials: Potentials) -> Tensor:
        u = potentials.values
        within = potentials.position[1:] > 0
        squares = torch.where(within, (u[1:] - u[:-1]).square(), 0.0)
        squares = torch.cat([squares.new_zeros(1), squares])
        sums = torch.segment_reduce(squares, "sum", lengths=potentials.lengths)
        return sums / (potentials.lengths - 1).clamp(min=1)


class SubTB(FlowBalance):
    """imbalance = sum_{i<j} lam^(j-i) (u_i - u_j)^2 / sum_{i<j} lam^(j-i)."""

    name = "subtb"

    @dataclass(frozen=True)
    class Options(DB.Options):
        lam: float = 0.9
        """Weight of a sub-trajectory relative to one a token shorter, in (0, 1]; near 0: detailed
        balance (torchgfn: 0.9)."""

        def __post_init__(self) -> None:
            super().__post_init__()
            require(
                0 < self.lam <= 1,
                f"objective.lam must be in (0, 1], got {self.lam}; set objective.lam=0.9",
            )

    def imbalance(self, potentials: Potentials) -> Tensor:
        """With sums over earlier states S_k(j) = sum_{i<j} lam^(j-i) u_i^k the squares are
        S_0 u_j^2 - 2 S_1 u_j + S_2: linear in the length instead of quadratic."""
        lengths = potentials.lengths
        mean = torch.segment_reduce(potentials.values.detach(), "sum", lengths=lengths) / lengths
        u = potentials.values - mean[potentials.sequence]  # differences only: no cancellation
        powers = torch.stack([torch.ones_like(u), u, u.square()])  # (3, S)
        s0, s1, s2 = discounted_sums(powers, potentials.position, self.options.lam)
        pairs = s0 * u.square() - 2 * s1 * u + s2
        totals = torch.segment_reduce(torch.stack([pairs, s0], 1), "sum", lengths=lengths)
        return totals[:, 0] / torch.where(lengths > 1, totals[:, 1], 1.0)
