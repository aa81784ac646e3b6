"""A sequence-local loss of the log-probabilities under a linear output layer, in one pass.

`reference.py` is the definition, `torch_chunked.py` the same in chunks of whole sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flowrl_kernels import backends, checks, cuda_support, native_library, triton_support
from flowrl_kernels.head.cuda_head import CudaHead
from flowrl_kernels.head.native_kernels import NativeHead, logits_bytes
from flowrl_kernels.policy_loss import reference, torch_chunked
from flowrl_kernels.policy_loss.contract import Objective, PolicyLoss, Rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Objective", "PolicyLoss", "Rows", "linear_policy_loss"]


def linear_policy_loss(
    hidden: Tensor,  # (T, D) hidden[t] is the state that predicts targets[t]
    weight: Tensor,  # (V_local, D)
    targets: Tensor,  # (T,) int64, -100 where masked
    cu_seqlens: Tensor,  # (N + 1,) int32
    objective: Objective,
    *,
    sequence_inputs: Mapping[str, Tensor] | None = None,  # (N,) each, such as log_z
    token_inputs: Mapping[str, Tensor] | None = None,  # (T,) each, such as values
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    entropy: Literal["none", "metric", "grad"] = "none",
    grad_scale: float = 1.0,
    main_grad: Tensor | None = None,  # (V_local, D) float32
    max_logits_bytes: int | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """Sum over sequences of any loss that is a function of each sequence's own log-probabilities.

        loss      = sum over calls of objective(logprobs, entropy, rows)
        logprobs  = linear_logprobs(hidden, weight, targets).logprobs

    The objective is called on parts of the batch, each of whole sequences in order, so it must be a
    sum over sequences, already divided by the totals it needs. It gets detached leaves: log-probs
    (n,), the entropies (n,) or None, and `rows.inputs`; gradients with respect to all of them are
    collected, and reach hidden, weight and the graph behind the inputs in backward.
    entropy="metric" gives the entropies without a gradient. Masked rows have log-prob and entropy 0
    and no gradient.

    The gradients are made in the call, while the logits are there: 6 T D V flop in all (8 for a
    sequence longer than a chunk, whose logits are made twice). `backward` multiplies them by the
    incoming gradient and hands them over; it works once. A frozen weight or hidden costs no
    product; if nothing needs a gradient, or under no_grad, only the forward product is made.
    Gradients are those of grad_scale * loss; the returned loss is not scaled. d(weight) is summed
    in float32; with `main_grad` it is added there during the call, weight.grad stays as it is, and
    backward refuses an incoming gradient other than 1 (use grad_scale). Vocabulary, group, masks
    and numerics: linear_logprobs.

    At most `max_logits_bytes` of logits are alive (default 256 MiB on a CPU, 3 GiB on CUDA). Native
    code rounds its rows up to 16, from 512 on to 32. Where it multiplies, the default is 112 MiB in
    float32 and 384 MiB in bfloat16; there d(weight) needs a float32 sum only if there are several
    chunks, and all rows are taken at once where that is no more memory.

    Raises ValueError for arguments out of range, an objective whose loss is no scalar or whose
    metrics are not one number a sequence, and a backend that cannot run the call.
    """
    sequence_inputs, token_inputs = dict(sequence_inputs or {}), dict(token_inputs or {})
    checks.check_head(
        hidden,
        weight,
        targets,
        temperature=temperature,
        entropy=entropy,
        max_logits_bytes=max_logits_bytes,
    )
    checks.check_vocabulary(weight, targets, vocab_start, vocab_size, group)
    offsets = checks.check_cu_seqlens(cu_seqlens, hidden.shape[0])
    _check_inputs(hidden, sequence_inputs, token_inputs, len(offsets) - 1)
    _check_main_grad(weight, main_grad)
    in_use = {
        "group": group is not None,
        "entropy": entropy != "none",
        "main_grad": main_grad is not None,
    }
    features = frozenset(name for name, used in in_use.items() if used)
    call = backends.Call(hidden.device, hidden.dtype, features, hidden.shape[1])
    return backends.resolve("linear_policy_loss", backend, call).run(
        hidden,
        weight,
        targets,
        cu_seqlens,
        objective,
        sequence_inputs=sequence_inputs,
        token_inputs=token_inputs,
        temperature=temperature,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        group=group,
        entropy=entropy,
        grad_scale=grad_scale,
        main_grad=main_grad,
        max_logits_bytes=max_logits_bytes,
    )


def _check_inputs(
    hidden: Tensor,
    sequence_inputs: Mapping[str, Tensor],
    token_inputs: Mapping[str, Tensor],
    num_sequences: int,
) -> None:
    both = sequence_inputs.keys() & token_inputs.keys()
    checks.require(
        not both,
        "an input is per sequence or per token",
        f"both for {', '.join(sorted(both))}",
        "rename one of the two",
    )
    for name, tensor in sequence_inputs.items():
        checks.check_shape(f"sequence_inputs[{name!r}]", tensor, (num_sequences,))
    for name, tensor in token_inputs.items():
        checks.check_shape(f"token_inputs[{name!r}]", tensor, hidden.shape[:1])
    checks.check_one_device(hidden=hidden, **sequence_inputs, **token_inputs)


def _check_main_grad(weight: Tensor, main_grad: Tensor | None) -> None:
    if main_grad is None:
        return
    checks.check_shape("main_grad", main_grad, weight.shape)
    wanted = checks.statistics_dtype(weight.dtype)
    checks.require(
        main_grad.dtype == wanted and main_grad.is_contiguous(),
        f"main_grad must be contiguous {wanted}",
        f"{main_grad.dtype}, strides {main_grad.stride()}",
        "allocate it so",
    )
    checks.require(
        weight.requires_grad or not torch.is_grad_enabled(),
        "main_grad needs a weight that requires grad",
        "a frozen one",
        "pass main_grad=None for a frozen weight",
    )
    checks.check_one_device(weight=weight, main_grad=main_grad)


def _reference_can_run(call: backends.Call) -> str | None:
    if "group" in call.features:
        return "holds the whole vocabulary on one rank and takes no group"
    return "returns weight.grad and takes no main_grad" if "main_grad" in call.features else None


def _torch_can_run(call: backends.Call) -> str | None:
    if call.device.type not in ("cpu", "cuda"):
        return f"runs on cpu and cuda, not on {call.device.type}"
    return None


def _triton(*args: Any, **options: Any) -> PolicyLoss:
    from flowrl_kernels.head.triton_head import TritonHead  # a machine may lack triton

    return torch_chunked.linear_policy_loss(*args, kernels=TritonHead(), **options)


def _cuda(*args: Any, **options: Any) -> PolicyLoss:
    return torch_chunked.linear_policy_loss(*args, kernels=CudaHead(), **options)


backends.register("linear_policy_loss", "triton", triton_support.refusal)(_triton)
backends.register("linear_policy_loss", "cuda", cuda_support.refusal)(_cuda)


def _native(
    hidden: Tensor, weight: Tensor, *args: Any, max_logits_bytes: int | None, **options: Any
) -> PolicyLoss:
    sums_dweight = weight.requires_grad and torch.is_grad_enabled() and options["main_grad"] is None
    limit = logits_bytes(weight, max_logits_bytes, hidden.shape[0], sums_dweight)
    return torch_chunked.linear_policy_loss(
        hidden, weight, *args, kernels=NativeHead(), max_logits_bytes=limit, **options
    )


backends.register("linear_policy_loss", "native", native_library.can_run)(_native)
backends.register("linear_policy_loss", "reference", _reference_can_run)(
    reference.linear_policy_loss
)
backends.register("linear_policy_loss", "torch", _torch_can_run)(torch_chunked.linear_policy_loss)
