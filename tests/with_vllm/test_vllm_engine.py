"""VLLMSampler with the real engine: what it samples, what it says about it, and its weights.

One engine serves all tests of this file, in their order; the last ones kill it.
"""

import dataclasses
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch

from flowrl.metrics import mismatch_metrics, mismatch_rows
from flowrl.records import LossBatch, Prompt
from flowrl.rollout.engine_process import InProcess, ServerProcess
from flowrl.rollout.engine_protocol import (
    EngineError,
    EngineRefusedError,
    Message,
    WeightSyncError,
)
from flowrl.rollout.process_tree import group_members, is_alive
from flowrl.schema import ConfigError

from .conftest import (
    EOS,
    START_LIMIT_S,
    Faulty,
    below,
    flip,
    kill,
    load_model,
    logp_abs_diff,
    lose,
    make_request,
    sampler_for,
    settings_for,
    stop_worker,
    trainer_logprobs,
    update,
    wait_until,
)

pytestmark = pytest.mark.timeout(600)
TEMPERATURES = (0.6, 1.0, 1.3)


@pytest.fixture(scope="module")
def model(model_dir):
    return load_model(model_dir)


def server(sampler):
    assert isinstance(sampler.host, ServerProcess)
    return sampler.host


@pytest.fixture(scope="module")
def sampler(model_dir, tokenizer, model, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    start = partial(ServerProcess, settings_for(model_dir, log), "", START_LIMIT_S)
    sampler = sampler_for(model_dir, tokenizer, start, restarts=1)
    sampler.load_weights(model.named_parameters(), 0)
    yield sampler
    group = server(sampler).pid
    sampler.close()
    assert group_members(group) == []


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_logprobs_are_the_trainers_at_the_sampled_temperature(
    sampler, model, tokenizer, temperature
):
    rollouts = sampler.sample(make_request(tokenizer, temperature=temperature))
    assert logp_abs_diff(model, rollouts, temperature) < 1e-5


def test_a_wrong_temperature_shows_in_the_mismatch_metric(sampler, model, tokenizer):
    rollouts = sampler.sample(make_request(tokenizer, temperature=1.3))
    found = {t: mismatch(model, rollouts, t) for t in (1.3, 1.0)}
    assert found[1.3]["mismatch/logp_abs_diff"] < 1e-5
    assert found[1.0]["mismatch/logp_abs_diff"] > 0.05  # 0.01 is already suspect
    assert found[1.0]["mismatch/ess"] < 0.9 < found[1.3]["mismatch/ess"]


def mismatch(model, rollouts, temperature):
    """The trainer's own metrics, with the log-probs that it would compute."""
    lengths = torch.tensor([len(r.response_ids) for r in rollouts])
    batch = LossBatch(
        rewards=torch.zeros(len(rollouts)),
        group_ids=torch.arange(len(rollouts)),
        cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        rollout_logprobs=torch.tensor([p for r in rollouts for p in r.rollout_logprobs]),
    )
    own = torch.cat([trainer_logprobs(model, r, temperature) for r in rollouts])
    return mismatch_metrics(mismatch_rows(batch, own))


def test_the_same_request_gives_the_same_rollouts(sampler, tokenizer):
    first = sampler.sample(make_request(tokenizer))
    assert sampler.sample(make_request(tokenizer)) == first
    assert sampler.sample(make_request(tokenizer, step=2)) != first
    assert sampler.sample(make_request(tokenizer, seed=1)) != first
    assert sampler.sample(make_request(tokenizer, stream="eval")) != first
    alone = sampler.sample(make_request(tokenizer, count=1))
    assert [r.response_ids for r in alone] == [r.response_ids for r in first[:8]]
    assert len({r.response_ids for r in first[:8]}) > 1  # a group's members differ


def test_rollouts_stop_at_eos_or_are_truncated(sampler, tokenizer):
    rollouts = sampler.sample(make_request(tokenizer, max_new_tokens=6))
    assert [(r.prompt.index, r.sample) for r in rollouts] == [
        (prompt, sample) for prompt in range(6) for sample in range(8)
    ]
    for r in rollouts:
        assert EOS not in r.response_ids[:-1]
        assert len(r.response_ids) == len(r.rollout_logprobs) <= 6
        assert r.truncated == (r.response_ids[-1] != EOS)
        assert r.text == tokenizer.decode(r.response_ids, skip_special_tokens=True)
    assert {r.truncated for r in rollouts} == {True, False}


def test_prompts_that_do_not_fit_one_pass_keep_their_seeds(sampler, model, tokenizer):
    """128 prompts of 60 tokens are 7680, vLLM takes 4096 at once on a CPU."""
    texts = [f"{i:03d}" + "1+2=3-" * 9 + "4+5" for i in range(128)]
    prompts = [Prompt(i, t, tuple(tokenizer(t)["input_ids"])) for i, t in enumerate(texts)]
    request = dataclasses.replace(make_request(tokenizer, group_size=1), prompts=prompts)
    rollouts = sampler.sample(request)
    assert logp_abs_diff(model, rollouts, 1.0) < 1e-5
    few = sampler.sample(dataclasses.replace(request, prompts=prompts[100:104]))
    assert [r.response_ids for r in few] == [r.response_ids for r in rollouts[100:104]]


def test_first_tokens_have_the_models_frequencies(sampler, model, tokenizer):
    """Pearson's statistic of 2048 draws over 17 tokens: its mean is 16, its deviation 5.7."""
    size = 2048
    request = make_request(tokenizer, count=1, group_size=size, max_new_tokens=1)
    drawn = torch.tensor([r.response_ids[0] for r in sampler.sample(request)])
    prompt = torch.tensor([request.prompts[0].token_ids])
    expected = model(prompt).logits[0, -1].double().softmax(-1) * size
    counts = torch.bincount(drawn, minlength=expected.numel())
    held = expected > 1
    assert float(((counts - expected)[held] ** 2 / expected[held]).sum()) < 50


def test_a_nucleus_is_for_evaluation_only(sampler, tokenizer):
    with pytest.raises(ConfigError, match="top_p"):
        sampler.sample(make_request(tokenizer, top_p=0.9))
    cut = sampler.sample(make_request(tokenizer, top_p=0.1, stream="eval"))
    assert all(p == 0.0 for r in cut for p in r.rollout_logprobs)  # one token is left, renormalised


def test_what_does_not_fit_is_refused(sampler, tokenizer):
    with pytest.raises(ConfigError, match="256 positions"):
        sampler.sample(make_request(tokenizer, max_new_tokens=256))
    with pytest.raises(EngineRefusedError, match="generate"):  # the engine lives on
        sampler.host.call(Message("generate", {}, {}), 10)


# --- weights


def test_weights_arrive_and_all_are_compared(sampler, model, tokenizer):
    for version in range(1, 6):
        update(model, version)
        sampler.load_weights(model.named_parameters(), version)
        assert sampler.compared == len(list(model.parameters()))
    for temperature in TEMPERATURES:
        rollouts = sampler.sample(make_request(tokenizer, temperature=temperature))
        assert logp_abs_diff(model, rollouts, temperature) < 1e-5
        assert {r.policy_version for r in rollouts} == {5}


def test_a_tensor_that_is_not_sent_stops_the_run(sampler, model):
    left_out = list(model.named_parameters())[:-1]
    with pytest.raises(WeightSyncError, match=r"lm_head\.weight did not come"):
        sampler.load_weights(left_out, 6)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.1.self_attn.v_proj.weight", lose),
        ("model.layers.0.mlp.down_proj.weight", lose),
        ("model.norm.weight", lose),
        ("model.layers.0.mlp.up_proj.weight", flip),
        ("model.embed_tokens.weight", flip),
        ("lm_head.weight", flip),
    ],
)
def test_a_tensor_that_is_lost_or_changed_on_its_way_stops_the_run(sampler, model, name, change):
    update(model, 7)
    real, sampler.host = sampler.host, Faulty(sampler.host, name, change)
    try:
        with pytest.raises(WeightSyncError, match=name.replace(".", r"\.")):
            sampler.load_weights(model.named_parameters(), 7)
    finally:
        sampler.host = real
    sampler.load_weights(model.named_parameters(), 7)  # the next transfer mends it


