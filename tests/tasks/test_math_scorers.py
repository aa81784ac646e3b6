"""The shipped scorers of mathematical answers, alone and in their process."""

from __future__ import annotations

import json
import time

import pytest

from flowrl.records import Rollout
from flowrl.tasks.jsonl import Jsonl, build
from flowrl.tasks.scorers.answer_line import WINDOW, equal, normal_form, score


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ("42", "42"),
        ("** 42**.", "42"),
        (r"$x = \boxed{1{,}200\text{ cm}}$.", "1200"),
        (r"\boxed{x=5}", "5"),
        (r"\boxed{\text{yes}}", "yes"),
        (r"\boxed{3", "3"),
        (r"\dfrac12", "1/2"),
        (r"\frac{n}{2}", "n/2"),
        ("1,234,567", "1234567"),
        (r"\left(1, 2\right)", "(1,2)"),
        (r"42^\circ", "42"),
        (r"5\text{ cm}^2", "5"),
        ("3 square units", "3"),
        ("12km", "12"),
        ("2 pi", "2pi"),  # no unit
        (r"10^{3}", "10^{3}"),
        ("8 or 9", "8or9"),
        ("units", "units"),
        ("=", ""),
    ],
)
def test_normal_form(given, form):
    assert normal_form(given) == form


@pytest.mark.parametrize(
    ("given", "answer", "same"),
    [
        ("42.0", "42", True),
        (r"\frac{1}{2}", "0.5", True),
        ("-.5", "-1/2", True),
        ("+7", "7", True),
        ("0.33", "1/3", False),
        ("1/0", "1/0", True),  # no number, yet the same text
        ("1/0", "2/0", False),
        ("1e3", "1000", False),
        ("-42", "42", False),
        ("4.2", "42", False),
        ("x", "X", False),
        ("$", "", False),  # nothing never equals nothing
    ],
)
def test_equal(given, answer, same):
    assert equal(given, answer) is same


def test_the_last_answer_line_at_the_end_counts():
    def reward(text: str) -> float:
        found = score("", text, "42", {})
        assert found["correct"] is (found["reward"] == 1.0)
        return found["reward"]

    assert reward("so\nAnswer: 42") == 1.0
    assert reward("the answer : 42\nbecause") == 1.0
    assert reward("Answer:\n42") == 1.0
    assert reward("Answer: 41\nAnswer: 42") == 1.0
    assert reward("Answer: 42\nAnswer: 41") == -1.0
    assert reward("it is 42") == -1.0
    assert reward("") == -1.0
    line = "Answer: 42\n"
    assert reward(line + "x" * (WINDOW - len(line))) == 1.0
    assert reward(line + "x" * (WINDOW - len(line) + 1)) == -1.0


def task_of(tmp_path, answers: list[str], **options) -> Jsonl:
    rows = [{"prompt": f"p{i}", "answer": answer} for i, answer in enumerate(answers)]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build({"train": str(path), "eval": str(path), **options}, 10.0)


def scores(task: Jsonl, index: int, *texts: str):
    prompt = task.prompt("eval", index)
    return task.score([Rollout(prompt, 0, (), (), False, 0, text) for text in texts])


def test_math_verify_compares_by_algebra(tmp_path):
    pytest.importorskip("math_verify")
    task = task_of(tmp_path, [r"\frac{x+1}{2}", "(1,2)", "12"], scorer="math_verify")
    try:
        right = r"so it is \boxed{\frac{1}{2} + \frac{x}{2}}."
        found = scores(task, 0, right, r"\boxed{\frac{x}{2}}", "", r"\boxed{\frac{")
        assert [s.reward for s in found] == [1.0, -1.0, -1.0, -1.0]
        assert [s.correct for s in found] == [True, False, False, False]
        assert all(s.error is None for s in found)
        assert [s.reward for s in scores(task, 1, r"\boxed{(1, 2)}", r"\boxed{(2, 1)}")] == [1, -1]
        assert scores(task, 2, "Answer: $12$")[0].correct
    finally:
        task.close()


def test_math_verify_gives_up_on_what_it_cannot_decide(tmp_path):
    """Such a response is wrong; it is no failure of the scorer, and costs seconds at most."""
    pytest.importorskip("math_verify")
    task = task_of(tmp_path, ["42"], scorer="math_verify")
    try:
        start = time.monotonic()
        (tower,) = scores(task, 0, r"\boxed{9^{9^{9^{9}}}}")
        assert (tower.reward, tower.error) == (-1.0, None)
        assert time.monotonic() - start < 10.0  # the limit past which the process is killed
        assert scores(task, 0, r"\boxed{42}")[0].correct  # the same process goes on
    finally:
        task.close()


def test_training_and_evaluation_may_differ(tmp_path):
    pytest.importorskip("math_verify")
    task = task_of(tmp_path, ["42"], scorer="answer_line", eval_scorer="math_verify")
    try:
        texts = (r"\boxed{6 \cdot 7}", "Answer: 42")
        assert [s.reward for s in scores(task, 0, *texts)] == [1.0, 1.0]
        prompt = task.prompt("train", 0)
        trained = task.score([Rollout(prompt, 0, (), (), False, 0, text) for text in texts])
        assert [s.reward for s in trained] == [-1.0, 1.0]
    finally:
        task.close()


def test_an_unreadable_reference_is_an_error_and_no_reward(tmp_path):
    pytest.importorskip("math_verify")
    task = task_of(tmp_path, ["}"], scorer="math_verify")
    try:
        (found,) = scores(task, 0, r"\boxed{42}")
        assert found.error is not None
        assert "cannot read the reference answer" in found.error
        assert (found.reward, found.correct) == (0.0, False)
    finally:
        task.close()
