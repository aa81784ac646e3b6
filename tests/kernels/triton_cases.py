"""Where the Triton tests run: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1) on a CPU.

`python -m pytest tests/kernels/on_triton_*.py` runs them on a GPU; test_triton_interpreter.py runs
the same files in the interpreter, in processes of their own: triton reads the variable once. The
tests of the CUDA operators (on_cuda_*.py) share these cases and need a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from flowrl_kernels.triton_support import interpreting
from head_cases import Case, make_case, outputs_and_gradients
from numerics import assert_within_budget

if not (interpreting() or torch.cuda.is_available()):
    raise RuntimeError("the Triton tests need a GPU or TRITON_INTERPRET=1")

DEVICE = torch.device("cpu" if interpreting() else "cuda")


@pytest.fixture(autouse=True)
def nan_in_new_memory() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def case_here(num_rows: int, vocab: int, dim: int = 16, **options) -> Case:
    case = make_case(num_rows, vocab, dim, **options)
    return Case(case.hidden.to(DEVICE), case.weight.to(DEVICE), case.targets.to(DEVICE))


def exact_products(case: Case) -> Case:
    """The case in sixteenths: no float32 sum of products rounds, in whatever order it is taken. The
    interpreter multiplies with numpy, whose order depends on the processor and on a row's place."""
    return Case((case.hidden * 16).round() / 16, (case.weight * 16).round() / 16, case.targets)


def judge(
    case: Case,
    dtype: torch.dtype,
    *,
    backend: str = "triton",
    but: tuple[str, ...] = (),
    **options,
) -> None:
    """Every output and gradient of the backend keeps the error budget, `but` some."""
    fused = outputs_and_gradients(case, dtype, backend=backend, **options)
    options.pop("max_logits_bytes", None)
    plain = outputs_and_gradients(case, dtype, backend="reference", **options)
    if DEVICE.type == "cuda" and dtype == torch.bfloat16:
        # Tensor cores truncate their sums of products, float32 products round them: what is plain
        # are torch's products of the same operands. Of the gradients the reference's stay.
        products = outputs_and_gradients(case, dtype, backend="torch", **options)
        plain |= {n: x for n, x in products.items() if n in ("logprobs", "lse", "entropy")}
    truth = outputs_and_gradients(case, torch.float64, backend="reference", **options)
    for name, value in fused.items():
        if name not in but:
            assert_within_budget(value, plain[name], truth[name], name)
    assert (fused["logprobs"] <= 0).all()
