"""Names, options and presets: every option has an effect, or is refused with a remedy."""

from __future__ import annotations

import dataclasses

import pytest
from flowrl_kernels import WeightBound
from loss_batches import evaluate, one_group_of_four, random_batch

from flowrl.config import ConfigError
from flowrl.objectives import LogZDefaults, build, loss, names
from flowrl.objectives.squared_residual import SquaredResidual

CODE_HEAD = LogZDefaults(dropout=0.1, include_last_prompt_token=False, dtype="bfloat16")

PRESET_TABLE = [
    ({}, WeightBound(None, 10.0), None, LogZDefaults()),
    ({"preset": "paper"}, WeightBound(0.8, 1.2), None, LogZDefaults()),
    ({"preset": "release"}, WeightBound(None, None), None, CODE_HEAD),
    ({"preset": "recipe"}, WeightBound(None, 10.0), None, CODE_HEAD),
    ({"preset": "recipe_2025_11"}, WeightBound(0.8, 1.28), (0.8, 1.28), CODE_HEAD),
    ({"preset": "release", "bound": "none"}, None, None, CODE_HEAD),
    ({"preset": "recipe", "max_weight": 3.0}, WeightBound(None, 3.0), None, CODE_HEAD),
    ({"bound": "paper", "clip_eps_high": 0.5}, WeightBound(0.8, 1.5), None, LogZDefaults()),
    ({"preset": "paper", "token_mask": True}, WeightBound(0.8, 1.2), (0.8, 1.2), LogZDefaults()),
]


@pytest.mark.parametrize(("options", "bound", "token_clip", "head"), PRESET_TABLE)
def test_presets(options, bound, token_clip, head):
    objective = build("flowrl", options)
    assert isinstance(objective, SquaredResidual)
    assert objective.settings.weight_bound == bound
    assert objective.settings.token_clip == token_clip
    assert objective.log_z_defaults == head
    assert dataclasses.astuple(objective.settings)[:4] == (15.0, "learned", True, "zscore")


NEEDS_TABLE = [
    ("flowrl", {}, {"ref", "old", "log_z"}, "sequence", None),
    ("flowrl", {"bound": "none", "log_z": "zero"}, {"ref"}, "sequence", None),
    ("flowrl", {"log_z": "group_mean", "reward": "raw"}, {"ref", "old"}, "group", 15.0),
    ("tb", {"beta": 2.0}, {"ref", "log_z"}, "sequence", 2.0),
    ("vargrad", {"bound": "recipe"}, {"ref", "old"}, "group", 3.0),
    ("gflowrl", {}, {"ref", "old", "old_pass"}, "sequence", 8.0),
    ("tba", {"kl_coef": 0.5}, {"ref"}, "group", 2.0),
    ("gvpo", {}, {"old"}, "group", None),
    ("kimi_pmd", {}, {"old"}, "sequence", None),
    ("ftb", {}, {"ref"}, "group", 3.0),
    ("ftb", {"log_z": "learned"}, {"ref", "log_z"}, "sequence", 3.0),
    ("subtb", {}, {"ref", "values"}, "sequence", 3.0),
    ("db", {}, {"ref", "values"}, "sequence", 3.0),
    ("rloo", {}, set(), "sequence", None),
    ("rloo_kl", {}, {"ref", "old_pass"}, "sequence", 3.0),
    ("grpo", {}, {"ref", "old"}, "sequence", None),
    ("grpo", {"kl_coef": 0.0}, {"old"}, "sequence", None),
    ("grpo", {"kl_placement": "reward_token"}, {"ref", "old", "old_pass"}, "sequence", None),
    ("reinforce", {}, set(), "sequence", None),
    ("reinforce", {"kl_coef": 0.25}, {"ref", "old_pass"}, "sequence", 4.0),
    (
        "reinforce",
        {"kl_coef": 0.25, "kl_placement": "reward_token"},
        {"ref", "old_pass"},
        "sequence",
        None,
    ),
    (
        "rloo",
        {"kl_coef": 0.25, "kl_placement": "reward_token"},
        {"ref", "old_pass"},
        "sequence",
        4.0,
    ),
    ("rloo", {"kl_coef": 0.25, "kl_estimator": "k2"}, {"ref", "old_pass"}, "sequence", None),
    ("reinforce", {"kl_coef": 0.1, "kl_placement": "loss"}, {"ref"}, "sequence", None),
    (
        "rloo",
        {"kl_coef": 0.1, "kl_placement": "loss", "kl_ratio_weight": True},
        {"ref", "old"},
        "sequence",
        None,
    ),
    ("reinforce_pp", {}, {"ref", "old", "old_pass"}, "sequence", None),
    ("reinforce_pp_baseline", {}, {"ref", "old"}, "sequence", None),
    ("ppo", {}, {"ref", "old", "old_pass", "values"}, "sequence", None),
    ("ppo", {"kl_coef": 0.0}, {"old", "old_pass", "values"}, "sequence", None),
    (
        "ppo",
        {"kl_placement": "loss", "kl_controller": "adaptive"},
        {"ref", "old", "old_pass", "values"},
        "sequence",
        None,
    ),
    ("trpo", {}, {"old", "kl_old_new"}, "sequence", None),
    ("trpo", {"method": "line_search"}, {"old"}, "sequence", None),
    ("trpo", {"critic": True}, {"old", "old_pass", "values", "kl_old_new"}, "sequence", None),
    ("dr_grpo", {}, {"old"}, "sequence", None),
    ("dapo", {}, {"old"}, "sequence", None),
    ("prorl", {}, {"ref", "old"}, "sequence", None),
    ("gspo", {}, {"old"}, "sequence", None),
    ("gspo_token", {"kl_coef": 0.1}, {"ref", "old"}, "sequence", None),
    ("gmpo", {}, {"old"}, "sequence", None),
    ("cispo", {}, {"old"}, "sequence", None),
    ("disco", {}, {"old", "kl_old_new"}, "group", None),
]


