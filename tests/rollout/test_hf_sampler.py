import collections
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from flowrl.rollout.hf_sampler import HFSampler, sample_tokens
from flowrl.schema import ConfigError

TEXTS = ["1+2=", "12+34=", "7=", "9-8-7=", "123456+7=", "3+3="]


def make_sampler(tiny, max_batch_sequences=1024, dtype=torch.float32):
    return HFSampler(tiny.path, dtype, torch.device("cpu"), tiny.tokenizer, max_batch_sequences)


def teacher_forced(model, rollout, temperature):
    """Log-probs (n,) of the response in one full forward pass, float64 after the logits."""
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0, len(rollout.prompt.token_ids) - 1 :]
    logprobs = torch.log_softmax(logits.double() / temperature, -1)
    return logprobs.gather(1, ids[0, len(rollout.prompt.token_ids) :, None])[:, 0]


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral", "gpt2"])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_logprobs_are_those_of_the_sampled_distribution(
    tiny_model, make_request, architecture, temperature
):
    tiny = tiny_model(architecture)
    sampler = make_sampler(tiny)
    rollouts = sampler.sample(make_request(tiny.prompts(TEXTS), temperature=temperature))
    untempered_gap = 0.0
    for rollout in rollouts:
        reported = torch.tensor(rollout.rollout_logprobs, dtype=torch.float64)
        expected = teacher_forced(sampler.model, rollout, temperature)
        torch.testing.assert_close(reported, expected, atol=1e-5, rtol=0)
        untempered = teacher_forced(sampler.model, rollout, 1.0)
        untempered_gap = max(untempered_gap, float((reported - untempered).abs().max()))
    # Negative control: a sampler that forgot the temperature would be seen.
    assert temperature == 1.0 or untempered_gap > 0.05


def test_a_leak_of_the_padding_would_be_seen(tiny_model, make_request):
    """Negative control: prompts of other lengths do change log-probs if padding is not masked."""
    tiny = tiny_model()
    sampler = make_sampler(tiny)
    (rollout, *_) = sampler.sample(make_request(tiny.prompts(TEXTS)))
    padded = torch.tensor([[0, 0, 0, *rollout.prompt.token_ids]])
    with torch.no_grad():
        logits = sampler.model(padded).logits[0, -1].double()
    leaked = torch.log_softmax(logits, -1)[rollout.response_ids[0]]
    assert abs(float(leaked) - rollout.rollout_logprobs[0]) > 1e-3


@pytest.mark.parametrize("architecture", ["qwen3", "mistral"])
def test_batch_layout_changes_nothing(tiny_model, make_request, architecture):
    tiny = tiny_model(architecture)
    prompts = tiny.prompts(TEXTS)
    sampler = make_sampler(tiny)
    whole = {(r.prompt.index, r.sample): r for r in sampler.sample(make_request(prompts))}
    layouts = {
        "subset": (sampler, prompts[2:4]),
        "reversed": (sampler, prompts[::-1]),
        "groups cut by the batch limit": (make_sampler(tiny, 3), prompts),
        "one at a time": (make_sampler(tiny, 1), prompts[:3]),
    }
    for name, (other, chosen) in layouts.items():
        rollouts = other.sample(make_request(chosen))
        keys = [(r.prompt.index, r.sample) for r in rollouts]
        assert keys == [(p.index, s) for p in chosen for s in range(4)], name
        for key, rollout in zip(keys, rollouts, strict=True):
            assert rollout.response_ids == whole[key].response_ids, name
            assert rollout.rollout_logprobs == pytest.approx(
                whole[key].rollout_logprobs, abs=1e-5
            ), name


def test_noise_depends_on_seed_step_stream_and_sample(tiny_model, make_request):
    tiny = tiny_model()
    sampler = make_sampler(tiny)
    prompts = tiny.prompts(TEXTS)

    def responses(**changes):
        return [r.response_ids for r in sampler.sample(make_request(prompts, **changes))]

    base = responses()
    assert responses() == base
    assert len(set(base[:4])) > 1, "members of a group must differ"
    for change in ({"seed": 1}, {"step": 2}, {"stream": "eval"}):
        assert responses(**change) != base, change
    longer = responses(max_new_tokens=20)
    assert all(x == y[: len(x)] for x, y in zip(base, longer, strict=True))


