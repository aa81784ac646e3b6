"""The corrections against their definitions, written out by hand for two short sequences."""

import dataclasses
import math

import pytest
import torch
from every_objective import cases, trainer

from flowrl.mismatch import FORMULAS, PER_SEQUENCE, corrected, correction_metrics
from flowrl.objectives.aggregation import rollout_correction
from flowrl.parallel import Parallel
from flowrl.records import LossBatch
from flowrl.rollout_config import RolloutConfig
from flowrl.schema import ConfigError
from flowrl.settings import merge

ALONE = Parallel(0, 1, torch.device("cpu"))

MU = [[3.0, 0.6, 1.0], [1.2, 1.0]]  # token ratios of two sequences
MEANS = [1.8 ** (1 / 3), 1.2**0.5]


def make(mu=MU, mask=None):
    flat = [math.log(m) for row in mu for m in row]
    lengths = torch.tensor([len(row) for row in mu])
    rollout = torch.linspace(-3, -1, len(flat))
    batch = LossBatch(
        rewards=torch.zeros(len(mu)),
        group_ids=torch.arange(len(mu)),
        cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        rollout_logprobs=rollout,
        response_mask=mask,
    )
    return batch, rollout + torch.tensor(flat)


def weights(correction, batch=None, **bounds):
    batch, trainer = batch or make()
    names = {f"correction_{k}": v for k, v in bounds.items()}
    found = corrected(batch, trainer, RolloutConfig(correction=correction, **names))
    found = found.rollout_weights
    return None if found is None else found.tolist()


def k3(mu):
    return sum(m - 1 - math.log(m) for m in mu) / len(mu)


CASES = {
    "tis": [2.0, 0.6, 1.0, 1.2, 1.0],
    "seq_tis": [1.8] * 3 + [1.2] * 2,
    "icepop": [3.0, 0.6, 1.0, 1.2, 1.0],
    "seq_mask": [1.8] * 3 + [1.2] * 2,
    "seq_mask_tis": [3.0, 0.6, 1.0, 1.2, 1.0],
    "geo_rs": [0.0] * 5,
    "k3_rs": [0.0] * 3 + [1.0 if k3(MU[1]) < 0.01 else 0.0] * 2,
}


@pytest.mark.parametrize("correction", sorted(FORMULAS))
def test_the_published_bounds(correction):
    assert weights(correction) == pytest.approx(CASES[correction], rel=1e-5)


@pytest.mark.parametrize(
    ("correction", "bounds", "expected"),
    [
        ("tis", {"high": 1.1}, [1.1, 0.6, 1.0, 1.1, 1.0]),
        ("seq_tis", {"high": 1.3}, [1.3] * 3 + [1.2] * 2),
        ("icepop", {"low": 0.8, "high": 2.0}, [0.0, 0.0, 1.0, 1.2, 1.0]),
        ("seq_mask", {"high": 1.3}, [0.0] * 3 + [1.2] * 2),
        ("seq_mask", {"low": 1.3}, [1.8] * 3 + [0.0] * 2),
        ("seq_mask_tis", {"high": 1.12}, [0.0] * 3 + [1.2, 1.0]),
        ("geo_rs", {"low": 0.9, "high": 1.12}, [0.0] * 3 + [1.0] * 2),
        ("k3_rs", {"high": 0.1}, [0.0] * 3 + [1.0] * 2),
    ],
)
def test_other_bounds(correction, bounds, expected):
    assert MEANS[0] > 1.12 > MEANS[1]  # what the cases rest on
    assert k3(MU[0]) > 0.1 > k3(MU[1])
    assert weights(correction, **bounds) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("correction", sorted(FORMULAS))
def test_no_mismatch_leaves_every_loss_as_it_is(correction):
    assert weights(correction, make([[1.0, 1.0], [1.0]])) == [1.0] * 3


@pytest.mark.parametrize("correction", sorted(FORMULAS))
def test_weights_stay_finite_over_long_sequences(correction):
    found = weights(correction, make([[8.0] * 500, [0.1] * 500]))
    assert found is not None
    assert all(math.isfinite(w) for w in found)


def test_masked_tokens_take_no_part():
    mask = torch.tensor([False, True, True, True, True])
    batch, trainer = make(mask=mask)
    trainer[0] = math.nan
    found = weights("seq_tis", (batch, trainer))
    assert found == pytest.approx([1.0, 0.6, 0.6, 1.2, 1.2], rel=1e-5)


def test_none_is_no_weight():
    assert weights("none") is None


