"""What the parity tests of the Megatron backend run: tiny models, one packed batch, layouts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from flowrl import objectives
from flowrl.assembly import resolve
from flowrl.config import Config
from flowrl.data.packing import pack
from flowrl.models import Microbatch
from flowrl.objectives.base import Objective, count_totals
from flowrl.records import LossBatch, PackedBatch, Prompt, Rollout
from flowrl.settings import load

LENGTHS = [(7, 3), (5, 9), (9, 1), (6, 6), (8, 2), (3, 12)]  # prompt and response tokens
# One for each of four replicas, and an odd number, for which interleaving needs fillers.
PLAN = [[0, 1], [2], [3], [4], [5]]
UPDATES = 3
PADDING = 2  # a token of the batch whose embedding gets no gradient
VOCABULARY = 21  # divides by nothing; on four ranks the last has padding only
CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
OBJECTIVE = {"preset": "recipe", "log_z": "learned"}  # with the log Z head's dropout


@dataclass(frozen=True)
class Case:
    family: str
    layout: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    breaks: str = ""  # a negative control: norm_flag or head_gradient
    liger: bool = False  # Liger's layers, in Triton's interpreter, which is slow: a short case

    @property
    def model(self) -> str:
        return f"{self.family}{'-tied' * self.tied}{'-short' * self.liger}"

    @property
    def layers(self) -> int:
        return 2 if self.liger else 4

    @property
    def updates(self) -> int:
        return 1 if self.liger else UPDATES

    @property
    def name(self) -> str:
        words = [f"{key}{value}" for key, value in self.layout.items()]
        return "-".join(
            [self.model, *(words or ["replicas"]), *([self.breaks] * bool(self.breaks))]
        )


TP = {"tensor": 2}
SP = {"tensor": 2, "sequence": True}
PP = {"pipeline": 2}
VPP = {"pipeline": 2, "virtual_pipeline": 2}
TP_PP = {"tensor": 2, "pipeline": 2}
ALL = {**TP_PP, "sequence": True, "virtual_pipeline": 2, "recompute": "full", "reference": "swap"}

TWO = [
    Case("qwen2", SP),
    Case("qwen2", PP, tied=True),
    Case("qwen3", TP),
    Case("qwen3", VPP),
    Case("llama", {}),
    Case("qwen3", SP, breaks="norm_flag"),
    Case("qwen2", TP, breaks="head_gradient"),
]
LIGER = Case("qwen3", SP, liger=True)
FOUR = [Case("qwen3", TP_PP), Case("qwen2", ALL, tied=True)]
ALL_TWO = [
    Case(family, layout, tied)
    for family in CONFIGS
    for tied in (False, True)
    for layout in (
        {}, TP, SP, PP, VPP, {**SP, "recompute": "selective"}, {**PP, "recompute": "full"},
        {**VPP, "reference": "swap"}, {"overlap_grad_reduce": True}, {**TP, "recompute": "full"},
    )
]  # fmt: skip
ALL_FOUR = [
    Case(family, layout, tied)
    for family in CONFIGS
    for tied in (False, True)
    for layout in ({}, TP, PP, TP_PP, ALL, {"pipeline": 4}, {**TP, "overlap_grad_reduce": True})
]


def make_model(
    directory: Path, family: str, tied: bool, vocabulary: int = VOCABULARY, layers: int = 4
) -> None:
    """A random model of the family, norms and biases random too."""
    extra = {"head_dim": 16} if family == "qwen3" else {}  # not hidden_size / heads
    config = CONFIGS[family](
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=tied, pad_token_id=PADDING, **extra,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).float()
        for param in model.parameters():
            param.data.add_(0.1 * torch.randn(param.shape))
    model.save_pretrained(directory)


def config_of(layout: dict[str, Any], backend: str, **sections: Any) -> Config:
    """Adam's epsilon stands above rounding noise, which it would blow up to whole steps."""
    settings = {
        "model": {"backend": backend},
        "objective": OBJECTIVE,
        "optimizer": {"eps": 1e-3, "lr": 1e-2, "weight_decay": 0.1},
        "rollout": {"temperature": 0.8},
        **({"parallel": layout} if backend == "megatron" else {}),
        **sections,
    }
    return resolve(load("countdown_cpu", settings))[0]


def objective() -> Objective:
    return objectives.build("flowrl", OBJECTIVE)


def batch() -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, (prompt, response) in enumerate(LENGTHS):
        ids = torch.randint(1, VOCABULARY, (prompt + response,), generator=generator).tolist()
        made.append(
            Rollout(
                Prompt(index // 2, "", tuple(ids[:prompt])), index % 2, tuple(ids[prompt:]),
                (0.0,) * response, False, 0, "",
            )
        )  # fmt: skip
    return pack(made)


def microbatches(packed: PackedBatch) -> list[Microbatch]:
    generator = torch.Generator().manual_seed(1)
    num_tokens = int(packed.cu_seqlens[-1])
    loss = LossBatch(
        rewards=torch.tensor([1.0, 0, 0, 1, 1, 1]),
        group_ids=torch.tensor([0, 0, 1, 1, 2, 2]),
        cu_seqlens=packed.cu_seqlens,
        old_logprobs=-torch.rand(num_tokens, generator=generator) - 2,
        ref_logprobs=-torch.rand(num_tokens, generator=generator) - 2,
    )
    loss = objective().prepare(loss)
    loss = loss.replace(totals=count_totals(loss))
    return [Microbatch(packed.select(torch.tensor(i)), loss.select(torch.tensor(i))) for i in PLAN]


def to_json(cases: list[Case]) -> str:
    return json.dumps([asdict(case) for case in cases])


def from_json(text: str) -> list[Case]:
    return [Case(**fields) for fields in json.loads(text)]
