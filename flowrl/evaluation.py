"""Evaluation: sampled answers to held-out problems, and the exact distance to the target where a
task can list every answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flowrl import diversity, objectives
from flowrl.config import Config
from flowrl.data.prompts import encode_prompts
from flowrl.exact_tables import StepTabulator, Tabulator, measure
from flowrl.metrics import error_rate, pass_at_k
from flowrl.models import Backend
from flowrl.parallel import Parallel
from flowrl.records import Prompt, Rollout, SampleRequest, Score
from flowrl.rollout import Sampler
from flowrl.scores import score_all
from flowrl.tasks import Task, names_solutions

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
        objective = objectives.build(config.objective.name, config.objective.options)
        self.nominal_beta = objective.beta  # None: the objective has no target of its own
        self.fixed_point = objective.fixed_point
        tables = StepTabulator if objective.policy == "legal_actions" else Tabulator
        self.tabulator = tables(config, task, tokenizer)

    def run(self, sampler: Sampler, backend: Backend | None) -> Evaluation:
        """Every rank takes part and gets the whole result. Without a backend, samples only."""
        shares = self.parallel.gather(self._sample(sampler))
        rollouts = [r for rollouts, _ in shares for r in rollouts]
        scores = [s for _, scores in shares for s in scores]
        problems = self._problems(rollouts, scores)
        metrics = self._sampled_metrics(problems, rollouts)
        metrics[f"eval/{self.task.name}/error_rate"] = self._error_rate(scores)
        if names_solutions(self.task):
            metrics |= self._diversity(problems, scores, rollouts)
        exact = self._exact(backend) if backend is not None else []
        if exact:
            metrics |= {k: float(np.mean(v)) for k, v in _by_name(exact).items()}
        detail = {
            "set": self.task.name,
            "problems": [{k: v for k, v in p.items() if k != "correct"} for p in problems],
            "exact": self._exact_detail(exact) if exact else None,
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
        return rollouts, score_all(self.task, rollouts)

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
                    "set": prompt.data.get("set"),
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
        metrics = self._success(problems, self.task.name)
        for name in sorted({p["set"] for p in problems if p["set"]}):
            metrics |= self._success([p for p in problems if p["set"] == name], name)
        metrics[f"eval/{self.task.name}/response_length"] = float(
            np.mean([len(r.response_ids) for r in rollouts])
        )
        metrics["diversity/distinct_2"] = diversity.distinct_n(
            [r.response_ids for r in rollouts], 2
        )
        return metrics

    def _success(self, problems: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
        """avg@k and pass@k of these problems, under the set's name."""
        n = self.config.eval.samples
        metrics = {f"eval/{name}/avg@{n}": float(np.mean([p["correct"] / n for p in problems]))}
        for k in (4, 16, 64):
            if k <= n:
                rates = [pass_at_k(n, p["correct"], k) for p in problems]
                metrics[f"eval/{name}/pass@{k}"] = float(np.mean(rates))
        return metrics

    def _diversity(
        self,
        problems: Sequence[dict[str, Any]],
        scores: Sequence[Score],
        rollouts: Sequence[Rollout],
    ) -> dict[str, float]:
        """Of right answers in their normal forms."""
        found = [len(p["counts"]) for p in problems]
        metrics = {
            "diversity/distinct_solutions": float(np.mean(found)),
            "diversity/for_diversity": diversity.for_diversity(found),
        }
        shares = [len(p["counts"]) / len(p["solutions"]) for p in problems if p["solutions"]]
        if shares:
            metrics["diversity/mode_coverage"] = float(np.mean(shares))
        judged = self._judge_scores(scores, rollouts, self.config.eval.samples)
        if judged:
            metrics["diversity/judge_score"] = float(np.mean(judged))
        return metrics

    @staticmethod
    def _judge_scores(scores: Sequence[Score], rollouts: Sequence[Rollout], n: int) -> list[int]:
        """Per problem, of its first 16 samples; none with fewer."""
        if n < diversity.JUDGED_RESPONSES:
            return []
        classes = [
            diversity.approach(s.correct, s.solution, r.text)
            for s, r in zip(scores, rollouts, strict=True)
        ]
        return [
            diversity.judge_score(classes[start : start + diversity.JUDGED_RESPONSES])
            for start in range(0, len(classes), n)
        ]

    # --- exact tables

    def _exact(self, backend: Backend) -> list[dict[str, Any]]:
        """Distributions and measures per prompt that the task can tabulate, if it can."""
        prompts = self.problems[: self.config.eval.exact_prompts]
        mine = prompts[self.parallel.rank :: self.parallel.world_size]
        rows = [row for prompt in mine if (row := self._exact_prompt(prompt, backend)) is not None]
        gathered = [row for share in self.parallel.gather(rows) for row in share]
        return sorted(gathered, key=lambda row: row["index"])

    def _exact_prompt(self, prompt: Prompt, backend: Backend) -> dict[str, Any] | None:
        answers = self.tabulator.answers(prompt, backend)
        if answers is None:
            return None
        policy = self.tabulator.probabilities(answers, backend)
        group_size = self.config.batch.group_size
        targets = answers.targets(self.target_beta, self.fixed_point, group_size)
        return {
            "index": prompt.index,
            "prompt": prompt.text,
            "outcomes": [o.text for o in answers.outcomes],
            "rewards": answers.rewards,
            "reference": answers.reference,
            "reference_version": answers.reference_version,
            "target": targets.nominal.probabilities.tolist(),
            "policy": policy,
            "measures": measure(answers, policy, targets),
        }

    def _exact_detail(self, exact: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Whole distributions of a few prompts, and every measure of every prompt."""
        return {
            "beta": self.target_beta,
            "nominal_beta": self.nominal_beta,
            "reference_version": exact[0]["reference_version"],
            "fixed_point": None if self.fixed_point is None else asdict(self.fixed_point),
            "prompts": [
                {k: v for k, v in row.items() if k != "measures"}
                for row in exact[:EXACT_PROMPTS_KEPT]
            ],
            "per_prompt": _by_name(exact),
        }


def _by_name(exact: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Values per prompt of each measure that all prompts have."""
    rows = [row["measures"] for row in exact]
    return {name: [row[name] for row in rows] for name in rows[0] if all(name in r for r in rows)}
