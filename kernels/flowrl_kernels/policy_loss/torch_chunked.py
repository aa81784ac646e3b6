"""linear_policy_loss chunk by chunk: logits, statistics, objective, dlogits in place, two products.

The gradients are finished when the call returns; autograd only scales them and hands them over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowrl_kernels.checks import check_shape, require, valid_columns
from flowrl_kernels.head import Head, HeadKernels, LocalStatistics, RowGradients, RowStatistics
from flowrl_kernels.head.chunks import (
    HeadGradients,
    Workspace,
    counted_rows,
    rows_per_chunk,
    split,
)
from flowrl_kernels.head.chunks import (
    Rows as RowIndex,
)
from flowrl_kernels.head.torch_kernels import TorchHead
from flowrl_kernels.head.vocab_parallel import finish
from flowrl_kernels.policy_loss.contract import Objective, PolicyLoss, Rows
from flowrl_kernels.policy_loss.sequence_chunks import Chunk, plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_policy_loss(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V_local, D)
    targets: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (N + 1,)
    objective: Objective,
    *,
    sequence_inputs: Mapping[str, Tensor],
    token_inputs: Mapping[str, Tensor],
    temperature: float,
    vocab_start: int,
    vocab_size: int | None,
    group: ProcessGroup | None,
    entropy: str,
    grad_scale: float,
    main_grad: Tensor | None,
    max_logits_bytes: int | None,
    kernels: HeadKernels | None = None,  # None: PyTorch's
) -> PolicyLoss:
    columns = valid_columns(weight, vocab_start, vocab_size)
    head = Head(
        weight.detach()[:columns],
        weight.shape[0],
        temperature,
        vocab_start,
        group,
        entropy=entropy != "none",
    )
    inputs = {**sequence_inputs, **token_inputs}
    call = _Call(
        head,
        kernels or TorchHead(),
        objective,
        targets,
        cu_seqlens,
        tuple(inputs),
        frozenset(sequence_inputs),
        entropy == "grad",
        grad_scale,
        main_grad,
        max_logits_bytes,
        torch.is_grad_enabled(),
    )
    loss, logprobs, row_entropy = _PolicyLoss.apply(call, hidden, weight, *inputs.values())
    return PolicyLoss(loss, call.metrics, logprobs, row_entropy)


@dataclass(frozen=True)
class _Call:
    head: Head
    kernels: HeadKernels
    objective: Objective
    targets: Tensor
    cu_seqlens: Tensor
    input_names: tuple[str, ...]
    per_sequence: frozenset[str]
    entropy_gradient: bool
    grad_scale: float
    main_grad: Tensor | None
    max_logits_bytes: int | None
    grad_enabled: bool
    metrics: dict[str, Tensor] = field(default_factory=dict)  # filled by the pass


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, call: _Call, hidden: Tensor, weight: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        needed = [need and call.grad_enabled for need in ctx.needs_input_grad[1:]]
        with torch.autocast(hidden.device.type, enabled=False):
            evaluation = _Evaluation(call, hidden, weight, inputs, needed)
            loss = evaluation.run()
        ctx.main_grad_used = call.main_grad is not None
        ctx.weight_dtype = weight.dtype
        ctx.gradients = evaluation.finish()
        ctx.mark_non_differentiable(evaluation.logprobs)
        if evaluation.entropy is not None:
            ctx.mark_non_differentiable(evaluation.entropy)
        return loss, evaluation.logprobs, evaluation.entropy

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dloss: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_policy_loss gives its gradients to one backward, got a second; "
                "call it again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.main_grad_used or dloss.device.type == "cpu":
            factor = float(dloss)
            require(
                factor == 1.0 or not ctx.main_grad_used,
                "backward with main_grad needs an incoming gradient of 1",
                factor,
                "pass grad_scale to linear_policy_loss instead",
            )
        else:
            factor = dloss  # on CUDA unseen: no synchronisation
        if not isinstance(factor, float) or factor != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(factor)  # nobody else's tensor
        dhidden, dweight, *dinputs = gradients
        if dweight is not None:
            dweight = dweight.to(ctx.weight_dtype)
        return None, dhidden, dweight, *dinputs


class _Evaluation:
    """One pass over the batch: fills log-probs, metrics and every gradient that is needed."""

    def __init__(
        self,
        call: _Call,
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (V_local, D)
        inputs: tuple[Tensor, ...],
        needed: list[bool],  # of hidden, weight, *inputs
    ) -> None:
        self._call, self._head, self._hidden = call, call.head, hidden
        self._inputs = dict(zip(call.input_names, inputs, strict=True))
        self._needed = dict(zip(call.input_names, needed[2:], strict=True))
        self._input_gradients = {
            name: torch.zeros_like(x) for name, x in self._inputs.items() if self._needed[name]
        }
        self._most = rows_per_chunk(call.head, call.kernels, call.max_logits_bytes)
        self._chunks = plan(call.targets, call.cu_seqlens, self._most)
        self._gradients = HeadGradients(
            call.head,
            call.kernels.products,
            hidden,
            weight,
            (needed[0], needed[1]),
            len(self._chunks) == 1 and self._chunks[0].num_counted <= self._most,
            call.main_grad,
        )
        self.logprobs = hidden.new_zeros(hidden.shape[:1], dtype=call.head.dtype)
        self.entropy = torch.zeros_like(self.logprobs) if call.head.entropy else None
        self._dlogprobs = torch.zeros_like(self.logprobs)
        self._dentropy = torch.zeros_like(self.logprobs) if call.entropy_gradient else None
        self._metrics: dict[str, list[Tensor]] = {}
        self._workspace: Workspace | None = None

    def run(self) -> Tensor:  # ()
        call = self._call
        if self._gradients.wanted or call.kernels.forward_needs_workspace(call.head):
            size = min(self._most, max(chunk.num_counted for chunk in self._chunks))
            self._workspace = Workspace(call.head, call.kernels, size)
        loss = self.logprobs.new_zeros(())
        for chunk in self._chunks:
            loss += self._chunk(chunk)
        for name, parts in self._metrics.items():
            call.metrics[name] = torch.cat(parts)
        return loss

    def finish(self) -> list[Tensor | None]:
        """Gradients of hidden, weight (None with main_grad, which has it) and every input."""
        dhidden, dweight = self._gradients.finish()
        if self._call.main_grad is not None:
            dweight = None
        return [dhidden, dweight, *(self._input_gradients.get(n) for n in self._call.input_names)]

    def _chunk(self, chunk: Chunk) -> Tensor:
        targets = self._call.targets
        rows = counted_rows(targets, chunk.tokens, chunk.num_counted)
        pieces = list(split(rows, chunk.num_counted, self._most))
        found = [self._score(piece, size) for piece, size in pieces]
        loss = self._differentiate(chunk)
        if not self._gradients.wanted:
            return loss
        assert self._workspace is not None
        for (piece, size), (local, done) in zip(pieces, found, strict=True):
            out = self._workspace.rows(size)
            if len(pieces) > 1:  # a long sequence: the next piece took the place of these logits
                local = self._local(piece, out)
            dentropy = None if self._dentropy is None else self._dentropy[piece]
            incoming = RowGradients(self._dlogprobs[piece], entropy=dentropy)
            self._call.kernels.dlogits_(self._head, targets[piece], out, local, done, incoming)
            self._gradients.add(piece, out)
        return loss

    def _local(self, rows: RowIndex, out: Tensor | None) -> LocalStatistics:
        call = self._call
        return call.kernels.statistics(call.head, self._hidden[rows], call.targets[rows], out)

    def _score(self, rows: RowIndex, size: int) -> tuple[LocalStatistics, RowStatistics]:
        out = None if self._workspace is None else self._workspace.rows(size)
        local = self._local(rows, out)
        done = finish(self._head, local)
        self.logprobs[rows] = done.logprobs
        if self.entropy is not None and done.entropy is not None:
            self.entropy[rows] = done.entropy
        return local, done

    def _differentiate(self, chunk: Chunk) -> Tensor:  # ()
        """The objective's loss on the chunk; its gradients go to the rows of the buffers."""
        head_wanted = self._gradients.wanted
        logprobs = _leaf(self.logprobs[chunk.tokens], head_wanted)
        entropy = None
        if self.entropy is not None:
            of_entropy = head_wanted and self._dentropy is not None
            entropy = _leaf(self.entropy[chunk.tokens], of_entropy)
        leaves = {
            name: _leaf(x[self._place(name, chunk)], self._needed[name])
            for name, x in self._inputs.items()
        }
        offsets = self._call.cu_seqlens[chunk.sequences.start : chunk.sequences.stop + 1]
        rows = Rows(chunk.sequences, chunk.tokens, offsets - offsets[0], leaves)
        with torch.set_grad_enabled(head_wanted or any(self._needed.values())):
            loss, metrics = self._call.objective(logprobs, entropy, rows)
        self._keep_metrics(loss, metrics, chunk)
        wanted: list[tuple[Tensor, Tensor]] = [
            (leaves[name], gradient[self._place(name, chunk)])
            for name, gradient in self._input_gradients.items()
        ]
        if head_wanted:
            wanted.append((logprobs, self._dlogprobs[chunk.tokens]))
        if entropy is not None and entropy.requires_grad and self._dentropy is not None:
            wanted.append((entropy, self._dentropy[chunk.tokens]))
        if loss.requires_grad:  # not when the chunk's sequences have no token that counts
            scale = torch.full_like(loss, self._call.grad_scale)
            leaf_list = [leaf for leaf, _ in wanted]
            results = torch.autograd.grad(loss, leaf_list, scale, allow_unused=True)
            for (_, place), result in zip(wanted, results, strict=True):
                if result is not None:
                    place.copy_(result)
        return loss.detach()

    def _place(self, name: str, chunk: Chunk) -> slice:
        return chunk.sequences if name in self._call.per_sequence else chunk.tokens

    def _keep_metrics(self, loss: Tensor, metrics: Mapping[str, Tensor], chunk: Chunk) -> None:
        check_shape("the objective's loss", loss, ())
        size = chunk.sequences.stop - chunk.sequences.start
        for name, metric in metrics.items():
            check_shape(f"metrics[{name!r}]", metric, (size,))
            self._metrics.setdefault(name, []).append(metric.detach())
        calls = {len(parts) for parts in self._metrics.values()}
        require(
            len(calls) <= 1 and len(metrics) == len(self._metrics),
            "an objective must give the same metrics for every part of the batch",
            ", ".join(metrics) or "none",
            "return every metric in every call",
        )


def _leaf(values: Tensor, requires_grad: bool) -> Tensor:
    """A leaf of its own storage: what the objective does to it stays there."""
    return values.detach().clone().requires_grad_(requires_grad)
