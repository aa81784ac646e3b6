"""Adapters of other projects' kernels. Their names in `pip`, what they cannot do, how to call them.

Written against liger-kernel and liger-cute-kernels 0.8.5, cut-cross-entropy 25.1.1, quack-kernels
0.6.5 and verl 0.9.1. Only Liger's fallback and CCE's torch.compile form have been run: they take a
CPU. The others wait for a GPU.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from bench.problems import Problem
from bench.providers import Head, Provider, Unavailable


def _import(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise Unavailable(f"{error}; pip install {package}") from error


def _needs_cuda(device: torch.device, problem: Problem) -> None:
    if device.type != "cuda":
        raise Unavailable(f"runs on CUDA, not on {device.type}")
    if problem.hidden.dtype == torch.float32:
        raise Unavailable("takes bfloat16 or float16, not float32")


def liger_triton(device: torch.device, problem: Problem) -> Head:
    module = _import("liger_kernel.transformers.fused_linear_cross_entropy", "liger-kernel==0.8.5")
    if device.type != "cuda":
        raise Unavailable(f"Triton: runs on CUDA, not on {device.type}")
    loss = module.LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def liger_scaled(device: torch.device, problem: Problem) -> Head:
    module = _import("liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel==0.8.5")
    function = module.LigerFusedLinearScaledCrossEntropyFunction
    return lambda hidden, weight, targets: -function.apply(hidden, weight, targets)


_lck_group = None


def liger_cute(device: torch.device, problem: Problem) -> Head:
    """LCK, through Liger's tensor-parallel front end on a group of one rank."""
    _import("liger_cute_kernels", "liger-cute-kernels[cu13]==0.8.5 apache-tvm-ffi")
    module = _import("liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel==0.8.5")
    _needs_cuda(device, problem)
    configure = _import("liger_kernel.ops.configure", "liger-kernel==0.8.5")
    native = module._load_native_tp_function()
    if native is None:
        raise Unavailable("its library does not load here; pip install nvidia-nvshmem-cu13==3.6.5")
    group = _one_rank_group(device)
    (rows, dim), vocab = problem.hidden.shape, problem.weight.shape[0]
    config = configure.FusedLinearCrossEntropyConfig(rows, dim, vocab, group="tp")
    options = {"process_groups": {"tp": group}, "device": device, "flsce": config}
    if not configure.configure(**options):
        raise Unavailable("its native kernels do not support this device")
    function = module.LigerFusedLinearScaledCrossEntropyTPFunction
    return lambda hidden, weight, targets: -function.apply(hidden, weight, targets, group)


def _one_rank_group(device: torch.device):
    global _lck_group
    if _lck_group is None:
        rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl", init_method=rendezvous, rank=0, world_size=1, device_id=device
        )
        _lck_group = torch.distributed.new_group([0])
    return _lck_group


def cut_cross_entropy(device: torch.device, problem: Problem) -> Head:
    module = _import("cut_cross_entropy", "cut-cross-entropy==25.1.1")
    impl = "cce" if device.type == "cuda" else "torch_compile"

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -module.linear_cross_entropy(
            hidden, weight, targets, reduction="none", impl=impl
        ).float()

    return head


def quack(device: torch.device, problem: Problem) -> Head:
    _needs_cuda(device, problem)
    module = _import("quack.linear_cross_entropy", "quack-kernels==0.6.5")
    return lambda hidden, weight, targets: module.chunked_linear_cross_entropy(
        hidden, weight, targets
    )


def verl(device: torch.device, problem: Problem) -> Head:
    """Its kernel alone: the packages around it would import ray, tensordict and more."""
    _needs_cuda(device, problem)
    found = find_spec("verl")
    if found is None or not found.submodule_search_locations:
        raise Unavailable("No module named 'verl'; pip install --no-deps verl==0.9.1")
    root = Path(found.submodule_search_locations[0])
    for name in ("verl", "verl.utils", "verl.utils.kernel"):
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules.setdefault(name, package)
    module = _import("verl.utils.kernel.linear_cross_entropy", "--no-deps verl==0.9.1")

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return module.linear_cross_entropy(hidden, weight, targets, 1.0, "none")[0]

    return head


def providers() -> list[Provider]:
    return [
        Provider("liger FLCE", "mean", liger_triton, "no per-token gradient, no TP, bf16 logits"),
        Provider("liger scaled CE", "logprobs", liger_scaled, "no vocabulary padding"),
        Provider("liger LCK", "logprobs", liger_cute, "bf16, logits rounded to fp16, NVSHMEM"),
        Provider(
            "cut-cross-entropy", "logprobs", cut_cross_entropy, "skips small gradients, no TP"
        ),
        Provider("quack", "mean", quack, "no per-token log-prob, no entropy, no TP"),
        Provider("verl", "logprobs", verl, "recomputes per vocabulary slice, bf16 sums in dX"),
    ]
