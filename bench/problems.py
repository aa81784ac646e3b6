"""What is computed: shapes, inputs, the loss of each benchmark, and the exact answer in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from flowrl_kernels import WeightBound, trajectory_balance
from torch import Tensor

SHAPES = {  # T rows, D hidden, V vocabulary
    "tiny": (64, 32, 517),
    "small": (1024, 128, 8192),
    "qwen2.5-0.5b": (1024, 896, 151936),
    "qwen2.5-7b": (8192, 3584, 152064),
    "qwen2.5-32b": (8192, 5120, 152064),
}
MEAN_LENGTH = 128  # tokens of a sequence


@dataclass(frozen=True)
class Shape:
    name: str
    rows: int
    dim: int
    vocab: int

    @staticmethod
    def parse(text: str) -> Shape:
        """A name of SHAPES, or TxDxV."""
        if text in SHAPES:
            return Shape(text, *SHAPES[text])
        try:
            rows, dim, vocab = (int(part) for part in text.split("x"))
        except ValueError:
            raise ValueError(
                f"a shape is TxDxV or one of {', '.join(SHAPES)}, got {text!r}; use 1024x896x151936"
            ) from None
        return Shape(text, rows, dim, vocab)

    def flops(self, backward: bool) -> int:
        """Useful ones: 2 T D V forward, 6 T D V with both gradients, however often an
        implementation makes the logits."""
        return (6 if backward else 2) * self.rows * self.dim * self.vocab


@dataclass
class Problem:
    hidden: Tensor  # (T, D) leaf
    weight: Tensor  # (V, D) leaf
    targets: Tensor  # (T,)
    cu_seqlens: Tensor  # (N + 1,) int32
    sequence: dict[str, Tensor]  # log_z, rewards: (N,)
    token: dict[str, Tensor]  # old, ref: (T,)

    def balance(self, logprobs: Tensor, inputs: dict[str, Tensor], cu_seqlens: Tensor):
        return trajectory_balance(
            logprobs,
            inputs["old"],
            inputs["ref"],
            inputs["log_z"],
            inputs["rewards"],
            cu_seqlens,
            beta=15.0,
            weight_bound=WeightBound(high=10.0),
            scale=1 / self.sequence["rewards"].shape[0],
        )

    def loss(self, logprobs: Tensor) -> Tensor:  # ()
        return self.balance(logprobs, {**self.sequence, **self.token}, self.cu_seqlens).loss


@dataclass(frozen=True)
class Truth:
    logprobs: Tensor  # (T,) float64
    loss: float
    dhidden: Tensor  # (T, D) in float32: its error is far below any gate
    dweight: Tensor  # (V, D)


def make(shape: Shape, dtype: torch.dtype, device: torch.device, inputs: str) -> Problem:
    """Random logits of standard deviation 1 to 2, or peaked ones: the target holds most of p."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    weight = (draw(shape.vocab, shape.dim) / shape.dim**0.5).to(dtype)
    targets = torch.randint(shape.vocab, (shape.rows,), generator=generator, device=device)
    hidden = 1.5 * draw(shape.rows, shape.dim)
    if inputs == "peaked":  # |weight_j| is about 1, so the target's logit is log V + 2 above
        hidden += (torch.tensor(shape.vocab).log().item() + 2) * weight[targets].float()
    num_sequences = max(shape.rows // MEAN_LENGTH, 1)
    cuts = torch.arange(1, num_sequences, device=device) * shape.rows // num_sequences
    cuts = cuts - cuts % 7  # lengths that are not all alike
    ends = torch.tensor([shape.rows], device=device)
    cu_seqlens = torch.cat([ends * 0, cuts, ends]).int()
    per_sequence = {"log_z": draw(num_sequences), "rewards": draw(num_sequences)}
    per_token = {"old": draw(shape.rows), "ref": draw(shape.rows)}
    hidden = hidden.to(dtype).requires_grad_()
    return Problem(hidden, weight.requires_grad_(), targets, cu_seqlens, per_sequence, per_token)


def solve(problem: Problem, mean: bool) -> Truth:
    """Exact log-probs and the gradients of the benchmark's loss, in blocks of rows in float64.

    Also places the old and the reference log-probs near the current ones, as in training."""
    hidden, weight = problem.hidden.detach().double(), problem.weight.detach().double()
    step = max((256 << 20) // (8 * weight.shape[0]), 1)
    blocks = [slice(i, i + step) for i in range(0, hidden.shape[0], step)]

    def log_p(rows: slice) -> Tensor:
        return (hidden[rows] @ weight.T).log_softmax(-1)

    at = problem.targets[:, None]
    logprobs = torch.cat([log_p(rows).gather(1, at[rows])[:, 0] for rows in blocks])
    for name, noise in (("old", 0.02), ("ref", 0.3)):
        problem.token[name] = logprobs.float() + noise * problem.token[name]
    leaf = logprobs.clone().requires_grad_()
    loss = -leaf.mean() if mean else problem.loss(leaf)
    (coefficient,) = torch.autograd.grad(loss, leaf)
    dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
    for rows in blocks:
        dlogits = log_p(rows).exp_().mul_(-coefficient[rows, None])
        dlogits.scatter_add_(1, at[rows], coefficient[rows, None])
        dhidden[rows] = dlogits @ weight
        dweight.addmm_(dlogits.T, hidden[rows])
    return Truth(logprobs, float(loss.detach()), dhidden.float(), dweight.float())


# Largest errors that still count as the same computation: of log-probs, and of gradients relative
# to their largest entry. Low precision: several peers round the logits or sum in bfloat16.
GATES = {
    torch.float32: (2e-4, 2e-4),
    torch.bfloat16: (0.15, 0.05),
    torch.float16: (0.05, 0.02),
}
INEXACT = (1.0, 1.0)  # of providers that say so: e4m3 operands cost up to 1 in a log-prob


def errors(truth: Truth, found: dict[str, Tensor]) -> dict[str, float]:
    """Largest errors by name; gradients and the loss relative to the truth's largest entry."""
    result = {}
    for name, value in found.items():
        if name == "loss":
            result[name] = abs(float(value.detach()) - truth.loss) / max(abs(truth.loss), 1e-30)
        else:
            exact = getattr(truth, name)
            size = 1.0 if name == "logprobs" else float(exact.abs().max())
            result[name] = _largest_difference(value.detach(), exact) / size
    return result


def refusal(measured: dict[str, float], dtype: torch.dtype, inexact: bool = False) -> str | None:
    """Why these errors do not pass the gate; NaN never does."""
    of_logprobs, of_gradients = INEXACT if inexact else GATES[dtype]
    wrong = [
        f"{name} off by {error:.2g}"
        for name, error in measured.items()
        if not error <= (of_logprobs if name == "logprobs" else of_gradients)
    ]
    return ", ".join(wrong) or None


def _largest_difference(value: Tensor, exact: Tensor) -> float:
    blocks = [slice(start, start + 4096) for start in range(0, exact.shape[0], 4096)]
    worst = [(value[rows].to(exact.dtype) - exact[rows]).abs().max() for rows in blocks]
    return float(torch.stack(worst).max())  # NaN if any is


Step = Callable[[], dict[str, Tensor]]
"""One timed call: computes everything, returns log-probs, loss and gradients where it has them."""
