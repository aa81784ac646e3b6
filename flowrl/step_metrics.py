"""The numbers of one step, over all ranks, from what its updates left behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl import metrics as measure
from flowrl.config import Config
from flowrl.experience import Experience
from flowrl.mismatch import correction_metrics
from flowrl.models import LossOutput, UpdateInfo
from flowrl.objectives.base import Objective
from flowrl.parallel import Parallel
from flowrl.records import LossBatch, PackedBatch, Rollout, Score, to_cu_seqlens
from flowrl.trust_region import Moved


@dataclass
class Part:
    """The sequences of one update, on this rank."""

    sequences: list[tuple[Rollout, Score]]
    packed: PackedBatch
    loss: LossBatch
    output: LossOutput | None = None
    update: UpdateInfo | None = None
    moved: Moved | None = None


def summarize(
    config: Config,
    parallel: Parallel,
    objective: Objective,
    experience: Experience,
    batch: LossBatch,
    parts: Sequence[Part],
    before: Tensor | None,
    *,
    names_solutions: bool,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics of all ranks, and this rank's rows (N,) by name: what the objective measured.

    `before` (T,) are the log-probs before any update; None where the first update has them."""
    outputs = [part.output for part in parts if part.output is not None]
    rows = {name: torch.cat([o.metrics[name] for o in outputs]) for name in outputs[0].metrics}
    if before is None:
        before = torch.cat([o.logprobs for o in outputs])
    entropy = batch.entropy
    if entropy is None:
        entropy = torch.cat([o.entropy for o in outputs if o.entropy is not None])
    batch = batch.replace(logprobs=before, entropy=entropy)
    whole = _gathered(parallel, experience.sequence_scores, batch, rows)
    answers = whole if experience.expansion is None else _gathered_answers(parallel, experience)
    metrics = measure.reward_metrics(answers["reward"], config.batch.group_size)
    metrics["reward/error_rate"] = float(answers["error"].double().mean())
    shaping = whole["shaped"] - whole["reward"]
    if bool((shaping != 0).any()):
        metrics["reward/shaping_mean"] = float(shaping.double().mean())
    metrics |= experience.metrics
    if names_solutions:
        metrics["diversity/distinct_solutions"] = _distinct_solutions(config, parallel, experience)
    metrics |= measure.length_metrics(answers["length"], answers["truncated"])
    metrics |= _actor_metrics(parts, outputs, whole)
    if batch.rollout_logprobs is not None:
        metrics |= measure.mismatch_metrics(whole)
    for name in ("correction_weight", "correction_dropped"):
        if name in whole:
            metrics[f"mismatch/{name}"] = float(whole[name].sum() / _num_tokens(whole))
    objective_rows = {name: whole[name] for name in rows}
    sequences = LossBatch(whole["shaped"], whole["group_id"], to_cu_seqlens(whole["length"]))
    return metrics | objective.summarize(objective_rows, sequences), rows


def _gathered(
    parallel: Parallel, scores: Sequence[Score], batch: LossBatch, rows: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Per-sequence numbers of all ranks, in prompt order."""
    assert batch.logprobs is not None
    assert batch.entropy is not None
    mine = {
        "group_id": batch.group_ids,
        "reward": torch.tensor([s.reward for s in scores], dtype=torch.float32),
        "shaped": batch.rewards,
        "error": torch.tensor([s.error is not None for s in scores]),
        "length": batch.lengths,
        "truncated": batch.truncated,
        "entropy": measure.segment_sum(
            torch.where(batch.mask, batch.entropy, 0.0), batch.cu_seqlens
        ),
        "tokens": measure.segment_sum(batch.mask.double(), batch.cu_seqlens),
        **rows,
    }
    if batch.rollout_logprobs is not None:
        mine |= measure.mismatch_rows(batch, batch.logprobs)
    if batch.ref_logprobs is not None:
        log_ratio = torch.where(batch.mask, batch.logprobs - batch.ref_logprobs, 0.0)
        mine["kl_ref"] = measure.segment_sum(log_ratio, batch.cu_seqlens)
    if batch.rollout_weights is not None:
        mine |= correction_metrics(batch)
    return _in_prompt_order(parallel, mine)


def _gathered_answers(parallel: Parallel, experience: Experience) -> dict[str, Tensor]:
    """Per rollout of all ranks, in prompt order, where sequences are not rollouts."""
    rollouts, scores = experience.rollouts, experience.scores
    mine = {
        "group_id": torch.tensor([r.prompt.index for r in rollouts]),
        "reward": torch.tensor([s.reward for s in scores], dtype=torch.float32),
        "error": torch.tensor([s.error is not None for s in scores]),
        "length": torch.tensor([len(r.response_ids) for r in rollouts]),
        "truncated": torch.tensor([r.truncated for r in rollouts]),
    }
    return _in_prompt_order(parallel, mine)


def _in_prompt_order(parallel: Parallel, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shares = parallel.gather(mine)
    whole = {name: torch.cat([share[name] for share in shares]) for name in mine}
    order = whole["group_id"].argsort(stable=True)
    return {name: values[order] for name, values in whole.items()}


def _num_tokens(whole: Mapping[str, Tensor]) -> Tensor:
    """Response tokens of the loss; 1 where every one is masked."""
    return whole["tokens"].sum().clamp(min=1.0)


def _actor_metrics(
    parts: Sequence[Part], outputs: Sequence[LossOutput], whole: Mapping[str, Tensor]
) -> dict[str, float]:
    """loss, grad_norm: means over the step's updates. entropy, kl_ref: per response token.
    kl_old_new: largest of the updates. step_share: mean share taken of a trust region's steps."""
    updates = [part.update for part in parts if part.update is not None]
    tokens = _num_tokens(whole)
    norms = [u.grad_norm for u in updates if not u.skipped]
    metrics = {
        "actor/loss": sum(o.loss for o in outputs) / len(outputs),
        "actor/grad_norm": sum(norms) / len(norms) if norms else 0.0,
        "actor/lr": updates[-1].lr,
        "actor/skipped_updates": float(sum(u.skipped for u in updates)),
    }
    for name in ("entropy", "kl_ref"):
        if name in whole:
            metrics[f"actor/{name}"] = float(whole[name].sum() / tokens)
    moved = [part.moved for part in parts if part.moved is not None]
    if moved:
        metrics["actor/kl_old_new"] = max(m.kl for m in moved)
        metrics["actor/step_share"] = sum(m.share for m in moved) / len(moved)
    return metrics


def _distinct_solutions(config: Config, parallel: Parallel, experience: Experience) -> float:
    """Distinct right answers per prompt, after their normal form."""
    pairs = zip(experience.rollouts, experience.scores, strict=True)
    found = {(r.prompt.index, s.solution) for r, s in pairs if s.correct and s.solution}
    total = parallel.all_reduce(torch.tensor(len(found)).double())
    return float(total) / config.batch.prompts_per_step
