"""Objectives by name: each one file, one `LossBatch` in, a loss and per-sequence metrics out.

    result = loss("flowrl", batch, preset="paper")     # one call, for tests and notebooks
    result.loss.backward()

    objective = build("flowrl", {"preset": "paper"})   # what the trainer holds

Siblings (tasks, rollout, models) are never imported here. To add an objective: write its file and
name its class below; CONTRIBUTING.md has a worked example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowrl.config import ConfigError, build_options
from flowrl.objectives.base import LogZDefaults, Metrics, Objective, count_totals
from flowrl.objectives.cispo import CISPO
from flowrl.objectives.dapo import DAPO
from flowrl.objectives.disco import DisCO
from flowrl.objectives.dr_grpo import DrGRPO
from flowrl.objectives.flow_of_reasoning import FlowOfReasoning
from flowrl.objectives.flowrl_objective import FlowRL
from flowrl.objectives.ftb import FTB
from flowrl.objectives.gflowrl import GFlowRL
from flowrl.objectives.gmpo import GMPO
from flowrl.objectives.grpo import GRPO
from flowrl.objectives.gspo import GSPO
from flowrl.objectives.gspo_token import GSPOToken
from flowrl.objectives.gvpo import GVPO
from flowrl.objectives.kimi_pmd import KimiPMD
from flowrl.objectives.ppo import PPO
from flowrl.objectives.prorl import ProRL
from flowrl.objectives.reinforce import Reinforce
from flowrl.objectives.reinforce_pp import ReinforcePP
from flowrl.objectives.reinforce_pp_baseline import ReinforcePPBaseline
from flowrl.objectives.rloo import RLOO
from flowrl.objectives.rloo_kl import RLOOKL
from flowrl.objectives.subtb import DB, SubTB
from flowrl.objectives.tb import TB
from flowrl.objectives.tba import TBA
from flowrl.objectives.trpo import TRPO
from flowrl.objectives.vargrad import VarGrad
from flowrl.records import LossBatch
from flowrl.schema import nearest

__all__ = [
    "LogZDefaults",
    "LossResult",
    "Objective",
    "build",
    "count_totals",
    "loss",
    "names",
]

RESIDUALS: tuple[type[Objective], ...] = (
    FlowRL, TB, VarGrad, GFlowRL, TBA, GVPO, KimiPMD, FTB, SubTB, DB, FlowOfReasoning,
)  # fmt: skip
POLICY_GRADIENTS: tuple[type[Objective], ...] = (
    Reinforce, RLOO, RLOOKL, ReinforcePP, ReinforcePPBaseline, PPO, TRPO,
    GRPO, DrGRPO, DAPO, ProRL, GSPO, GSPOToken, GMPO, CISPO, DisCO,
)  # fmt: skip

OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in (*RESIDUALS, *POLICY_GRADIENTS)}


@dataclass(frozen=True)
class LossResult:
    """What the one-call form gives back."""

    loss: Tensor  # scalar
    metrics: Metrics  # per sequence (N,), without gradient
    summary: dict[str, float]  # the names that a run logs


def names() -> list[str]:
    return sorted(OBJECTIVES)


def build(
    name: str, options: Mapping[str, Any] | None = None, *, backend: str | None = None
) -> Objective:
    """The objective called `name` with checked options; `backend` of the operators that it calls.

    Raises ConfigError for an unknown name or option (naming the nearest) and impossible values."""
    if name not in OBJECTIVES:
        raise ConfigError(f"no objective called {name!r}{nearest(name, names())}")
    cls = OBJECTIVES[name]
    try:
        chosen = build_options(cls.Options, options or {}, "objective")
    except ConfigError as error:
        raise ConfigError(f"{error} (objective {name})") from error
    return cls(chosen, backend)


def loss(name: str, batch: LossBatch, **options: Any) -> LossResult:
    """Prepares and evaluates a whole `LossBatch`: the mean over its sequences or tokens.

    Fills `totals` from the batch, prepares, takes the group's statistic where there is one, and
    evaluates. Differentiable in `batch.logprobs` and, where log Z is learned, `batch.log_z`.
    Raises ConfigError as `build` does, ValueError for a field that the objective needs and lacks.
    """
    objective = build(name, options)
    batch = objective.prepare(batch.replace(totals=count_totals(batch)))
    if objective.coupling == "group":
        batch = batch.replace(group_log_z=objective.group_statistic(batch))
    value, metrics = objective.loss(batch)
    return LossResult(value, metrics, objective.summarize(metrics, batch))
