"""Who computes it: this project's backends, PyTorch, and peers, each behind a small adapter.

An adapter says what its implementation cannot do. One that is absent or cannot take a problem is
skipped with the reason and the command that installs it; nothing is imitated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from flowrl_kernels import backends, linear_logprobs, linear_policy_loss
from torch import Tensor

from bench.problems import Problem, Step


class Unavailable(Exception):
    """This provider cannot take part: why, and what would change that."""


Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden, weight, targets) -> log-probs (T,), or the mean negative log-prob ()."""


@dataclass(frozen=True)
class Provider:
    name: str
    gives: Literal["logprobs", "mean"]
    make: Callable[[torch.device, Problem], Head]
    limits: str = ""
    """What it cannot do, in words."""

    def step(self, benchmark: str, backward: bool, problem: Problem) -> Step:
        """Raises Unavailable."""
        if self.gives == "mean" and benchmark == "policy_loss":
            raise Unavailable("gives only the mean or the sum: no per-token log-prob or gradient")
        if self.gives == "mean" and not backward:
            raise Unavailable("gives no log-probs, so its forward pass alone is another task")
        head = self.make(problem.hidden.device, problem)

        def run() -> dict[str, Tensor]:
            value = head(problem.hidden, problem.weight, problem.targets)
            if self.gives == "mean":
                return _differentiate(problem, value, {})
            loss = problem.loss(value) if benchmark == "policy_loss" else -value.mean()
            return _differentiate(problem, loss, {"logprobs": value.detach()})

        return run if backward else _without_gradients(head, problem)


@dataclass(frozen=True)
class PolicyLoss:
    """linear_policy_loss of one of our backends."""

    name: str
    backend: str
    limits: str = ""

    def step(self, benchmark: str, backward: bool, problem: Problem) -> Step:
        _check(self.backend, "linear_policy_loss", problem)

        def objective(logprobs, entropy, rows):
            return problem.balance(logprobs, rows.inputs, rows.cu_seqlens).loss, {}

        def run() -> dict[str, Tensor]:
            result = linear_policy_loss(
                problem.hidden,
                problem.weight,
                problem.targets,
                problem.cu_seqlens,
                objective,
                sequence_inputs=problem.sequence,
                token_inputs=problem.token,
                backend=self.backend,
            )
            return _differentiate(problem, result.loss, {"logprobs": result.logprobs})

        return run


def _differentiate(problem: Problem, loss: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
    loss.backward()
    assert problem.hidden.grad is not None
    assert problem.weight.grad is not None
    found |= {
        "loss": loss.detach(),
        "dhidden": problem.hidden.grad,
        "dweight": problem.weight.grad,
    }
    problem.hidden.grad = problem.weight.grad = None
    return found


def _without_gradients(head: Head, problem: Problem) -> Step:
    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logprobs": head(problem.hidden, problem.weight, problem.targets)}

    return run


def _check(backend: str, operator: str, problem: Problem) -> None:
    hidden = problem.hidden
    try:
        call = backends.Call(hidden.device, hidden.dtype, dim=hidden.shape[1])
        backends.resolve(operator, backend, call)
    except ValueError as error:
        raise Unavailable(str(error)) from error


def _ours(backend: str, precision: Literal["native", "fp8"] = "native"):
    def make(device: torch.device, problem: Problem) -> Head:
        _check(backend, "linear_logprobs", problem)

        def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return linear_logprobs(
                hidden, weight, targets, precision=precision, backend=backend
            ).logprobs

        return head

    return make


def _naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _compiled(device: torch.device, problem: Problem) -> Head:
    return torch.compile(_naive)


def _torch_linear_cross_entropy(device: torch.device, problem: Problem) -> Head:
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(
            "torch older than 2.13 has no F.linear_cross_entropy; pip install -U torch"
        )
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: function(hidden, weight, targets, options=options)


def providers(benchmark: str, backward: bool) -> dict[str, Provider | PolicyLoss]:
    """By name, in the order of the table."""
    from bench import peers

    ours = [
        Provider(f"flowrl {name} log-probs", "logprobs", _ours(name), "8TDV")
        for name in backends.implemented("linear_logprobs")
        if name != "reference"
    ]
    one_pass = [
        PolicyLoss(f"flowrl {name} one pass", name)
        for name in backends.implemented("linear_policy_loss")
        if name != "reference" and benchmark == "policy_loss" and backward
    ]
    if not backward:
        for name in ("triton", "cuda"):
            fp8 = Provider(f"flowrl {name} fp8", "logprobs", _ours(name, "fp8"), "inexact")
            ours.append(fp8)
    torch_only = [
        Provider("torch", "logprobs", lambda *_: _naive, "all logits at once"),
        Provider("torch.compile", "logprobs", _compiled, "all logits at once"),
        Provider(
            "F.linear_cross_entropy",
            "mean",
            _torch_linear_cross_entropy,
            "no per-token gradient in one pass, no entropy, no TP",
        ),
    ]
    return {p.name: p for p in (*one_pass, *ours, *torch_only, *peers.providers())}
