"""The training loop: the only place where samplers, tasks, objectives and backends meet.

`Trainer.step` reads as the algorithm of arXiv:2509.15207: sample, score, old and reference
log-probs, prepare, then one optimizer update per part of the step, then new weights to the sampler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowrl import metrics as measure
from flowrl.config import Config
from flowrl.data.packing import pack, plan_microbatches
from flowrl.data.prompts import encode_prompts, step_indices
from flowrl.models import Backend, LossOutput, Microbatch, UpdateInfo
from flowrl.objectives.base import Objective
from flowrl.parallel import Parallel
from flowrl.records import (
    LossBatch,
    PackedBatch,
    Prompt,
    Rollout,
    SampleRequest,
    Score,
    Totals,
    take_segments,
    to_cu_seqlens,
)
from flowrl.rollout import Sampler
from flowrl.schema import ConfigError
from flowrl.tasks import Task


class TrainingError(RuntimeError):
    """The run cannot go on."""


class NonFiniteLossError(TrainingError):
    """The loss is not a number. Holds this rank's sequences of the update, each with whether it is
    at fault; on a rank whose share is sound none is."""

    def __init__(self, message: str, sequences: Sequence[tuple[Rollout, Score, bool]]) -> None:
        super().__init__(message)
        self.sequences = list(sequences)


@dataclass(frozen=True)
class StepResult:
    """One step: `metrics` are of all ranks, `rollouts`, `scores` and `rows` of this one."""

    metrics: dict[str, float]
    rollouts: list[Rollout]
    scores: list[Score]
    rows: dict[str, Tensor]  # per sequence (N,), what the objective measured
    num_tokens: int  # response tokens of all ranks


@dataclass
class Part:
    """The sequences of one update, on this rank."""

    sequences: list[tuple[Rollout, Score]]
    packed: PackedBatch
    loss: LossBatch
    output: LossOutput | None = None
    update: UpdateInfo | None = None


@dataclass
class Trainer:
    config: Config
    parallel: Parallel
    task: Task
    tokenizer: Any
    sampler: Sampler
    backend: Backend
    objective: Objective
    watch: measure.Stopwatch
    skipped_in_a_row: int = 0

    def step(self, number: int) -> StepResult:
        """Step `number` (1, 2, ...). A function of the weights, the config and the number."""
        with self.watch("generate"):
            rollouts = self.sampler.sample(self._request(number))
        with self.watch("reward"):
            scores = self._score(rollouts)
        packed = pack(rollouts)
        batch = self._loss_batch(rollouts, scores, packed)
        with self.watch("logprob"):
            batch, trainer_logprobs = self._add_logprobs(packed, batch)
        batch = self.objective.prepare(batch, self.parallel.all_reduce)
        parts = self._split(packed, batch, list(zip(rollouts, scores, strict=True)))
        with self.watch("train"):
            for index, part in enumerate(parts):
                self._add_group_log_z(part, trainer_logprobs if index == 0 else None)
                self._update(part)
        with self.watch("sync"):
            self.sampler.load_weights(self.backend.named_weights(), self.backend.policy_version)
        return self._summary(rollouts, scores, batch, parts, trainer_logprobs)

    # --- before the update

    def _request(self, number: int) -> SampleRequest:
        rollout = self.config.rollout
        return SampleRequest(
            prompts=self._prompts(number),
            group_size=self.config.batch.group_size,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=1.0,
            seed=self.config.seed,
            step=number,
        )

    def _prompts(self, number: int) -> list[Prompt]:
        """This rank's share of every update of the step, update by update."""
        sizes = self.config.batch
        indices = step_indices(number, sizes.prompts_per_step)
        share = self.parallel.share(sizes.prompts_per_update)
        mine = [
            index
            for update in range(sizes.updates_per_step)
            for index in indices[update * sizes.prompts_per_update :][share]
        ]
        prompts = [self.task.prompt("train", index) for index in mine]
        return encode_prompts(prompts, self.tokenizer, self.config.rollout.max_prompt_tokens)

    def _score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        scores = self.task.score(rollouts)
        errors = [s.error for s in scores if s.error]
        totals = self.parallel.all_reduce(torch.tensor([len(errors), len(scores)]).double())
        limit = self.config.reward.max_error_rate
        measure.error_rate(float(totals[0]), float(totals[1]), errors, limit)
        return scores

    def _loss_batch(
        self, rollouts: Sequence[Rollout], scores: Sequence[Score], packed: PackedBatch
    ) -> LossBatch:
        flat = [p for r in rollouts for p in r.rollout_logprobs]
        return LossBatch(
            rewards=torch.tensor([s.reward for s in scores], dtype=torch.float32),
            group_ids=torch.tensor([r.prompt.index for r in rollouts]),
            cu_seqlens=packed.cu_seqlens,
            rollout_logprobs=torch.tensor(flat, dtype=torch.float32),
            truncated=torch.tensor([r.truncated for r in rollouts]),
        )

    @property
    def needs_old_pass(self) -> bool:
        """On-policy the old policy is the current one, and its pass may be skipped (DESIGN). With
        the sampler's log-probs as old ones it only measures the mismatch."""
        return (
            self.config.batch.updates_per_step > 1
            or self.objective.coupling == "group"
            or "old_pass" in self.objective.needs
        )

    def _add_logprobs(
        self, packed: PackedBatch, batch: LossBatch
    ) -> tuple[LossBatch, Tensor | None]:
        """The batch with old and reference log-probs, and the trainer's own before the first update
        (T,), None where the first update's loss will tell them."""
        own = None
        if self.needs_old_pass:
            own, entropy = self._logprobs(packed, entropy=True)
            batch = batch.replace(entropy=entropy)
        use_rollout = self.config.rollout.old_logprobs == "rollout"
        batch = batch.replace(old_logprobs=batch.rollout_logprobs if use_rollout else own)
        if "ref" in self.objective.needs:
            reference, _ = self._logprobs(packed, reference=True)
            batch = batch.replace(ref_logprobs=reference)
        return batch, own

    def _logprobs(
        self, packed: PackedBatch, *, reference: bool = False, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(T,) in the batch's own order, on CPU, from passes without gradient."""
        plan = plan_microbatches(packed, self.config.batch.tokens_per_microbatch)
        parts = [packed.select(indices) for indices in plan]
        scores = self.backend.logprobs(parts, reference=reference, entropy=entropy)
        restore = _token_order(packed.cu_seqlens, plan)
        found = None if scores.entropy is None else scores.entropy.cpu()[restore]
        return scores.logprobs.cpu()[restore], found

    def _split(
        self, packed: PackedBatch, batch: LossBatch, sequences: list[tuple[Rollout, Score]]
    ) -> list[Part]:
        """Sequences of each update, with the totals of the update over all ranks."""
        updates = self.config.batch.updates_per_step
        parts = []
        for indices in torch.arange(batch.num_sequences).chunk(updates):
            loss = batch.select(indices)
            groups = loss.group_ids.unique().numel()
            sizes = torch.tensor([loss.num_sequences, int(loss.mask.sum()), groups]).double()
            totals = Totals(*self.parallel.all_reduce(sizes).tolist())
            mine = [sequences[i] for i in indices.tolist()]
            parts.append(Part(mine, packed.select(indices), loss.replace(totals=totals)))
        return parts

    def _add_group_log_z(self, part: Part, step_logprobs: Tensor | None) -> None:
        """The group's statistic at the current policy. Until the first update that is the policy of
        `step_logprobs` (all T of the step, of which the first part's come first)."""
        if self.objective.coupling != "group":
            return
        if step_logprobs is None:
            current, _ = self._logprobs(part.packed)
        else:
            current = step_logprobs[: int(part.loss.cu_seqlens[-1])]
        batch = part.loss.replace(logprobs=current).to(self.parallel.device)
        part.loss = part.loss.replace(group_log_z=self.objective.group_statistic(batch).cpu())

    # --- the update

    def _update(self, part: Part) -> None:
        plan = plan_microbatches(part.packed, self.config.batch.tokens_per_microbatch)
        microbatches = [Microbatch(part.packed.select(i), part.loss.select(i)) for i in plan]
        wants_entropy = part.loss.entropy is None
        output = self.backend.forward_backward(microbatches, self.objective, entropy=wants_entropy)
        order = torch.cat(plan).argsort()
        tokens = _token_order(part.packed.cu_seqlens, plan)
        part.output = LossOutput(
            loss=float(self.parallel.all_reduce(torch.tensor(output.loss).double())),
            logprobs=output.logprobs.cpu()[tokens],
            entropy=None if output.entropy is None else output.entropy.cpu()[tokens],
            metrics={name: rows.cpu()[order] for name, rows in output.metrics.items()},
        )
        self._check_finite(part)
        part.update = self.backend.step()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if part.update.skipped else 0
        if self.skipped_in_a_row > self.config.trainer.max_skipped_updates:
            raise TrainingError(
                f"{self.skipped_in_a_row} updates in a row had a non-finite gradient norm; lower "
                "optimizer.lr or objective.beta, or raise trainer.max_skipped_updates"
            )

    def _check_finite(self, part: Part) -> None:
        assert part.output is not None
        if math.isfinite(part.output.loss):
            return
        bad = ~torch.isfinite(measure.segment_sum(part.output.logprobs, part.loss.cu_seqlens))
        for rows in part.output.metrics.values():  # squared, as most losses take them
            bad |= ~torch.isfinite(rows.float() ** 2)
        raise NonFiniteLossError(
            f"the loss is {part.output.loss}; lower optimizer.lr or bound the importance weight",
            [(r, s, b) for (r, s), b in zip(part.sequences, bad.tolist(), strict=True)],
        )

    # --- after the update

    def _summary(
        self,
        rollouts: list[Rollout],
        scores: list[Score],
        batch: LossBatch,
        parts: Sequence[Part],
        trainer_logprobs: Tensor | None,
    ) -> StepResult:
        outputs = [part.output for part in parts if part.output is not None]
        updates = [part.update for part in parts if part.update is not None]
        names = outputs[0].metrics
        rows = {name: torch.cat([o.metrics[name] for o in outputs]) for name in names}
        if trainer_logprobs is None:
            trainer_logprobs = torch.cat([o.logprobs for o in outputs])
        entropy = batch.entropy
        if entropy is None:
            entropy = torch.cat([o.entropy for o in outputs if o.entropy is not None])
        batch = batch.replace(logprobs=trainer_logprobs, entropy=entropy)
        whole = self._gathered(scores, batch, rows)
        metrics = measure.reward_metrics(whole["reward"], self.config.batch.group_size)
        metrics["reward/error_rate"] = float(whole["error"].double().mean())
        metrics["diversity/distinct_solutions"] = self._distinct_solutions(rollouts, scores)
        metrics |= measure.length_metrics(whole["length"], whole["truncated"])
        metrics |= self._actor_metrics(outputs, updates, whole)
        metrics |= measure.mismatch_metrics(whole)
        objective_rows = {name: whole[name] for name in rows}
        sequences = LossBatch(whole["reward"], whole["group_id"], to_cu_seqlens(whole["length"]))
        metrics |= self.objective.summarize(objective_rows, sequences)
        return StepResult(metrics, rollouts, scores, rows, int(whole["length"].sum()))

    def _gathered(
        self, scores: Sequence[Score], batch: LossBatch, rows: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Per-sequence numbers of all ranks, in prompt order."""
        assert batch.logprobs is not None
        assert batch.entropy is not None
        mine = {
            "group_id": batch.group_ids,
            "reward": batch.rewards,
            "error": torch.tensor([s.error is not None for s in scores]),
            "length": batch.lengths,
            "truncated": batch.truncated,
            "entropy": measure.segment_sum(batch.entropy, batch.cu_seqlens),
            **measure.mismatch_rows(batch, batch.logprobs),
            **rows,
        }
        if batch.ref_logprobs is not None:
            log_ratio = torch.where(batch.mask, batch.logprobs - batch.ref_logprobs, 0.0)
            mine["kl_ref"] = measure.segment_sum(log_ratio, batch.cu_seqlens)
        shares = self.parallel.gather(mine)
        whole = {name: torch.cat([share[name] for share in shares]) for name in mine}
        order = whole["group_id"].argsort(stable=True)
        return {name: values[order] for name, values in whole.items()}

    def _actor_metrics(
        self, outputs: Sequence[LossOutput], updates: Sequence[UpdateInfo], whole: dict[str, Tensor]
    ) -> dict[str, float]:
        """loss, grad_norm: means over the step's updates. entropy, kl_ref: per response token."""
        tokens = whole["tokens"].sum()
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
        return metrics

    def _distinct_solutions(self, rollouts: Sequence[Rollout], scores: Sequence[Score]) -> float:
        """Distinct right answers per prompt, after their normal form."""
        found = {(r.prompt.index, s.solution) for r, s in zip(rollouts, scores, strict=True)
                 if s.correct and s.solution}  # fmt: skip
        total = self.parallel.all_reduce(torch.tensor(len(found)).double())
        return float(total) / self.config.batch.prompts_per_step


def check_layout(config: Config, parallel: Parallel) -> None:
    """Raises ConfigError where the batch does not divide over the ranks."""
    prompts = config.batch.prompts_per_update
    if prompts % parallel.world_size:
        nearest = math.ceil(prompts / parallel.world_size) * parallel.world_size
        raise ConfigError(
            f"an update's prompts must divide over the ranks, got {prompts} prompts "
            f"and {parallel.world_size} ranks; set "
            f"batch.prompts_per_step={nearest * config.batch.updates_per_step}"
        )


def _token_order(cu_seqlens: Tensor, plan: Sequence[Tensor]) -> Tensor:
    """(T,) where to find each token of a batch in the concatenation of its micro-batches."""
    rows, _ = take_segments(cu_seqlens, torch.cat(list(plan)))
    return rows.argsort()
