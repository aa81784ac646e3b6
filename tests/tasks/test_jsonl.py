"""Problems from files: what is read, what is refused with file and line, and how it is scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowrl.config import ConfigError
from flowrl.records import Prompt, Rollout
from flowrl.tasks.jsonl import Jsonl, build

GOOD = [{"prompt": f"{i}+1=", "answer": str(i + 1), "level": i} for i in range(20)]


def write(path: Path, rows: list) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def rollout(prompt: Prompt, text: str) -> Rollout:
    return Rollout(prompt, 0, (), (), False, 0, text)


def prompts(task: Jsonl, split: str) -> list[str]:
    return [task.prompt(split, i).text for i in range(task.num_prompts(split))]


def test_the_last_lines_are_held_out(tmp_path):
    task = build({"train": write(tmp_path / "a.jsonl", GOOD)}, 1.0)
    assert prompts(task, "eval") == ["18+1=", "19+1="]
    assert sorted(prompts(task, "train")) == sorted(row["prompt"] for row in GOOD[:18])
    assert prompts(task, "train") != [row["prompt"] for row in GOOD[:18]]
    prompt = task.prompt("train", 18)  # the second epoch
    assert prompt.index == 18
    first = next(p for i in range(18) if (p := task.prompt("train", i)).text == prompt.text)
    assert first.data == prompt.data
    assert prompt.data["row"]["level"] + 1 == int(prompt.data["answer"])
    json.dumps(prompt.data)


def test_an_evaluation_file_of_its_own_and_other_field_names(tmp_path):
    rows = [{"q": row["prompt"], "a": row["answer"]} for row in GOOD]
    train, held = write(tmp_path / "t.jsonl", rows[:15]), write(tmp_path / "e.jsonl", rows[15:])
    options = {"train": train, "eval": held, "prompt_field": "q", "answer_field": "a"}
    task = build(options, 1.0)
    assert task.num_prompts("train") == 15
    assert prompts(task, "eval") == [row["q"] for row in rows[15:]]


def test_several_evaluation_files_take_turns(tmp_path):
    held = [write(tmp_path / f"{n}.jsonl", GOOD[i : i + n]) for i, n in ((0, 1), (1, 3), (4, 2))]
    task = build({"train": write(tmp_path / "t.jsonl", GOOD), "eval": ", ".join(held)}, 1.0)
    sets = [task.prompt("eval", i).data["set"] for i in range(task.num_prompts("eval"))]
    assert sets == ["1", "3", "2", "3", "2", "3"]
    assert "set" not in task.prompt("train", 0).data
    one = build({"train": held[0], "eval": write(tmp_path / "a,b.jsonl", GOOD)}, 1.0)
    assert one.num_prompts("eval") == len(GOOD)


def test_messages_and_fields_inside_objects(tmp_path):
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
    other = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2"}]
    rows = [
        {"q": {"chat": chat}, "gold": {"a": "2"}},
        {"q": {"chat": other}, "gold": {"a": "4"}, "gold.a": "3"},
    ]
    train = write(tmp_path / "a.jsonl", rows)
    options = {"train": train, "eval": train, "prompt_field": "q.chat", "answer_field": "gold.a"}
    task = build(options, 1.0)
    first, second = task.prompt("eval", 0), task.prompt("eval", 1)
    assert first.messages == tuple(chat)
    assert first.text == "Add.\n1+1"
    assert first.data["problem"] != second.data["problem"]
    assert [p.data["answer"] for p in (first, second)] == ["2", "3"]  # a field's own name first
    json.dumps(first.data)


def test_a_scorer_that_compares_needs_every_answer(tmp_path):
    rows = [GOOD[0], {"prompt": "x", "answer": " "}]
    path = write(tmp_path / "a.jsonl", rows)
    assert build({"train": path}, 1.0).num_prompts("train") == 1  # "exact" may expect silence
    with pytest.raises(ConfigError, match="line 2: 'answer' is empty"):
        build({"train": path, "scorer": "answer_line"}, 1.0)


def test_exact_match_strips_white_space_only(tmp_path):
    rows = [{"prompt": "p", "answer": " Two words\n"}, {"prompt": "r", "answer": "x"}]
    task = build({"train": write(tmp_path / "a.jsonl", rows)}, 1.0)
    prompt = task.prompt("train", 0)
    texts = ["Two words", "\tTwo words ", "two words", "Two  words", "", "Two words."]
    scores = task.score([rollout(prompt, text) for text in texts])
    assert [s.reward for s in scores] == [1, 1, 0, 0, 0, 0]
    assert [s.solution for s in scores[:3]] == ["Two words", "Two words", None]
    assert task.solutions(prompt) == {"Two words"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{broken"], "a.jsonl, line 1: not valid UTF-8 JSON"),
        ([GOOD[0], "", "nope"], "a.jsonl, line 3: not valid UTF-8 JSON"),
        ([GOOD[0], '{"prompt": "x", "answer": NaN}'], "line 2: not valid UTF-8 JSON: NaN"),
        (["[" * 100000], "line 1: not valid UTF-8 JSON"),
        ([GOOD[0], [1]], "line 2: must be a JSON object, got list"),
        ([GOOD[0], {"promt": "x", "answer": "1"}], "line 2: no field 'prompt' .*mean promt"),
        ([{"prompt": "x"}], "line 1: no field 'answer'"),
        ([{"prompt": "x", "answer": 4}], "line 1: field 'answer' must be a string, got 4"),
        ([{"prompt": None, "answer": "4"}], "line 1: field 'prompt' must be a string, got null"),
        ([{"prompt": "", "answer": "4"}], "line 1: 'prompt' is empty"),
        ([GOOD[0], GOOD[1], GOOD[0]], "line 3: the same prompt as line 1"),
        ([{"prompt": [], "answer": "1"}], "line 1: field 'prompt' has no messages"),
        ([{"prompt": ["hi"], "answer": "1"}], "line 1: field 'prompt': a message must be an"),
        ([{"prompt": [{"role": "user"}], "answer": "1"}], "strings role and content, got {.role"),
        ([{"prompt": [{"role": "user", "content": None}], "answer": "1"}], "strings role and"),
        ([{"prompt": "a\ud800", "answer": "1"}], "line 1: 'prompt' has half of a surrogate pair"),
        ([], "a.jsonl has no problems"),
        (["", "  "], "a.jsonl has no problems"),
        ([GOOD[0]], "1 problems, too few to hold out 1"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message):
        build({"train": write(tmp_path / "a.jsonl", rows)}, 1.0)


def test_other_bad_input(tmp_path):
    good = write(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "answer": ""}'.encode("latin-1"))
    for options, message in [
        ({}, "task.train must name a file"),
        ({"train": str(tmp_path / "no.jsonl")}, "cannot read .*no.jsonl: No such file"),
        ({"train": str(tmp_path)}, "cannot read"),
        ({"train": str(tmp_path / "latin.jsonl")}, "line 1: not valid UTF-8"),
        ({"train": good, "scorer": "exakt"}, "task.scorer .* write exact"),
        ({"train": good, "scorer": "grade.py"}, "path/to/file.py:function"),
        ({"train": good, "scorer": "none.py:f"}, "file not found: none.py"),
        ({"train": good, "answer_field": ""}, "needs answers"),
        ({"train": good, "evaluation": good}, "unknown setting task.evaluation"),
        ({"train": good, "scorer_workers": 0}, "task.scorer_workers"),
        ({"train": good, "eval_fraction": 0.0}, "task.eval_fraction"),
        ({"train": good, "eval_scorer": "exakt"}, "task.eval_scorer .* got 'exakt'"),
        ({"train": good, "scorer": "answer_line", "answer_field": ""}, "answer_line needs answers"),
        ({"train": good, "eval": f"{good},b/a.jsonl"}, "differ in their names"),
        ({"train": good, "eval": f"{good},jsonl.jsonl"}, "none called jsonl"),
        ({"train": good, "answer_field": "answer.text"}, "no field 'answer.text'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build(options, 1.0)


def test_a_function_of_the_users_scores_in_order_over_several_processes(tmp_path):
    (tmp_path / "grade.py").write_text(
        "import time\n"
        "def score(prompt, response, answer, row):\n"
        "    if response == 'slow': time.sleep(0.3)\n"
        "    if response == 'raise': raise KeyError('no')\n"
        "    return {'reward': row['level'] / 10, 'correct': response == answer,\n"
        "            'solution': response}\n"
    )
    options = {"train": write(tmp_path / "a.jsonl", GOOD), "scorer_workers": 2}
    task = build({**options, "scorer": f"{tmp_path}/grade.py:score"}, 5.0)
    try:
        prompt = task.prompt("eval", 0)  # 18+1=
        texts = ["slow", "19", "raise", "20", "19"]
        scores = task.score([rollout(prompt, text) for text in texts])
        assert [s.correct for s in scores] == [False, True, False, False, True]
        assert [s.reward for s in scores] == [1.8, 1.8, 0.0, 1.8, 1.8]
        assert [s.error is None for s in scores] == [True, True, False, True, True]
        assert scores[1].solution == "19"
        assert scores[0].solution is None
        assert task.solutions(prompt) is None
    finally:
        task.close()


def test_rows_need_no_answer_where_the_function_needs_none(tmp_path):
    (tmp_path / "grade.py").write_text("def score(prompt, response, answer, row):\n    return 2\n")
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    options = {"train": write(tmp_path / "a.jsonl", rows), "answer_field": ""}
    task = build({**options, "scorer": f"{tmp_path}/grade.py:score"}, 5.0)
    (score,) = task.score([rollout(task.prompt("train", 0), "x")])
    task.close()
    assert (score.reward, score.correct, score.error) == (2.0, True, None)