def test_stops_at_eos_or_the_limit(tiny_model, make_request):
    tiny = tiny_model()
    rollouts = make_sampler(tiny).sample(make_request(tiny.prompts(TEXTS), group_size=8))
    for r in rollouts:
        assert r.truncated == (1 not in r.response_ids)
        assert 1 not in r.response_ids[:-1]
        assert len(r.rollout_logprobs) == len(r.response_ids) <= 16
        assert len(r.response_ids) == 16 or not r.truncated
        specials = {0, 1, 2}
        letters = tiny.tokenizer.convert_ids_to_tokens(
            [i for i in r.response_ids if i not in specials]
        )
        assert r.text == "".join(letters)
        assert r.policy_version == 0
    assert {r.truncated for r in rollouts} == {True, False}, "the test must see both"


def with_eos(tiny, directory, eos):
    """A copy of the model whose generation config says `eos`."""
    shutil.copytree(tiny.path, directory)
    for name in ("config.json", "generation_config.json"):
        file = directory / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": eos}))
    return dataclasses.replace(tiny, path=directory)


def test_stops_at_every_eos_of_the_generation_config(tiny_model, make_request, tmp_path):
    tiny = tiny_model()
    request = make_request(tiny.prompts(TEXTS))
    plain = make_sampler(tiny).sample(request)
    stop = collections.Counter(i for r in plain for i in r.response_ids[:-1]).most_common(1)[0][0]
    several = make_sampler(with_eos(tiny, tmp_path / "model", [1, stop])).sample(request)
    for before, after in zip(plain, several, strict=True):
        ids = before.response_ids
        assert after.response_ids == (ids[: ids.index(stop) + 1] if stop in ids else ids)
        assert after.truncated == (before.truncated and stop not in ids)


def test_nucleus_by_hand():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.05, 0.45]])).repeat(4, 1)
    noise = torch.tensor([0.0001, 0.46, 0.48, 0.9999], dtype=torch.float64)
    # top_p 0.8 keeps 0.45 and 0.4: in the order of ids, [0, 0.4, 0, 0.45] / 0.85
    tokens, logprobs = sample_tokens(logits, noise, 1.0, 0.8)
    assert tokens.tolist() == [1, 1, 3, 3]
    expected = [math.log(x / 0.85) for x in (0.4, 0.4, 0.45, 0.45)]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-6)
    # top_p 0.86 needs the third, 0.1, too; a mass that is reached exactly needs no more
    tokens, _ = sample_tokens(logits, noise, 1.0, 0.86)
    assert tokens.tolist() == [0, 1, 1, 3]
    halves = torch.log(torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64))
    tokens, logprobs = sample_tokens(halves, noise[-1:], 1.0, 0.5)
    assert (tokens.item(), logprobs.item()) == (0, pytest.approx(0.0, abs=1e-12))


def test_nucleus_never_leaves_its_set(tiny_model, make_request):
    tiny = tiny_model()
    sampler = make_sampler(tiny)
    request = make_request(tiny.prompts(TEXTS), top_p=0.7, temperature=0.8)
    for rollout in sampler.sample(request):
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
        with torch.no_grad():
            logits = sampler.model(ids[:, :-1]).logits[0, len(rollout.prompt.token_ids) - 1 :]
        probs = torch.softmax(logits.double() / 0.8, -1)
        for p, token, logprob in zip(
            probs.numpy(), rollout.response_ids, rollout.rollout_logprobs, strict=True
        ):
            order = np.argsort(-p, kind="stable")
            kept = order[: int(np.searchsorted(np.cumsum(p[order]), 0.7)) + 1]
            assert token in kept
            assert logprob == pytest.approx(math.log(p[token] / p[kept].sum()), abs=1e-5)