@pytest.mark.parametrize(("name", "options", "needs", "coupling", "beta"), NEEDS_TABLE)
def test_what_objectives_declare(name, options, needs, coupling, beta):
    objective = build(name, options)
    assert (objective.needs, objective.coupling, objective.beta) == (needs, coupling, beta)


REFUSED = [
    ("flowlr", {}, r"no objective called 'flowlr'; did you mean flowrl\?"),
    ("flowrl", {"betta": 1.0}, r"unknown setting objective.betta; did you mean objective.beta\?"),
    ("flowrl", {"preset": "papr"}, "did you mean paper"),
    ("flowrl", {"beta": 0.0}, "objective.beta must be > 0, got 0.0"),
    ("flowrl", {"clip_eps_low": 0.1}, "clip_eps_low has no effect with bound 'recipe'"),
    (
        "flowrl",
        {"preset": "paper", "max_weight": 5.0},
        "max_weight has no effect",
    ),
    ("flowrl", {"bound": "none", "token_mask": True}, "token_mask has no effect with bound 'none'"),
    ("flowrl", {"preset": "recipe_2025_11", "reward": "raw"}, "needs reward=zscore"),
    ("tb", {"log_z": "zero"}, "unknown setting objective.log_z"),
    ("vargrad", {"max_weight": 2.0}, "no effect with bound 'none'"),
    ("tba", {"kl_coef": 0.5, "beta": 2.0}, "kl_coef is 1 / objective.beta, got both"),
    ("tba", {"kl_coef": -1.0}, "objective.kl_coef must be > 0"),
    ("gflowrl", {"gap_clip": False, "gap_clip_low": 0.5}, "no effect with gap_clip=false"),
    ("gflowrl", {"gap_clip_high": 0.0}, "objective.gap_clip_high must be > 0"),
    ("ftb", {"phi": "linex", "alpha": 2.0}, "alpha has no effect with phi=linex"),
    ("ftb", {"huber_threshold": 2.0}, "huber_threshold has no effect with phi=f_alpha"),
    ("ftb", {"phi": "huber"}, "set objective.log_z=learned"),
    ("subtb", {"lam": 0.0}, r"objective.lam must be in \(0, 1\]"),
    ("db", {"lam": 0.5}, "unknown setting objective.lam"),
    ("rloo", {"beta": 1.0}, "unknown setting objective.beta"),
    ("rloo_kl", {"beta": -1.0}, "objective.beta must be > 0"),
    ("grpo", {"clip_eps_low": 1.5}, r"clip_eps_low must be in \[0, 1\]"),
    ("grpo", {"aggregation": "tokens"}, "aggregation must be one of"),
    ("grpo", {"dual_clip": 0.9}, r"dual_clip must be > 1 or 0 \(none\), got 0.9"),
    ("grpo", {"kl_coef": -1.0}, "kl_coef must be >= 0"),
    ("grpo", {"max_tokens": 5}, "max_tokens has no effect with aggregation=seq-mean-token-mean"),
    ("dr_grpo", {"max_tokens": 0}, "max_tokens must be > 0"),
    ("dr_grpo", {"aggregation": "token-mean", "max_tokens": 5}, "max_tokens has no effect"),
    (
        "rloo",
        {"kl_coef": 0.1, "kl_estimator": "k3_straight_through"},
        "needs kl_placement=loss, got reward_sequence; set objective.kl_estimator=k3",
    ),
    ("reinforce_pp", {"kl_ratio_weight": True}, "kl_ratio_weight multiplies a token loss"),
    ("reinforce", {"advantage": "zscore"}, "advantage must be one of none, mean"),
    ("ppo", {"gamma": 1.1}, r"gamma must be in \[0, 1\], got 1.1"),
    ("ppo", {"lam": -0.1}, r"lam must be in \[0, 1\]"),
    ("ppo", {"value_coef": 0.0}, "value_coef must be > 0"),
    ("ppo", {"value_clip": -0.1}, "value_clip must be >= 0"),
    ("ppo", {"kl_controller": "adaptive", "kl_coef": 0.0}, "kl_coef, which must be > 0, got 0"),
    ("ppo", {"kl_target": 0.0}, "kl_target must be > 0, got 0.0; set objective.kl_target=0.1"),
    ("trpo", {"max_kl": 0.0}, "max_kl must be > 0"),
    ("trpo", {"damping": 1.0}, "damping has no effect with method=penalty"),
    ("trpo", {"method": "line_search", "kl_penalty": 2.0}, "kl_penalty has no effect"),
    ("trpo", {"lam": 0.9}, "lam has no effect without a critic, got 0.9"),
    (
        "trpo",
        {"method": "conjugate_gradient", "critic": True},
        "critic=true needs a first-order step",
    ),
    ("prorl", {"preset": "v3"}, "preset must be one of v1, v2"),
    ("prorl", {"clip_eps_low": 2.0}, r"clip_eps_low must be in \[0, 1\]"),
    ("gspo", {"aggregation": "token-mean"}, "unknown setting objective.aggregation"),
    ("gspo", {"clip_eps_high": -1.0}, "clip_eps_high must be >= 0"),
    ("gmpo", {"clip_eps_low": -0.1}, "clip_eps_low bounds a log-ratio and must be >= 0"),
    ("cispo", {"clip_eps_low": 1.5}, r"clip_eps_low must be in \[0, 1\]"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build(name, options)


EFFECTS = [
    ("flowrl", {}, {"beta": 5.0}),
    ("flowrl", {}, {"length_norm": False}),
    ("flowrl", {}, {"reward": "raw"}),
    ("flowrl", {}, {"log_z": "zero"}),
    ("flowrl", {}, {"log_z": "group_mean"}),
    ("flowrl", {}, {"max_weight": 1.0}),
    ("flowrl", {}, {"bound": "release"}),
    ("flowrl", {"preset": "paper"}, {"clip_eps_low": 0.01}),
    ("flowrl", {"preset": "paper"}, {"clip_eps_high": 0.5}),
    ("flowrl", {"preset": "recipe_2025_11"}, {"clip_eps_high": 0.01}),
    ("tb", {}, {"beta": 5.0}),
    ("tb", {}, {"bound": "paper"}),
    ("vargrad", {}, {"beta": 5.0}),
    ("flowrl", {"reward": "raw"}, {"log_z": "mean_reward"}),
    ("flowrl", {"reward": "raw"}, {"log_z": "group_mean_old"}),
    ("gflowrl", {}, {"gap_clip_low": 0.5}),
    ("gflowrl", {}, {"gap_clip_high": 0.5}),
    ("gflowrl", {}, {"gap_clip": False}),
    ("gflowrl", {}, {"max_weight": 0.9}),
    ("gflowrl", {"gap_clip": False}, {"beta": 5.0}),
    ("tba", {}, {"kl_coef": 0.5}),
    ("gvpo", {}, {"beta": 5.0}),
    ("kimi_pmd", {}, {"beta": 5.0}),
    ("ftb", {}, {"beta": 5.0}),
    ("ftb", {}, {"alpha": 1.2}),
    ("ftb", {}, {"phi": "linex"}),
    ("ftb", {}, {"log_z": "learned"}),
    ("ftb", {"phi": "huber", "log_z": "learned"}, {"huber_threshold": 0.1}),
    ("subtb", {}, {"beta": 5.0}),
    ("subtb", {}, {"lam": 0.5}),
    ("db", {}, {"beta": 5.0}),
    ("rloo_kl", {}, {"beta": 5.0}),
    ("grpo", {}, {"kl_coef": 0.5}),
    ("grpo", {}, {"clip_eps_low": 0.01}),
    ("grpo", {}, {"clip_eps_high": 0.01}),
    ("grpo", {}, {"aggregation": "token-mean"}),
    ("grpo", {}, {"aggregation": "token-sum"}),
    ("grpo", {}, {"dual_clip": 1.5}),
    ("grpo", {}, {"kl_estimator": "k2"}),
    ("grpo", {}, {"kl_placement": "reward_token"}),
    ("grpo", {}, {"kl_ratio_weight": True}),
    ("reinforce", {}, {"kl_coef": 0.5}),
    ("rloo", {}, {"kl_coef": 0.5}),
    ("rloo", {"kl_coef": 0.5}, {"kl_estimator": "k3"}),
    ("rloo", {"kl_coef": 0.5}, {"kl_placement": "loss"}),
    ("reinforce_pp", {}, {"kl_coef": 1.0}),
    ("reinforce_pp", {"kl_coef": 1.0}, {"kl_placement": "reward_sequence"}),
    ("reinforce_pp_baseline", {}, {"kl_coef": 1.0}),
    ("ppo", {}, {"kl_coef": 1.0}),
    ("ppo", {}, {"gamma": 0.5}),
    ("ppo", {}, {"lam": 0.5}),
    ("ppo", {"clip_eps_high": 0.1}, {"clip_eps_high": 0.5}),
    ("trpo", {}, {"kl_penalty": 5.0}),
    ("trpo", {}, {"method": "line_search"}),
    ("trpo", {}, {"critic": True}),
    ("trpo", {"critic": True}, {"lam": 0.5}),
    ("trpo", {"critic": True}, {"gamma": 0.5}),
    ("dr_grpo", {}, {"max_tokens": 6}),
    ("dr_grpo", {}, {"aggregation": "token-mean"}),
    ("dr_grpo", {"max_tokens": 6}, {"max_tokens": 12}),
    ("dapo", {}, {"clip_eps_high": 0.05}),
    ("dapo", {}, {"dual_clip": 1.5}),
    ("prorl", {}, {"preset": "v2"}),
    ("prorl", {}, {"clip_eps_high": 0.05}),
    ("prorl", {}, {"kl_coef": 1.0}),
    ("prorl", {}, {"dual_clip": 1.5}),
    ("prorl", {"kl_coef": 1.0}, {"kl_estimator": "k2"}),
    ("gspo", {}, {"clip_eps_low": 0.5}),
    ("gspo", {}, {"clip_eps_high": 0.5}),
    ("gspo", {}, {"kl_coef": 1.0}),
    ("gspo_token", {}, {"clip_eps_low": 0.5}),
    ("gmpo", {}, {"clip_eps_low": 0.01}),
    ("gmpo", {}, {"clip_eps_high": 0.01}),
    ("cispo", {}, {"clip_eps_low": 0.01}),
    ("cispo", {}, {"clip_eps_high": 0.01}),
    ("cispo", {}, {"aggregation": "seq-mean-token-mean"}),
]


@pytest.mark.parametrize(("name", "base", "change"), EFFECTS)
def test_every_option_has_an_effect(name, base, change):
    """The released code read its beta and clip settings without using them."""
    batch = one_group_of_four()
    _, before, _ = evaluate(name, batch, **base)
    _, after, _ = evaluate(name, batch, **{**base, **change})
    assert float((after - before).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("flowrl", "logprobs"),
        ("flowrl", "ref_logprobs"),
        ("flowrl", "log_z"),
        ("rloo_kl", "old_logprobs"),
        ("gflowrl", "old_logprobs"),
        ("subtb", "values"),
        ("db", "ref_logprobs"),
        ("grpo", "ref_logprobs"),
        ("reinforce_pp", "old_logprobs"),
        ("ppo", "old_values"),
        ("ppo", "values"),
    ],
)
def test_a_missing_field_is_named(name, field):
    with pytest.raises(ValueError, match=f"needs LossBatch.{field}, got None"):
        loss(name, random_batch(0, [4]).replace(**{field: None}))


def test_group_statistics_are_refused_where_they_mean_nothing():
    with pytest.raises(ValueError, match="flowrl has no group statistic"):
        build("flowrl").group_statistic(one_group_of_four())
    with pytest.raises(ValueError, match="at least 2 samples per prompt"):
        loss("vargrad", random_batch(0, [1, 1, 1]))


def test_names_are_sorted_and_build():
    assert names() == sorted(names())
    assert [build(name).name for name in names()] == names()
