import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

from flowrl.config import BaseConfig
from flowrl.models.base_model import build_base, character_tokenizer
from flowrl.models.hf_files import (
    check_model_dir,
    fingerprint,
    load_causal_lm,
    load_tokenizer,
)
from flowrl.schema import ConfigError

CPU = torch.device("cpu")
ALPHABET = " +0123456789="


class Sums:
    """`3+4=` and its sum: learnt in a few steps, so that a loss that ignores answers is seen."""

    name = "sums"
    alphabet: str | None = ALPHABET

    def example(self, index: int) -> tuple[str, str] | None:
        first, second = index % 10, index // 10 % 10
        return f"{first}+{second}=", str(first + second)


class Mixed(Sums):
    def example(self, index):
        return ("1=", "x")


def load_exactly(path: Path) -> Any:
    """The model as transformers loads it, with no tensor missing or unexpected."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    return model


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return BaseConfig(
        cache_dir=str(tmp_path_factory.mktemp("base")),
        hidden_size=32,
        num_layers=2,
        num_kv_heads=2,
        intermediate_size=64,
        pretrain_steps=60,
        pretrain_rows=32,
        pretrain_lr=1e-2,
    )


@pytest.fixture(scope="module")
def base(settings):
    return build_base(Sums(), settings, lambda line: None)


def test_base_is_a_standard_directory(base):
    check_model_dir(base)
    model = load_exactly(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert model.config.vocab_size == len(tokenizer)
    assert len(tokenizer) % 4
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    text = "12 + 3=0 "
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == list(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_pretraining_learns_answers_and_their_end(base):
    """From ln 16 = 2.8 nats at the start; and only answers are learnt, not the prompts' letters."""
    record = json.loads((base / "base.json").read_text())
    assert record["final_loss"] < 1.5
    assert record["alphabet"] == ALPHABET
    assert record["hidden_size"] == 32
    model, tokenizer = load_causal_lm(base, torch.float32, CPU), load_tokenizer(base)
    ids = torch.tensor([tokenizer("3+4=7")["input_ids"]])
    with torch.no_grad():
        probs = model(ids).logits[0].softmax(-1)
    one_digit = probs[3].argmax()
    assert tokenizer.decode([one_digit]) in "0123456789"
    assert probs[4, tokenizer.eos_token_id] > 0.2
    plus = tokenizer.convert_tokens_to_ids("+")  # always second in a prompt, never in an answer
    assert probs[0, plus] < 0.2


def test_base_is_built_once_and_again_for_other_settings(base, settings):
    said: list[str] = []
    assert build_base(Sums(), settings, said.append) == base
    assert not said
    other = dataclasses.replace(settings, pretrain_steps=1)

    class Others(Sums):
        def example(self, index):
            return ("1=", str(index % 7))

    paths = {
        base,
        build_base(Sums(), other, said.append),
        build_base(Sums(), dataclasses.replace(other, seed=1), said.append),
        build_base(Others(), other, said.append),
    }
    assert len(paths) == 4
    assert len({fingerprint(path) for path in paths}) == 4
    assert all("building base model" in line or "ready" in line for line in said)


def test_building_repeats_bit_for_bit(settings, tmp_path):
    few = dataclasses.replace(settings, pretrain_steps=3)
    paths = [
        build_base(
            Sums(), dataclasses.replace(few, cache_dir=str(tmp_path / name)), lambda line: None
        )
        for name in "ab"
        if torch.manual_seed(ord(name))  # the caller's generator must not matter
    ]
    assert paths[0].name == paths[1].name
    assert fingerprint(paths[0]) == fingerprint(paths[1])


def test_building_leaves_the_callers_generator_alone(settings, tmp_path):
    few = dataclasses.replace(settings, pretrain_steps=1, cache_dir=str(tmp_path))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_base(Sums(), few, lambda line: None)
    assert torch.equal(torch.rand(3), expected)


