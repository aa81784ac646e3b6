"""python -m bench weight_sync: a trainer's weights to a running vLLM engine, by each transport.

    python -m bench weight_sync --python .venv-vllm/bin/python --layers 24 --workers 1

A Qwen2-like model with random weights on a CPU; one engine, whose transfers alternate. Seconds are
of the whole transfer, which ends with the engine's weights read back and compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from bench import measure
from flowrl.rollout.engine_process import ServerProcess
from flowrl.rollout.engine_protocol import EngineSettings
from flowrl.rollout.vllm_sampler import SyncOptions, VLLMSampler

CPU = torch.device("cpu")
TRANSPORTS = ("files", "broadcast")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench weight_sync", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--python", default="", help="of the environment with vllm; empty: this one"
    )
    parser.add_argument("--layers", type=int, default=24, help="of 896 wide, as Qwen2.5-0.5B's")
    parser.add_argument("--workers", type=int, default=1, help="tensor-parallel ones of the engine")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        seconds, size = run(Path(folder), options)
    record: dict[str, Any] = {
        "benchmark": "weight_sync",
        "machine": measure.machine(CPU),
        "bytes": size,
        "layers": options.layers,
        "workers": options.workers,
        "seconds": seconds,
    }
    print(f"{size / 1e9:.2f} GB of float32, {options.workers} worker(s), {options.repeats} repeats")
    for name, times in seconds.items():
        print(f"{name:10} {statistics.median(times):6.2f} s   {min(times):.2f} to {max(times):.2f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def run(folder: Path, options: argparse.Namespace) -> tuple[dict[str, list[float]], int]:
    """Seconds of each transfer by transport, and the bytes of one."""
    model, tokenizer = make_model(folder, options.layers)
    settings = EngineSettings(
        str(folder), str(folder / "vllm.log"), max_model_len=64, max_sequences=8,
        tensor_parallel_size=options.workers,
    )  # fmt: skip
    limits = SyncOptions(600.0, 600.0, 256 << 20, 64, 0, workers=options.workers)
    start = partial(ServerProcess, settings, options.python, 600.0)
    sampler = VLLMSampler(folder, tokenizer, torch.float32, start, limits)
    seconds: dict[str, list[float]] = {name: [] for name in TRANSPORTS}
    try:
        # The first round meets and allocates, and is not kept.
        for repeat in range(-1, options.repeats):
            for transport in TRANSPORTS:
                sampler.options = dataclasses.replace(limits, transport=transport)
                began = time.perf_counter()
                sampler.load_weights(model.named_parameters(), repeat + 1)
                if repeat >= 0:
                    seconds[transport].append(round(time.perf_counter() - began, 4))
    finally:
        sampler.close()
    return seconds, sum(p.nbytes for p in model.parameters())


def make_model(folder: Path, layers: int) -> tuple[Any, Any]:
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=layers,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_empty_tokenizer(), eos_token="<eos>")
    return model.requires_grad_(False), tokenizer


def _empty_tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