def test_metrics_count_what_is_dropped():
    batch, trainer = make()
    config = RolloutConfig(correction="icepop", correction_low=0.8, correction_high=2.0)
    found = correction_metrics(corrected(batch, trainer, config))
    assert found["correction_dropped"].tolist() == [2, 0]
    assert found["correction_weight"].tolist() == pytest.approx([1.0, 2.2], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"correction": "tis", "old_logprobs": "rollout"}, "set rollout.old_logprobs=trainer"),
        ({"correction_high": 3.0}, "leave them out"),
        ({"correction": "tis", "correction_low": 0.5}, "no lower bound"),
        ({"correction": "icepop", "correction_low": 6.0}, "must be below"),
        ({"engine": "vllm", "dtype": "fp8"}, "set rollout.correction=tis"),
        ({"top_p": 0.9}, "eval.top_p"),
        ({"top_k": 50}, "leave it out"),
        ({"min_p": 0.1}, "leave it out"),
        ({"server_python": "python3"}, "set rollout.engine=vllm"),
        ({"engine": "vllm", "mode": "in_process", "server_python": "x"}, "set rollout.mode=server"),
        ({"engine": "replay", "replay_dir": "x", "max_staleness": 1}, "max_staleness=0"),
        (
            {"engine": "vllm", "mode": "in_process", "sync_transport": "broadcast"},
            "set rollout.mode=server",
        ),
        ({"engine": "vllm", "sleep": True, "max_staleness": 1}, "cannot sleep"),
        ({"sync_timeout_s": 0.0}, "must be > 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, remedy):
    with pytest.raises(ConfigError, match=remedy):
        RolloutConfig(**settings)


def test_fp8_with_a_correction_is_accepted():
    assert RolloutConfig(engine="vllm", dtype="fp8", correction="tis").dtype == "fp8"


def test_other_ranks_wait_as_long_as_an_engine_may_take():
    once = RolloutConfig(
        engine="vllm", start_timeout_s=100, generate_timeout_s=7200, sync_timeout_s=10
    )
    assert once.longest_wait_s == 7210
    assert dataclasses.replace(once, start_timeout_s=9000).longest_wait_s == 9000
    assert dataclasses.replace(once, sleep=True).longest_wait_s == 7230
    assert dataclasses.replace(once, max_staleness=2).longest_wait_s == 14410
    assert dataclasses.replace(once, restart=2).longest_wait_s == 7210 + 2 * 7310
    assert RolloutConfig().longest_wait_s == 0


def test_evaluation_samples_the_same_distribution_without_the_engine():
    rollout = RolloutConfig(
        engine="vllm", server_python="x", restart=2, temperature=0.7, max_staleness=1,
        correction="tis",
    )  # fmt: skip
    assert rollout.by_transformers() == RolloutConfig(temperature=0.7, correction="tis")


@pytest.mark.parametrize("correction", sorted(FORMULAS))
def test_a_sequence_level_loss_gets_one_factor_a_sequence(correction):
    """Of a whole-sequence correction its one weight, not a power of it; else the capped product."""
    batch, trainer = make()
    low = 0.5 if correction == "icepop" else None
    rollout = RolloutConfig(correction=correction, correction_low=low, correction_high=2.5)
    batch = corrected(batch, trainer, rollout)
    assert (batch.rollout_factors is not None) == (correction in PER_SEQUENCE)
    expected = {
        "tis": [1.5, 1.2],  # 2.5 * 0.6
        "seq_tis": [1.8, 1.2],
        "icepop": [0.0, 1.2],
        "seq_mask": [1.8, 1.2],
        "seq_mask_tis": [1.8, 1.2],
        "geo_rs": [1.0, 1.0],
        "k3_rs": [1.0, 1.0],
    }[correction]
    assert rollout_correction(batch).tolist() == pytest.approx(expected, rel=1e-5)
    again = batch.select(torch.tensor([1, 0]))
    assert rollout_correction(again).tolist() == pytest.approx(expected[::-1], rel=1e-5)


@pytest.mark.parametrize("name", cases())
def test_every_objective_learns_nothing_from_what_is_dropped(name, base_dir):
    """All sequences are outside these bounds: no gradient is left of a whole step."""
    dropping = {"correction": "geo_rs", "correction_low": 0.1, "correction_high": 0.2}
    world = merge(cases()[name], {"rollout": dropping})
    row = trainer(world, str(base_dir.parent), ALONE).step(1).metrics
    assert row["mismatch/correction_dropped"] == 1.0
    assert row["actor/grad_norm"] == 0.0
