"""Measures of diversity on cases computed by hand."""

import math

import numpy as np
import pytest

from flowrl import diversity
from flowrl.metrics import distances
from flowrl.objectives.base import FixedPoint
from flowrl.targets import Table
from flowrl.targets import target as fixed_point


def test_modes_gather_the_answers_that_share_a_solution():
    found = diversity.mode_masses([0.1, 0.2, 0.3, 0.4], ["a", None, "a", "b"])
    assert found == {"a": pytest.approx(0.4), "b": 0.4}


def test_expected_coverage_by_hand():
    assert diversity.expected_coverage([0.5, 0.25], 2) == pytest.approx((0.75 + 0.4375) / 2)
    assert diversity.expected_coverage([1.0, 0.0], 64) == 0.5


def test_expected_coverage_is_what_sampling_finds():
    masses = [0.3, 0.1, 0.02, 0.001]
    random = np.random.default_rng(0)
    draws = random.choice(5, size=(20_000, 16), p=[*masses, 1 - sum(masses)])
    hit = np.mean([[(draw == m).any() for m in range(4)] for draw in draws])
    assert diversity.expected_coverage(masses, 16) == pytest.approx(hit, abs=0.005)


def test_effective_modes_by_hand():
    assert diversity.effective_modes([0.2, 0.2, 0.0]) == pytest.approx(2.0)
    assert diversity.effective_modes([0.3, 0.1]) == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )
    assert diversity.effective_modes([0.3, 0.1], order=2) == pytest.approx(1 / (0.5625 + 0.0625))
    assert diversity.effective_modes([0.3, 0.1], order=math.inf) == pytest.approx(4 / 3)
    assert diversity.effective_modes([0.0, 0.0]) == 0.0


def test_implied_log_z_is_log_z_minus_the_kl():
    """The tabular oracle: at pi_ref the best log Z is 0.7, at the target it is log Z itself."""
    reference, rewards = [0.4, 0.3, 0.2, 0.1], [0.0, 1.0, 1.0, 2.0]
    assert diversity.implied_log_z(reference, reference, rewards, 1.0) == pytest.approx(0.7)
    found = fixed_point(FixedPoint(1.0), Table(reference, rewards, [1] * 4))
    assert found is not None
    target = found.probabilities.tolist()
    log_z = diversity.implied_log_z(target, reference, rewards, 1.0)
    assert log_z == pytest.approx(0.9155090, abs=1e-7)
    policy = [0.1, 0.2, 0.3, 0.4]
    kl = distances(policy, target)["kl"]
    found = diversity.implied_log_z(policy, reference, rewards, 1.0)
    assert found == pytest.approx(log_z - kl)


def test_spearman_by_hand():
    assert diversity.spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1.0)
    assert diversity.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Ranks 1 2 3 4 against 1.5 1.5 3 4: cov 4.5, variances 5 and 4.5.
    assert diversity.spearman([1, 2, 3, 4], [0, 0, 5, 9]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert diversity.spearman([1, 1, 1], [1, 2, 3]) == 0.0


def test_solutions_found():
    assert diversity.distinct_solutions(["a", None, "b", "a"]) == 2
    assert diversity.for_diversity([3, 0, 1]) == 2.0
    assert diversity.for_diversity([0, 0]) == 0.0
    found = diversity.creativity({"x": {(0, "a"), (0, "b")}, "y": {(0, "b"), (1, "b")}, "z": set()})
    assert found == {"x": 1 / 3, "y": 1 / 3, "z": 0.0}


@pytest.mark.parametrize(
    ("sizes", "score"),
    [
        ([16], 1), ([14, 2], 1), ([13, 3], 2), ([11, 5], 2), ([10, 6], 3), ([7, 7, 2], 3),
        ([6, 5, 5], 4), ([4, 4, 4, 4], 4), ([3, 3, 3, 3, 3, 1], 5), ([1] * 16, 5),
    ],
)  # fmt: skip
def test_judge_rubric_at_its_thresholds(sizes, score):
    classes = [name for name, size in enumerate(sizes) for _ in range(size)]
    assert diversity.judge_score(classes) == score


def test_the_rubric_wants_16_responses():
    with pytest.raises(ValueError, match="16 responses, got 3"):
        diversity.judge_score(["a", "b", "c"])


def test_distinct_n_by_hand():
    assert diversity.distinct_n(["abab", "ab"], 2) == 2 / 4  # ab ba ab, ab
    assert diversity.distinct_n(["a", "b"], 2) == 0.0


def test_self_bleu_by_hand():
    assert diversity.self_bleu(["abcd", "abcd"]) == pytest.approx(1.0)
    assert diversity.self_bleu(["ab", "cd"]) == 0.0
    # "abc" against "abd": 2 of 3 letters; (1 + 1) / (2 + 1) pairs; (0 + 1) / (1 + 1) triples.
    assert diversity.self_bleu(["abc", "abd"]) == pytest.approx((2 / 3 * 2 / 3 * 1 / 2) ** (1 / 3))
    # "a" against "abc": all of its letters, brevity exp(1 - 3); "abc" against "a": 1/3, 1/3, 1/2.
    expected = (math.exp(-2) + (1 / 3 * 1 / 3 * 1 / 2) ** (1 / 3)) / 2
    assert diversity.self_bleu(["a", "abc"]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="needs 2"):
        diversity.self_bleu(["a"])


def test_vendi_by_hand():
    assert diversity.vendi(np.ones((5, 5))) == pytest.approx(1.0)
    assert diversity.vendi(np.eye(5)) == pytest.approx(5.0)
    blocks = np.kron(np.eye(2), np.ones((3, 3)))
    assert diversity.vendi(blocks) == pytest.approx(2.0)
    half = np.array([[1.0, 0.5], [0.5, 1.0]])  # eigenvalues of K / 2: 3/4 and 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert diversity.vendi(half) == pytest.approx(math.exp(entropy))
    assert diversity.vendi(half, order=2) == pytest.approx(1 / (0.75**2 + 0.25**2))
    assert diversity.vendi(half, order=math.inf) == pytest.approx(4 / 3)
    with pytest.raises(ValueError, match="ones on the diagonal"):
        diversity.vendi(2 * np.eye(2))


def test_ngram_similarity_by_hand():
    found = diversity.ngram_similarity(["ab", "ac", "ab", ""], max_n=2)
    assert found[0, 2] == pytest.approx(1.0)
    assert found[0, 1] == pytest.approx(1 / 3)  # a of {a, b, ab} and {a, c, ac}
    assert found[0, 3] == 0.0
    assert np.allclose(np.diag(found), 1.0)


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        found = diversity.bootstrap(random.normal(size=(1, 50)).tolist(), resamples=300, seed=trial)
        held += found.low <= 0.0 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_bootstrap_draws_whole_seeds_and_whole_prompts():
    by_seed = diversity.bootstrap([[1.0, 1.0], [3.0, 3.0]])
    assert (by_seed.mean, by_seed.low, by_seed.high) == (2.0, 1.0, 3.0)
    by_prompt = diversity.bootstrap([[1.0, 3.0], [1.0, 3.0]])
    assert (by_prompt.mean, by_prompt.low, by_prompt.high) == (2.0, 1.0, 3.0)
    alone = diversity.bootstrap([[0.25]])
    assert (alone.low, alone.high) == (0.25, 0.25)
    with pytest.raises(ValueError, match="seeds, prompts"):
        diversity.bootstrap([])
