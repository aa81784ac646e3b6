"""The toy tree: its counts, its examples, and what the spec's conventions make of them."""

from __future__ import annotations

from collections import Counter

import pytest

from flowrl.config import ConfigError
from flowrl.records import Rollout
from flowrl.tasks.toy_tree import ToyTree, build


def test_341_answers_of_which_24_are_right():
    task = build({}, 1.0)
    prompt = task.prompt("eval", 0)
    outcomes = task.outcomes(prompt)
    assert len({o.text for o in outcomes}) == len(outcomes) == 341
    assert Counter(len(o.text) for o in outcomes) == {0: 1, 1: 4, 2: 16, 3: 64, 4: 256}
    right = {o.text for o in outcomes if o.solution}
    assert right == task.solutions(prompt)
    assert Counter(map(len, right)) == {2: 2, 3: 9, 4: 13}
    assert {"57", "75", "255", "3333"} <= right
    assert not right & {"", "5", "77", "2222"}
    assert {o.reward for o in outcomes} == {0.0, 1.0}


def test_graded_reward_knows_near_answers():
    task = build({"reward": "graded"}, 1.0)
    rewards = {o.text: (o.reward, o.solution) for o in task.outcomes(task.prompt("eval", 0))}
    assert rewards["75"] == (1.0, "75")
    assert rewards["3332"] == (0.5, None)  # 11
    assert rewards["7222"] == (0.5, None)  # 13
    assert rewards["77"] == (0.0, None)


def test_scores_agree_with_outcomes_and_refuse_all_else():
    task = build({}, 1.0)
    prompt = task.prompt("train", 7)
    outcomes = task.outcomes(prompt)
    scores = task.score([Rollout(prompt, 0, (), (), False, 0, o.text) for o in outcomes])
    assert [(s.reward, s.solution) for s in scores] == [(o.reward, o.solution) for o in outcomes]
    for text in ("75 ", "7:5", "66", "\u0667\u0665", "1" * 12, "7" * 10**6):
        (score,) = task.score([Rollout(prompt, 0, (), (), False, 0, text)])
        assert (score.reward, score.correct, score.solution) == (0.0, False, None)


def test_examples_are_right_by_chance_alone():
    task = ToyTree(build({}, 1.0).options)
    answers = [task.example(i)[1] for i in range(20_000)]
    right = task.solutions(task.prompt("eval", 0))
    share = sum(a in right for a in answers) / len(answers)
    assert share == pytest.approx(0.0566, abs=0.006)  # 3.7 standard errors
    assert Counter(map(len, answers))[0] / len(answers) == pytest.approx(0.2, abs=0.011)
    assert task.example(5) == build({}, 1.0).example(5)
    assert task.example(5) != build({"seed": 1}, 1.0).example(5) or task.example(6) != build(
        {"seed": 1}, 1.0
    ).example(6)


def test_bad_options_and_prompts_are_refused():
    with pytest.raises(ConfigError, match="did you mean"):
        build({"rewards": "graded"}, 1.0)
    with pytest.raises(ValueError, match="eval"):
        build({}, 1.0).prompt("eval", 1)
