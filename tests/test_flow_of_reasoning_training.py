"""Flow of Reasoning end to end: the step sampler against the trainer, exploration, local search,
exact resume and two processes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from arguments import as_args

from flowrl import assembly, parallel
from flowrl.cli import main
from flowrl.config import ConfigError
from flowrl.data.packing import pack
from flowrl.data.prompts import encode_prompts
from flowrl.exact_tables import StepTabulator
from flowrl.experience import Experience
from flowrl.metrics import segment_sum
from flowrl.records import Rollout, SampleRequest
from flowrl.rollout.step_sampler import StepSampler, _Trajectory
from flowrl.settings import load, merge
from flowrl.step_config import StepsConfig

SMALL = {
    "task": {"max_steps": 4},
    "base": {"hidden_size": 32, "num_layers": 1, "intermediate_size": 32, "pretrain_steps": 30},
    "batch": {"prompts_per_step": 4, "group_size": 3, "updates_per_step": 2},
    "eval": {"every": 0, "num_prompts": 2, "samples": 4},
    "checkpoint": {"every": 2},
    "steps": {"anneal_steps": 3},
    "optimizer": {"eps": 1e-3},
}


def settings(base_cache, **changes):
    return merge(merge(SMALL, {"base": {"cache_dir": str(base_cache)}}), changes)


@pytest.fixture(scope="module")
def parts(base_cache):
    config = assembly.resolve(load("blocksworld_for", settings(base_cache)))[0]
    found = assembly.assemble(config, parallel.start("cpu"), lambda _: None)
    yield found
    found.close()


def request_for(parts, step: int = 1, stream: str = "train", indices=(0, 1), size: int = 3):
    prompts = [parts.task.prompt("train", i) for i in indices]
    prompts = encode_prompts(prompts, parts.tokenizer, 64)
    return SampleRequest(prompts, size, 64, 1.0, 1.0, seed=0, step=step, stream=stream)


def test_sampler_and_trainer_score_the_same_candidates(parts):
    """The log-probs that actions are drawn by are those of the sequences that the loss sees."""
    rollouts = parts.sampler.sample(request_for(parts))
    experience = Experience(rollouts, parts.task.score(rollouts))
    expanded = assembly.expansion(parts)(experience)
    assert expanded.expansion is not None
    packed = pack(expanded.sequences)
    trainer = segment_sum(parts.backend.logprobs([packed]).logprobs, packed.cu_seqlens)
    sampler = []
    for rollout in rollouts:
        state = _Trajectory(rollout.prompt, rollout.sample)
        while legal := parts.task.legal_actions(rollout.prompt, state.text):
            sampler.extend(parts.sampler.action_logprobs([state], [legal])[0])
            rest = rollout.text[len(state.text) :]
            state.actions.append(next(a for a in legal if rest.startswith(a)))
    np.testing.assert_allclose(trainer.numpy(), sampler, atol=2e-5)
    table = expanded.expansion.actions
    assert table.chosen.sum() == table.step_ids.unique().numel()
    for owner, rollout in enumerate(rollouts):
        taken = [
            sequence.text
            for sequence, o, chosen in zip(
                expanded.sequences, expanded.expansion.owners, table.chosen, strict=True
            )
            if o == owner and chosen
        ]
        assert "".join(taken) == rollout.text


def test_samples_do_not_depend_on_the_batch_and_are_complete(parts):
    together = parts.sampler.sample(request_for(parts))
    alone = parts.sampler.sample(request_for(parts, indices=(1,)))
    assert [r.text for r in together if r.prompt.index == 1] == [r.text for r in alone]
    assert all(parts.task.legal_actions(r.prompt, r.text) == [] for r in together)
    other = parts.sampler.sample(request_for(parts, step=2))
    assert [r.text for r in other] != [r.text for r in together]


def sampler_with(parts, **steps) -> StepSampler:
    found = object.__new__(StepSampler)
    found.__dict__.update(parts.sampler.__dict__)
    found.exploration = dataclasses.replace(
        StepsConfig(local_search_tries=0, tempered_share=0.0, epsilon_start=0.0, epsilon_end=0.0),
        **steps,
    )
    return found


def first_actions(sampler, parts, stream="train"):
    """Shares of the first action over many samples of one prompt, and the policy's P."""
    request = request_for(parts, stream=stream, indices=(0,), size=400)
    rollouts = sampler.sample(request)
    legal = parts.task.legal_actions(request.prompts[0], "")
    shares = np.array([np.mean([r.text.startswith(a) for r in rollouts]) for a in legal])
    scores = sampler.action_logprobs([_Trajectory(request.prompts[0], 0)], [legal])[0]
    weights = np.exp(scores - scores.max())
    return shares, weights / weights.sum(), [r.rollout_logprobs[0] for r in rollouts]


