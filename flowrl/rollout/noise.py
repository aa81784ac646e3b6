"""Sampling noise: uniform numbers that depend on what is sampled, never on where or in which batch.

A counter-based generator: each number is a hash of (seed, step, stream, prompt, sample, position),
so any rank computes any of them without the others. The hash chains the finaliser of splitmix64
(Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, splitmix64's increment


def stream_keys(
    seed: int, step: int, stream: str, prompt_indices: Sequence[int], samples: Sequence[int]
) -> NDArray[np.uint64]:
    """One key for each pair (prompt_indices[i], samples[i]), (n,)."""
    name = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")
    key = np.zeros(1, np.uint64)
    for word in (seed, step, name):
        key = _absorb(key, np.array([word % 2**64], np.uint64))
    for words in (prompt_indices, samples):
        key = _absorb(key, np.asarray(words, np.int64).astype(np.uint64))
    return key


def uniform(keys: NDArray[np.uint64], position: ArrayLike) -> NDArray[np.float64]:
    """Numbers in (0, 1), keys and positions broadcast against each other.

    Midpoints of 2^48 equal cells: never 0 or 1, and u * s < s holds in float64 for every s > 0, so
    an inverse distribution function never runs past its last outcome."""
    position = np.atleast_1d(np.asarray(position, np.int64)).astype(np.uint64)
    bits = _absorb(np.asarray(keys, np.uint64), position)
    return ((bits >> np.uint64(16)).astype(np.float64) + 0.5) * 2.0**-48


def _absorb(key: NDArray[np.uint64], word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Two rounds, so that neighbouring words (0, 1, 2, ...) give unrelated keys."""
    return _mix(key ^ _mix(word + _GAMMA))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser, arithmetic modulo 2^64."""
    z = z + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
