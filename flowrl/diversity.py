"""Measures of diversity and of matching, each on plain numbers or token sequences.

From exact tables where a task can list its answers (`mode_masses`, `expected_coverage`,
`effective_modes`, `implied_log_z`, `spearman`; distances: metrics.py), from samples otherwise.
Nothing here knows of tasks or models. Imports no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Method = TypeVar("Method", bound=Hashable)
JUDGED_RESPONSES = 16
_RUBRIC = ((14, 1), (11, 2), (7, 3), (4, 4))  # largest class of at least ... -> score


# --- from exact tables


def mode_masses(
    probabilities: Sequence[float], solutions: Sequence[str | None]
) -> dict[str, float]:
    """q_m = sum of q(y) over the answers y of mode m. `solutions[y]` names the mode of a right
    answer and is None for a wrong one."""
    masses: dict[str, float] = {}
    for probability, solution in zip(probabilities, solutions, strict=True):
        if solution is not None:
            masses[solution] = masses.get(solution, 0.0) + probability
    return masses


def expected_coverage(masses: Sequence[float], num_samples: int) -> float:
    """(1 / K) sum_m [1 - (1 - q_m)^n]: the expected share of the K modes that n independent samples
    hit at least once, without sampling."""
    q = np.clip(np.asarray(masses, dtype=np.float64), 0.0, 1.0)
    return float(np.mean(1.0 - (1.0 - q) ** num_samples))


def effective_modes(masses: Sequence[float], order: float = 1.0) -> float:
    """exp(H(q | right)): the Hill number of the modes' masses given a right answer. Order 1 is
    exp of the entropy, order 2 is 1 / sum q^2. 0 where no answer is right.
    Source: M. O. Hill, "Diversity and evenness" (1973)."""
    q = np.asarray(masses, dtype=np.float64)
    if q.sum() <= 0:
        return 0.0
    return _hill(q / q.sum(), order)


def _hill(p: np.ndarray, order: float) -> float:
    """Hill number of order `order` of a distribution: (sum p^order)^(1 / (1 - order))."""
    p = p[p > 0]
    if order == math.inf:
        return float(1.0 / p.max())
    if abs(order - 1.0) < 1e-12:
        return float(np.exp(-(p * np.log(p)).sum()))
    return float((p**order).sum() ** (1.0 / (1.0 - order)))


def implied_log_z(
    policy: Sequence[float], prior: Sequence[float], rewards: Sequence[float], beta: float
) -> float:
    """E_q[beta r - log(q / prior)]: the log Z that fits a policy q best in least squares. It
    equals log Z - KL(q || pi*), so its error is the KL. Answers of no mass count 0; nan where none
    has any."""
    q = np.asarray(policy, dtype=np.float64)
    if q.sum() <= 0:
        return math.nan
    q = q / q.sum()
    held = q > 0
    base, r = np.asarray(prior, dtype=np.float64)[held], np.asarray(rewards)[held]
    return float((q[held] * (beta * r - np.log(q[held]) + np.log(base))).sum())


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation, with the mean rank among ties: Pearson's of the ranks. 0 where either side
    has one value only. The classic of GFlowNets takes log q(y) and log R(y) over all answers."""
    a, b = _ranks(np.asarray(first)), _ranks(np.asarray(second))
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / scale) if scale > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[place]


# --- from samples: right answers in their normal form


def distinct_solutions(solutions: Sequence[str | None]) -> int:
    """Right answers (not None) of one problem that differ in normal form."""
    return len({s for s in solutions if s is not None})


def for_diversity(num_distinct: Sequence[int]) -> float:
    """sum_i S_i 1[S_i >= 1] / sum_i 1[S_i >= 1], S_i the distinct right answers of problem i: their
    mean over solved problems; 0 where none is. Source: Flow of Reasoning, arXiv:2406.05673."""
    solved = [s for s in num_distinct if s >= 1]
    return sum(solved) / len(solved) if solved else 0.0


def creativity(found: Mapping[Method, Set[Hashable]]) -> dict[Method, float]:
    """For each method the share of the union of all methods' solutions that it alone found. The
    members of `found` are (problem, solution) pairs. Source: arXiv:2406.05673."""
    everything = set().union(*found.values()) if found else set()
    owners = Counter(solution for solutions in found.values() for solution in solutions)
    return {
        method: sum(owners[s] == 1 for s in solutions) / len(everything) if everything else 0.0
        for method, solutions in found.items()
    }


def approach(correct: bool, solution: str | None, text: str) -> tuple[str, str]:
    """A response's class for `judge_score`: a right answer's solution, a wrong one's text."""
    return ("right", solution) if correct and solution else ("wrong", text)


def judge_score(classes: Sequence[Hashable]) -> int:
    """The diversity rubric of FlowRL's judge, computed: 1 to 5 from the largest class among 16
    responses. 14 or more alike: 1; 11 to 13: 2; 7 to 10: 3; 4 to 6: 4; at most 3: 5.

    `classes` names each response's approach, here its normal form. The paper asks GPT-4o-mini,
    which sees the first 300 characters. Source: arXiv:2509.15207, appendix."""
    if len(classes) != JUDGED_RESPONSES:
        raise ValueError(
            f"the rubric is defined for {JUDGED_RESPONSES} responses, got {len(classes)}; pass "
            "the first 16"
        )
    largest = max(Counter(classes).values())
    return next((score for least, score in _RUBRIC if largest >= least), 5)


