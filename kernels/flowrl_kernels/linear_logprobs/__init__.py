"""Log-probabilities of target tokens under a linear output layer, without its logits.

`reference.py` is the definition, `torch_chunked.py` the same in chunks of rows, with the kernels of
one of the other backends (`flowrl_kernels/head`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flowrl_kernels import backends, checks, cuda_support, native_library, triton_support
from flowrl_kernels.head import HeadKernels
from flowrl_kernels.head.cuda_head import CudaHead
from flowrl_kernels.head.native_kernels import NativeHead, block_bytes, logits_bytes
from flowrl_kernels.linear_logprobs import reference, torch_chunked
from flowrl_kernels.linear_logprobs.contract import LinearLogprobs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LinearLogprobs", "linear_logprobs"]


def linear_logprobs(
    hidden: Tensor,  # (T, D) hidden[t] is the state that predicts targets[t]
    weight: Tensor,  # (V_local, D)
    targets: Tensor,  # (T,) int64, -100 where masked
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    entropy: Literal["none", "metric", "grad"] = "none",
    precision: Literal["native", "fp8"] = "native",
    max_logits_bytes: int | None = None,
    backend: str | None = None,
) -> LinearLogprobs:
    """Log-probability of each row's target, its log-sum-exp and, if asked for, its entropy.

        z_tj       = hidden_t . weight_j / temperature
        lse_t      = log sum_j exp(z_tj)
        logprob_t  = z_t,target - lse_t
        entropy_t  = lse_t - sum_j exp(z_tj - lse_t) z_tj

    Nothing is averaged. Differentiable in hidden and weight; "grad" makes the entropy so too. A
    hidden or a weight that needs no gradient costs no product in backward. Statistics, sums and
    outputs are float32 whatever the inputs, float64 for float64. Masked rows give 0 and no
    gradient, whatever their hidden state holds.

    `vocab_size` is the true vocabulary where weight is padded: columns past it take no part and get
    zero gradient. With `group`, each rank holds equally many columns (padding included) from
    `vocab_start` on, all ranks give the same hidden, targets and options, all get the same result,
    and the gradient of hidden is summed over ranks.

    The chunked backends hold at most `max_logits_bytes` of logits (default 256 MiB on a CPU, 100 by
    native code where it multiplies; 3 GiB on CUDA), store the log-sum-exp and make the logits a
    second time in backward: 8 T D V flop in all. The backends triton and cuda hold none in forward,
    nor does native where it multiplies. Backward goes by blocks of the vocabulary, and rounds a
    16-bit weight's gradient block by block: there is no float32 sum as large as the weight.

    precision="fp8" (triton and cuda) multiplies rows of hidden and weight rounded to e4m3, each
    with its own scale, and has no gradient: log-probs are off by 0.01 to 1, too much for importance
    weights.

    Raises ValueError for shapes, dtypes, devices, targets or options out of range, for fp8 where a
    gradient is needed, and for a backend that cannot run the call. Source: arXiv:2411.09009 for the
    idea of recomputing the logits.
    """
    checks.check_head(
        hidden,
        weight,
        targets,
        temperature=temperature,
        entropy=entropy,
        max_logits_bytes=max_logits_bytes,
    )
    checks.check_vocabulary(weight, targets, vocab_start, vocab_size, group)
    checks.require(
        precision in ("native", "fp8"),
        "precision must be 'native' or 'fp8'",
        repr(precision),
        "use precision='native'",
    )
    in_use = {"group": group is not None, "fp8": precision == "fp8", "entropy": entropy != "none"}
    features = frozenset(name for name, used in in_use.items() if used)
    call = backends.Call(hidden.device, hidden.dtype, features, hidden.shape[1])
    return backends.resolve("linear_logprobs", backend, call).run(
        hidden,
        weight,
        targets,
        temperature=temperature,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        group=group,
        entropy=entropy,
        precision=precision,
        max_logits_bytes=max_logits_bytes,
    )


def _reference_can_run(call: backends.Call) -> str | None:
    if "group" in call.features:
        return "holds the whole vocabulary on one rank and takes no group"
    return "has no FP8 product" if "fp8" in call.features else None


def _torch_can_run(call: backends.Call) -> str | None:
    if call.device.type not in ("cpu", "cuda"):
        return f"runs on cpu and cuda, not on {call.device.type}"
    return "has no FP8 product" if "fp8" in call.features else None


def _tiled(
    kernels: HeadKernels,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    precision: str,
    **options: Any,
) -> LinearLogprobs:
    checks.require(
        precision == "native"
        or not torch.is_grad_enabled()
        or not (hidden.requires_grad or weight.requires_grad),
        "precision='fp8' has no gradient: hidden and weight must not require one",
        "one that does",
        "call it under torch.no_grad() or use precision='native'",
    )
    return torch_chunked.linear_logprobs(
        hidden, weight, targets, precision=precision, kernels=kernels, **options
    )


def _triton(*args: Any, precision: str, **options: Any) -> LinearLogprobs:
    from flowrl_kernels.head.triton_head import TritonHead  # a machine may lack triton

    return _tiled(TritonHead(precision), *args, precision=precision, **options)


def _cuda(*args: Any, precision: str, **options: Any) -> LinearLogprobs:
    return _tiled(CudaHead(precision), *args, precision=precision, **options)


backends.register("linear_logprobs", "triton", triton_support.refusal)(_triton)
backends.register("linear_logprobs", "cuda", cuda_support.refusal)(_cuda)


def _native(
    hidden: Tensor, weight: Tensor, *args: Any, max_logits_bytes: int | None, **options: Any
) -> LinearLogprobs:
    return torch_chunked.linear_logprobs(
        hidden,
        weight,
        *args,
        kernels=NativeHead(),
        max_logits_bytes=logits_bytes(weight, max_logits_bytes),
        max_block_bytes=block_bytes(weight, max_logits_bytes),
        **options,
    )


backends.register("linear_logprobs", "native", native_library.can_run)(_native)
backends.register("linear_logprobs", "reference", _reference_can_run)(reference.linear_logprobs)
backends.register("linear_logprobs", "torch", _torch_can_run)(torch_chunked.linear_logprobs)
