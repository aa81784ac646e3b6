"""The training loop: the only place where samplers, tasks, objectives and backends meet.

`Trainer.step` reads as the algorithm of arXiv:2509.15207: sample, score, old and reference
log-probs, prepare, then one optimizer update per part of the step, then new weights to the sampler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl import metrics as measure
from flowrl.config import Config
from flowrl.data.packing import pack, plan_microbatches
from flowrl.experience import Collector, Experience, shaped_rewards
from flowrl.mismatch import corrected
from flowrl.models import Backend, LossOutput, Microbatch, TokenScores, UpdateInfo
from flowrl.objectives.base import Objective
from flowrl.parallel import Parallel
from flowrl.records import LossBatch, PackedBatch, Rollout, Score, Totals, take_segments
from flowrl.rollout import Sampler
from flowrl.schema import ConfigError
from flowrl.step_metrics import Part, summarize
from flowrl.tasks import names_solutions
from flowrl.trust_region import Moved, kl_old_new, take_step


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
    num_tokens: int  # response tokens of all ranks that the step trained on
    num_generated: int  # and that were sampled for it: more with dynamic sampling, less with replay


@dataclass
class Trainer:
    config: Config
    parallel: Parallel
    collector: Collector
    sampler: Sampler
    backend: Backend
    objective: Objective
    watch: measure.Stopwatch
    skipped_in_a_row: int = 0

    def step(self, number: int) -> StepResult:
        """Step `number` (1, 2, ...). A function of the weights, the config and the number."""
        experience = self.collector.collect(number)
        packed = pack(experience.sequences)
        batch = self._loss_batch(experience, packed, number)
        with self.watch("logprob"):
            batch, before = self._add_logprobs(packed, batch)
        batch = self.objective.prepare(batch, self.parallel.all_reduce)
        parts = self._split(packed, batch, experience)
        with self.watch("train"):
            for index, part in enumerate(parts):
                self._add_group_log_z(part, before if index == 0 else None)
                self._update(part)
        with self.watch("sync"):
            self.sampler.load_weights(self.backend.named_weights(), self.backend.policy_version)
        self._reset_reference(number)
        return self._summary(experience, batch, parts, before)

    # --- before the update

    def _loss_batch(self, experience: Experience, packed: PackedBatch, number: int) -> LossBatch:
        rollouts, loop = experience.sequences, self.config.loop
        sampled = None  # of candidates the sampler knows no log-probs by token
        if experience.expansion is None:
            flat = [p for r in rollouts for p in r.rollout_logprobs]
            sampled = torch.tensor(flat, dtype=torch.float32)
        truncated = torch.tensor([r.truncated for r in rollouts])
        rewards = torch.tensor([s.reward for s in experience.sequence_scores], dtype=torch.float32)
        lengths = packed.cu_seqlens.diff().long()
        longest = self.config.rollout.max_new_tokens
        kept = None
        if loop.mask_truncated and bool(truncated.any()):
            kept = ~truncated.repeat_interleave(lengths)
        return LossBatch(
            rewards=shaped_rewards(rewards, lengths, truncated, loop, longest, number),
            group_ids=torch.tensor([r.prompt.index for r in rollouts]),
            cu_seqlens=packed.cu_seqlens,
            rollout_logprobs=sampled,
            response_mask=kept,
            truncated=truncated,
            actions=experience.expansion.actions if experience.expansion else None,
        )

    def _add_logprobs(
        self, packed: PackedBatch, batch: LossBatch
    ) -> tuple[LossBatch, Tensor | None]:
        """The batch with old and reference log-probs, and the policy's own (T,) before any update:
        None where no pass is made for them, since the first update's pass gives the same."""
        before = None
        if needs_old_pass(self.config, self.objective):
            scores = self._scores(packed, entropy=True)
            before = scores.logprobs
            batch = batch.replace(entropy=scores.entropy, old_values=scores.values)
        use_rollout = self.config.rollout.old_logprobs == "rollout"
        batch = batch.replace(old_logprobs=batch.rollout_logprobs if use_rollout else before)
        if before is not None:
            batch = corrected(batch, before, self.config.rollout)
        if "ref" in self.objective.needs:
            reference = self._scores(packed, reference=True)
            batch = batch.replace(ref_logprobs=reference.logprobs)
        return batch, before

    def _scores(
        self, packed: PackedBatch, *, reference: bool = False, entropy: bool = False
    ) -> TokenScores:
        """Per token (T,) in the batch's own order, on CPU, from passes without gradient."""
        plan = plan_microbatches(packed, self.config.batch.tokens_per_microbatch)
        parts = [packed.select(indices) for indices in plan]
        found = self.backend.logprobs(parts, reference=reference, entropy=entropy)
        restore = _token_order(packed.cu_seqlens, plan)
        optional = (found.entropy, found.values)
        return TokenScores(
            found.logprobs.cpu()[restore],
            *(None if x is None else x.cpu()[restore] for x in optional),
        )

    def _split(self, packed: PackedBatch, batch: LossBatch, experience: Experience) -> list[Part]:
        """Groups of each update, with the totals of the update over all ranks."""
        updates = self.config.batch.updates_per_step
        first = torch.ones(1, dtype=torch.int64)
        group = torch.cat([first, (batch.group_ids.diff() != 0).long()]).cumsum(0) - 1  # (N,)
        per_update = self.config.batch.prompts_per_update // self.parallel.world_size
        pairs = list(zip(experience.sequences, experience.sequence_scores, strict=True))
        parts = []
        for update in range(updates):
            indices = (group // per_update == update).nonzero().flatten()
            loss = batch.select(indices)
            groups = loss.group_ids.unique().numel()
            sizes = torch.tensor([loss.num_sequences, int(loss.mask.sum()), groups]).double()
            sizes = self.parallel.all_reduce(sizes).clamp(min=1.0)  # every token may be masked
            totals = Totals(*sizes.tolist())
            mine = [pairs[i] for i in indices.tolist()]
            parts.append(Part(mine, packed.select(indices), loss.replace(totals=totals)))
        return parts

    def _add_group_log_z(self, part: Part, before: Tensor | None) -> None:
        """The group's statistic at the current policy. Until the first update that is the policy of
        `before` (all T of the step, of which the first part's come first)."""
        if self.objective.coupling != "group":
            return
        if before is None:
            current = self._scores(part.packed).logprobs
        else:
            current = before[: int(part.loss.cu_seqlens[-1])]
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
        part.update = self._move(part, microbatches)
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

    def _move(self, part: Part, microbatches: Sequence[Microbatch]) -> UpdateInfo:
        """The optimizer's step, within the objective's trust region if it has one."""
        assert part.output is not None
        region = self.objective.trust_region
        if region is not None:
            before = part.output.loss
            part.moved = take_step(
                self.backend, region, microbatches, lambda: self._measure(part), before
            )
            update = part.moved.update
        else:
            update = self.backend.step()
        if "kl_old_new" in self.objective.needs:
            if part.moved is None:
                part.moved = Moved(update, self._measure(part)[0])
            if not update.skipped:
                self.objective.after_update(part.moved.kl)
        return update

    @torch.no_grad()
    def _measure(self, part: Part) -> tuple[float, float]:
        """KL(old || new) per token and the loss over all ranks, at the weights as they are now."""
        assert part.output is not None
        scores = self._scores(part.packed, entropy="entropy" in self.objective.needs)
        batch = part.loss
        old = part.output.logprobs if batch.old_logprobs is None else batch.old_logprobs
        now = batch.replace(
            logprobs=scores.logprobs, old_logprobs=old, values=scores.values, entropy=scores.entropy
        )
        loss, _ = self.objective.loss(now)
        mean = kl_old_new(scores.logprobs, old, batch)
        kl, total = self.parallel.all_reduce(torch.stack([mean, loss.double()])).tolist()
        return kl, total

    # --- after the update

    def _reset_reference(self, number: int) -> None:
        every = self.config.loop.reference_reset_every
        if every and number % every == 0:
            self.reset_reference()

    def reset_reference(self) -> None:
        """The reference becomes the current policy (ProRL, arXiv:2505.24864, section 3.2)."""
        self.backend.reset_reference()
        if self.config.loop.reset_optimizer:
            self.backend.reset_optimizer()

    def _summary(
        self,
        experience: Experience,
        batch: LossBatch,
        parts: Sequence[Part],
        before: Tensor | None,
    ) -> StepResult:
        metrics, rows = summarize(
            self.config, self.parallel, self.objective, experience, batch, parts, before,
            names_solutions=names_solutions(self.collector.task),
        )  # fmt: skip
        if experience.expansion:
            rows = {}  # of candidates, not of rollouts
        counts = torch.tensor([int(batch.lengths.sum()), self.collector.take_generated()]).double()
        trained, generated = (int(count) for count in self.parallel.all_reduce(counts))
        return StepResult(metrics, experience.rollouts, experience.scores, rows, trained, generated)

    # --- state

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the backend's files."""
        return {
            "skipped_in_a_row": self.skipped_in_a_row,
            "collector": self.collector.state(),
            "objective": self.objective.state(),
        }

    def save(self, directory: Path) -> None:
        self.backend.save_state(directory)
        self.collector.save(directory)

    def load(self, state: Mapping[str, Any], directory: Path) -> None:
        self.backend.load_state(directory)
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.collector.load(state["collector"], directory)
        self.objective.load_state(state["objective"])
        self.sampler.load_weights(self.backend.named_weights(), self.backend.policy_version)


def needs_old_pass(config: Config, objective: Objective) -> bool:
    """Whether a step begins with a pass for the log-probs before its first update. On-policy the
    old policy is the current one, and the first update's own pass gives the same numbers. With the
    sampler's log-probs as old ones it only measures the mismatch."""
    return (
        config.batch.updates_per_step > 1
        or objective.coupling == "group"
        or bool(objective.needs & {"old_pass", "values"})
        or config.rollout.correction != "none"
    )


def check_layout(config: Config, parallel: Parallel) -> None:
    """Raises ConfigError where the batch does not divide over the ranks, or not all have an
    engine."""
    config.rollout.address_of(parallel.rank, parallel.world_size)
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
