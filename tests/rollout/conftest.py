"""A tiny model with a peaked distribution for the samplers' tests, built once."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from flowrl.records import Prompt, SampleRequest

CHARACTERS = "0123456789+-= "
SIZES: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
CONFIGS = {
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=6),  # shorter than the sequences
    "gpt2": lambda: GPT2Config(
        vocab_size=17, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1,
        bos_token_id=None,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TinyModel:
    path: Any
    tokenizer: Any

    def prompts(self, texts: list[str]) -> list[Prompt]:
        return [
            Prompt(i, text, tuple(self.tokenizer(text)["input_ids"]))
            for i, text in enumerate(texts)
        ]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model("llama") -> TinyModel of that architecture."""
    made: dict[str, TinyModel] = {}

    def make(architecture: str = "qwen3") -> TinyModel:
        if architecture not in made:
            path = tmp_path_factory.mktemp(architecture)
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
            for name, param in model.named_parameters():  # far from uniform, unlike fresh weights
                param.data.mul_(8.0 if param.ndim == 2 and "embed" not in name else 1.0)
            model.save_pretrained(path)
            tokenizer = _tokenizer()
            tokenizer.save_pretrained(path)
            made[architecture] = TinyModel(path, tokenizer)
        return made[architecture]

    return make


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *CHARACTERS]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore
    inner.decoder = decoders.Fuse()  # type: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture
def make_request():
    def make(prompts: list[Prompt], **changes: Any) -> SampleRequest:
        settings: dict[str, Any] = {
            "group_size": 4,
            "max_new_tokens": 16,
            "temperature": 1.0,
            "top_p": 1.0,
            "seed": 0,
            "step": 1,
        }
        return SampleRequest(prompts=prompts, **{**settings, **changes})

    return make