# --- from samples: their tokens


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams / n-grams, over all sequences together; 0 where none is long enough.
    Source: arXiv:1510.03055."""
    grams = [gram for sequence in sequences for gram in _ngrams(sequence, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(sequences: Sequence[Sequence[Hashable]], max_n: int = 4) -> float:
    """mean_i BLEU(y_i | all others): 1 where all are alike, lower is more diverse.

    BLEU is the geometric mean of clipped n-gram precisions, n = 1 .. max_n, with one added to both
    counts for n > 1 (Lin and Och 2004), times the brevity penalty against the reference closest in
    length. Orders longer than the sequence are left out. Source: arXiv:1802.01886."""
    if len(sequences) < 2:
        raise ValueError(f"self-BLEU compares samples and needs 2, got {len(sequences)}; add one")
    tables = [[Counter(_ngrams(s, n)) for s in sequences] for n in range(1, max_n + 1)]
    lengths = [len(s) for s in sequences]
    return float(np.mean([_bleu(i, tables, lengths) for i in range(len(sequences))]))


def _bleu(index: int, tables: Sequence[Sequence[Counter]], lengths: Sequence[int]) -> float:
    length = lengths[index]
    others = [j for j in range(len(lengths)) if j != index]
    if length == 0:
        return float(any(lengths[j] == 0 for j in others))
    logs = []
    for order, counters in enumerate(tables, start=1):
        mine = counters[index]
        if length < order:
            break
        held = sum(min(k, max(counters[j][gram] for j in others)) for gram, k in mine.items())
        extra = 0 if order == 1 else 1
        logs.append((held + extra) / (mine.total() + extra))
    if min(logs) == 0:
        return 0.0
    closest = min((lengths[j] for j in others), key=lambda size: (abs(size - length), size))
    brevity = min(1.0, math.exp(1.0 - closest / length))
    return brevity * math.exp(sum(map(math.log, logs)) / len(logs))


def _ngrams(sequence: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]


def vendi(similarity: np.ndarray, order: float = 1.0) -> float:
    """Effective number of different samples: the Hill number of order q of the eigenvalues of
    K / n, K the (n, n) similarity matrix with ones on its diagonal. 1 where all are alike, n where
    all are unrelated; q = inf is 1 / largest eigenvalue. Source: arXiv:2210.02410, order q:
    arXiv:2310.12952."""
    kernel = np.asarray(similarity, dtype=np.float64)
    n = len(kernel)
    if kernel.shape != (n, n) or not np.allclose(np.diag(kernel), 1.0):
        raise ValueError(
            f"similarity must be square with ones on the diagonal, got shape {kernel.shape}; "
            "divide it by the norms"
        )
    eigenvalues = np.clip(np.linalg.eigvalsh(kernel / n), 0.0, None)
    return _hill(eigenvalues / eigenvalues.sum(), order)


def ngram_similarity(sequences: Sequence[Sequence[Hashable]], max_n: int = 2) -> np.ndarray:
    """(n, n): cosine of the counts of n-grams up to `max_n`, a kernel for `vendi`. Two empty
    sequences are alike."""
    counts = [
        Counter(gram for n in range(1, max_n + 1) for gram in _ngrams(s, n)) or Counter([()])
        for s in sequences
    ]
    columns = {gram: i for i, gram in enumerate({gram for c in counts for gram in c})}
    vectors = np.zeros((len(counts), len(columns)))
    for row, count in enumerate(counts):
        for gram, number in count.items():
            vectors[row, columns[gram]] = number
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


# --- intervals


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float


def bootstrap(
    values: Sequence[Sequence[float]],  # (seeds, prompts)
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the mean over seeds and prompts. Every resample draws whole seeds and
    whole prompts with replacement, since all seeds share the prompts. One seed or one prompt adds
    no spread of its own. Source: B. Efron and R. Tibshirani (1993), chapter 13."""
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"values must be (seeds, prompts), got shape {table.shape}; fill it")
    random = np.random.default_rng(seed)
    num_seeds, num_prompts = table.shape
    seeds = random.integers(num_seeds, size=(resamples, num_seeds))
    prompts = random.integers(num_prompts, size=(resamples, num_prompts))
    # Weights of rows and columns: the same means as picking them, without (resamples, S, P) cells.
    row = _counts(seeds, num_seeds) / num_seeds
    column = _counts(prompts, num_prompts) / num_prompts
    means = ((row @ table) * column).sum(1)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return Interval(float(table.mean()), float(low), float(high))


def _counts(picked: np.ndarray, size: int) -> np.ndarray:
    """(R, n) indices -> (R, size): how often each was picked."""
    flat = picked + size * np.arange(len(picked))[:, None]
    return np.bincount(flat.ravel(), minlength=size * len(picked)).reshape(len(picked), size)
