"""One small model and one running engine for all tests with vLLM; without it they are skipped.

make test-vllm
"""

import importlib.util
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from flowrl.records import Prompt, SampleRequest
from flowrl.rollout.engine_protocol import EngineSettings, Message
from flowrl.rollout.process_tree import group_members, without_trackers
from flowrl.rollout.vllm_sampler import SyncOptions, VLLMSampler

WORDS = ["<pad>", "<eos>", "<unk>", *"0123456789+-= "]
EOS = 1
START_LIMIT_S = 240.0


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="vllm is not installed: make test-vllm")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def tokenizer():
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore
    inner.decoder = decoders.Fuse()  # type: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer):
    return make_model(tmp_path_factory.mktemp("model"), tokenizer, len(WORDS))


def make_model(path, tokenizer, vocab_size):
    """A Qwen3 of two layers whose distributions are far from uniform."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        tie_word_embeddings=False, eos_token_id=EOS, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 2 and "embed" not in name:
                param.mul_(6.0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def load_model(path):
    """The trainer's side: the same weights in transformers."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False)


def settings_for(model_dir, log_path):
    return EngineSettings(
        model_dir=str(model_dir), log_path=str(log_path), max_model_len=160, max_sequences=128
    )


def sampler_for(model_dir, tokenizer, start, restarts=0):
    options = SyncOptions(
        generate_timeout_s=60.0,
        sync_timeout_s=60.0,
        bucket_bytes=1 << 15,  # several buckets
        checked_tensors=64,
        restarts=restarts,
    )
    return VLLMSampler(model_dir, tokenizer, torch.float32, start, options)


def make_request(tokenizer, count=6, **changes):
    texts = [f"{i}+{i + 2}=" for i in range(count)]
    prompts = [Prompt(i, t, tuple(tokenizer(t)["input_ids"])) for i, t in enumerate(texts)]
    settings = {
        "group_size": 8, "max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "seed": 0,
        "step": 1,
    }  # fmt: skip
    return SampleRequest(prompts=prompts, **{**settings, **changes})


def trainer_logprobs(model, rollout, temperature):
    """Of the response's tokens, by transformers in one pass (n,) float64."""
    prompt = rollout.prompt.token_ids
    ids = torch.tensor([[*prompt, *rollout.response_ids]])
    logprobs = (model(ids).logits[0].double() / temperature).log_softmax(-1)
    chosen = ids[0, len(prompt) :]
    return logprobs[len(prompt) - 1 : -1].gather(1, chosen[:, None])[:, 0]


def logp_abs_diff(model, rollouts, temperature):
    differences = [
        trainer_logprobs(model, r, temperature) - torch.tensor(r.rollout_logprobs).double()
        for r in rollouts
    ]
    return float(torch.cat(differences).abs().mean())


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def stop_worker(group):
    """An engine whose request stays under way until somebody kills it."""
    os.kill(without_trackers(group_members(group))[-1], signal.SIGSTOP)


def update(model, seed):
    """A step of training, as far as weights are concerned."""
    torch.manual_seed(seed)
    for param in model.parameters():
        param.add_(torch.randn_like(param) * 0.05 * param.abs().mean())


class Faulty:
    """A connection that loses or changes one tensor on its way; the rest is the real engine."""

    def __init__(self, host, name, change):
        self.host, self.changed, self.change = host, name, change
        self.name, self.log_tail, self.close = host.name, host.log_tail, host.close
        self.interrupt, self.trainer_address = host.interrupt, host.trainer_address

    def call(self, message, limit_s):
        if message.op == "weights" and self.changed in message.arrays:
            message = self.change(message, self.changed)
        return self.host.call(message, limit_s)


def lose(message, name):
    kept = [d for d in message.fields["tensors"] if d[0] != name]
    return Message("weights", {"tensors": kept}, {n: message.arrays[n] for n, *_ in kept})


def flip(message, name):
    changed = message.arrays[name].copy()
    changed[-2] ^= 1
    return Message("weights", message.fields, {**message.arrays, name: changed})


def below(pid):
    """Its children: a thread's are not its main thread's."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for children in lists for child in children.read_text().split()]


def wait_until(condition, limit_s):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
