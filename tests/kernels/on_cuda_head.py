"""linear_logprobs on the CUDA operators: on a GPU of compute capability 9.0, or emulated.

    python -m pytest tests/kernels/on_cuda_*.py

bench/gpu_session.sh runs these files on a GPU, test_emulated_kernels.py with the processor in its
place. Operands are bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from flowrl_kernels import backends, cuda_support, linear_logprobs
from flowrl_kernels.head import Head, cuda_head
from head_cases import Case, combine, outputs_and_gradients
from numerics import max_error
from torch import Tensor
from triton_cases import DEVICE, case_here, judge, nan_in_new_memory
from vocab_parallel_cases import judge_ranks

__all__ = ["nan_in_new_memory"]
BF16 = torch.bfloat16
OPERATORS = torch.ops.flowrl_cuda

EMULATED = DEVICE.type == "cpu"
on_a_gpu = pytest.mark.skipif(EMULATED, reason="needs a GPU")

refused = cuda_support.refusal(backends.Call(DEVICE, BF16))
if refused is not None:
    raise RuntimeError(f"the tests of the CUDA operators cannot run: cuda {refused}")


def bfloat16(case: Case) -> Case:
    return Case(case.hidden.to(BF16), case.weight.to(BF16), case.targets)


def logprobs_of(case: Case, **options) -> Tensor:
    with torch.no_grad():
        scores = linear_logprobs(
            case.hidden, case.weight, case.targets, entropy="metric", backend="cuda", **options
        )
    assert scores.entropy is not None
    return torch.stack([scores.logprobs, scores.lse, scores.entropy])


@pytest.mark.parametrize("num_rows", [1, 63, 65, 129, pytest.param(1025, marks=on_a_gpu)])
@pytest.mark.parametrize("vocab", [1, 127, 191, 192, 193, 257, 1000])
def test_error_budget(num_rows, vocab):
    judge(case_here(num_rows, vocab, 72, size=3), BF16, backend="cuda")


@pytest.mark.parametrize("dim", [8, 64, 136, 3584])
def test_depths(dim):
    """At 3584 torch may split its product along D, and is then more exact than one chain of sums:
    statistics of such a depth are below, against float64."""
    but = ("logprobs", "lse", "entropy") if dim > 1000 else ()
    judge(case_here(70, 400, dim, size=3), BF16, backend="cuda", but=but)


def test_large_vocabulary():
    judge(case_here(20 if EMULATED else 300, 50257, 64, size=3), BF16, backend="cuda")


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_and_options(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    padding, vocab = draw(0, 300), draw(1, 900)
    case = case_here(draw(1, 400), vocab + padding, 8 * draw(1, 30), seed=seed, size=draw(1, 4))
    case.targets = case.targets.where(case.targets < vocab, 0)
    limit = draw(20, 300) * (vocab + padding) * 2
    temperature = draw(4, 20) / 10
    options = {"vocab_size": vocab, "temperature": temperature, "max_logits_bytes": limit}
    judge(case, BF16, backend="cuda", **options)


@pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
def test_extreme_logits(size):
    case = case_here(40, 257, 16, size=size / 3)
    case.hidden[3] = 0
    judge(case, BF16, backend="cuda")


@pytest.mark.parametrize(
    ("shape", "size"),
    [((65, 700, 256) if EMULATED else (513, 20_000, 1024), 4), ((70, 400, 3584), 3)],
)
def test_logits_are_exact_sums_of_the_operands(shape, size):
    """Every statistic within 1e-4 of float64 on the same bfloat16 operands."""
    case = case_here(*shape, size=size, masked=0)
    ours = logprobs_of(bfloat16(case))
    truth = linear_logprobs(
        case.hidden.double(), case.weight.double(), case.targets, entropy="metric"
    )
    assert truth.entropy is not None
    assert max_error(ours, torch.stack([truth.logprobs, truth.lse, truth.entropy])) <= 1e-4


def stored(columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The whole buffer (40, padded) that the forward pass writes E to; z and tile maxima."""
    case = bfloat16(case_here(40, columns, 64, size=4, masked=0))
    padded = (columns // 64 + 1) * 64
    buffer = torch.full((40, padded), 7.0, dtype=BF16, device=DEVICE)
    tile_max = OPERATORS.head_statistics(
        case.hidden, case.weight, case.targets, buffer[:, :columns], None, None, 1.0, 0,
        cuda_support.stream_of(buffer),
    )[4]  # fmt: skip
    return buffer, case.hidden.double() @ case.weight.double().T, tile_max


@pytest.mark.parametrize("columns", [1, 130, 190, 193, 385, 392])
def test_e_is_relative_to_its_tile_and_stays_in_its_columns(columns):
    buffer, z, tile_max = stored(columns)
    width = OPERATORS.tile_columns(False)
    of_column = tile_max.double().T.repeat_interleave(width, 1)[:, :columns]
    assert max_error(tile_max.T[:, 0], z[:, :width].amax(1)) <= 1e-4
    e = buffer[:, :columns].double()
    assert ((e - (z - of_column).exp()).abs() <= (2.0**-8 + 1e-4) * e + 1e-30).all()
    assert (buffer[:, columns:] == 7).all()


def test_a_rank_with_no_column_of_the_vocabulary():
    """Of tensor-parallel ranks the last may hold padding alone."""
    case = bfloat16(case_here(40, 1, 64, masked=0))
    nothing = torch.empty(40, 0, dtype=BF16, device=DEVICE)
    stream = cuda_support.stream_of(nothing)
    row_max, sum_exp, target, _, tile_max = OPERATORS.head_statistics(
        case.hidden, case.weight[:0], case.targets, nothing, None, None, 1.0, 1, stream
    )
    assert tile_max.shape == (0, 40)
    assert (row_max == -torch.inf).all()
    assert (sum_exp == 0).all()
    assert (target == -torch.inf).all()
    OPERATORS.head_dlogits_(
        nothing, tile_max, row_max, row_max, row_max, None, row_max, case.targets, stream
    )


def test_repeats_are_bitwise():
    case = case_here(300, 5000, 64, size=2)
    options = {"backend": "cuda", "max_logits_bytes": 5000 * 2 * 130}
    once = outputs_and_gradients(case, BF16, **options)
    again = outputs_and_gradients(case, BF16, **options)
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


def test_a_row_does_not_depend_on_the_others():
    case = bfloat16(case_here(300, 5000, 64, size=2, masked=0))
    together = logprobs_of(case)
    for rows in (slice(3, 4), slice(40, 277), slice(0, 300, 7)):
        part = Case(case.hidden[rows], case.weight, case.targets[rows])
        assert torch.equal(logprobs_of(part), together[:, rows])
    alone = Case(case.hidden.roll(1, 0), case.weight, case.targets)  # control: other rows differ
    assert not torch.equal(logprobs_of(alone), together)


def test_masked_rows_and_padding_are_never_read():
    case = bfloat16(case_here(140, 500, 64, size=2))
    case.targets = case.targets.where(case.targets < 400, 1)
    clean = logprobs_of(Case(case.hidden, case.weight[:400], case.targets))
    case.hidden[case.targets < 0] = float("nan")
    case.weight[400:] = float("nan")
    assert torch.equal(logprobs_of(case, vocab_size=400), clean)


def test_operands_that_the_copy_engine_does_not_take_are_copied():
    case = bfloat16(case_here(70, 300, 64, size=2))
    wide = torch.zeros(70, 67, dtype=BF16, device=DEVICE)
    wide[:, 1:65] = case.hidden
    crooked = Case(wide[:, 1:65], case.weight.T.contiguous().T, case.targets)
    assert torch.equal(logprobs_of(crooked), logprobs_of(case))


@pytest.mark.parametrize("num_rows", [0, 5])
def test_nothing_counts(num_rows):
    case = case_here(num_rows, 10, masked=1.1).to(BF16)
    result = linear_logprobs(case.hidden, case.weight, case.targets, backend="cuda")
    result.logprobs.sum().backward()
    assert result.logprobs.tolist() == [0.0] * num_rows
    assert case.weight.grad is not None
    assert not case.weight.grad.any()


@on_a_gpu
def test_it_runs_on_the_current_stream():
    """The operand comes late on another stream: a kernel on the default one would read zeros."""
    case = bfloat16(case_here(300, 5000, 64, size=2, masked=0))
    head = Head(case.weight, 5000, 1.0, 0, None, entropy=False)
    expected = cuda_head.CudaHead().statistics(head, case.hidden, case.targets, None)
    late = torch.zeros_like(case.hidden)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        late.copy_(case.hidden)
        found = cuda_head.CudaHead().statistics(head, late, case.targets, None)
    torch.cuda.synchronize()
    assert torch.equal(found.sum_exp, expected.sum_exp)
    assert torch.equal(found.target, expected.target)


def test_budget_sees_a_wrong_tile_maximum(monkeypatch):
    """Negative control: E taken as if it were relative to the row's maximum."""
    original = cuda_head.CudaHead.turn_into_dlogits_

    def wrong(self, head, out, tile_max, rows, by_row):
        same = tile_max.amax(0, keepdim=True).expand_as(tile_max).contiguous()
        original(self, head, out, same, rows, by_row)

    case = case_here(33, 600, 64, size=3)
    judge(case, BF16, backend="cuda")
    monkeypatch.setattr(cuda_head.CudaHead, "turn_into_dlogits_", wrong)
    with pytest.raises(AssertionError, match="dhidden: error"):
        judge(case, BF16, backend="cuda")


@on_a_gpu
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one(tmp_path, world):
    judge_ranks(tmp_path, world, "cuda", BF16)


def rounded(x: Tensor) -> Tensor:
    # By a tensor of its device: CUDA multiplies by the reciprocal of a Python number.
    largest = torch.full((), 448.0, device=x.device)
    scale = (x.float().abs().amax(1, keepdim=True)).clamp(min=1e-30) / largest
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()


def test_fp8_rows():
    x = torch.randn(37, 48, device=DEVICE).to(BF16)
    x[3] = 0
    x[4] *= 1e-20
    x[5] *= 1e20
    quantized, scale = cuda_head.CudaHead().quantize_rows(x)
    assert torch.equal(quantized.double() * scale.double()[:, None], rounded(x))


@pytest.mark.parametrize("shape", [(33, 130, 64), (30, 500, 1040)])
def test_fp8_forward(shape):
    case = bfloat16(case_here(*shape, size=3))
    options = {"temperature": 0.7, "vocab_size": 125, "entropy": "metric"}
    case.targets = case.targets.where(case.targets < 125, 5)
    with torch.no_grad():
        ours = linear_logprobs(
            case.hidden, case.weight, case.targets, precision="fp8", backend="cuda", **options
        )
        truth, exact = (
            linear_logprobs(hidden, weight, case.targets, **options)
            for hidden, weight in (
                (rounded(case.hidden), rounded(case.weight)),
                (case.hidden.double(), case.weight.double()),
            )
        )
    assert max_error(ours.logprobs, truth.logprobs) < 1e-2  # the tensor cores keep 14 bits in a sum
    assert max_error(ours.lse, truth.lse) < 1e-2
    # Negative control, and why fp8 is never a default: the rounding itself is not small.
    assert 0.01 < max_error(ours.logprobs, exact.logprobs) < 1.0


def test_what_it_cannot_take_is_refused():
    case = bfloat16(case_here(9, 20, 12))
    with pytest.raises(ValueError, match="'cuda' needs hidden and weight with a multiple of 8"):
        linear_logprobs(case.hidden, case.weight, case.targets, backend="cuda")
    case = case_here(9, 20, 16)
    with pytest.raises(ValueError, match=r"'cuda' takes bfloat16, not torch\.float32"):
        linear_logprobs(case.hidden, case.weight, case.targets, backend="cuda")


@on_a_gpu
def test_operators_are_registered_as_torch_expects():
    case = bfloat16(case_here(20, 70, masked=0))
    out = torch.empty(20, 128, dtype=BF16, device=DEVICE)[:, :70]
    stream = cuda_support.stream_of(out)
    arguments = (case.hidden, case.weight, case.targets, out, None, None, 1.0, 0, stream)
    tests = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(OPERATORS.head_statistics.default, arguments, test_utils=tests)
    row_max, _, target, _, tile_max = OPERATORS.head_statistics(*arguments)
    rows = (tile_max, row_max, target, target, None, target, case.targets, stream)
    torch.library.opcheck(OPERATORS.head_dlogits_.default, (out, *rows), test_utils=tests)


def test_gradients_of_every_output():
    """A combination of log-probs, log-sum-exp and entropy on cuda and on torch."""
    found = []
    for backend in ("cuda", "torch"):
        case = case_here(200, 3000, 64, size=2).to(BF16)
        scores = linear_logprobs(
            case.hidden, case.weight, case.targets, entropy="grad", backend=backend
        )
        combine(scores._asdict()).backward()
        found.append((case.hidden.grad, case.weight.grad))
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None
        assert theirs is not None
        assert max_error(ours, theirs.double()) <= 0.02 * float(theirs.abs().max())
