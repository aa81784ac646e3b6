"""[loop]: defaults, shaping by hand, the replay buffer, and what cannot work together."""

import dataclasses

import pytest
import torch

from flowrl import objectives
from flowrl.assembly import resolve
from flowrl.commands.train import Plateau
from flowrl.config import ConfigError
from flowrl.experience import shaped_rewards
from flowrl.loop_config import OFF, LoopConfig, with_defaults
from flowrl.records import Prompt, Rollout, Score
from flowrl.replay import Group, ReplayBuffer
from flowrl.settings import load, merge


def group(index, rewards):
    rollouts = tuple(
        Rollout(Prompt(index, f"{index}", (1, 2), {"problem": "a"}), i, (3, 4), (-0.5, -0.25),
                False, 7, "x")
        for i in range(len(rewards))
    )  # fmt: skip
    return Group(rollouts, tuple(Score(r, r > 0, "s" if r > 0 else None) for r in rewards))


def test_unset_fields_take_the_objectives_defaults_then_off():
    loop = with_defaults(LoopConfig(overlong_buffer=0.5), {"dynamic_sampling": True}, "x")
    assert loop.dynamic_sampling is True
    assert loop.overlong_buffer == 0.5
    assert loop.replay_fraction == 0.0
    assert with_defaults(loop, {"dynamic_sampling": True}, "x") == loop  # resolved settings stay
    off = with_defaults(LoopConfig(dynamic_sampling=False), {"dynamic_sampling": True}, "x")
    assert off.dynamic_sampling is False
    assert dataclasses.asdict(off).items() >= OFF.items()


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (LoopConfig(replay_capacity=5), "loop.replay_capacity has no effect"),
        (LoopConfig(max_sampling_rounds=5), "loop.max_sampling_rounds has no effect"),
        (LoopConfig(overlong_penalty=2.0), "loop.overlong_penalty has no effect"),
        (LoopConfig(reset_optimizer=True), "loop.reset_optimizer has no effect"),
    ],
)
def test_a_setting_without_effect_is_refused(loop, message):
    with pytest.raises(ConfigError, match=message):
        with_defaults(loop, {}, "x")


@pytest.mark.parametrize("name", objectives.names())
def test_a_resolved_config_stays_as_it_is(name):
    """Also where the user switches off what the objective has on: a resume resolves again."""
    base = {"objective": {"name": name}, "rollout": {"old_logprobs": "rollout"}}
    if name == "flow_of_reasoning":
        base |= {"rollout": {"old_logprobs": "trainer"}, "eval": {"top_p": 1.0, "exact_prompts": 0}}
    defaults = objectives.build(name, {}).loop_defaults
    for off in ({}, *({key: OFF[key]} for key in defaults)):
        once = resolve(load("countdown_cpu", merge(base, {"loop": off})))[0]
        assert resolve(once)[0] == once, off


def test_an_objectives_unknown_default_names_the_nearest():
    with pytest.raises(ConfigError, match="dynamic_sampling"):
        with_defaults(LoopConfig(), {"dynamic_samplin": True}, "x")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"loop": {"replay_fraction": 0.95}}, r"must be in \[0, 0.9\], got 0.95"),
        ({"loop": {"overlong_buffer": -0.1}}, r"must be in \[0, 1\]"),
        ({"loop": {"max_sampling_rounds": 0}}, "must be >= 1"),
        (
            {"objective": {"name": "grpo"}, "loop": {"replay_fraction": 0.5}},
            "set rollout.old_logprobs=rollout",
        ),
        ({"objective": {"name": "rloo"}, "value_head": {"lr": 1e-3}}, "has no value head"),
        (
            {"loop": {"reference_reset_patience": 2}, "eval": {"every": 0}},
            "set eval.every",
        ),
        (
            {"objective": {"name": "rloo"}, "batch": {"group_size": 1},
             "loop": {"dynamic_sampling": True}},
            "set batch.group_size=8",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        resolve(load("countdown_cpu", overrides))


def test_overlong_responses_are_punished_over_the_buffer():
    """max 20, buffer 0.25 -> 5 tokens: none up to 15, half at 17.5, all at 20. DAPO, eq. 13."""
    loop = with_defaults(LoopConfig(overlong_buffer=0.25, overlong_penalty=2.0), {}, "x")
    lengths = torch.tensor([3, 15, 17, 20])
    found = shaped_rewards(torch.ones(4), lengths, torch.zeros(4, dtype=torch.bool), loop, 20)
    assert found.tolist() == pytest.approx([1.0, 1.0, 1 - 2 * 2 / 5, -1.0])


@pytest.mark.parametrize(("keep", "expected"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5), (-2.0, -2.0)])
def test_truncated_responses_keep_a_share_or_get_a_fixed_reward(keep, expected):
    loop = with_defaults(LoopConfig(truncated_reward=keep), {}, "x")
    truncated = torch.tensor([True, False])
    found = shaped_rewards(torch.ones(2), torch.tensor([4, 4]), truncated, loop, 4)
    assert found.tolist() == [expected, 1.0]


def test_rewards_count_more_and_more():
    given = LoopConfig(reward_scale_start=0.5, reward_scale_steps=11)
    loop = with_defaults(given, {}, "x")
    found = [
        float(shaped_rewards(torch.ones(1), torch.ones(1), torch.zeros(1).bool(), loop, 4, step))
        for step in (1, 6, 11, 99)
    ]
    assert found == pytest.approx([0.5, 0.75, 1.0, 1.0])
    assert with_defaults(loop, {}, "x") == loop
    with pytest.raises(ConfigError, match="reward_scale_steps has no effect"):
        with_defaults(LoopConfig(reward_scale_steps=11), {}, "x")


def test_the_buffer_drops_the_oldest_and_draws_different_groups():
    buffer = ReplayBuffer(3, "uniform", seed=0)
    buffer.add([group(i, [0.0, 1.0]) for i in range(5)])
    assert [g.index for g in buffer.groups] == [2, 3, 4]
    drawn = [g.index for g in buffer.draw(step=1, count=3)]
    assert sorted(drawn) == [2, 3, 4]
    assert drawn == [g.index for g in buffer.draw(step=1, count=3)]
    firsts = {buffer.draw(step, 1)[0].index for step in range(40)}
    assert firsts == {2, 3, 4}
    assert [g.index for g in ReplayBuffer(3, "recent", 0, buffer.groups).draw(9, 2)] == [4, 3]


def test_priority_reward_draws_in_proportion_to_its_exponential():
    buffer = ReplayBuffer(2, "reward", seed=1)
    buffer.add([group(0, [0.0, 0.0]), group(1, [2.0, 2.0])])
    draws = [buffer.draw(step, 1)[0].index for step in range(2000)]
    assert sum(draws) / len(draws) == pytest.approx(0.8808, abs=0.03)  # e^2 / (1 + e^2)


def test_the_buffer_comes_back_from_its_file(tmp_path):
    buffer = ReplayBuffer(9, "uniform", seed=0)
    buffer.add([group(0, [0.0, 1.0]), group(5, [1.0])])
    buffer.save(tmp_path / "replay.jsonl")
    again = ReplayBuffer(9, "uniform", seed=0)
    again.load(tmp_path / "replay.jsonl")
    assert again.groups == buffer.groups


def test_a_plateau_is_the_patience_th_evaluation_without_a_better_score():
    plateau = Plateau(2)
    assert [plateau.reached(s) for s in (0.1, 0.1, 0.2, 0.2, 0.1, 0.1, 0.2)] == [
        False, False, False, False, True, False, True,
    ]  # fmt: skip
    assert not any(Plateau(0).reached(0.0) for _ in range(5))
