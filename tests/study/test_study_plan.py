"""Study files: what they name, what they refuse, and commands that give the same runs."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from flowrl import objectives
from flowrl.overrides import as_arguments, split_overrides
from flowrl.schema import ConfigError
from flowrl.settings import load
from flowrl.study.plan import plan_runs, read_study, study_names

SMALL = """
seeds = [3, 4]
sweep_seeds = [3]
[worlds.tree]
recipe = "toy_tree_cpu"
settings = { eval = { samples = 16 }, run = { loggers = ["tensorboard"] } }
[worlds.grid]
recipe = "hypergrid_cpu"
[arms.tb]
family = "matcher"
settings = { objective = { name = "tb", beta = 2.0 } }
sweep = { "objective.beta" = [1.0, 4.0] }
[arms.grpo]
settings = { objective = { name = "grpo" }, optimizer = { betas = [0.9, 0.95] } }
worlds = ["tree"]
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_runs_are_arms_by_worlds_by_points_by_seeds(tmp_path):
    study = read_study(write(tmp_path, SMALL))
    runs = plan_runs(study, tmp_path)
    assert study.name == "mine"
    found = {(r.world, r.arm, tuple(r.point.values()), r.seed) for r in runs}
    swept = {(w, "tb", (b,), 3) for w in ("tree", "grid") for b in (1.0, 4.0)}
    own = {(w, "tb", (), s) for w in ("tree", "grid") for s in (3, 4)}
    assert found == swept | own | {("tree", "grpo", (), s) for s in (3, 4)}
    assert len({r.directory for r in runs}) == len(runs) == 10
    assert runs[0].seed == 3  # every arm once before the second seed
    assert [r.seed for r in runs] == sorted(r.seed for r in runs)


def test_settings_stack_recipe_world_arm_point_seed(tmp_path):
    runs = plan_runs(read_study(write(tmp_path, SMALL)), tmp_path)
    swept = next(r for r in runs if r.world == "tree" and r.point == {"objective.beta": 4.0})
    assert swept.config.objective.name == "tb"
    assert swept.config.objective.options["beta"] == 4.0
    assert swept.config.eval.samples == 16
    assert swept.config.seed == 3
    assert swept.config.run_dir == tmp_path / "mine" / "tree" / "tb_beta=4.0" / "seed_3"


@pytest.mark.parametrize("name", ["smoke", "laptop"])
def test_every_shipped_studys_commands_give_its_configs(name):
    runs = plan_runs(read_study(name), Path("runs/studies"))
    for run in runs:
        words = shlex.split(run.command)
        assert words[:2] == ["flowrl", "train"]
        rest, overrides = split_overrides(words[2:])
        assert load(rest[0], overrides) == run.config


def test_commands_of_lists_and_switches_give_the_same_config(tmp_path):
    runs = plan_runs(read_study(write(tmp_path, SMALL)), tmp_path)
    run = next(r for r in runs if r.arm == "grpo")
    rest, overrides = split_overrides(shlex.split(run.command)[2:])
    assert load(rest[0], overrides) == run.config
    assert run.config.optimizer.betas == (0.9, 0.95)
    assert run.config.run.loggers == ("tensorboard",)


def test_options_of_any_kind_survive_the_command_line():
    """The command line knows no types of options: a text that looks like a number needs quotes."""
    options = {"sizes": [1, 2], "level": "1", "names": ["a", "true"], "flag": False, "word": "x y"}
    settings = {"seed": 3, "task": {"name": "mine", "options": options, "size": 1e-6}}
    words = shlex.split(shlex.join(as_arguments({**settings, "run": {"loggers": ["wandb"]}})))
    rest, overrides = split_overrides(words)
    assert rest == []
    assert overrides == {
        "seed": 3,
        "task": {"name": "mine", **options, "size": 1e-6},
        "run": {"loggers": ["wandb"]},
    }


def test_the_laptop_study_is_large_enough():
    study = read_study("laptop")
    assert set(study.worlds) == {"toy_tree", "modular"}
    assert len(study.arms) >= 12
    assert len(study.seeds) == 3
    for run in plan_runs(study, Path("runs/studies")):
        objectives.build(run.config.objective.name, run.config.objective.options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds = [3, 4]", "seeds = []"), "needs a seed"),
        (('worlds = ["tree"]', 'worlds = ["tre"]'), "no world called 'tre'; did you mean tree?"),
        (("[arms.grpo]", "[arms.grpo]\nfamly = 1"), "unknown setting arms.grpo.famly"),
        (('name = "grpo" }', 'name = "grpo" }, bathc = {}'), "arm grpo in world tree"),
        (('recipe = "hypergrid_cpu"', 'recipe = "hypergrd_cpu"'), "did you mean hypergrid_cpu?"),
        (("= [1.0, 4.0]", "= []"), "must be a list of values"),
        (("objective = { name = \"grpo\" }", "base = { hidden_size = 32 }"), "from one model"),
        (("objective = { name = \"grpo\" }", "task = { name = \"modular\" }"), "have one task"),
        (("objective = { name = \"grpo\" }", "task = { depth = 3 }"), "toy_tree (depth=3)"),
        (("objective = { name = \"grpo\" }", "eval = { num_prompts = 0 }"), "eval.num_prompts=0"),
        (("[arms.grpo]", "[controls]\ntemperature_arms=['tbb']\n[arms.grpo]"), "did you mean tb?"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_work_is_refused(tmp_path, change, message):
    assert change[0] in SMALL
    path = write(tmp_path, SMALL.replace(*change))
    with pytest.raises(ConfigError) as error:
        plan_runs(read_study(path), tmp_path)
    assert message in str(error.value)


def test_unknown_names_come_with_the_nearest(tmp_path):
    assert set(study_names()) >= {"smoke", "laptop"}
    with pytest.raises(ConfigError, match="did you mean laptop"):
        read_study("laptpo")
    with pytest.raises(ConfigError, match="study file not found"):
        read_study("nowhere.toml")
    study = read_study("smoke")
    with pytest.raises(ConfigError, match="has no arm 'grpp'; did you mean grpo"):
        plan_runs(study, tmp_path, ["grpp"])
