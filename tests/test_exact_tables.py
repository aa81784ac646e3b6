"""Tables by teacher forcing against what the sampler does, and the measures taken from them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from flowrl import assembly, parallel
from flowrl.config import Config
from flowrl.evaluation import Evaluator
from flowrl.exact_tables import Answers, measure
from flowrl.objectives.base import FixedPoint
from flowrl.records import Prompt, SampleRequest
from flowrl.schema import ConfigError
from flowrl.settings import load, merge
from flowrl.tasks import Outcome

SMALL = {
    "base": {
        "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2,
        "intermediate_size": 64, "pretrain_rows": 64, "pretrain_steps": 60,
    },
    "eval": {"samples": 16},
}  # fmt: skip


def resolved(base_cache, recipe: str, **changes) -> Config:
    settings = merge(SMALL, {"base": {"cache_dir": str(base_cache)}, **changes})
    return assembly.resolve(load(recipe, settings))[0]


def assembled(config: Config) -> tuple[assembly.Parts, Evaluator]:
    ranks = parallel.start("cpu")
    parts = assembly.assemble(config, ranks, lambda _: None)
    return parts, Evaluator(config, parts.task, parts.tokenizer, ranks)


def test_the_table_is_what_the_sampler_draws_from(base_cache):
    """341 answers, those of four digits without EOS; the rest of the mass is on other tokens."""
    parts, evaluator = assembled(resolved(base_cache, "toy_tree_cpu"))
    answers = evaluator.tabulator.answers(evaluator.problems[0], parts.backend)
    assert answers is not None
    assert {len(o.text): n for o, n in zip(answers.outcomes, answers.lengths, strict=True)} == {
        0: 1, 1: 2, 2: 3, 3: 4, 4: 4,
    }  # fmt: skip
    ids = (r.response_ids for r in answers.rollouts)
    table = dict(zip(ids, answers.reference, strict=True))
    assert evaluator.tabulator.probabilities(answers, parts.backend) == answers.reference
    size = 8192
    request = SampleRequest([answers.prompt], size, 4, 1.0, 1.0, seed=0, step=0)
    counts = Counter(r.response_ids for r in parts.sampler.sample(request))
    ill_formed = sum(n for ids, n in counts.items() if ids not in table) / size
    assert 1.0 - float(sum(table.values())) == pytest.approx(ill_formed, abs=0.012)
    likely = [ids for ids, p in table.items() if p > 0.01]
    assert len(likely) > 5
    for ids in likely:
        error = 4 * np.sqrt(table[ids] / size)  # four standard errors
        assert counts[ids] / size == pytest.approx(table[ids], abs=error), ids


def test_answers_that_the_sampler_cannot_reach_are_refused(base_cache):
    config = resolved(base_cache, "toy_tree_cpu", rollout={"max_new_tokens": 3})
    parts, evaluator = assembled(config)
    with pytest.raises(ConfigError, match="set rollout.max_new_tokens=5"):
        evaluator.tabulator.answers(evaluator.problems[0], parts.backend)


def test_an_evaluation_reports_target_and_fixed_point_apart(base_cache):
    """FlowRL on raw rewards: the two differ; on log R of the hypergrid by a square."""
    config = resolved(base_cache, "hypergrid_cpu", objective={"name": "flowrl"})
    parts, evaluator = assembled(config)
    found = evaluator.run(parts.sampler, parts.backend)
    metrics = found.metrics
    assert metrics["diversity/l1_to_target"] != pytest.approx(
        metrics["diversity/l1_to_fixed_point"], abs=0.1
    )
    assert metrics["diversity/effective_modes_reference"] == pytest.approx(4.0, abs=0.3)
    assert metrics["diversity/success_target"] == pytest.approx(0.464, abs=0.1)
    detail = found.detail["exact"]
    assert detail["nominal_beta"] == 1.0
    assert detail["fixed_point"] == asdict(FixedPoint(1.0, length_normalised=True))
    assert set(detail["per_prompt"]) <= set(metrics)
    assert len(found.detail["problems"][0]["solutions"]) == 4


def test_measures_by_hand():
    outcomes = [Outcome("a", 1.0, "m"), Outcome("b", 1.0, "n"), Outcome("c", 0.0)]
    answers = Answers(Prompt(0, "p"), outcomes, [2, 2, 1], [], [0.25, 0.25, 0.5], 0)
    log_two = float(np.log(2.0))
    targets = answers.targets(log_two, FixedPoint(log_two), 8)
    assert targets.nominal.probabilities == pytest.approx([1 / 3] * 3)  # 0.25 x 2, 0.5 x 1
    found = measure(answers, [0.5, 0.0, 0.5], targets)
    by_hand = {
        "l1_to_target": 1 / 6 + 1 / 3 + 1 / 6,
        "l1_to_fixed_point": 2 / 3,
        "kl_to_target": float(np.log(1.5)),
        "success_exact": 0.5,
        "success_target": 2 / 3,
        "mode_mass_error": 1 / 6,
        "effective_modes": 1.0,
        "effective_modes_target": 2.0,
        "expected_coverage": (1 - 0.5**64) / 2,
        "length_exact": 1.5,
        "kl_to_reference": 0.5 * log_two,
        "log_z_target": float(np.log(1.5)),
        "log_z_error": float(np.log(1.5)),  # the KL
    }
    for name, value in by_hand.items():
        assert found[f"diversity/{name}"] == pytest.approx(value), name
    lost = measure(answers, [0.0, 0.0, 0.0], targets)  # a policy that diverged
    given_a_listed_answer = {"kl_to_target", "kl_to_fixed_point", "kl_to_reference", "length_exact",
                             "log_z_error"}  # fmt: skip
    assert {name.split("/")[1] for name in found.keys() - lost.keys()} == given_a_listed_answer
    assert lost["diversity/l1_to_target"] == pytest.approx(2.0)
