"""The modular task: tables, splits, and the distribution of its examples."""

from __future__ import annotations

from collections import Counter

import pytest

from flowrl.config import ConfigError
from flowrl.records import Prompt, Rollout
from flowrl.tasks.modular import DIGITS, Modular, Options, build


def test_solutions_by_hand():
    task = Modular(Options(p=7))
    prompt = Prompt(0, "3 5", data={"a": 3, "c": 5})
    assert task.solutions(prompt) == {"05", "12", "26", "33", "40", "54", "61"}


@pytest.mark.parametrize("p", [2, 6, 7, 11, 36])
def test_every_prompt_has_p_right_answers_of_p_squared(p):
    task = Modular(Options(p=p))
    assert task.num_prompts("train") == task.num_prompts("eval") == p * p
    for index in range(0, p * p, 7):
        prompt = task.prompt("eval", index)
        a, c = (DIGITS.index(d) for d in prompt.text.split(" "))
        outcomes = task.outcomes(prompt)
        assert len({o.text for o in outcomes}) == len(outcomes) == p * p
        right = {o.text for o in outcomes if o.reward == 1.0}
        assert right == task.solutions(prompt)
        assert len(right) == p
        for text in right:
            x, y = (DIGITS.index(d) for d in text)
            assert (a * x + y - c) % p == 0
        assert set(prompt.text + "".join(right)) <= set(task.alphabet or "")


def test_score_agrees_with_outcomes_and_refuses_all_else():
    task = Modular(Options(p=5))
    prompt = task.prompt("train", 4)
    outcomes = task.outcomes(prompt)
    scores = task.score([Rollout(prompt, 0, (), (), False, 0, o.text) for o in outcomes])
    assert [s.reward for s in scores] == [o.reward for o in outcomes]
    assert {s.solution for s in scores if s.correct} == task.solutions(prompt)
    right = sorted(task.solutions(prompt))[0]
    for text in ("", right[0], right + right[1], " " + right, right + " ", "zz", "٣٣", "9" * 10**6):
        (score,) = task.score([Rollout(prompt, 0, (), (), False, 0, text)])
        assert (score.reward, score.correct, score.solution) == (0.0, False, None)


def test_both_splits_are_all_prompts_unless_some_are_held_out():
    def problems(task: Modular, split: str) -> set[str]:
        return {task.prompt(split, i).data["problem"] for i in range(task.num_prompts(split))}

    everything = {f"{a} {c}" for a in range(7) for c in range(7)}
    task = Modular(Options())
    assert problems(task, "train") == problems(task, "eval") == everything
    held_out = Modular(Options(held_out=0.3))
    train, held = problems(held_out, "train"), problems(held_out, "eval")
    assert held
    assert not train & held
    assert train | held == everything
    assert {held_out.example(i)[0] for i in range(2000)} == train


@pytest.mark.parametrize("p", [2, 7, 13])
def test_examples_follow_the_documented_distribution(p):
    task = Modular(Options(p=p))
    draws = 20000
    weights = [(x + 1) ** -1.5 for x in range(p)]
    counts, right = Counter(), 0
    for index in range(draws):
        prompt_text, answer = task.example(index)
        a, c = (DIGITS.index(d) for d in prompt_text.split(" "))
        x, y = (DIGITS.index(d) for d in answer)
        counts[x] += 1
        right += (a * x + y - c) % p == 0
    assert right / draws == pytest.approx(2 / p, abs=0.015)  # 4 standard deviations
    for x in range(p):
        assert counts[x] / draws == pytest.approx(weights[x] / sum(weights), abs=0.015)


def test_examples_and_order_repeat():
    first, again = Modular(Options()), Modular(Options())
    assert [first.example(i) for i in range(50)] == [again.example(i) for i in range(50)]
    assert [first.prompt("train", i) for i in range(99)] == [
        again.prompt("train", i) for i in range(99)
    ]


@pytest.mark.parametrize("options", [{"p": 1}, {"p": 37}, {"held_out": 1.0}, {"prime": 7}])
def test_impossible_options(options):
    with pytest.raises(ConfigError, match=r"task\."):
        build(options, 1.0)
