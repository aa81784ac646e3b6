"""The command line as a user meets it: help, bad input, the small commands."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from arguments import as_args
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flowrl.cli import main
from flowrl.config import Config
from flowrl.settings import merge


def fail(capsys, *args):
    """The one line that `flowrl ARGS` ends with; it must end with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert len(error.strip().splitlines()) == 1
    assert error.startswith("flowrl: ")
    return error


def test_help_answers_within_a_second():
    """The floor of several tries: a busy machine must not decide."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "flowrl", "--help"], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
    assert "make-base" in done.stdout
    assert min(seconds) < 1.0


def test_train_help_lists_every_section(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--objective.name", "grpo", "--help"])
    shown = capsys.readouterr().out
    assert "--resume" in shown
    for section in dataclasses.fields(Config):
        flag = f"--{section.name.replace('_', '-')}"
        assert flag in shown, section.name


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "no command called 'trian'; did you mean train?"),
        (["train", "countdown_gpu"], "did you mean countdown_cpu?"),
        (["train", "--batch.group_siz", "3"], "did you mean batch.group_size?"),
        (["train", "--dry-run", "--objective.name", "flowrll"], "did you mean flowrl?"),
        (["train", "--dry-run", "--objective.bta", "3"], "did you mean objective.beta?"),
        (["train", "--dry-run", "--task.name", "countdwn"], "did you mean countdown?"),
        (["train", "--dry-run", "--task.num_number", "3"], "did you mean task.num_numbers?"),
        (["train", "--dry-run", "--model.path", "nowhere"], "model directory not found: nowhere"),
        (["train", "--dry-run", "--kernels.backend", "trtion"], "cannot run here"),
        (["train", "--batch.updates_per_step", "5"], "set batch.updates_per_step=4"),
        (["train", "--objective", "grpo"], "write --objective.name VALUE"),
        (["train", "--group_size", "4"], "write --batch.group_size VALUE"),
        (["inspect", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["export", "nowhere"], "nowhere is no run directory"),
        (["eval", "nowhere"], "nowhere is no run directory"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(capsys, args, message):
    assert message in fail(capsys, *args)


def test_a_directory_that_is_no_model_is_refused(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    message = fail(capsys, "train", "--dry-run", "--model.path", str(tmp_path))
    assert "no config.json" in message


def test_a_jsonl_task_names_file_and_line(capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1", "answer": "2"}\n{"prompt": \n')
    args = ["train", "--dry-run", "--task.name", "jsonl", "--task.train", str(data)]
    message = fail(capsys, *args, "--model.path", str(tmp_path))
    assert "data.jsonl" in message
    assert "2" in message


def test_prompts_longer_than_the_limit_are_refused(capsys, tiny, base_dir, tmp_path):
    settings = merge(tiny, {"run": {"dir": str(tmp_path / "run")}})
    message = fail(capsys, "train", *as_args(settings), "--rollout.max_prompt_tokens", "3")
    assert "the limit is 3; set rollout.max_prompt_tokens=" in message


def test_dry_run_prints_config_batch_and_memory_and_makes_nothing(capsys, tiny, tmp_path):
    settings = merge(tiny, {"run": {"dir": str(tmp_path / "run")}})
    main(["train", "--dry-run", *as_args(settings)])
    shown = capsys.readouterr().out
    assert "[objective.options]" in shown
    assert "4 x 4 = 16" in shown
    assert "reference policy" in shown
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_where_no_run_can_go(capsys, tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    settings = merge(tiny, {"run": {"dir": str(tmp_path)}})
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--dry-run", *as_args(settings)])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert "[objective.options]" in shown.out
    assert "not empty and holds no run" in shown.err


def test_a_refused_run_leaves_no_directory_behind(capsys, tiny, tmp_path):
    path = tmp_path / "run"
    settings = merge(tiny, {"run": {"dir": str(path)}})
    for wrong in (
        ["--model.path", "nowhere"],
        ["--run.loggers", "wandb"] if not importlib.util.find_spec("wandb") else ["--seed", "x"],
        ["--rollout.max_prompt_tokens", "3"],
    ):
        fail(capsys, "train", *as_args(settings), *wrong)
        assert not path.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dry-run", "--resume"], "leave one out"),
        (["--dry-run", "--batch.group_size", "1"], "set batch.group_size=8"),
        (["--dry-run", "--objective.name", "rloo", "--batch.group_size", "1"], "compares the"),
        (["--dry-run", "--objective.name", "grpo", "--log_z.lr", "5"], "learns no log Z"),
        (["--reusme"], "has no --reusme; did you mean resume?"),
    ],
)
def test_settings_that_nothing_reads_are_refused(capsys, args, message):
    assert message in fail(capsys, "train", *args)


def test_a_full_or_missing_disk_is_one_line(capsys, tiny, tmp_path):
    places = {"run": {"dir": str(tmp_path / "run")}, "base": {"cache_dir": "/proc/nothing/here"}}
    with pytest.raises(SystemExit) as stopped:
        main(["train", *as_args(merge(tiny, places))])
    assert stopped.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot read or write" in error
    assert "--resume" in error


@pytest.fixture(scope="module")
def run_dir(tiny, base_dir, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run"
    settings = merge(tiny, {"run": {"dir": str(path)}, "trainer": {"steps": 2}})
    main(["train", *as_args(settings), "--objective.log_z", "learned"])
    return path


def test_a_run_leaves_what_the_design_names(run_dir):
    names = {p.name for p in run_dir.iterdir()}
    assert names >= {
        "config.toml", "env.json", "metrics.jsonl", "timing.jsonl", "samples", "evals",
        "checkpoints", "report.html",
    }  # fmt: skip
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in rows] == [
        ("eval", 0), ("train", 1), ("train", 2), ("eval", 2),
    ]  # fmt: skip
    assert not any("timing" in name or "perf" in name for row in rows for name in row)


def test_export_loads_in_transformers_with_the_trained_logprobs(run_dir, tmp_path, capsys):
    out = tmp_path / "export"
    main(["export", str(run_dir), "--hf", str(out)])
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    samples = (run_dir / "samples" / "step_000002.jsonl").read_text().splitlines()
    row = json.loads(samples[0])
    assert tokenizer.decode(row["prompt_ids"]) == row["prompt"]
    state = load_file(run_dir / "checkpoints" / "step_000002" / "state.safetensors")
    trained = {k.removeprefix("param."): v for k, v in state.items() if k.startswith("param.")}
    assert any(name.startswith("log_z.") for name in trained)
    exported = dict(model.named_parameters())
    assert not any("log_z" in name for name in load_file(out / "model.safetensors"))
    for name, tensor in trained.items():
        if not name.startswith("log_z."):
            assert torch.equal(exported[name], tensor), name
    capsys.readouterr()  # transformers' own progress bar
    assert "must be new or empty" in fail(capsys, "export", str(run_dir), "--hf", str(out))


def test_exported_policy_samples_what_the_next_step_would(run_dir, tiny, tmp_path):
    """The sampler's log-probs of a step are those of the policy exported one step before."""
    longer = tmp_path / "longer"
    settings = merge(tiny, {"run": {"dir": str(longer)}, "trainer": {"steps": 3}})
    main(["train", *as_args(settings), "--objective.log_z", "learned"])
    out = tmp_path / "export"
    main(["export", str(run_dir), "--hf", str(out)])
    model = AutoModelForCausalLM.from_pretrained(out)
    for line in (longer / "samples" / "step_000003.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :, 0]
        assert chosen.tolist() == pytest.approx(row["rollout_logprobs"], abs=1e-5)


def test_eval_of_a_run_and_of_a_model_directory(run_dir, base_dir, capsys, tmp_path):
    out = tmp_path / "found.json"
    main(["eval", str(run_dir), "--samples", "4", "--num_prompts", "4", "--json", str(out)])
    found = json.loads(out.read_text())
    assert "eval/countdown/avg@4" in found
    shown = capsys.readouterr().out
    assert "temperature 0.6, top_p 0.95" in shown
    main(["eval", str(run_dir), "--model", str(base_dir), "--samples", "4", "--num_prompts", "4"])
    assert str(base_dir) in capsys.readouterr().out


def test_eval_of_a_model_on_a_recipes_problems(base_dir, capsys, tmp_path):
    out = tmp_path / "found.json"
    few = ["--samples", "4", "--num_prompts", "3", "--json", str(out)]
    arguments = ["eval", "countdown_cpu", "--model", str(base_dir), *few,
                 "--rollout.max_new_tokens", "5", "--task.low", "2"]  # fmt: skip
    main(arguments)
    found = json.loads(out.read_text())
    assert 0 < found["eval/countdown/response_length"] <= 5
    assert "eval/countdown/avg@4" in found
    assert f"{base_dir}: 3 problems" in " ".join(capsys.readouterr().out.split())
    assert "give --model DIR" in fail(capsys, "eval", "countdown_cpu")
    assert "unknown setting task.lwo" in fail(capsys, *arguments[:-2], "--task.lwo", "2")


def test_eval_samples_with_the_runs_engine_or_with_the_one_that_is_named(run_dir, tmp_path, capsys):
    """The test's own Python has no vLLM, so it has to be refused."""
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vllm is installed here")
    moved = tmp_path / "moved"
    shutil.copytree(run_dir, moved)
    config = (moved / "config.toml").read_text()
    assert 'engine = "hf"' in config
    changed = config.replace('engine = "hf"', 'engine = "vllm"').replace(
        "restart = 0", "restart = 1"
    )
    (moved / "config.toml").write_text(changed)
    arguments = ["eval", str(moved), "--samples", "2", "--num_prompts", "2"]
    message = fail(capsys, *arguments)
    assert "rollout.engine=vllm needs vllm" in message
    assert (moved / "logs/vllm_rank0.log").exists()
    main([*arguments, "--rollout.engine", "hf"])
    assert "engine hf" in capsys.readouterr().out
    message = fail(capsys, *arguments, "--rollout.temperature", "2.0")
    assert "flowrl eval has the run's settings, got rollout.temperature; leave it out" in message
    assert "got seed" in fail(capsys, *arguments, "--seed", "3")


def test_replay_trains_on_recorded_rollouts_to_the_same_losses(run_dir, tiny, tmp_path):
    replayed = tmp_path / "replayed"
    settings = merge(
        tiny,
        {
            "run": {"dir": str(replayed)},
            "trainer": {"steps": 2},
            "rollout": {"engine": "replay", "replay_dir": str(run_dir)},
            "eval": {"num_prompts": 0},
        },
    )
    main(["train", *as_args(settings), "--objective.log_z", "learned"])
    rows = [json.loads(line) for line in (replayed / "metrics.jsonl").read_text().splitlines()]
    recorded = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == [row for row in recorded if row["kind"] == "train"]


def test_a_nan_loss_stops_the_run_saves_the_batch_and_names_the_samples(tiny, tmp_path, capsys):
    path = tmp_path / "run"
    settings = merge(tiny, {"run": {"dir": str(path)}, "trainer": {"steps": 3}})
    with pytest.raises(SystemExit) as stopped:
        main(["train", *as_args(settings), "--objective.beta", "1e38"])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "the loss is" in error
    assert "samples at fault: prompt" in error
    saved = next(path.glob("failed_step_*.jsonl"))
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert any(row["at_fault"] for row in rows)
    assert all("response_ids" in row for row in rows)
