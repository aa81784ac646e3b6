"""Prompts as token ids."""

import pytest
from chat_model import ASSISTANT, END, USER, make_chat_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from flowrl.data.prompts import encode_prompts
from flowrl.records import Prompt
from flowrl.schema import ConfigError

CHAT = Prompt(1, "hi", messages=({"role": "user", "content": "hi"},))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(make_chat_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def with_bos(tokenizer):
    """As Llama's, which puts a BOS in front; and an EOS behind, as some are set up to."""
    tokenizer.bos_token = "~"
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("~", END)}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"~ $A {END}", special_tokens=list(ids.items())
    )
    yield tokenizer
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = None


def tokens(prompt: Prompt, tokenizer) -> list[str]:
    (encoded,) = encode_prompts([prompt], tokenizer, 9)
    assert encoded.messages == ()
    return tokenizer.convert_ids_to_tokens(encoded.token_ids)


def test_texts_and_messages(tokenizer):
    assert tokens(Prompt(0, "1+2="), tokenizer) == ["1", "+", "2", "="]
    assert tokens(CHAT, tokenizer) == [USER, "h", "i", END, ASSISTANT]
    assert encode_prompts([], tokenizer, 9) == []


def test_a_text_has_the_tokenizers_bos_and_a_template_its_own(with_bos):
    assert with_bos(["1"])["input_ids"] == [with_bos.convert_tokens_to_ids(["~", "1", END])]
    assert tokens(Prompt(0, "1+2="), with_bos) == ["~", "1", "+", "2", "="]
    assert tokens(CHAT, with_bos) == [USER, "h", "i", END, ASSISTANT]


def test_a_mixed_batch_is_that_of_each_alone(with_bos):
    prompts = [CHAT, Prompt(0, "1"), CHAT]
    alone = [encode_prompts([prompt], with_bos, 9)[0] for prompt in prompts]
    assert encode_prompts(prompts, with_bos, 9) == alone


def test_prompts_that_no_model_can_be_given(tokenizer):
    with pytest.raises(ConfigError, match="prompt 3 .* has 4 tokens, the limit is 3"):
        encode_prompts([Prompt(2, "1"), Prompt(3, "1+2=")], tokenizer, 3)
    with pytest.raises(ConfigError, match="prompt 2 .* has 0 tokens"):
        encode_prompts([Prompt(2, "")], tokenizer, 3)
