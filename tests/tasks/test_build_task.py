"""Tasks by name and by file, and the examples of docs/tasks.md, which run here."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from flowrl.config import ConfigError
from flowrl.records import Rollout
from flowrl.scores import score_all
from flowrl.tasks import TASK_NAMES, Task, build_task
from flowrl.tasks.step_task import StepTask

DOCS = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()


def code_block(first_line: str) -> str:
    blocks = re.findall(r"```\w+\n(.*?)```", DOCS, flags=re.DOTALL)
    (block,) = [b for b in blocks if b.startswith(first_line)]
    return block


@pytest.mark.parametrize("name", ["blocksworld", "countdown", "game24", "modular"])
def test_shipped_tasks_by_name(name):
    assert name in TASK_NAMES
    task = build_task(name, {}, 1.0)
    assert task.name == name
    check_contract(task)
    task.close()


def check_contract(task: Task) -> None:
    """What every task with a base model promises the trainer."""
    alphabet = set(task.alphabet or "")
    for split in ("train", "eval"):
        prompt = task.prompt(split, 1)
        assert prompt.index == 1
        assert prompt == task.prompt(split, 1)
        assert prompt.token_ids == ()
        assert set(prompt.text) <= alphabet
        assert isinstance(json.loads(json.dumps(prompt.data))["problem"], str)
        solutions = task.solutions(prompt)
        assert solutions
        scores = task.score([Rollout(prompt, 0, (), (), False, 0, s) for s in sorted(solutions)])
        assert [s.solution for s in scores] == sorted(solutions)
        assert all(s.reward == 1.0 and s.correct and s.error is None for s in scores)
        (wrong,) = task.score([Rollout(prompt, 0, (), (), False, 0, "")])
        assert (wrong.reward, wrong.correct, wrong.solution, wrong.error) == (0, False, None, None)
    size = task.num_prompts("train")
    epochs = [[task.prompt("train", e * size + i) for i in range(size)] for e in range(2)]
    keys = [[p.data["problem"] for p in epoch] for epoch in epochs]
    assert sorted(keys[0]) == sorted(keys[1])
    assert keys[0] != keys[1]
    train = {p.text for p in epochs[0]}
    for index in range(30):
        example = task.example(index)
        assert example is not None
        assert example == task.example(index)
        assert example[0] in train
        assert set("".join(example)) <= alphabet


def test_unknown_name_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no task called 'countdwn'; did you mean countdown\?"):
        build_task("countdwn", {}, 1.0)
    with pytest.raises(ConfigError, match="choose from: blocksworld, countdown, game24, hypergrid"):
        build_task("zzz", {}, 1.0)


def test_the_documented_task_works(tmp_path):
    path = tmp_path / "reverse.py"
    path.write_text(code_block("# reverse.py"))
    task = build_task(str(path), {"letters": "xyz"}, 1.0)
    assert task.num_prompts("train") + task.num_prompts("eval") == 27
    check_contract(task)
    with pytest.raises(
        ConfigError, match=r"unknown setting task.leters; did you mean task.letters"
    ):
        build_task(str(path), {"leters": "xyz"}, 1.0)


def test_the_documented_scorer_and_line_work(tmp_path):
    (tmp_path / "grade.py").write_text(code_block("# grade.py"))
    line = code_block('{"prompt"')
    (tmp_path / "a.jsonl").write_text(line + line.replace("2 + 2", "1 + 3"))
    options = {"train": str(tmp_path / "a.jsonl"), "scorer": f"{tmp_path}/grade.py:score"}
    task = build_task("jsonl", options, 5.0)
    prompt = task.prompt("train", 0)
    texts = ["So, Answer: 4", "Answer: 5", "Answer:"]
    scores = task.score([Rollout(prompt, 0, (), (), False, 0, text) for text in texts])
    task.close()
    assert [s.error for s in scores] == [None] * 3
    assert [(s.reward, s.correct) for s in scores] == [(1, True), (0, False), (-0.5, False)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def build(:", "cannot load the task file .*SyntaxError"),
        ("import nothing_of_that_name", "cannot load the task file .*No module named"),
        ("import sys\nsys.exit(0)", r"cannot load .*SystemExit: 0 \(mine.py, line 2\); correct"),
        ("def build(options):\n    return 1 + ''", r"failed: TypeError: .* \(mine.py, line 2\)"),
        ("build = 3", r"must define build\(options: dict\) -> Task"),
        ("def build(options): return object()", "must have name, alphabet, prompt, num_prompts"),
    ],
)
def test_files_that_define_no_task(tmp_path, source, message):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(ConfigError, match=message):
        build_task(str(path), {}, 1.0)


def test_missing_file():
    with pytest.raises(ConfigError, match=r"task file not found: nowhere/mine\.py"):
        build_task("nowhere/mine.py", {}, 1.0)


def test_a_build_with_the_signature_of_the_shipped_tasks_is_told(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def build(options, timeout_s):\n    return None\n")
    with pytest.raises(
        ConfigError, match="takes the options alone: missing a required argument: 'timeout_s'"
    ):
        build_task(str(path), {}, 1.0)


def test_a_reward_that_is_no_number_is_a_failure_of_the_scorer(tmp_path):
    rewards = {"a": 0.5, "b": math.nan, "c": -math.inf, "d": None}
    source = code_block("# reverse.py").replace("float(right)", "REWARDS[rollout.text]")
    path = tmp_path / "reverse.py"
    path.write_text(f"from math import inf, nan\nREWARDS = {rewards}\n{source}")
    task = build_task(str(path), {}, 1.0)
    prompt = task.prompt("train", 0)
    rollouts = [Rollout(prompt, 0, (), (), False, 0, text) for text in rewards]
    first, second, third, fourth = score_all(task, rollouts)
    assert (first.reward, first.error) == (0.5, None)
    assert (second.reward, second.correct, second.error) == (0.0, False, "the reward is nan")
    assert (third.error, fourth.error) == ("the reward is -inf", "the reward is None")
    path.write_text(code_block("# reverse.py").replace("return scores", "return scores[1:]"))
    with pytest.raises(ConfigError, match="gave 3 scores for 4 rollouts"):
        score_all(build_task(str(path), {}, 1.0), rollouts)


def test_the_documented_task_of_legal_actions_works(tmp_path):
    """Each held-out problem, whole: length n with k ones has C(n, k) right answers of 2^n."""
    path = tmp_path / "bits.py"
    path.write_text(code_block("# bits.py"))
    task = build_task(str(path), {}, 1.0)
    assert isinstance(task, StepTask)
    check_contract(task)
    for index in range(task.num_prompts("eval")):
        prompt = task.prompt("eval", index)
        length, ones = prompt.data["length"], prompt.data["ones"]
        right = math.comb(length, ones)
        assert task.num_answers(prompt.data) == (2**length, right)
        log_partition = math.log(1 + right / 2**length * (math.e - 1))
        assert task.log_partition(prompt, 1.0) == pytest.approx(log_partition)
    partial = ",".join("1" * (length - 1))
    assert task.legal_actions(prompt, partial) == [",0", ",1"]