def test_frequencies_follow_the_distribution():
    probs = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.25, 0.05])
    noise = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    tokens, logprobs = sample_tokens(probs.log().repeat(20000, 1), noise, 1.0, 1.0)
    assert torch.bincount(tokens, minlength=6).tolist() == [0, 10000, 4000, 0, 5000, 1000]
    torch.testing.assert_close(logprobs.exp(), probs.double()[tokens], atol=1e-7, rtol=0)


def test_extreme_noise_draws_no_impossible_token():
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]]).repeat(2, 1)
    noise = torch.tensor([2.0**-49, 1 - 2.0**-49], dtype=torch.float64)
    assert sample_tokens(logits, noise, 1.0, 1.0)[0].tolist() == [1, 2]


def test_new_weights_are_sampled_from(tiny_model, make_request):
    tiny = tiny_model()
    sampler = make_sampler(tiny)
    request = make_request(tiny.prompts(TEXTS))
    before = sampler.sample(request)
    trained = AutoModelForCausalLM.from_pretrained(tiny.path)
    for param in trained.parameters():
        param.data.mul_(1.1)
    sampler.load_weights(((n, p.detach()) for n, p in trained.named_parameters()), 7)
    after = sampler.sample(request)
    assert [r.response_ids for r in after] != [r.response_ids for r in before]
    assert {r.policy_version for r in after} == {7}
    for rollout in after:
        reported = torch.tensor(rollout.rollout_logprobs, dtype=torch.float64)
        torch.testing.assert_close(
            reported, teacher_forced(trained, rollout, 1.0), atol=1e-5, rtol=0
        )


def test_weights_of_another_model_are_refused(tiny_model):
    sampler = make_sampler(tiny_model())
    other = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2").path)
    with pytest.raises(ValueError, match=r"no weight called transformer\.wte"):
        sampler.load_weights(other.named_parameters(), 1)
    assert sampler.policy_version == 0


def test_nan_weights_name_the_prompt(tiny_model, make_request):
    tiny = tiny_model()
    sampler = make_sampler(tiny)
    sampler.model.get_output_embeddings().weight.data[3] = math.nan
    with pytest.raises(ValueError, match=r"NaN for prompt .* at policy version 0"):
        sampler.sample(make_request(tiny.prompts(TEXTS)))


def test_prompts_that_do_not_fit_are_refused(tiny_model, make_request):
    tiny = tiny_model()
    sampler = make_sampler(tiny)
    with pytest.raises(ConfigError, match="64 positions, got 60 \\+ 5 tokens"):
        sampler.sample(make_request(tiny.prompts(["1" * 60]), max_new_tokens=5))
    assert len(sampler.sample(make_request(tiny.prompts(["1" * 60]), max_new_tokens=4))) == 4
    with pytest.raises(ConfigError, match="prompt \\[0\\] has none"):
        sampler.sample(make_request(tiny.prompts([""])))


def test_a_model_without_eos_is_refused(tiny_model, tmp_path):
    tiny = with_eos(tiny_model(), tmp_path / "model", None)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny.path)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="add eos_token_id to generation_config"):
        make_sampler(dataclasses.replace(tiny, tokenizer=tokenizer))


def test_a_policy_without_finite_logits_is_named(tiny_model, make_request):
    """One prompt alone: its first token's embedding is NaN, in padded batches as well."""
    tiny = tiny_model()
    sampler = make_sampler(tiny)
    prompts = tiny.prompts(["1+2=", "7*1=", "12+34="])
    only = set(prompts[1].token_ids) - set(prompts[0].token_ids) - set(prompts[2].token_ids)
    table = sampler.model.get_input_embeddings().weight
    table[sorted(only)[0]] = math.nan
    with pytest.raises(ValueError, match=f"NaN for prompt {prompts[1].index} at policy version 0"):
        sampler.sample(make_request(prompts, max_new_tokens=1))
