"""A dry run refuses what the run would refuse, in the same words, before anything is written."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from arguments import as_args
from chat_model import make_chat_model

from flowrl.cli import main
from flowrl.settings import merge

PROMPTS = "".join(
    json.dumps({"prompt": f"{n} + 1 = ", "answer": str(n + 1)}) + "\n" for n in range(8)
)


def refused(capsys, args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["train", *args])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def both(capsys, args, run_dir):
    dry = refused(capsys, [*args, "--dry-run"])
    assert refused(capsys, args) == dry
    assert not run_dir.exists()
    return dry


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run.loggers", "wandb"], "the logger wandb needs the package wandb"),
        (["--model.device", "cuda"], "torch sees no CUDA device"),
        (["--model.liger", "true"], "model.liger"),
        (["--rollout.engine", "replay", "--rollout.replay_dir", "nowhere", "--eval.num_prompts",
          "0"], "nowhere is not a run directory"),
        (["--rollout.max_new_tokens", "1020", "--batch.tokens_per_microbatch", "2048"],
         "must fit the model's 1024 positions, got 7 + 1020"),
        (["--rollout.max_prompt_tokens", "3"], "the limit is 3"),
        (["--objective.name", "trpo", "--objective.method", "conjugate_gradient",
          "--model.backend", "megatron"], "set objective.method=line_search"),
        (["--rollout.engine", "vllm", "--rollout.sleep", "true"], "rollout.sleep is for a GPU"),
    ],
)  # fmt: skip
def test_of_the_machine_and_the_lengths(capsys, tiny, base_dir, tmp_path, flags, message):
    if "wandb" in flags and importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed here")
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    args = as_args(merge(tiny, {"run": {"dir": str(tmp_path / "run")}}))
    assert message in both(capsys, [*args, *flags], tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rollout.server_python", "/nowhere/python"], "/nowhere/python cannot be run"),
        (["--rollout.server_python", sys.executable], "rollout.engine=vllm needs vllm"),
    ],
)
def test_of_an_engine_that_is_not_there(capsys, tiny, tmp_path, flags, message):
    """The engine itself would say so minutes later."""
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vllm is installed here")
    args = as_args(merge(tiny, {"run": {"dir": str(tmp_path / "run")}}))
    found = refused(capsys, [*args, "--rollout.engine", "vllm", *flags, "--dry-run"])
    assert message in found


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut_weights(directory):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def name_missing_weights(directory):
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_eos(directory):
    change_config(directory, eos_token_id=None)
    (directory / "generation_config.json").unlink()
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_weights, "model.safetensors is damaged"),
        (name_missing_weights, "model-2.safetensors is missing"),
        (drop_eos, "must have an end-of-sequence token"),
        (lambda d: change_config(d, final_logit_softcapping=30.0), "final_logit_softcapping is 30"),
        (lambda d: change_config(d, logits_scaling=8.0), "logits_scaling is 8.0"),
        (lambda d: change_config(d, attn_logit_softcapping=50.0), "no soft cap"),
        (lambda d: change_config(d, use_sliding_window=True, sliding_window=4,
                                 layer_types=["sliding_attention"]),
         "no sliding window, this model's is 4 and the longest sequence 14 tokens"),
        (lambda d: change_config(d, max_position_embeddings=12), "model's 12 positions, got 8 + 6"),
    ],
)  # fmt: skip
def test_of_a_model(capsys, tmp_path, damage, message):
    model = Path(make_chat_model(tmp_path / "model"))
    damage(model)
    data = tmp_path / "problems.jsonl"
    data.write_text(PROMPTS)
    args = ["--model.path", str(model), "--task.name", "jsonl", "--task.train", str(data),
            "--rollout.max_new_tokens", "6", "--run.dir", str(tmp_path / "run")]  # fmt: skip
    assert message in both(capsys, args, tmp_path / "run")


def test_of_a_run_directory_that_cannot_be_made(capsys, tiny, tmp_path):
    (tmp_path / "file").touch()
    run_dir = tmp_path / "file" / "run"
    args = as_args(merge(tiny, {"run": {"dir": str(run_dir)}}))
    assert f"cannot make directory {run_dir}: Not a directory" in refused(capsys, args)
    assert "cannot write to" in refused(capsys, [*args, "--dry-run"])


@pytest.mark.parametrize(
    "change",
    [
        lambda d: change_config(d, use_sliding_window=True, sliding_window=4, max_window_layers=1),
        lambda d: (d / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'  # of before a merge
        ),
        lambda d: change_config(d, max_position_embeddings=10, rope_parameters={
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}),
    ],
)  # fmt: skip
def test_what_is_no_obstacle(capsys, tmp_path, change):
    """A window that no layer has, an index that is not read, a context that is stretched."""
    model = Path(make_chat_model(tmp_path / "model"))
    change(model)
    data = tmp_path / "problems.jsonl"
    data.write_text(PROMPTS)
    main(["train", "--dry-run", "--model.path", str(model), "--task.name", "jsonl", "--task.train",
          str(data), "--run.dir", str(tmp_path / "run")])  # fmt: skip
    assert f"run directory {tmp_path / 'run'} is free" in capsys.readouterr().out