def test_without_exploration_actions_follow_the_policy(parts):
    shares, policy, drawn = first_actions(sampler_with(parts), parts)
    assert len(policy) > 1
    np.testing.assert_allclose(shares, policy, atol=0.08)
    assert set(np.round(np.exp(drawn), 6)) <= set(np.round(policy, 6))


def test_exploration_is_what_the_settings_say_and_spares_evaluation(parts):
    uniform = sampler_with(parts, epsilon_start=1.0, epsilon_end=1.0)
    shares, policy, drawn = first_actions(uniform, parts)
    assert float(np.abs(policy - 1 / len(policy)).max()) > 0.1, "the policy is not uniform itself"
    np.testing.assert_allclose(shares, 1 / len(policy), atol=0.08)
    np.testing.assert_allclose(np.exp(drawn), 1 / len(policy))
    evaluated, policy, _ = first_actions(uniform, parts, stream="eval")
    np.testing.assert_allclose(evaluated, policy, atol=0.08)
    hot = sampler_with(parts, tempered_share=1.0, tempered_start=4.0)
    shares, policy, _ = first_actions(hot, parts)
    tempered = policy**0.25 / (policy**0.25).sum()
    np.testing.assert_allclose(shares, tempered, atol=0.08)


def test_annealing_ends_where_it_should():
    steps = StepsConfig(anneal_steps=11)
    assert (steps.epsilon(1), steps.epsilon(11), steps.epsilon(99)) == pytest.approx(
        (0.3, 0.01, 0.01)
    )
    assert (steps.temperature(1), steps.temperature(6)) == pytest.approx((4.0, 2.5))
    assert steps.temperature(50) == 1.0


def test_local_search_replaces_the_worst_by_something_better(parts):
    plain, searched = sampler_with(parts), sampler_with(parts, local_search_tries=64)
    request = request_for(parts, indices=range(12))
    before = [s.reward for s in parts.task.score(plain.sample(request))]
    rollouts = searched.sample(request)
    after = [s.reward for s in parts.task.score(rollouts)]
    assert sum(after) > sum(before)
    groups = zip(np.reshape(before, (12, 3)), np.reshape(after, (12, 3)), strict=True)
    for old, new in groups:
        assert (new >= old).all()
        assert (new != old).sum() <= 1
        assert old.max() < 1 or (new == old).all()
    assert [r.sample for r in rollouts] == [0, 1, 2] * 12


def test_a_text_that_is_no_trajectory_is_refused(parts):
    prompt = request_for(parts).prompts[0]
    rollout = Rollout(prompt, 0, (1,), (0.0,), False, 0, "nonsense")
    with pytest.raises(ValueError, match="must be made of legal actions, got 'nonsense'"):
        assembly.expansion(parts)(Experience([rollout], parts.task.score([rollout])))


