"""Recipes, overrides and their errors: one line that says what is wrong and what to do."""

import tomllib

import pytest

from flowrl.config import Config, ConfigError
from flowrl.option_tables import load_checked
from flowrl.overrides import split_overrides
from flowrl.schema import toml_text
from flowrl.settings import from_mapping, load, recipe_names, to_toml


def from_args(*args: str, recipe: str = "countdown_cpu") -> Config:
    rest, overrides = split_overrides(args)
    assert not rest
    return load(recipe, overrides)


@pytest.mark.parametrize("name", recipe_names())
def test_resolved_config_reads_back_to_itself(name):
    config = load(name, {"objective": {"name": "grpo", "kl_coef": 0.5}, "log_z": {"dropout": 0.1}})
    assert from_mapping(tomllib.loads(to_toml(config))) == config


def test_text_survives_toml():
    config = from_mapping({"run": {"dir": 'a "b" \\ c\nd'}, "task": {"x y": "1"}})
    assert from_mapping(tomllib.loads(to_toml(config))) == config


def test_overrides_reach_their_settings():
    config = from_args(
        "--batch.group-size", "4", "--batch.updates_per_step=1", "--optimizer.betas", "0.8", "0.9",
        "--model.gradient_checkpointing", "--run.dir", "5", "--seed", "3", "--objective.beta", "2",
        "--run.loggers", "tensorboard", "wandb", "--log_z.lr", "1e-4",
    )  # fmt: skip
    assert config.batch.group_size == 4
    assert config.batch.updates_per_step == 1
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.model.gradient_checkpointing is True
    assert config.run.dir == "5"
    assert config.seed == 3
    assert config.objective.options["beta"] == 2
    assert config.run.loggers == ("tensorboard", "wandb")
    assert config.log_z.lr == 1e-4


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_tables_of_names_not_chosen_are_right(name):
    assert load_checked(name, {}) == load(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[objective.vargrd]\nbeta = 3.0", r"names no objective; did you mean objective.vargrad\?"),
        ("[objective.vargrad]\nbetta = 3.0", r"unknown setting objective.vargrad.betta; did you"),
        ("[task.countdwn]\nseed = 3", r"names no task; did you mean task.countdown\?"),
        ("[task.game24]\nsede = 3", r"unknown setting task.game24.sede; did you mean"),
    ],
)
def test_a_misspelt_table_is_not_left_out(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    load(str(path))
    with pytest.raises(ConfigError, match=message):
        load_checked(str(path), {})


def test_positional_arguments_are_left_alone():
    rest, overrides = split_overrides(["--objective.name", "tb", "modular_cpu", "--resume"])
    assert rest == ["modular_cpu", "--resume"]
    assert overrides == {"objective": {"name": "tb"}}


def test_another_objective_takes_its_own_table_and_drops_the_other_options():
    config = from_args("--objective.name", "vargrad", recipe="modular_cpu")
    assert config.objective.options == {"beta": 3.0}
    config = from_args("--objective.name", "grpo", recipe="modular_cpu")
    assert config.objective.options == {}
    config = from_args("--objective.name", "vargrad", "--objective.beta", "9", recipe="modular_cpu")
    assert config.objective.options == {"beta": 9}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--batch.group_siz", "4"],
            r"unknown setting batch.group_siz; did you mean batch.group_size",
        ),
        (["--loop.steps", "4"], r"unknown setting loop.steps; did you mean trainer.steps\?"),
        (["--batc.group_size", "4"], r"unknown setting batc; did you mean batch"),
        (["--batch.group_size", "four"], r"batch.group_size must be of type int, got 'four'"),
        (["--batch.group_size", "0"], r"batch.group_size must be >= 1, got 0"),
        (["--batch.group_size", "true"], r"batch.group_size must be of type int, got True"),
        (["--batch.group_size"], r"--batch.group_size needs a value"),
        (["--optimizer.lr", "nan"], r"optimizer.lr must be finite"),
        (["--optimizer.betas", "0.9"], r"optimizer.betas must have 2 values, got 1"),
        (["--rollout.engine", "hff"], r"rollout.engine must be one of .*; did you mean hf\?"),
        (["--rollout.temperature", "0"], r"rollout.temperature must be >= 0.001"),
        (["--rollout.temperature", "1e-40"], r"rollout.temperature must be >= 0.001"),
        (["--seed", "99999999999999999999"], r"seed must be in \[0, 2\^63\)"),
        (["--base.seed", "-1"], r"base.seed must be in \[0, 2\^63\)"),
        (["--base.pretrain_lr", "-1"], r"base.pretrain_lr must be > 0"),
        (["--rollout.engine", "replay"], r"rollout.replay_dir go together"),
        (["--batch.updates_per_step", "3"], r"got 3 and 32; set batch.updates_per_step=2"),
        (["--eval.top_p", "1.5"], r"eval.top_p must be in \(0, 1\]"),
        (
            ["--base.hidden_size", "97", "--base.head_dim", "0"],
            r"base.hidden_size must be a multiple",
        ),
    ],
)
def test_bad_settings_name_the_remedy(args, message):
    with pytest.raises(ConfigError, match=message):
        from_args(*args)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean countdown_cpu"):
        load("countdown_gpu")


def test_broken_toml_names_the_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[batch\n")
    with pytest.raises(ConfigError, match=r"mine.toml is not valid TOML"):
        load(str(path))


def test_options_written_either_way_reach_the_objective():
    config = from_args("--objective.options.beta", "15", "--task.options.num_numbers", "3")
    assert config.objective.options["beta"] == 15
    assert config.task.options["num_numbers"] == 3
    assert config.task.options["target_high"] == 50


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--objective.vargardd.beta", "9"], "unknown setting objective.vargardd"),
        (["--task.options", "3"], "task.options must be a table"),
        (["--batch.tokens_per_microbatch", "8"], "set batch.tokens_per_microbatch=47"),
        (["--reward.max_error_rate", "-1"], "reward.max_error_rate must be >= 0"),
        (["--optimizer.betas", "0.9", "1.5"], "optimizer.betas must be in"),
        (["--optimizer.warmup_updates", "-4"], "optimizer.warmup_updates must be >= 0"),
        (["--base.num_heads", "0"], "base.num_heads must be >= 1"),
        (["--base.num_kv_heads", "0"], "base.num_kv_heads must be >= 1"),
        (["--base.head_dim", "7"], "base.head_dim must be even, or 0, got 7"),
        (["--eval.num_prompts", "-1"], "eval.num_prompts must be >= 0"),
        (["--rollout.engine", "replay", "--rollout.replay_dir", "x"], "set eval.num_prompts=0"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(args, message):
    with pytest.raises(ConfigError, match=message):
        from_args(*args)


@pytest.mark.parametrize("section", ["log_z", "value_head"])
def test_a_head_never_ascends(section):
    with pytest.raises(ConfigError, match=f"{section}.lr must be >= 0, got -0.01"):
        from_mapping({section: {"lr": -0.01}})


def test_control_characters_survive_toml():
    name = 'runs/a\r\n\t\x1b\x7f"\\b'
    assert tomllib.loads(toml_text({"run": {"dir": name}})) == {"run": {"dir": name}}
