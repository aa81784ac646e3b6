import numpy as np
import pytest

from flowrl.rollout.noise import stream_keys, uniform


def grid(seed=0, step=3, stream="train", prompts=40, samples=25, positions=40):
    """(prompts, samples, positions) numbers."""
    index, sample = np.divmod(np.arange(prompts * samples), samples)
    keys = stream_keys(seed, step, stream, index.tolist(), sample.tolist())
    return uniform(keys[:, None], np.arange(positions)).reshape(prompts, samples, positions)


def test_golden_values():
    """They are part of every recorded run: a change of the generator must not go unnoticed."""
    keys = stream_keys(0, 1, "train", [0, 0, 1], [0, 1, 0])
    assert keys.tolist() == [3657955231352878850, 2237647727685579090, 16913305003612096116]
    assert uniform(keys[:, None], [0, 1]).tolist() == [
        [0.11190973070897847, 0.25823148512067995],
        [0.5893413630401891, 0.38201748671671787],
        [0.6001030723493432, 0.7210770921451708],
    ]
    (far,) = uniform(stream_keys(-1, 2**40, "eval", [7], [3]), 5)
    assert far == 0.7933433895366608


def test_is_uniform():
    u = grid().ravel()  # 40 000 numbers
    n = u.size
    assert u.min() > 0
    assert u.max() < 1
    assert abs(u.mean() - 1 / 2) < 4 * np.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / n)
    counts = np.bincount((u * 100).astype(int), minlength=100)
    chi_square = ((counts - n / 100) ** 2 / (n / 100)).sum()  # mean 99, standard deviation 14.07
    assert 99 - 4 * 14.07 < chi_square < 99 + 4 * 14.07


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["prompt", "sample", "position"])
def test_neighbours_are_unrelated(axis):
    u = grid() - 0.5
    first, second = (np.delete(u, end, axis).ravel() for end in (-1, 0))
    correlation = 12 * (first * second).mean()
    assert abs(correlation) < 4 / np.sqrt(first.size)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"step": 4}, {"stream": "eval"}], ids=["seed", "step", "stream"]
)
def test_streams_are_unrelated(other):
    u, v = grid() - 0.5, grid(**other) - 0.5
    assert abs(12 * (u * v).mean()) < 4 / np.sqrt(u.size)
    assert not (u == v).any()


def test_arguments_do_not_stand_in_for_each_other():
    swapped = [(1, 2, 3, 4, 5), (2, 1, 3, 4, 5), (1, 2, 4, 3, 5), (1, 2, 3, 5, 4), (3, 2, 1, 4, 5)]
    values = [
        uniform(stream_keys(seed, step, "train", [prompt], [sample]), position)[0]
        for seed, step, prompt, sample, position in swapped
    ]
    assert len(set(values)) == len(swapped)


def test_largest_number_stays_below_any_total():
    largest = 1 - 2.0**-49  # the midpoint of the last cell
    for total in (1.0, np.nextafter(1.0, 0), np.nextafter(1.0, 2), 0.5, 0.9999999999999997):
        assert largest * total < total
