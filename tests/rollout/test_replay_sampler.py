import dataclasses
import json
import random

import pytest

from flowrl.records import Prompt, Rollout
from flowrl.rollout.replay_sampler import ReplaySampler
from flowrl.schema import ConfigError

PROMPTS = [Prompt(i, f"{i}=", (i + 3, 15)) for i in (4, 7, 9)]


def make_rollouts(prompts=PROMPTS, group_size=4, seed=0):
    draw = random.Random(seed)
    return [
        Rollout(
            prompt=prompt,
            sample=sample,
            response_ids=tuple(draw.randrange(17) for _ in range(length)),
            rollout_logprobs=tuple(-draw.expovariate(1) for _ in range(length)),
            truncated=draw.random() < 0.5,
            policy_version=3,
            text="é\n" * length,
        )
        for prompt in prompts
        for sample in range(group_size)
        for length in [draw.randrange(1, 9)]
    ]


def record(run_dir, rollouts, step, drop=()):
    (run_dir / "samples").mkdir(parents=True, exist_ok=True)
    (run_dir / "config.toml").write_text("[rollout]\ntemperature = 1.0\n")
    rows = [
        {
            "step": step,
            "prompt_index": r.prompt.index,
            "sample": r.sample,
            "prompt": r.prompt.text,
            "prompt_ids": list(r.prompt.token_ids),
            "response": r.text,
            "response_ids": list(r.response_ids),
            "rollout_logprobs": list(r.rollout_logprobs),
            "truncated": r.truncated,
            "policy_version": r.policy_version,
            "reward": 0.5,
        }
        for r in rollouts
    ]
    lines = [json.dumps({k: v for k, v in row.items() if k not in drop}) for row in rows]
    (run_dir / "samples" / f"step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def run_dir(tmp_path):
    for step in (1, 2):
        record(tmp_path, make_rollouts(seed=step), step)
    (tmp_path / "samples" / "eval_000000.jsonl").write_text("{}\n")  # is not a training step
    return tmp_path


def test_gives_back_what_was_recorded(run_dir, make_request):
    sampler = ReplaySampler(run_dir)
    for step in (2, 1):
        assert sampler.sample(make_request(PROMPTS, step=step)) == make_rollouts(seed=step)
    sampler.load_weights(iter([]), 5)
    assert sampler.sample(make_request(PROMPTS))[0].policy_version == 3


def test_a_rank_gets_its_own_prompts_in_its_order(run_dir, make_request):
    recorded = make_rollouts(seed=1)
    rollouts = ReplaySampler(run_dir).sample(make_request([PROMPTS[2], PROMPTS[0]]))
    assert rollouts == recorded[8:] + recorded[:4]


def test_the_hf_samplers_rollouts_survive_bit_for_bit(tiny_model, make_request, tmp_path):
    import torch

    from flowrl.rollout.hf_sampler import HFSampler

    tiny = tiny_model()
    request = make_request(tiny.prompts(["1+2=", "34="]))
    sampler = HFSampler(tiny.path, torch.float32, torch.device("cpu"), tiny.tokenizer, 64)
    rollouts = sampler.sample(request)
    record(tmp_path, rollouts, 1)
    assert ReplaySampler(tmp_path).sample(request) == rollouts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 3}, "no samples of step 3, its last is 2; set trainer.steps=2"),
        ({"group_size": 3}, "recorded 4 samples .* takes 3; set batch.group_size=4"),
        ({"group_size": 5}, "recorded 4 samples .* takes 5; set batch.group_size=4"),
        ({"temperature": 0.9}, "at temperature 1.0, .* at 0.9; set rollout.temperature=1.0"),
        ({"stream": "eval"}, "set eval.num_prompts=0"),
        ({"prompts": [Prompt(5, "5=", (8, 15))]}, "did not record prompt 5"),
        (
            {"prompts": [dataclasses.replace(PROMPTS[0], token_ids=(1, 2))]},
            "did not record prompt 4 .*use its seed",
        ),
    ],
    ids=["step", "fewer", "more", "temperature", "eval", "other prompt", "other tokens"],
)
def test_refuses_what_was_not_recorded(run_dir, make_request, changes, message):
    request = dataclasses.replace(make_request(PROMPTS), **changes)
    with pytest.raises(ConfigError, match=message):
        ReplaySampler(run_dir).sample(request)


def test_refuses_text_only_recordings(tmp_path, make_request):
    record(tmp_path, make_rollouts(), 1, drop=("prompt_ids", "response_ids", "rollout_logprobs"))
    with pytest.raises(ConfigError, match=r"run\.samples=full"):
        ReplaySampler(tmp_path).sample(make_request(PROMPTS))


def test_refuses_damaged_lines_by_number(run_dir, make_request):
    file = run_dir / "samples" / "step_000001.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:5], lines[5][:40], *lines[6:]]))
    with pytest.raises(ConfigError, match=r"step_000001\.jsonl:6 is not a recorded response"):
        ReplaySampler(run_dir).sample(make_request(PROMPTS))


def test_refuses_directories_without_recordings(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.toml"):
        ReplaySampler(tmp_path)
    (tmp_path / "config.toml").touch()
    with pytest.raises(ConfigError, match=r"run\.samples=full"):
        ReplaySampler(tmp_path)