def test_an_interrupted_build_leaves_nothing(settings, tmp_path):
    few = dataclasses.replace(settings, pretrain_steps=1, cache_dir=str(tmp_path))
    partial = tmp_path / f".{build_base(Sums(), few, lambda line: None).name}.partial"
    whole = next(tmp_path.iterdir())
    shutil.rmtree(whole)
    partial.mkdir()  # as a killed build leaves it
    (partial / "config.json").write_text("half")

    def interrupt(line):
        if "ready" not in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_base(Sums(), few, interrupt)
    assert not whole.exists()
    check_model_dir(build_base(Sums(), few, lambda line: None))
    assert list(tmp_path.iterdir()) == [whole]


def test_tasks_that_cannot_have_a_base_model_are_refused(settings):
    task = Sums()
    task.alphabet = None
    with pytest.raises(ConfigError, match=r"set model\.path"):
        build_base(task, settings, print)
    with pytest.raises(ConfigError, match="only characters of the task's alphabet"):
        build_base(Mixed(), settings, lambda line: None)


@pytest.mark.parametrize("size", range(9, 14))
def test_vocabulary_is_never_a_multiple_of_four(size):
    tokenizer = character_tokenizer("abcdefghijklm\n"[:size])
    assert len(tokenizer) % 4
    assert len(tokenizer) <= size + 4
    assert tokenizer("ba")["input_ids"] == [4, 3]
    assert tokenizer("b?")["input_ids"] == [4, tokenizer.unk_token_id]


def test_alphabets_with_repeated_characters_are_refused():
    with pytest.raises(ConfigError, match=r"remove \['a'\]"):
        character_tokenizer("abca")


# --- directories that do not work


@pytest.fixture
def broken(base, tmp_path):
    return shutil.copytree(base, tmp_path / "model")


def test_missing_parts_are_named(broken):
    with pytest.raises(ConfigError, match="not found"):
        check_model_dir(broken / "nowhere")
    for pattern, message in [
        ("tokenizer*", "no tokenizer"),
        ("*.safetensors", "no weights"),
        ("config.json", r"no config\.json"),
    ]:
        for file in broken.glob(pattern):
            file.unlink()
        with pytest.raises(ConfigError, match=message):
            check_model_dir(broken)


def test_a_model_that_is_not_causal_is_refused(broken):
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertForMaskedLM(BertConfig(vocab_size=30, intermediate_size=8, **sizes)).save_pretrained(broken)
    with pytest.raises(ConfigError, match="causal language model, got BertForMaskedLM"):
        check_model_dir(broken)


def test_a_tokenizer_of_another_model_is_refused(broken):
    character_tokenizer(ALPHABET + "abcdefgh").save_pretrained(broken)
    with pytest.raises(ConfigError, match="has 25 tokens, the model embeds 17"):
        check_model_dir(broken)


def test_unknown_and_damaged_models_are_refused(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"does not load.*layer_types"):
        load_causal_lm(broken, torch.float32, CPU)
    layers = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (broken / "config.json").write_text(json.dumps({**config, **layers}))
    with pytest.raises(ConfigError, match=r"lacks \d+ weights .*layers\.2"):
        load_causal_lm(broken, torch.float32, CPU)
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(ConfigError, match="does not load"):
        check_model_dir(broken)
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="does not load"):
        load_causal_lm(broken, torch.float32, CPU)
    with pytest.raises(ConfigError, match="is damaged"):
        check_model_dir(broken)


def test_fingerprint_sees_weights_and_config(broken):
    before = fingerprint(broken)
    (broken / "base.json").write_text("{}")
    assert fingerprint(broken) == before
    for name in ("model.safetensors", "config.json"):
        data = bytearray((broken / name).read_bytes())
        data[-5] ^= 1
        (broken / name).write_bytes(data)
        assert fingerprint(broken) != before
        data[-5] ^= 1
        (broken / name).write_bytes(data)
    assert fingerprint(broken) == before
