"""Points of a study that need no training: what temperature, rejection sampling and the exact
target itself reach, from tables.

If sampling a maximiser's policy at a higher temperature reaches a matcher's point, its diversity
was for free. Rejection sampling from pi_ref keeps all of pi_ref's diversity, at the price of its
draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np

from flowrl import assembly, parallel
from flowrl.config import Config
from flowrl.evaluation import Evaluator
from flowrl.exact_tables import Answers, measure
from flowrl.models import Backend
from flowrl.objectives.base import FixedPoint
from flowrl.run_dir import read_config, restore_newest
from flowrl.schema import ConfigError
from flowrl.study.plan import Run
from flowrl.targets import Table, target

Point = dict[str, Any]  # kind, value, per_prompt


def temperature_points(run: Run, temperatures: Sequence[float]) -> list[Point]:
    """The run's last policy with its logits divided by each temperature; pi_ref and targets stay at
    the run's own. Distances are to the run's own target."""
    config = read_config(run.directory)
    evaluator, answers = _answers(config)
    points = []
    for temperature in temperatures:
        backend = _backend(config, temperature)
        restore_newest(run.directory, backend)
        policies = [evaluator.tabulator.probabilities(a, backend) for a in answers]
        points.append(_point("temperature", temperature, answers, policies, evaluator))
    return points


def reference_points(run: Run, tries: Sequence[float], betas: Sequence[float]) -> list[Point]:
    """Rejection sampling from pi_ref, and exact targets with and without length normalisation."""
    config = assembly.resolve(run.config)[0]
    evaluator, answers = _answers(config)
    points = []
    for count in tries:
        policies = [rejection(a, count) for a in answers]
        points.append(_point("rejection", count, answers, policies, evaluator))
    for beta in betas:
        for kind, point in (
            ("target", FixedPoint(beta)),
            ("length-normalised target", FixedPoint(beta, length_normalised=True)),
        ):
            policies = [_solved(point, a) for a in answers]
            points.append(_point(kind, beta, answers, policies, evaluator))
    return points


def rejection(answers: Answers, tries: float) -> np.ndarray:
    """Draws y from pi_ref until one is right, at most n times; the last draw stands.

        q(y) = pi_ref(y) (1 - (1 - p)^n) / p for right y,   pi_ref(y) (1 - p)^(n - 1) for wrong y

    with p the success of pi_ref. n = 1 is pi_ref, n = inf pi_ref given a right answer."""
    reference = np.asarray(answers.reference, dtype=np.float64)
    reference = reference / reference.sum()
    right = np.array([s is not None for s in answers.solutions])
    success = float(reference[right].sum())
    if success == 0.0:
        return reference
    kept = (1.0 - (1.0 - success) ** tries) / success
    return reference * np.where(right, kept, (1.0 - success) ** (tries - 1))


def _solved(point: FixedPoint, answers: Answers) -> np.ndarray:
    found = target(point, Table(answers.reference, answers.rewards, answers.lengths))
    assert found is not None, point  # raw rewards always have one
    return found.probabilities


def _answers(config: Config) -> tuple[Evaluator, list[Answers]]:
    """Every exact prompt of the run's evaluation. Raises ConfigError for a task without tables."""
    ranks = parallel.start(config.model.device)
    parts = assembly.assemble(config, ranks, print)
    with closing(parts):
        evaluator = Evaluator(config, parts.task, parts.tokenizer, ranks)
        prompts = evaluator.problems[: config.eval.exact_prompts]
        found = [evaluator.tabulator.answers(prompt, parts.backend) for prompt in prompts]
    answers = [a for a in found if a is not None]
    if not answers:
        raise ConfigError(
            f"task {config.task.name} lists no answers, so it has no exact controls; leave "
            "[controls] out of the study"
        )
    return evaluator, answers


def _backend(config: Config, temperature: float) -> Backend:
    rollout = dataclasses.replace(config.rollout, temperature=temperature)
    warmed = dataclasses.replace(config, rollout=rollout)
    ranks = parallel.start(config.model.device)
    return assembly.build_backend(warmed, assembly.resolve(config)[1], ranks, print)


def _point(
    kind: str,
    value: float,
    answers: Sequence[Answers],
    policies: Sequence[Sequence[float] | np.ndarray],
    evaluator: Evaluator,
) -> Point:
    rows = []
    for held, policy in zip(answers, policies, strict=True):
        group_size = evaluator.config.batch.group_size
        targets = held.targets(evaluator.target_beta, evaluator.fixed_point, group_size)
        rows.append(measure(held, list(policy), targets))
    per_prompt = {name: [row[name] for row in rows] for name in rows[0]}
    return {"kind": kind, "value": value, "per_prompt": per_prompt}
