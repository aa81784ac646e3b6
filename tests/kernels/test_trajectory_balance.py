"""trajectory_balance: golden values, exact targets, and the closed-form gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flowrl_kernels import WeightBound, trajectory_balance
from flowrl_kernels.trajectory_balance.torch_packed import _trajectory_balance
from head_cases import FUSED, backends_for
from numerics import assert_within_budget
from torch import Tensor

BACKENDS = ["reference", "torch"]
F64 = torch.float64
LOGPROBS = [-0.5, -1.0, -0.25, -2.0, -0.1, -0.3, -0.3, -0.3, -1.2]
OLD = [-0.6, -0.9, -0.35, -3.5, -1.6, -0.1, -0.2, -0.4, -1.2]
REF = [-0.7, -1.1, -0.30, -1.5, -0.4, -0.4, -0.1, -0.3, -1.0]
CU_SEQLENS = torch.tensor([0, 3, 5, 8, 9], dtype=torch.int32)
RESIDUAL = [-12.623703, 13.140370, 13.207036, -12.940370]
GOLDEN = {
    None: (168.476546, [-2.103951, 3.285092, 2.201173, -6.470185]),
    WeightBound(0.8, 1.2): (173.395456, [-2.325225, 3.942111, 1.802168, -6.470185]),
    WeightBound(None, 10): (553.267957, [-2.325225, 32.850925, 1.802168, -6.470185]),
    WeightBound(): (988.633655, [-2.325225, 65.982846, 1.802168, -6.470185]),
}


def golden_batch() -> dict[str, Any]:
    rewards = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=F64)
    return {
        "logprobs": torch.tensor(LOGPROBS, dtype=F64, requires_grad=True),
        "old_logprobs": torch.tensor(OLD, dtype=F64),
        "ref_logprobs": torch.tensor(REF, dtype=F64),
        "log_z": torch.full((4,), 0.25, dtype=F64, requires_grad=True),
        "rewards": (rewards - rewards.mean()) / (rewards.std() + 1e-6),
        "cu_seqlens": CU_SEQLENS,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", list(GOLDEN), ids=["none", "paper", "recipe", "release"])
def test_golden_values(bound, backend):
    batch = golden_batch()
    result = trajectory_balance(**batch, beta=15.0, weight_bound=bound, scale=0.25, backend=backend)
    result.loss.backward()
    loss, per_row = GOLDEN[bound]
    assert float(result.loss.detach()) == pytest.approx(loss, abs=1e-6)
    assert result.residual.tolist() == pytest.approx(RESIDUAL, abs=1e-6)
    assert result.log_weight.tolist() == pytest.approx([0.1, 3.0, -0.2, 0.0], abs=1e-12)
    expected = torch.tensor(per_row, dtype=F64).repeat_interleave(CU_SEQLENS.diff())
    assert batch["logprobs"].grad is not None
    assert batch["log_z"].grad is not None
    assert batch["logprobs"].grad.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    of_log_z = torch.tensor(per_row, dtype=F64) * CU_SEQLENS.diff()
    assert batch["log_z"].grad.tolist() == pytest.approx(of_log_z.tolist(), abs=4e-6)
    assert result.num_tokens.tolist() == [3, 2, 3, 1]
    assert result.mean_ref_logprob.tolist() == pytest.approx([-0.7, -0.95, -0.8 / 3, -1.0])


def random_batch(dtype: torch.dtype, size: float = 0.3) -> dict[str, Any]:
    """Lengths 0 and 1 among others, a sequence whose tokens are all masked, NaN where masked."""
    generator = torch.Generator().manual_seed(5)
    cu_seqlens = torch.tensor([0, 7, 7, 8, 20, 23, 40], dtype=torch.int32)
    mask = torch.rand(40, generator=generator) < 0.7
    mask[7] = True
    mask[20:23] = False
    logprobs = -torch.rand(40, generator=generator) * 3
    old = logprobs + torch.randn(40, generator=generator) * size
    ref = logprobs + torch.randn(40, generator=generator)
    nan = torch.full((40,), math.nan)
    batch = {
        "logprobs": logprobs.where(mask, nan),
        "old_logprobs": old.where(mask, nan),
        "ref_logprobs": ref.where(mask, nan),
        "log_z": torch.randn(6, generator=generator),
        "rewards": torch.randn(6, generator=generator),
    }
    batch = {name: x.to(dtype) for name, x in batch.items()}
    batch["logprobs"].requires_grad_()
    batch["log_z"].requires_grad_()
    return {**batch, "cu_seqlens": cu_seqlens, "response_mask": mask}


def evaluate(batch: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    result = trajectory_balance(**batch, beta=3.0, scale=0.2, **options)
    gradients = torch.autograd.grad(result.loss * 1.5, [batch["logprobs"], batch["log_z"]])
    return {**result._asdict(), "dlogprobs": gradients[0], "dlog_z": gradients[1]}


@pytest.mark.parametrize("bound", list(GOLDEN), ids=["none", "paper", "recipe", "release"])
@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(dtype, name) for dtype in (torch.float32, F64) for name in backends_for(dtype)],
)
def test_error_budget(bound, length_norm, dtype, backend):
    options = {"weight_bound": bound, "length_norm": length_norm}
    fused = evaluate(random_batch(dtype), backend=backend, **options)
    plain = evaluate(random_batch(dtype), backend="reference", **options)
    truth = evaluate(random_batch(F64), backend="reference", **options)
    assert torch.equal(fused.pop("num_tokens"), truth["num_tokens"])
    for name, value in fused.items():
        assert value.dtype == dtype
        assert_within_budget(value.detach(), plain[name].detach(), truth[name].detach(), name)


@pytest.mark.parametrize("backend", ["reference", *FUSED])
def test_nothing_leaks_from_masked_tokens(backend):
    batch = random_batch(torch.float32)
    result = evaluate(batch, weight_bound=WeightBound(), backend=backend)
    for name, value in result.items():
        assert value.isfinite().all(), name
    assert not result["dlogprobs"][~batch["response_mask"]].any()
    for n in (1, 4):  # an empty sequence, and one whose tokens are all masked
        assert result["residual"][n] == 0
        assert result["dlog_z"][n] == 0
        assert result["weight"][n] == 1
    unmasked = {**batch, "response_mask": None}  # negative control: the NaN is there to be read
    assert trajectory_balance(**unmasked, beta=1.0, weight_bound=None, backend=backend).loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    """At w = 1 the loss is an ordinary function: its gradient must be that of its values."""
    batch = random_batch(F64)
    batch["logprobs"] = batch["logprobs"].detach().nan_to_num(-1.0).requires_grad_()

    def loss(logprobs, log_z):
        changed = {**batch, "logprobs": logprobs, "log_z": log_z}
        return trajectory_balance(**changed, beta=2.0, weight_bound=None, backend=backend).loss

    assert torch.autograd.gradcheck(loss, (batch["logprobs"], batch["log_z"]))


@pytest.mark.parametrize("backend", ["reference", *FUSED])
def test_on_policy_weight_is_exactly_one(backend):
    batch = {**random_batch(torch.float32), "old_logprobs": None}
    result = trajectory_balance(
        **batch, beta=1.0, weight_bound=WeightBound(2.0, 3.0), backend=backend
    )
    assert result.weight.tolist() == [1.0] * 6
    assert result.log_weight.tolist() == [0.0] * 6


@pytest.mark.parametrize("backend", FUSED)
def test_log_weight_is_bounded_before_the_exponential(backend):
    """A ratio of e^200 overflows float32; bounded in log space it is 10."""
    batch = random_batch(torch.float32)
    batch["old_logprobs"] = batch["old_logprobs"] - 100
    result = trajectory_balance(
        **batch, beta=1.0, weight_bound=WeightBound(None, 10.0), backend=backend
    )
    assert result.weight[0] == pytest.approx(10)
    assert result.loss.isfinite()
    raw = trajectory_balance(**batch, beta=1.0, weight_bound=WeightBound(), backend=backend)
    assert raw.weight[0].isinf()


@pytest.mark.parametrize("backend", FUSED)
def test_log_z_of_lower_precision_keeps_its_dtype(backend):
    batch = random_batch(torch.float32)
    log_z = batch["log_z"].detach().bfloat16().requires_grad_()
    changed = {**batch, "log_z": log_z}
    trajectory_balance(**changed, beta=1.0, weight_bound=None, backend=backend).loss.backward()
    assert log_z.grad is not None
    assert log_z.grad.dtype == torch.bfloat16


def test_operator_is_registered_as_torch_expects():
    batch = random_batch(F64)
    arguments = (
        batch["logprobs"].detach().nan_to_num(-1.0).requires_grad_(),
        batch["old_logprobs"].nan_to_num(-1.0),
        batch["ref_logprobs"].nan_to_num(-1.0),
        batch["log_z"],
        batch["rewards"],
        batch["cu_seqlens"],
        batch["response_mask"],
    )
    torch.library.opcheck(_trajectory_balance, (*arguments, 2.0, None, math.log(10), True, 0.5))
    on_policy = (arguments[0], None, *arguments[2:6], None)
    torch.library.opcheck(_trajectory_balance, (*on_policy, 2.0, 0.0, 0.0, False, 1.0))


# A bandit of four answers with lengths [1, 2, 4, 8], each with the log-probability of the whole
# answer spread evenly over its tokens (spec: exact targets, numbers of an independent computation).
REF_POLICY = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64)
REWARDS = torch.tensor([0.0, 1.0, 1.0, 2.0], dtype=F64)
LENGTHS = torch.tensor([1, 2, 4, 8])
BANDIT_CU_SEQLENS = torch.tensor([0, 1, 3, 7, 15], dtype=torch.int32)


def bandit_loss(log_policy: Tensor, log_z: Tensor, length_norm: bool, backend: str):
    """Expected squared residual under the policy: its probabilities are the sampling weights."""

    def spread(total: Tensor) -> Tensor:
        return (total / LENGTHS).repeat_interleave(LENGTHS)

    # Each answer enters with weight pi(answer): log w = log pi - log 1, with old = 0.
    return trajectory_balance(
        spread(log_policy),
        torch.zeros(15, dtype=F64),
        spread(REF_POLICY.log()),
        log_z.expand(4),
        REWARDS,
        BANDIT_CU_SEQLENS,
        beta=1.0,
        weight_bound=WeightBound(),
        length_norm=length_norm,
        backend=backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("length_norm", "log_z", "policy"),
    [
        (False, 0.9155090, [0.1601251, 0.3264489, 0.2176326, 0.2957934]),
        (True, 1.7325969, [0.0707298, 0.0693100, 0.0106753, 0.8492849]),
    ],
)
def test_exact_target_has_zero_residual(length_norm, log_z, policy, backend):
    log_policy = torch.tensor(policy, dtype=F64).log()
    result = bandit_loss(log_policy, torch.tensor(log_z, dtype=F64), length_norm, backend)
    assert result.residual.abs().max() < 1e-5
    other = bandit_loss(REF_POLICY.log(), torch.tensor(log_z, dtype=F64), length_norm, backend)
    assert other.residual.abs().max() > 0.5  # negative control


@pytest.mark.parametrize("backend", BACKENDS)
def test_best_log_z_of_a_fixed_policy(backend):
    """At pi = pi_ref the gradient in log Z vanishes at 0.7 = log Z_true - KL(pi || pi*)."""
    for value, slope in ((0.7, 0.0), (0.8, 0.2)):
        log_z = torch.tensor(value, dtype=F64, requires_grad=True)
        bandit_loss(REF_POLICY.log(), log_z, False, backend).loss.backward()
        assert log_z.grad is not None
        assert float(log_z.grad) == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_the_gradient_is_that_of_the_divergence(backend):
    logits = torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=F64, requires_grad=True)
    log_z = torch.tensor(0.5, dtype=F64)
    loss = bandit_loss(logits.log_softmax(0), log_z, False, backend).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = [0.1020615, -0.1183223, 0.0909089, -0.0746481]
    assert (gradient / 2).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("backend", ["reference", *FUSED])
def test_empty_batch(backend):
    empty = torch.zeros(0, requires_grad=True)
    result = trajectory_balance(
        empty,
        None,
        torch.zeros(0),
        torch.zeros(0),
        torch.zeros(0),
        torch.tensor([0]),
        beta=1.0,
        weight_bound=None,
        backend=backend,
    )
    result.loss.backward()
    assert float(result.loss) == 0
    assert result.residual.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": torch.zeros(9).half()}, "logprobs must be"),
        ({"log_z": torch.zeros(3)}, r"log_z must have shape \(4,\)"),
        ({"ref_logprobs": torch.zeros(8)}, "ref_logprobs must have shape"),
        ({"response_mask": torch.ones(9)}, "response_mask must be bool"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, "cu_seqlens must be"),
        ({"backend": "triton"}, "'triton' takes float32 log-probs, not torch.float64"),
        ({"backend": "best"}, "'best' must be one of native, torch"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        trajectory_balance(**{**golden_batch(), "beta": 1.0, "weight_bound": None, **change})


@pytest.mark.parametrize("bounds", [(0.0, None), (2.0, 1.0), (None, math.inf)])
def test_bad_bounds(bounds):
    with pytest.raises(ValueError, match="WeightBound"):
        WeightBound(*bounds)
