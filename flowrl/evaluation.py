"""Evaluation: sampled answers to held-out problems, and the exact distance to the target where a
task can list every answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowrl.config import Config
from flowrl.data.packing import pack, plan_microbatches
from flowrl.data.prompts import encode_prompts
from flowrl.metrics import distances, error_rate, exact_target, pass_at_k, segment_sum
from flowrl.models import Backend
from flowrl.parallel import Parallel
from flowrl.records import Prompt, Rollout, SampleRequest, Score
from flowrl.rollout import Sampler
from flowrl.tasks import Outcome, Task

EXACT_PROMPTS_KEPT = 6  # prompts whose whole distributions are kept for the report


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    detail: dict[str, Any]  # evals/step_*.json
    rollouts: list[Rollout]
    scores: list[Score]


class Evaluator:
    """Evaluates on the same held-out problems with the same noise every time."""

    def __init__(self, config: Config, task: Task, tokenizer: Any, parallel: Parallel) -> None:
        self.config = config
        self.task = task
        self.tokenizer = tokenizer
        self.parallel = parallel
        self.problems = self._prompts(config.eval.num_prompts)
        assert config.eval.target_beta is not None, "assembly.resolve fills it"
        self.target_beta = config.eval.target_beta
        # By version and prompt: the reference changes only when the loop resets it.
        self._reference: dict[tuple[int, int], list[float]] = {}

    def run(self, sampler: Sampler, backend: Backend | None) -> Evaluation:
        """Every rank takes part and gets the whole result. Without a backend, samples only."""
        shares = self.parallel.gather(self._sample(sampler))
        rollouts = [r for rollouts, _ in shares for r in rollouts]
        scores = [s for _, scores in shares for s in scores]
        problems = self._problems(rollouts, scores)
        metrics = self._sampled_metrics(problems, rollouts)
        metrics[f"eval/{self.task.name}/error_rate"] = self._error_rate(scores)
        exact = self._exact(backend) if backend is not None else []
        if exact:
            metrics |= _mean([row["distances"] for row in exact])
        detail = {
            "set": self.task.name,
            "problems": [{k: v for k, v in p.items() if k != "correct"} for p in problems],
            "exact": {"beta": self.target_beta, "prompts": _kept(exact)} if exact else None,
        }
        return Evaluation(metrics, detail, rollouts, scores)

    def _error_rate(self, scores: Sequence[Score]) -> float:
        """Share of answers whose scorer failed. Raises ScorerError past reward.max_error_rate."""
        errors = [s.error for s in scores if s.error]
        return error_rate(len(errors), len(scores), errors, self.config.reward.max_error_rate)

    def _prompts(self, count: int) -> list[Prompt]:
        count = min(count, self.task.num_prompts("eval"))
        prompts = [self.task.prompt("eval", i) for i in range(count)]
        return encode_prompts(prompts, self.tokenizer, self.config.rollout.max_prompt_tokens)

    def _sample(self, sampler: Sampler) -> tuple[list[Rollout], list[Score]]:
        options = self.config.eval
        mine = self.problems[self.parallel.rank :: self.parallel.world_size]
        if not mine:
            return [], []
        request = SampleRequest(
            prompts=mine,
            group_size=options.samples,
            max_new_tokens=self.config.rollout.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=self.config.seed,
            step=0,
            stream="eval",
        )
        rollouts = sampler.sample(request)
        return rollouts, self.task.score(rollouts)

    def _problems(
        self, rollouts: Sequence[Rollout], scores: Sequence[Score]
    ) -> list[dict[str, Any]]:
        size = self.config.eval.samples
        problems = []
        for start in range(0, len(rollouts), size):
            prompt = rollouts[start].prompt
            group = scores[start : start + size]
            solutions = self.task.solutions(prompt)
            problems.append(
                {
                    "prompt": prompt.text,
                    "index": prompt.index,
                    "solutions": None if solutions is None else sorted(solutions),
                    "counts": dict(Counter(s.solution for s in group if s.correct and s.solution)),
                    "correct": sum(s.correct for s in group),
                    "num_samples": size,
                }
            )
        return sorted(problems, key=lambda p: p["index"])

    def _sampled_metrics(
        self, problems: Sequence[dict[str, Any]], rollouts: Sequence[Rollout]
    ) -> dict[str, float]:
        n = self.config.eval.samples
        prefix = f"eval/{self.task.name}"
        metrics = {f"{prefix}/avg@{n}": float(np.mean([p["correct"] / n for p in problems]))}
        for k in (4, 16, 64):
            if k <= n:
                rates = [pass_at_k(n, p["correct"], k) for p in problems]
                metrics[f"{prefix}/pass@{k}"] = float(np.mean(rates))
        metrics[f"{prefix}/response_length"] = float(
            np.mean([len(r.response_ids) for r in rollouts])
        )
        metrics["diversity/distinct_solutions"] = float(
            np.mean([len(p["counts"]) for p in problems])
        )
        shares = [len(p["counts"]) / len(p["solutions"]) for p in problems if p["solutions"]]
        if shares:
            metrics["diversity/mode_coverage"] = float(np.mean(shares))
        return metrics

    # --- exact distances

    def _exact(self, backend: Backend) -> list[dict[str, Any]]:
        """Distributions and distances per prompt that the task can tabulate, if it can."""
        prompts = [
            (prompt, outcomes)
            for prompt in self.problems[: self.config.eval.exact_prompts]
            if (outcomes := self.task.outcomes(prompt)) is not None
        ]
        mine = prompts[self.parallel.rank :: self.parallel.world_size]
        rows = [self._exact_prompt(prompt, outcomes, backend) for prompt, outcomes in mine]
        gathered = [row for share in self.parallel.gather(rows) for row in share]
        return sorted(gathered, key=lambda row: row["index"])

    def _exact_prompt(
        self, prompt: Prompt, outcomes: list[Outcome], backend: Backend
    ) -> dict[str, Any]:
        rollouts = self._outcome_rollouts(prompt, outcomes)
        key = (backend.reference_version, prompt.index)
        if key not in self._reference:
            self._reference[key] = self._probabilities(rollouts, backend, reference=True)
        reference = self._reference[key]
        policy = self._probabilities(rollouts, backend, reference=False)
        rewards = [o.reward for o in outcomes]
        target = exact_target(reference, rewards, self.target_beta)
        found = distances(policy, target)
        return {
            "index": prompt.index,
            "prompt": prompt.text,
            "outcomes": [o.text for o in outcomes],
            "rewards": rewards,
            "reference": reference,
            "target": target,
            "policy": policy,
            "distances": {
                "diversity/l1_to_target": found["l1"],
                "diversity/jsd_to_target": found["jsd"],
                "diversity/kl_to_target": found["kl"],
                "diversity/kl_from_target": found["kl_from"],
                "diversity/success_exact": float(np.dot(policy, np.asarray(rewards) > 0)),
                "diversity/success_target": float(np.dot(target, np.asarray(rewards) > 0)),
            },
        }

    def _outcome_rollouts(self, prompt: Prompt, outcomes: list[Outcome]) -> list[Rollout]:
        eos = self.tokenizer.eos_token_id
        texts = [o.text for o in outcomes]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [
            Rollout(prompt, i, (*ids, eos), (0.0,) * (len(ids) + 1), False, 0, text)
            for i, (ids, text) in enumerate(zip(encoded, texts, strict=True))
        ]

    def _probabilities(
        self, rollouts: Sequence[Rollout], backend: Backend, *, reference: bool
    ) -> list[float]:
        packed = pack(rollouts)
        plan = plan_microbatches(packed, self.config.batch.tokens_per_microbatch)
        found = np.empty(len(rollouts))
        for indices in plan:
            part = packed.select(indices)
            scores = backend.logprobs([part], reference=reference)
            found[indices.numpy()] = (
                segment_sum(scores.logprobs.cpu(), part.cu_seqlens).exp().numpy()
            )
        return found.tolist()


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _kept(exact: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k != "distances"} for row in exact[:EXACT_PROMPTS_KEPT]
    ]
