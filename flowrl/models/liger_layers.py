"""Liger's RMSNorm, rotary embedding and SwiGLU, for the layers of both backends (`model.liger`).

    check_liger(device)     raises where they cannot run
    use_liger(model)        puts them into one transformers model; megatron_layers.py has Megatron's

Never its losses or its fused cross entropy: the log-prob head is flowrl's own. The functions come
from Liger's modules of Triton kernels, so that its LIGER_KERNEL_IMPL changes nothing here. Source:
liger-kernel 0.8.5, https://github.com/linkedin/Liger-Kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from flowrl_kernels.triton_support import interpreting
from torch import Tensor, nn

from flowrl.schema import ConfigError, require

FAMILIES = ("llama", "qwen2", "qwen3")  # whose norm is weight * x / rms(x), without an offset
ROTARY = "apply_rotary_pos_emb"  # what their attention calls, in transformers 5


def check_liger(device: torch.device) -> None:
    """Raises ConfigError where Liger's kernels are missing or cannot run."""
    try:
        import liger_kernel.ops.swiglu as found
    except ImportError as error:
        raise ConfigError(
            "model.liger takes layers from liger-kernel, which does not import here "
            f"({str(error).splitlines()[0]}); set model.liger=false, or: "
            "pip install 'flowrl-trainer[liger]'"
        ) from error
    require(
        hasattr(found, "LigerFusedGateUpSiLUMulFunction"),
        "model.liger needs liger-kernel 0.8.3 or later, an older one is installed; "
        "pip install -U 'liger-kernel>=0.8.3'",
    )
    require(
        device.type == "cuda" or interpreting(),
        f"model.liger runs Triton kernels on CUDA devices, got model.device={device.type}; set "
        "model.liger=false (Triton's interpreter, TRITON_INTERPRET=1, is for tests)",
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # (..., D), (D,) -> (..., D)
    """weight * (x / sqrt(mean(x^2) + eps)): statistics in float32, the product in x's dtype, as in
    transformers. Not in place: the incoming gradient may be another's, too."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def rotate(
    q: Tensor,  # (B, H, T_model, head_dim)
    k: Tensor,  # (B, H_kv, T_model, head_dim)
    cos: Tensor,  # (B, T_model, head_dim), its halves alike
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """[a, b] -> [a cos - b sin, b cos + a sin] for the halves of every head. Writes into q and k
    where their memory is in order: nothing may have kept them."""
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply(q, k, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # (..., F), (..., F) -> (..., F)
    """silu(gate) * up. Backward writes the gradients over gate and up: it runs once."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def swiglu_of_both(gate_up: Tensor) -> Tensor:  # (..., 2 F) -> (..., F)
    """silu(first half) * second half."""
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    rows = gate_up.flatten(0, -2)  # it returns the gradient of rows, whatever it was given
    return LigerFusedGateUpSiLUMulFunction.apply(rows).unflatten(0, gate_up.shape[:-1])


# --- transformers


def use_liger(model: Any) -> None:
    """Replaces the forward of every norm, attention and MLP of this model; other models of the same
    class, such as the sampler's, stay as they are. Raises ConfigError for another family."""
    config = model.config.get_text_config()
    require(
        config.model_type in FAMILIES,
        f"model.liger knows the families {', '.join(FAMILIES)}, got {config.model_type}; "
        "set model.liger=false",
    )
    require(
        config.hidden_act == "silu",
        f"model.liger has SwiGLU, this model's activation is {config.hidden_act}; "
        "set model.liger=false",
    )
    replaced = {"RMSNorm": 0, "Attention": 0, "MLP": 0}
    for module in model.modules():
        for kind in replaced:
            if type(module).__name__.endswith(kind):
                module.forward = MethodType(_forward(kind, module), module)
                replaced[kind] += 1
    assert all(replaced.values()), replaced


def _forward(kind: str, module: nn.Module) -> Callable[..., Any]:
    if kind == "RMSNorm":
        return _norm_forward
    return _mlp_forward if kind == "MLP" else _with_rotary(type(module).forward)


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _with_rotary(forward: Any) -> Callable[..., Any]:
    """The attention's own forward with `rotate` under the name of its module's rotary function: to
    set it in the module would change every model of the process."""
    require(
        ROTARY in forward.__code__.co_names,
        f"model.liger expects {forward.__qualname__} to call {ROTARY}, which this version of "
        "transformers does not; set model.liger=false",
    )
    names = {**forward.__globals__, ROTARY: rotate}
    made = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made
