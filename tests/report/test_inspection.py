"""`flowrl inspect`: which samples are shown, and what is said where there are none."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from synthetic_run import sample_rows, write_lines, write_run

from flowrl.config import ConfigError
from flowrl.inspection import show


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("inspect") / "run", steps=20)


def printed(run_dir, **options) -> str:
    console = Console(file=io.StringIO(), width=160)
    show(run_dir, console=console, **options)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_last_step_is_the_default(run_dir):
    rows = sample_rows(20, 20, True)
    right = sum(row["correct"] for row in rows)
    truncated = sum(row["truncated"] for row in rows)
    text = printed(run_dir)
    assert (
        f"training step 20: 96 responses to 12 prompts; {right} right, {truncated} truncated"
        in text
    )
    assert "shown: 4 of 12 prompts; --limit 0 shows all" in text
    group = [row for row in rows if row["prompt_index"] == 101]
    assert f"{sum(r['correct'] for r in group)} of 8 right" in text.split("prompt 101")[1]
    assert f"{group[0]['residual']:+.3f}" in text
    assert f"{group[0]['importance_weight']:.3f}" in text


def test_responses_are_shown_as_they_are(run_dir):
    assert "0*100+[bold]<script>alert(1)</script>" in printed(run_dir)


def test_one_prompt(run_dir):
    text = printed(run_dir, step=1, prompt_index=105)
    assert "prompt 105" in text
    assert "prompt 100" not in text
    assert "shown: 1 of 1 prompts" in text


@pytest.mark.parametrize("only", ["correct", "wrong", "truncated", "error"])
def test_filters(run_dir, only):
    kept = {
        "correct": [r for r in sample_rows(10, 20, True) if r["correct"]],
        "wrong": [r for r in sample_rows(10, 20, True) if not r["correct"]],
        "truncated": [r for r in sample_rows(10, 20, True) if r["truncated"]],
        "error": [],
    }[only]
    text = printed(run_dir, step=10, only=only, limit=0)
    verdicts = {"correct": ["right"], "wrong": ["wrong", "cut off"], "truncated": ["cut off"]}
    lines = [line for line in text.splitlines() if "+" in line and " 0.00 " in line + " "]
    shown = sum(text.count(f"  {word}  ") for word in verdicts.get(only, []))
    assert shown == len(kept)
    assert bool(lines) == (only in ("wrong", "truncated"))
    prompts = len({row["prompt_index"] for row in kept})
    assert f"shown: {prompts} of {prompts} prompts with {only} responses" in text


def test_evaluation_samples_have_no_training_columns(run_dir):
    text = printed(run_dir, split="eval", step=0)
    assert "evaluation step 0" in text
    assert "residual" not in text


def test_scorer_errors_are_named(tmp_path):
    rows = sample_rows(1, 1, True)
    rows[3] |= {"error": "timed out after 10 s [x]", "correct": False}
    path = write_run(tmp_path / "run", steps=2)
    write_lines(path / "samples/step_000002.jsonl", rows)
    text = printed(path, only="error")
    assert "scorer failed: timed out after 10 s [x]" in text
    assert "1 with a failed scorer" in text
    assert "shown: 1 of 1 prompts with error responses" in text


def test_half_a_line_is_left_out_and_said(tmp_path):
    path = write_run(tmp_path / "run", steps=2)
    with (path / "samples/step_000002.jsonl").open("a") as file:
        file.write('{"step": 2, "prompt_ind')
    assert "step_000002.jsonl: line 97 cannot be read and was left out." in printed(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 7}, r"no train samples of step 7; it has those of 1, 10, 20: choose with --step"),
        ({"prompt_index": 3}, r"no prompt 3; it has 100-111: choose with --prompt"),
        ({"only": "right"}, r"--only must be one of all, correct, .*got 'right'; use"),
        ({"limit": -1}, r"--limit must be >= 0, got -1; 0 shows all"),
    ],
)
def test_wrong_choices_name_the_right_ones(run_dir, options, message):
    with pytest.raises(ConfigError, match=message):
        printed(run_dir, **options)


def test_no_run_and_no_samples(tmp_path):
    with pytest.raises(ConfigError, match="is no run directory"):
        show(tmp_path)
    path = write_run(tmp_path / "run", steps=2)
    for file in path.glob("samples/step_*"):
        file.unlink()
    with pytest.raises(ConfigError, match="no train samples yet; it has some of --split eval"):
        show(path)
