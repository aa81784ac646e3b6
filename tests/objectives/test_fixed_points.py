"""Where training ends: a tabular policy over all words of up to three letters, exact distances.

The policy has one row of logits per prefix (letter a, letter b, end); 15 words of 1 to 4 tokens."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from flowrl.objectives import build, count_totals
from flowrl.records import LossBatch, take_segments, to_cu_seqlens

MAX_LETTERS = 3
PREFIXES = ["".join(w) for n in range(MAX_LETTERS + 1) for w in product("ab", repeat=n)]
WORDS = PREFIXES  # every prefix may end
TOKENS = [(PREFIXES.index(w[:t]), "ab".find(w[t]) if t < len(w) else 2)
          for w in WORDS for t in range(len(w) + 1)]  # fmt: skip
CU_SEQLENS = to_cu_seqlens(torch.tensor([len(w) + 1 for w in WORDS]))
ROWS, COLUMNS = (torch.tensor(column) for column in zip(*TOKENS, strict=True))
REWARDS = torch.tensor([w.count("a") / 3 + (w in ("b", "aba", "bb")) for w in WORDS]).double()
BETA = 2.0


def token_logprobs(logits: torch.Tensor) -> torch.Tensor:  # (tokens of all words,)
    forced = torch.zeros_like(logits)
    forced[-(2**MAX_LETTERS) :, :2] = -torch.inf  # three letters: the end is certain
    return (logits + forced).log_softmax(1)[ROWS, COLUMNS]


def word_sums(per_token: torch.Tensor) -> torch.Tensor:  # (15,)
    return torch.segment_reduce(per_token, "sum", offsets=CU_SEQLENS.long())


REF = torch.randn(len(PREFIXES), 3, generator=torch.Generator().manual_seed(2)).double() * 0.5
TARGET = (word_sums(token_logprobs(REF)) + BETA * REWARDS).softmax(0)
TILT = torch.tensor([len(w) + 1.0 for w in WORDS]).double()


def train(
    name: str, options: dict, updates: int = 400, off_policy: bool = False, group_size: int = 8
) -> torch.Tensor:
    """Word probabilities after `updates` of Adam on 128 words each; two updates a sample. Off the
    policy all samples are the reference's, and the old policy is the reference."""
    objective = build(name, options)
    logits, values = REF.clone().requires_grad_(), torch.zeros(len(PREFIXES)).double()
    log_z = torch.zeros(1).double().requires_grad_()
    values.requires_grad_()
    optimizer = torch.optim.Adam([logits, values, log_z], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates, eta_min=1e-4)
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(128 // group_size).repeat_interleave(group_size)
    ref = token_logprobs(REF)
    for update in range(updates):
        if update % 2 == 0:
            old = ref if off_policy else token_logprobs(logits).detach()
            words = torch.multinomial(word_sums(old).exp(), 128, True, generator=generator)
        rows, cu_seqlens = take_segments(CU_SEQLENS, words)
        batch = LossBatch(
            rewards=REWARDS[words],
            group_ids=groups,
            cu_seqlens=cu_seqlens,
            logprobs=token_logprobs(logits)[rows],
            old_logprobs=old[rows],
            ref_logprobs=ref[rows],
            values=values[ROWS][rows],
            log_z=log_z.expand(128),
        )
        batch = objective.prepare(batch.replace(totals=count_totals(batch)))
        if objective.coupling == "group":
            batch = batch.replace(group_log_z=objective.group_statistic(batch))
        optimizer.zero_grad()
        objective.loss(batch)[0].backward()
        optimizer.step()
        schedule.step()
    return word_sums(token_logprobs(logits).detach()).exp()


def l1(policy: torch.Tensor, target: torch.Tensor = TARGET) -> float:
    return float((policy - target).abs().sum())


MATCHING = [
    ("tb", {"beta": BETA}),
    ("vargrad", {"beta": BETA}),
    ("tba", {"kl_coef": 1 / BETA}),
    ("gflowrl", {"beta": BETA}),
    ("gflowrl", {"beta": BETA, "gap_clip": False}),
    ("ftb", {"beta": BETA, "alpha": 0.5}),
    ("ftb", {"beta": BETA, "alpha": 2.0}),
    ("ftb", {"beta": BETA, "phi": "huber", "log_z": "learned"}),
    ("subtb", {"beta": BETA}),
    ("subtb", {"beta": BETA, "lam": 1.0}),
    ("db", {"beta": BETA}),
]


@pytest.mark.parametrize(("name", "options"), MATCHING)
def test_matches_the_target(name, options):
    assert l1(word_sums(token_logprobs(REF)).exp()) > 0.5  # where it starts
    assert l1(train(name, options)) < 0.02


def test_length_normalised_flowrl_matches_its_tilted_target_instead():
    options = {"beta": BETA, "reward": "raw", "bound": "none"}
    policy = train("flowrl", options, 800)
    log_ref, log_z = word_sums(token_logprobs(REF)), torch.zeros(()).double()
    for _ in range(200):  # sum_y pi_ref exp(|y| (beta r - log Z)) = 1 by Newton's method
        masses = (log_ref + TILT * (BETA * REWARDS - log_z)).exp()
        log_z = log_z + (masses.sum() - 1) / (TILT * masses).sum()
    assert float(masses.sum()) == pytest.approx(1)
    assert l1(policy) > 0.3
    assert l1(policy, masses) < 0.05


@pytest.mark.parametrize("name", ["vargrad", "tba", "ftb"])
def test_old_samples_do_not_bias_the_group_constant(name):
    assert l1(train(name, {"beta": BETA}, off_policy=True)) < 0.02


def test_old_samples_bias_a_constant_of_the_old_policy():
    """GFlowRL's log Z and clip are right at the policy that sampled, and there alone."""
    for options in ({}, {"gap_clip": False}):
        assert l1(train("gflowrl", {"beta": BETA, **options}, off_policy=True)) > 0.1


def test_old_samples_bias_the_mean_reward_as_log_z():
    """Negative control: on the same samples Kimi's approximation ends elsewhere."""
    options = {"beta": BETA, "reward": "raw", "length_norm": False, "bound": "none"}
    assert l1(train("flowrl", {**options, "log_z": "mean_reward"}, off_policy=True)) > 0.1


def test_gvpo_with_a_fixed_anchor_reaches_the_tilted_anchor():
    """All samples the anchor's: the group's variance vanishes at pi_old exp(beta r) / Z."""
    assert l1(train("gvpo", {"beta": BETA}, off_policy=True)) < 0.02


def test_gvpo_and_kimi_with_a_moving_anchor_pass_the_target_by():
    best = int(REWARDS.argmax())
    for name in ("gvpo", "kimi_pmd"):
        policy = train(name, {"beta": BETA})
        assert float(policy[best]) > 2 * float(TARGET[best])


def test_kimi_with_a_fixed_anchor_ends_where_its_approximation_says():
    """Stationary under sum pi = 1:  A - tau log x = m x,  x = pi / pi_old;  m by bisection."""
    policy = train("kimi_pmd", {"beta": BETA}, off_policy=True, group_size=128)
    old = word_sums(token_logprobs(REF)).exp()
    centred = REWARDS - (old * REWARDS).sum()

    def ratios(multiplier: float) -> torch.Tensor:
        low, high = torch.full_like(old, 1e-9), torch.full_like(old, 1e3)
        for _ in range(100):
            x = (low + high) / 2
            above = centred - x.log() / BETA > multiplier * x
            low, high = torch.where(above, x, low), torch.where(above, high, x)
        return x

    least, most = 0.0, 10.0
    for _ in range(60):
        multiplier = (least + most) / 2
        too_much = float((old * ratios(multiplier)).sum()) > 1
        least, most = (multiplier, most) if too_much else (least, multiplier)
    predicted = old * ratios(multiplier)
    assert l1(policy, predicted) < 0.05
    assert l1(predicted) > 0.1
