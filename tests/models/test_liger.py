"""Liger's layers: where they are refused, and their own tests in Triton's interpreter."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import megatron_cases as cases
import pytest
import torch
from interpreter import run_interpreted
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from flowrl.models.hf_backend import HFBackend
from flowrl.models.liger_layers import check_liger, use_liger
from flowrl.models.megatron_backend import MegatronBackend
from flowrl.models.megatron_cpu_shim import silence_megatron
from flowrl.parallel import Parallel
from flowrl.schema import ConfigError

CPU = torch.device("cpu")


def passed_in_the_interpreter(*arguments: str) -> int:
    """How many tests passed, when all did."""
    pytest.importorskip("triton", reason="Liger's kernels need triton (Linux, x86-64)")
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    status, output = run_interpreted(Path(__file__).with_name("on_triton_liger.py"), *arguments)
    assert status == 0, output
    return int(re.findall(r"(\d+) passed", output)[0])


@pytest.mark.timeout(600)
def test_in_the_interpreter():
    assert passed_in_the_interpreter() == 16


@pytest.mark.matrix
@pytest.mark.timeout(600)
def test_the_other_families_in_the_interpreter():
    assert passed_in_the_interpreter("-m", "matrix") == 4


@pytest.mark.parametrize("backend", ["hf", "megatron"])
def test_a_cpu_is_refused(tmp_path, backend):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    silence_megatron()
    cases.make_model(tmp_path / "model", "qwen3", tied=False, layers=1)
    config = cases.config_of({}, backend, model={"backend": backend, "liger": True})
    build = HFBackend if backend == "hf" else MegatronBackend
    with pytest.raises(ConfigError, match=r"got model\.device=cpu; set model\.liger=false"):
        build(config, tmp_path / "model", frozenset(), Parallel(0, 1, CPU))


def test_where_it_is_not_installed_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.delitem(sys.modules, "liger_kernel.ops.swiglu", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'flowrl-trainer\[liger\]'"):
        check_liger(CPU)


def test_other_models_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match=r"llama, qwen2, qwen3, got gpt2; set model\.liger=false"):
        use_liger(gpt2)
    gelu = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, hidden_act="gelu",
        )
    )  # fmt: skip
    with pytest.raises(ConfigError, match="activation is gelu"):
        use_liger(gelu)


def test_fp8_has_layers_of_its_own():
    model = {"backend": "megatron", "dtype": "bfloat16", "fp8": "hybrid", "liger": True}
    with pytest.raises(ConfigError, match=r"fp8=hybrid takes .*; set model\.liger=false"):
        cases.config_of({}, "megatron", model=model)
