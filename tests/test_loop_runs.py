"""The loop's mechanisms in whole runs: what they do, and that they resume to the same bytes."""

import json
import shutil

import pytest
from arguments import as_args

from flowrl.cli import main
from flowrl.settings import merge


def train(tiny, run_dir, overrides, *more):
    settings = merge(tiny, {"run": {"dir": str(run_dir)}, "trainer": {"steps": 6}})
    main(["train", *as_args(merge(settings, overrides)), *more])
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps(rows):
    return [row for row in rows if row["kind"] == "train"]


def groups(run_dir, step):
    """Rewards by prompt index of one step's samples."""
    found = {}
    for line in (run_dir / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["prompt_index"], []).append(row["reward"])
    return found


MECHANISMS = {
    "dynamic": {"objective": {"name": "grpo"}, "loop": {"dynamic_sampling": True}},
    "replay": {
        "objective": {"name": "vargrad"},
        "loop": {"replay_fraction": 0.5, "replay_priority": "reward", "replay_capacity": 6},
    },
    "reset": {
        "objective": {"name": "grpo"},
        "loop": {"reference_reset_every": 3, "reset_optimizer": True},
    },
    "plateau": {
        "objective": {"name": "grpo"},
        "eval": {"every": 1},
        "loop": {"reference_reset_patience": 1},
    },
}


@pytest.fixture(scope="module")
def run(tiny, base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    found = {}

    def get(name):
        if name not in found:
            found[name] = (folder / name, train(tiny, folder / name, MECHANISMS[name]))
        return found[name]

    return get


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_run_goes_on_from_a_checkpoint_with_the_same_bytes(run, name, tmp_path):
    straight, _ = run(name)
    copy = tmp_path / "run"
    shutil.copytree(straight, copy)
    for folder in ("checkpoints/step_000006",):  # the run was ended after step 4
        shutil.rmtree(copy / folder)
    (copy / "report.html").unlink()
    main(["train", "--run.dir", str(copy), "--resume"])
    assert (copy / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_dynamic_sampling_keeps_groups_with_a_difference_and_takes_new_prompts(run):
    run_dir, rows = run("dynamic")
    seen = []
    for row in steps(rows):
        members = groups(run_dir, row["step"])
        assert len(members) == 4
        uniform = [len(set(rewards)) == 1 for rewards in members.values()]
        assert sum(uniform) == round(row["reward/filled_frac"] * 4)
        assert row["reward/sampling_rounds"] >= 1
        seen += members
    assert len(seen) == len(set(seen))
    assert any(row["reward/sampling_rounds"] > 1 for row in steps(rows))
    assert any(row["reward/kept_frac"] < 1 for row in steps(rows))


def test_replay_mixes_in_groups_of_earlier_steps(run):
    run_dir, rows = run("replay")
    fractions = [row["reward/replayed_frac"] for row in steps(rows)]
    assert fractions == [0.0, *[0.5] * 5]
    first = set(groups(run_dir, 1))
    second = set(groups(run_dir, 2))
    assert len(second & first) == 2
    assert len(second - first) == 2


def test_the_speed_of_sampling_counts_what_was_sampled(run):
    """With replay that is less than what the step trained on, with dynamic sampling more."""
    ratios = {}
    for name in ("replay", "dynamic"):
        run_dir, _ = run(name)
        lines = (run_dir / "timing.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["kind"] == "train"][1:]
        generated = sum(r["perf/gen_tokens_per_s"] * r["timing_s/generate"] for r in rows)
        trained = sum(r["perf/train_tokens_per_s"] * r["timing_s/train"] for r in rows)
        ratios[name] = generated / trained
    assert ratios["replay"] < 0.9
    assert ratios["dynamic"] > 1.1


def test_a_reset_makes_the_reference_the_policy(run):
    _, rows = run("reset")
    kl = {row["step"]: row["actor/kl_ref"] for row in steps(rows)}
    assert kl[1] == pytest.approx(0.0, abs=1e-6)
    assert abs(kl[3]) > 1e-4
    assert kl[4] == pytest.approx(0.0, abs=1e-6)
    assert abs(kl[6]) > 1e-4


def test_a_plateau_resets_the_reference(run):
    """Scores of four problems stand still soon; each still evaluation is followed by a KL of 0."""
    _, rows = run("plateau")
    scores = [row["eval/countdown/avg@4"] for row in rows if row["kind"] == "eval"]
    kl = [row["actor/kl_ref"] for row in steps(rows)]
    best, followed = float("-inf"), []
    for step, score in enumerate(scores[:-1]):
        if score > best:
            best = score
        else:
            followed.append(kl[step])
    assert followed
    assert followed == pytest.approx([0.0] * len(followed), abs=1e-6)


def test_truncated_responses_leave_the_loss(tiny, base_dir, tmp_path):
    """A truncated response has the reward -1, so it has a gradient, unless it is masked."""
    world = {
        "rollout": {"max_new_tokens": 4, "temperature": 3.0},
        "objective": {"name": "vargrad"},
        "loop": {"truncated_reward": -1.0},
        "trainer": {"steps": 1},
    }
    kept = steps(train(tiny, tmp_path / "kept", world))[0]
    world = merge(world, {"loop": {"mask_truncated": True}})
    masked = steps(train(tiny, tmp_path / "masked", world))[0]
    assert 0 < kept["response_length/truncated"] < 1
    assert kept["reward/shaping_mean"] < 0
    assert masked["reward/shaping_mean"] == kept["reward/shaping_mean"]
    assert masked["actor/loss"] < 0.9 * kept["actor/loss"]


def test_the_rewards_of_a_step_count_by_its_number(tiny, base_dir, tmp_path):
    world = {
        "objective": {"name": "vargrad"},
        "loop": {"reward_scale_start": 0.0, "reward_scale_steps": 3},
        "trainer": {"steps": 4},
    }
    rows = steps(train(tiny, tmp_path / "run", world))
    assert rows[0]["reward/mean"] > 0
    for row, share in zip(rows, (0.0, 0.5, 1.0, 1.0), strict=True):
        expected = (share - 1) * row["reward/mean"]
        assert row.get("reward/shaping_mean", 0.0) == pytest.approx(expected, abs=1e-6)


def test_a_step_of_truncated_responses_alone_changes_nothing(tiny, base_dir, tmp_path):
    world = {
        "rollout": {"max_new_tokens": 2},
        "objective": {"name": "grpo", "aggregation": "token-mean"},
        "loop": {"mask_truncated": True},
        "trainer": {"steps": 1},
    }
    for name, more in (("run", {}), ("corrected", {"rollout": {"correction": "tis"}})):
        row = steps(train(tiny, tmp_path / name, merge(world, more)))[0]
        assert row["response_length/truncated"] == 1.0
        assert (row["actor/loss"], row["actor/grad_norm"]) == (0.0, 0.0)
        assert row.get("mismatch/correction_dropped", 0.0) == 0.0