# --- a lost engine: these come last


def test_an_engine_killed_while_idle_is_started_again_with_its_weights(
    sampler, model, tokenizer, capsys
):
    before = sampler.sample(make_request(tokenizer))
    group = server(sampler).pid
    members = group_members(group)
    assert len(members) >= 3, "server, core and worker are one group"
    kill(members[-1])
    after = sampler.sample(make_request(tokenizer))
    assert after == before
    assert sampler.restarts == 1
    assert group_members(group) == []
    assert "starting the engine again" in capsys.readouterr().err
    assert logp_abs_diff(model, after, 1.0) < 1e-5


def test_an_engine_killed_in_a_rollout_ends_the_step(sampler, tokenizer):
    group = server(sampler).pid
    stop_worker(group)  # no answer comes before the kill
    threading.Timer(0.3, kill, [group]).start()
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"died during generate.*log.*ends: .*all 1 restarts"):
        sampler.sample(make_request(tokenizer))
    assert time.monotonic() - began < 30
    assert group_members(group) == []


def test_the_engine_in_process_and_its_death_in_a_transfer(model_dir, tokenizer, model, tmp_path):
    log = tmp_path / "vllm.log"
    start = partial(InProcess, settings_for(model_dir, log), START_LIMIT_S)
    sampler = sampler_for(model_dir, tokenizer, start)
    assert isinstance(sampler.host, InProcess)
    pids = sampler.host.pids
    assert len(pids) >= 2
    sampler.load_weights(model.named_parameters(), 8)
    rollouts = sampler.sample(make_request(tokenizer, temperature=0.6))
    assert logp_abs_diff(model, rollouts, 0.6) < 1e-5
    assert log.stat().st_size > 0
    sampler.host = Faulty(sampler.host, "lm_head.weight", partial(kill_then_send, pids))
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"rollout\.restart is 0"):
        sampler.load_weights(model.named_parameters(), 9)
    assert time.monotonic() - began < 60
    sampler.close()
    assert not any(map(is_alive, pids))


def kill_then_send(pids, message, name):
    kill(pids[-1])
    return message


def test_a_server_does_not_outlive_a_trainer_that_is_killed(model_dir, tmp_path):
    """Killed while the engine is loading: nobody is there who could close it."""
    code = (
        "import sys; from flowrl.rollout.engine_process import ServerProcess;"
        "from flowrl.rollout.engine_protocol import EngineSettings;"
        "ServerProcess(EngineSettings(sys.argv[1], sys.argv[2]), '', 100)"
    )
    command = [sys.executable, "-c", code, str(model_dir), str(tmp_path / "vllm.log")]
    trainer = subprocess.Popen(command)
    servers = []
    wait_until(lambda: servers.extend(below(trainer.pid)) or servers, 60)
    time.sleep(6)  # it has imported itself and watches
    assert group_members(servers[0])
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not group_members(servers[0]), 15)
