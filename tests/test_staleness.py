"""Sampling ahead of training: who is asked for what, how old it is, and that nothing gets lost."""

import dataclasses
import json
import threading
import time

import pytest
import torch
from arguments import as_args
from test_matching import WORLD

from flowrl.cli import main
from flowrl.records import Prompt, Rollout, SampleRequest
from flowrl.schema import ConfigError
from flowrl.staleness import AheadSampler


def train(base_cache, run_dir, *extra, **changes):
    settings = {section: dict(values) for section, values in WORLD.items()}
    settings["base"]["cache_dir"] = str(base_cache)
    settings["run"] = {"dir": str(run_dir)}
    settings["objective"] = {"name": "vargrad"}
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    main(["train", "modular_cpu", *as_args(settings), *extra])
    return run_dir


def rows(run_dir, kind="train"):
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def samples(run_dir, step):
    path = run_dir / "samples" / f"step_{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def stale(base_cache, tmp_path_factory):
    return train(base_cache, tmp_path_factory.mktemp("stale") / "run", rollout={"max_staleness": 2})


def test_vargrad_reaches_the_target_two_steps_behind_without_a_correction(stale):
    before, after = rows(stale, "eval")[0], rows(stale, "eval")[-1]
    assert before["diversity/l1_to_target"] > 0.5
    assert after["diversity/l1_to_target"] <= 0.25
    assert after["diversity/success_exact"] > 0.85


def test_every_rollout_is_as_old_as_the_bound_and_no_older(stale):
    for step in (1, 2, 3, 4, 50, 160):
        versions = {row["policy_version"] for row in samples(stale, step)}
        assert versions == {max(0, step - 1 - 2)}
    assert [row["rollout/staleness"] for row in rows(stale)[:5]] == [0, 1, 2, 2, 2]


def test_stale_rollouts_show_in_the_mismatch(stale):
    first, later = rows(stale)[0], rows(stale)[10]
    assert first["mismatch/logp_abs_diff"] < 1e-5
    assert later["mismatch/logp_abs_diff"] > 1e-3


SHORT = {"trainer": {"steps": 6}, "checkpoint": {"every": 3}, "eval": {"num_prompts": 0}}


def cut_and_resume(base_cache, folder, staleness):
    """metrics of a run that goes through, and of one that lost its last steps and resumed."""
    rollout = {"max_staleness": staleness}
    whole = train(base_cache, folder / "whole", rollout=rollout, **SHORT)
    cut = train(base_cache, folder / "cut", rollout=rollout, **SHORT)
    for path in (cut / "checkpoints").glob("step_000006*"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (cut / "report.html").unlink()
    main(["train", "--resume", "--run.dir", str(cut)])
    return whole, cut


def prompts_of(run_dir):
    return [{row["prompt_index"] for row in samples(run_dir, step)} for step in range(1, 7)]


def test_resume_loses_no_prompt_and_repeats_none(base_cache, tmp_path):
    whole, cut = cut_and_resume(base_cache, tmp_path, 2)
    assert prompts_of(whole) == prompts_of(cut)
    assert sorted(i for s in prompts_of(cut) for i in s) == list(range(6 * 18))
    assert {r["policy_version"] for r in samples(cut, 4)} == {3}  # generated again, and fresher
    assert {r["policy_version"] for r in samples(whole, 4)} == {1}


def test_resume_is_exact_on_policy(base_cache, tmp_path):
    whole, cut = cut_and_resume(base_cache, tmp_path, 0)
    assert (whole / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()
    assert len(rows(cut)) == 6


def test_a_run_repeats_itself_at_any_staleness(base_cache, tmp_path):
    settings = {**SHORT, "rollout": {"max_staleness": 1}}
    first, second = (train(base_cache, tmp_path / name, **settings) for name in "ab")
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()


def test_what_chooses_prompts_by_their_rewards_is_refused(base_cache, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(
            base_cache,
            tmp_path / "run",
            rollout={"max_staleness": 1},
            loop={"dynamic_sampling": True},
        )
    assert "max_staleness" in capsys.readouterr().err


class Gate:
    """A sampler whose generation waits until it is let through."""

    def __init__(self):
        self.open = threading.Event()
        self.version = 0
        self.events = []

    def sample(self, request):
        assert self.open.wait(10)
        self.events.append(("sample", request.step, self.version))
        return [Rollout(p, 0, (1,), (0.0,), False, self.version, "") for p in request.prompts]

    def load_weights(self, weights, policy_version):
        self.version = policy_version
        self.events.append(("load", policy_version))

    def close(self):
        self.events.append("close")


def request(step):
    return SampleRequest([Prompt(step, "", (1,))], 1, 4, 1.0, 1.0, 0, step)


def test_new_weights_wait_until_the_batch_under_way_is_generated():
    gate = Gate()
    sampler = AheadSampler(gate, torch.device("cpu"))
    sampler.prefetch(request(1))
    loader = threading.Thread(target=sampler.load_weights, args=([], 1))
    loader.start()
    assert gate.events == []  # the trainer goes on meanwhile
    gate.open.set()
    loader.join(10)
    assert sampler.sample(request(1))[0].policy_version == 0
    assert sampler.sample(request(2))[0].policy_version == 1
    sampler.close()
    assert gate.events == [("sample", 1, 0), ("load", 1), ("sample", 2, 1), "close"]


def test_a_batch_is_never_given_out_for_another_request():
    gate = Gate()
    gate.open.set()
    sampler = AheadSampler(gate, torch.device("cpu"))
    sampler.prefetch(request(1))
    with pytest.raises(AssertionError):
        sampler.sample(dataclasses.replace(request(1), temperature=0.5))
    sampler.close()


def test_an_error_of_the_sampler_reaches_the_step():
    class Broken(Gate):
        def sample(self, request):
            raise ConfigError("broken")

    sampler = AheadSampler(Broken(), torch.device("cpu"))
    sampler.prefetch(request(1))
    with pytest.raises(ConfigError, match="broken"):
        sampler.sample(request(1))
    sampler.close()


def test_what_nobody_will_train_on_is_not_waited_for():
    class Slow(Gate):
        def interrupt(self):
            self.events.append("interrupt")
            self.open.set()

    for is_awaited in (False, True):
        gate = Slow()
        sampler = AheadSampler(gate, torch.device("cpu"))
        sampler.prefetch(request(1))
        if is_awaited:  # and the wait was given up, by Ctrl-C say
            threading.Thread(target=sampler.sample, args=(request(1),), daemon=True).start()
            while sampler._awaited is None:
                time.sleep(0.01)
        sampler.close()  # an error has ended the run
        assert gate.events[0] == "interrupt"
        assert gate.events[-1] == "close"
