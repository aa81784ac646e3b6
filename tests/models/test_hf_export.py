"""The export: what transformers would have saved, and never more than a shard in memory."""

from __future__ import annotations

import gc
import itertools
import json
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from flowrl.models.base_model import character_tokenizer
from flowrl.models.hf_export import export_hf
from flowrl.models.hf_files import check_model_dir, load_causal_lm, load_tokenizer
from flowrl.schema import ConfigError

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MODELS = {
    "tied llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=17, n_embd=16, n_layer=1, n_head=2, n_positions=32),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=2),  # its files cut experts otherwise
}


@pytest.fixture
def source(request, tmp_path) -> Path:
    directory = tmp_path / "source"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[request.param])
    model.generation_config.update(do_sample=True, temperature=0.7)
    model.save_pretrained(directory)
    character_tokenizer(" +0123456789=").save_pretrained(directory)
    return directory


def trained(source: Path) -> Any:
    model = load_causal_lm(source, torch.float32, CPU)
    for param in model.parameters():
        param.data.add_(torch.randn_like(param), alpha=0.1)
    return model


def weights_of(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, p.detach()) for name, p in model.named_parameters()]


def load_exactly(path: Path) -> Any:
    """The model as transformers loads it, with no tensor missing or unexpected."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("source", MODELS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_holds_the_given_weights(source, tmp_path, dtype):
    model = trained(source)
    out = tmp_path / "runs" / "export"
    export_hf(source, weights_of(model), out, dtype)
    check_model_dir(out)
    assert load_exactly(out).dtype == dtype, "the exported config names the dtype"
    for param in model.parameters():
        param.data = param.data.to(dtype).float()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(load_causal_lm(out, torch.float32, CPU)(ids).logits, expected)
        start = load_causal_lm(source, torch.float32, CPU)(ids).logits
    assert not torch.allclose(start, expected, atol=1e-2), "the test must see the training"
    assert load_tokenizer(out)("1+2")["input_ids"] == load_tokenizer(source)("1+2")["input_ids"]


@pytest.mark.parametrize("source", MODELS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_writes_the_bytes_that_transformers_writes(source, tmp_path, dtype):
    """In one file, whatever the order in which the weights come."""
    model = trained(source)
    export_hf(source, reversed(weights_of(model)), tmp_path / "one", dtype)
    whole = load_causal_lm(source, dtype, CPU)
    whole.load_state_dict(model.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    load_tokenizer(source).save_pretrained(tmp_path / "whole")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    found = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert found == expected


@pytest.mark.parametrize("source", [name for name in MODELS if name != "mixtral"], indirect=True)
def test_shards_hold_the_same_tensors_and_no_more_bytes_than_asked(source, tmp_path):
    weights = weights_of(trained(source))
    export_hf(source, weights, tmp_path / "one", torch.bfloat16)
    export_hf(source, weights, tmp_path / "many", torch.bfloat16, max_shard_bytes=1024)
    single = load_file(tmp_path / "one/model.safetensors")
    shards = sorted((tmp_path / "many").glob("model-*-of-*.safetensors"))
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    joined = {}
    for shard in shards:
        part = load_file(shard)
        assert {index["weight_map"][name] for name in part} == {shard.name}
        assert sum(t.nbytes for t in part.values()) <= 1024 or len(part) == 1
        joined |= part
    assert len(shards) > 3
    assert joined.keys() == single.keys() == index["weight_map"].keys()
    for name, tensor in single.items():
        assert torch.equal(joined[name], tensor), name
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in single.values())
    load_exactly(tmp_path / "many")


@pytest.mark.parametrize("source", ["untied llama"], indirect=True)
def test_export_refuses_what_would_be_lost_or_wrong(source, tmp_path):
    weights = dict(weights_of(load_causal_lm(source, torch.float32, CPU)))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/precious.txt").touch()
    with pytest.raises(ConfigError, match="new or empty"):
        export_hf(source, weights.items(), tmp_path / "kept", torch.float32)
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["precious.txt"]
    head = weights.pop("lm_head.weight")
    for given, message in (
        ({}, r"1 weights did not come, lm_head\.weight for one"),
        ({"lm_head.weight": head[:-1]}, r"lm_head\.weight must have shape \(17, 16\)"),
        ({"lm_head.weight": head, "odd": head}, "no weight called odd"),
    ):
        with pytest.raises(ValueError, match=message):
            export_hf(source, (weights | given).items(), tmp_path / "out", torch.float32)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["tied llama"], indirect=True)
def test_a_tied_weight_comes_once_under_either_name(source, tmp_path):
    weights = dict(weights_of(load_causal_lm(source, torch.float32, CPU)))
    words = weights.pop("model.embed_tokens.weight")
    twice = [*weights.items(), ("model.embed_tokens.weight", words), ("lm_head.weight", words)]
    with pytest.raises(ValueError, match=r"lm_head\.weight came twice"):
        export_hf(source, twice, tmp_path / "out", torch.float32)
    export_hf(
        source, [*weights.items(), ("lm_head.weight", words)], tmp_path / "out", torch.float32
    )
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("model.embed_tokens.weight"), words)
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (safe_open is no mapping)


# --- memory

LARGE = LlamaConfig(
    vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=16,
    num_attention_heads=8, num_key_value_heads=8,
)  # fmt: skip
LAYER_BYTES = 4 * (4 * 512 * 512 + 3 * 512 * 2048 + 2 * 512)
LARGEST_BYTES = 4 * 512 * 2048
SHARD_BYTES = 20 << 20


@pytest.fixture
def large(tmp_path):
    """A model directory without weights: nobody reads them."""
    source = tmp_path / "source"
    LARGE.save_pretrained(source)
    character_tokenizer(" +0123456789=").save_pretrained(source)
    return source


def shapes() -> Iterator[list[tuple[str, torch.Size]]]:
    """Names and shapes, layer by layer, then the others."""
    with torch.device("meta"):
        structure = AutoModelForCausalLM.from_config(LARGE)
    named = [(name, param.shape) for name, param in structure.named_parameters()]
    for layer in range(LARGE.num_hidden_layers):
        yield [(name, shape) for name, shape in named if f".layers.{layer}." in name]
    yield [(name, shape) for name, shape in named if ".layers." not in name]


def views() -> Iterator[tuple[str, torch.Tensor]]:
    """Of one flat tensor a layer, as the Megatron backend streams them."""
    for number, layer in enumerate(shapes()):
        sizes = [math.prod(shape) for _, shape in layer]
        parts = torch.full((sum(sizes),), float(number)).split(sizes)
        for (name, shape), part in zip(layer, parts, strict=True):
            yield name, part.view(shape)


class Counted:
    """Tensors, with the bytes of those that somebody still holds."""

    def __init__(self) -> None:
        self.held = self.most = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in itertools.chain.from_iterable(shapes()):
            memory = np.zeros(shape, np.float32)  # lives as long as any tensor over it
            self.held += memory.nbytes
            self.most = max(self.most, self.held)
            weakref.finalize(memory, self._let_go, memory.nbytes)
            made = (name, torch.from_numpy(memory))
            del memory
            yield made
            del made

    def _let_go(self, nbytes: int) -> None:
        self.held -= nbytes


def test_no_more_tensors_than_a_shard_are_held(large, tmp_path):
    """With one shard for all, all are."""
    counted, all_of_them = Counted(), Counted()
    export_hf(large, counted, tmp_path / "streamed", torch.float32, max_shard_bytes=SHARD_BYTES)
    assert SHARD_BYTES / 2 < counted.most <= SHARD_BYTES + 2 * LARGEST_BYTES
    export_hf(large, all_of_them, tmp_path / "whole", torch.float32)
    assert all_of_them.most > 16 * LAYER_BYTES


def peak_bytes(action: Callable[[], None]) -> int:
    """Most memory that this process holds during the action, over what it held before."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = status_bytes("VmHWM")
    except OSError:
        pytest.skip("the high-water mark of memory is Linux's")
    action()
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def test_the_process_does_not_grow_by_a_model(large, tmp_path):
    """16 layers of 17 MB, shards of 20 MB: 37 to 80 MB were measured. With one shard for all the
    same measure sees the model."""

    def export(name: str, limit: int) -> None:
        export_hf(large, views(), tmp_path / name, torch.float32, max_shard_bytes=limit)

    export("warm", SHARD_BYTES)
    assert peak_bytes(lambda: export("streamed", SHARD_BYTES)) < 7 * LAYER_BYTES
    assert peak_bytes(lambda: export("whole", 1 << 40)) > 10 * LAYER_BYTES
