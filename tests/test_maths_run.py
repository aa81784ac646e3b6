"""Chat prompts, sets of evaluation problems and the shipped scorers of maths in a whole run."""

import json
from pathlib import Path

import pytest
from chat_model import make_chat_model

from flowrl.cli import main
from flowrl.commands.train import resumed_config
from flowrl.schema import ConfigError
from flowrl.settings import load
from flowrl.tasks.scorers.answer_line import score


def rows(first: int, count: int) -> str:
    """Problems as DAPO-Math-17k has them: chat messages, and the answer inside an object."""
    lines = [
        {
            "prompt": [{"role": "user", "content": f"{n} + 1 = ?"}],
            "reward_model": {"ground_truth": str(n + 1)},
        }
        for n in range(first, first + count)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name, first, count in (("train", 0, 8), ("aime", 20, 2), ("minerva", 30, 5)):
        (tmp_path / f"{name}.jsonl").write_text(rows(first, count))
    held = f"{tmp_path}/aime.jsonl,{tmp_path}/minerva.jsonl"
    return ["--task.name", "jsonl", "--task.train", f"{tmp_path}/train.jsonl", "--task.eval", held,
            "--task.answer_field", "reward_model.ground_truth",
            "--task.scorer", "answer_line"]  # fmt: skip


def run(model: str, files: list[str], run_dir: Path, *args: str) -> None:
    main(["train", "--model.path", model, *files, "--run.dir", str(run_dir), "--trainer.steps", "1",
          "--rollout.max_new_tokens", "6", "--eval.samples", "4", "--eval.num_prompts", "6",
          "--batch.prompts_per_step", "2", "--batch.updates_per_step", "1",
          "--checkpoint.every", "0", *args])  # fmt: skip


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_on_chat_prompts_with_two_sets(tmp_path, files, capsys):
    run(make_chat_model(tmp_path / "model"), files, tmp_path / "run")
    trained = read(tmp_path / "run" / "samples" / "step_000001.jsonl")
    for sample in trained:
        assert sample["prompt"].startswith("<|user|>")
        assert sample["prompt"].endswith(" + 1 = ?<|end|><|assistant|>")
        marks = [i for i in sample["prompt_ids"] if i < 3]
        assert marks == [1, 0, 2]  # special tokens, each one id
        assert sample["reward"] == -1.0
    evaluated = next((tmp_path / "run" / "evals").glob("step_000000.json"))
    problems = json.loads(evaluated.read_text())["problems"]
    assert [p["set"] for p in problems] == ["aime", "minerva"] * 2 + ["minerva"] * 2
    first = next(r for r in read(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "eval")
    names = {name.split("/")[1] for name in first if name.startswith("eval/")}
    assert names == {"jsonl", "aime", "minerva"}
    for row in read(tmp_path / "run" / "metrics.jsonl"):  # nothing that tells one from another
        assert not {n for n in row if n.startswith("diversity/")} - {"diversity/distinct_2"}
    report = (tmp_path / "run" / "report.html").read_text()
    assert "avg@4, minerva" in report
    assert "pass@4, minerva" not in report
    assert "set by set" in report
    said = capsys.readouterr().out
    assert "eval at step 1: avg@4 0.000  pass@4 0.000  " in said
    assert "  aime/avg@4 0.000  minerva/avg@4 0.000\n" in said


def test_a_set_has_the_mean_of_its_own_problems(tmp_path, files):
    """With a scorer under which aime is always right and minerva never."""
    (tmp_path / "grade.py").write_text(
        "def score(prompt, response, answer, row):\n    return int(answer) < 25\n"
    )
    grade = f"{tmp_path}/grade.py:score"
    run(make_chat_model(tmp_path / "model"), files, tmp_path / "run", "--task.eval_scorer", grade)
    first = next(r for r in read(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "eval")
    assert first["eval/aime/avg@4"] == first["eval/aime/pass@4"] == 1.0
    assert first["eval/minerva/avg@4"] == first["eval/minerva/pass@4"] == 0.0
    assert first["eval/jsonl/avg@4"] == pytest.approx(2 / 6)
    trained = read(tmp_path / "run" / "samples" / "step_000001.jsonl")
    assert {sample["reward"] for sample in trained} == {score("", "", "1", {})["reward"]}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; set model.path"),
        ("{{ raise_exception('no users') }}", "refuses its messages: no users"),
    ],
)
def test_a_template_that_is_missing_or_refuses(tmp_path, files, capsys, template, message):
    model = make_chat_model(tmp_path / "model", template)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(model, files, tmp_path / "run", "--dry-run")
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


@pytest.mark.parametrize("dry", [True, False])
def test_every_prompt_is_read_before_a_run(tmp_path, files, capsys, dry):
    """Also those that the run would not come to."""
    flags = ["--dry-run"] * dry
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(rows(10**20, 1))
    model = make_chat_model(tmp_path / "model")
    run(model, files, tmp_path / "run", *flags, "--rollout.max_prompt_tokens", "40")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(model, files, tmp_path / "other", *flags, "--rollout.max_prompt_tokens", "20")
    assert "has 32 tokens, the limit is 20; set rollout.max_prompt_tokens=32" in (
        capsys.readouterr().err
    )


@pytest.fixture
def moved(tmp_path, files, capsys) -> tuple[Path, Path, list[str]]:
    """A run of one step, where its model and problems lie now, and the flags that say so."""
    run_dir, model = tmp_path / "run", Path(make_chat_model(tmp_path / "model"))
    run(str(model), files, run_dir, "--checkpoint.every", "1")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("train", "aime", "minerva"):
        (tmp_path / f"{name}.jsonl").rename(elsewhere / f"{name}.jsonl")
    model.rename(elsewhere / "model")
    held = f"{elsewhere}/aime.jsonl,{elsewhere}/minerva.jsonl"
    places = ["--model.path", f"{elsewhere}/model", "--task.train", f"{elsewhere}/train.jsonl"]
    return run_dir, elsewhere, [*places, "--task.eval", held]


def resume(run_dir: Path, *flags: str) -> list[str]:
    return ["train", "--resume", "--run.dir", str(run_dir), "--trainer.steps", "2", *flags]


def test_what_a_run_reads_may_lie_elsewhere(tmp_path, moved, capsys):
    run_dir, _, places = moved
    assert "model directory not found" in refused(capsys, "export", str(run_dir))
    main(["export", str(run_dir), "--hf", str(tmp_path / "out"), *places[:2]])
    main(["eval", str(run_dir), *places, "--samples", "2", "--num_prompts", "6"])
    assert "at step 1: 6 problems" in capsys.readouterr().out
    main(resume(run_dir, *places, "--rollout.max_prompt_tokens", "300"))
    rows = read(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]


def test_what_a_run_reads_may_not_change(moved, capsys):
    """Problems, the weights, and where the model's answers end."""
    run_dir, elsewhere, places = moved
    for name, changed, message in (
        ("train.jsonl", rows(0, 9), f"task.train ({elsewhere}/train.jsonl) is not what this run"),
        ("model/config.json", " ", "is not the one that this run began with"),
        ("model/generation_config.json", '{"eos_token_id": [0, 50]}',
         f"model.path generation_config.json ({elsewhere}/model/generation_config.json) is not"),
    ):  # fmt: skip
        file = elsewhere / name
        before = file.read_text()
        file.write_text(before + changed if changed == " " else changed)
        assert message in refused(capsys, *resume(run_dir, *places))
        file.write_text(before)
    renamed = elsewhere / "aime24.jsonl"
    (elsewhere / "aime.jsonl").rename(renamed)
    message = refused(capsys, *resume(run_dir, *places[:-1], places[-1].replace("aime", "aime24")))
    assert "task.eval aime, which is gone now, is not what this run began with" in message
    renamed.rename(elsewhere / "aime.jsonl")
    main(resume(run_dir, *places))


def test_options_of_a_task_of_ones_own_are_no_places():
    recorded = load("countdown_cpu", {"task": {"name": "own.py", "train": 8}})
    with pytest.raises(ConfigError, match="task.options.train is 8 in this run and cannot become"):
        resumed_config(recorded, {"task": {"train": 5}})


def refused(capsys, *args: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    assert stopped.value.code == 2
    return capsys.readouterr().err