def test_exact_table_of_a_policy_over_actions(parts):
    """Against the sampler's own scores, answer by answer, and against how often it draws them."""
    request = request_for(parts, stream="eval", indices=(0,), size=400)
    prompt = request.prompts[0]
    tabulator = StepTabulator(parts.backend.config, parts.task, parts.tokenizer)
    answers = tabulator.answers(prompt, parts.backend)
    assert answers is not None
    policy = tabulator.probabilities(answers, parts.backend)
    assert sum(policy) == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(policy, answers.reference, atol=1e-6)  # untrained as yet
    for outcome, probability in zip(answers.outcomes, policy, strict=True):
        state, expected, log_backward = _Trajectory(prompt, 0), 1.0, 0.0
        while legal := parts.task.legal_actions(prompt, state.text):
            scores = parts.sampler.action_logprobs([state], [legal])[0]
            rest = outcome.text[len(state.text) :]
            taken = next(i for i, a in enumerate(legal) if rest.startswith(a))
            expected *= np.exp(scores[taken]) / np.exp(scores).sum()
            state.actions.append(legal[taken])
            log_backward -= np.log(parts.task.num_parents(prompt, state.text))
        assert probability == pytest.approx(expected, abs=1e-5)
        assert answers.log_backward is not None
        assert answers.log_backward[answers.outcomes.index(outcome)] == pytest.approx(log_backward)
    drawn = [r.text for r in parts.sampler.sample(request)]
    most = int(np.argmax(policy))
    share = np.mean([text == answers.outcomes[most].text for text in drawn])
    assert share == pytest.approx(policy[most], abs=0.08)
    own = parts.objective.fixed_point
    targets = answers.targets(parts.objective.beta, own, 8)
    assert targets.fixed_point is not None
    np.testing.assert_allclose(targets.nominal.probabilities, targets.fixed_point.probabilities)
    weights = np.exp(own.beta * np.array(answers.rewards) + np.array(answers.log_backward))
    np.testing.assert_allclose(targets.nominal.probabilities, weights / weights.sum())


REFUSED = [
    ({"objective": {"ll_weight": 1.5}}, "set eval.exact_prompts=0"),
    ({"rollout": {"temperature": 0.7}}, "needs rollout.temperature=1.0"),
    ({"eval": {"top_p": 0.9}}, "needs eval.top_p=1.0"),
    ({"loop": {"truncated_reward": 0.0}}, "needs loop.truncated_reward=1.0"),
    ({"loop": {"mask_truncated": True}}, "needs loop.mask_truncated=False"),
    ({"objective": {"name": "vargrad"}}, "draws tokens, not legal actions"),
    ({"steps": {"epsilon_start": 2.0}}, "steps.epsilon_start must be in"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_settings_that_do_not_go_together(change, message):
    with pytest.raises(ConfigError, match=message):
        assembly.resolve(load("blocksworld_for", change))


def test_a_task_without_legal_actions_is_refused(tiny):
    changes = {"objective": {"name": "flow_of_reasoning"}, "task": {"name": "countdown"}}
    config = assembly.resolve(load("blocksworld_for", merge(changes, {"base": tiny["base"]})))[0]
    with pytest.raises(ConfigError, match="task countdown has no legal actions"):
        assembly.assemble(config, parallel.start("cpu"), lambda _: None)


def train_args(base_cache, run_dir, steps):
    changes = settings(base_cache, run={"dir": str(run_dir)}, trainer={"steps": steps})
    return ["train", "blocksworld_for", *as_args(changes)]


def rows(run_dir):
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == "train"]


def test_resumes_to_the_same_bytes(base_cache, tmp_path):
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    main(train_args(base_cache, straight, 4))
    shutil.copytree(straight, halved)
    shutil.rmtree(halved / "checkpoints" / "step_000004")
    main(["train", "--resume", "--run.dir", str(halved)])
    assert (halved / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    state = "checkpoints/step_000004/state.safetensors"
    assert (halved / state).read_bytes() == (straight / state).read_bytes()
    assert all(row["actor/grad_norm"] > 0 for row in rows(straight))
    assert [row["reward/replayed_frac"] for row in rows(straight)] == [0, 0.25, 0.25, 0.25]


def test_two_processes_read_the_numbers_of_one(base_cache, tmp_path):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for folder, launcher in (("one", []), ("two", torchrun)):
        args = train_args(base_cache, tmp_path / folder, 2)
        command = [sys.executable, "-m", *launcher, "flowrl", *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"kind"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key
