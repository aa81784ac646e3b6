"""The Hugging Face backend: packing without leaks, invariances of loss and gradient, its state."""

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM

from flowrl import objectives
from flowrl.config import LogZConfig
from flowrl.data.packing import pack
from flowrl.models import Microbatch
from flowrl.models import packed_attention as attention
from flowrl.models.hf_backend import HFBackend
from flowrl.models.hf_forward import check_forward, probe
from flowrl.models.log_z import LogZHead, _dropout_mask
from flowrl.objectives.base import count_totals
from flowrl.parallel import Parallel
from flowrl.records import LossBatch, Prompt, Rollout
from flowrl.schema import ConfigError
from flowrl.settings import from_mapping, merge, to_mapping

ALONE = Parallel(0, 1, torch.device("cpu"))
LENGTHS = [(7, 3), (5, 9), (9, 1), (6, 6), (8, 2), (3, 12)]  # prompt and response tokens


def rollouts(seed=0, vocabulary=18):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, (prompt, response) in enumerate(LENGTHS):
        ids = torch.randint(1, vocabulary, (prompt + response,), generator=generator).tolist()
        made.append(
            Rollout(
                Prompt(index // 2, "", tuple(ids[:prompt])), index % 2, tuple(ids[prompt:]),
                (0.0,) * response, False, 0, "",
            )
        )  # fmt: skip
    return made


def changed(config, **sections):
    return from_mapping(merge(to_mapping(config), sections))


def backend_of(config, base_dir, needs=frozenset({"ref", "log_z"})):
    return HFBackend(config, base_dir, needs, ALONE)


def one_by_one(base_dir, batch, temperature):
    """Log-probs of each sequence alone, through transformers' own forward and head."""
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    found = []
    for i in range(batch.num_sequences):
        part = batch.select(torch.tensor([i]))
        with torch.no_grad():
            logits = model(input_ids=part.token_ids[None]).logits[0] / temperature
        logprobs = logits.log_softmax(-1)[part.hidden_rows]
        found.append(logprobs.gather(1, part.targets[:, None])[:, 0])
    return torch.cat(found)


def test_a_packed_batch_gives_its_sequences_logprobs_one_by_one(tiny_config, base_dir):
    config = changed(tiny_config, rollout={"temperature": 0.7})
    batch = pack(rollouts())
    expected = one_by_one(base_dir, batch, 0.7)
    for reference in (False, True):
        found = backend_of(config, base_dir).logprobs([batch], reference=reference, entropy=True)
        torch.testing.assert_close(found.logprobs, expected, atol=1e-5, rtol=0)
        assert found.entropy is not None
        assert bool((found.entropy > 0).all())


def test_the_comparison_would_see_a_leak(tiny_config, base_dir):
    """Negative control: the same packed row with one causal mask over all of it."""
    backend = backend_of(tiny_config, base_dir)
    backend.model.set_attn_implementation("sdpa")
    batch = pack(rollouts())
    with torch.no_grad():
        hidden = backend.model.base_model(
            input_ids=batch.token_ids[None], position_ids=torch.arange(len(batch.token_ids))[None]
        ).last_hidden_state[0]
    logits = hidden[batch.hidden_rows] @ backend._head_weight(backend.model).T
    leaked = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    assert (leaked - one_by_one(base_dir, batch, 1.0)).abs().max() > 1e-2


def loss_batch(objective, packed, seed=1):
    generator = torch.Generator().manual_seed(seed)
    num_tokens = int(packed.cu_seqlens[-1])
    batch = LossBatch(
        rewards=torch.tensor([1.0, 0, 0, 1, 1, 1]),
        group_ids=torch.tensor([0, 0, 1, 1, 2, 2]),
        cu_seqlens=packed.cu_seqlens,
        old_logprobs=-torch.rand(num_tokens, generator=generator) - 1,
        ref_logprobs=-torch.rand(num_tokens, generator=generator) - 1,
    )
    batch = objective.prepare(batch)
    return batch.replace(totals=count_totals(batch))


def gradients(config, base_dir, objective, plan):
    backend = backend_of(config, base_dir, objective.needs)
    packed = pack(rollouts())
    batch = loss_batch(objective, packed)
    microbatches = [
        Microbatch(packed.select(torch.tensor(i)), batch.select(torch.tensor(i))) for i in plan
    ]
    output = backend.forward_backward(microbatches, objective)
    grads = {name: p.grad for name, p in backend.params.items() if p.grad is not None}
    assert grads.keys() == backend.params.keys()
    return output, grads


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flowrl", {}),
        ("flowrl", {"preset": "recipe"}),
        ("tb", {}),
        ("rloo", {}),
        ("grpo", {"kl_coef": 0.04}),
    ],
)
def test_loss_and_gradient_do_not_depend_on_split_or_order(tiny_config, base_dir, name, options):
    objective = objectives.build(name, options)
    tiny_config = changed(tiny_config, log_z=dataclasses.asdict(objective.log_z_defaults))
    whole, expected = gradients(tiny_config, base_dir, objective, [[0, 1, 2, 3, 4, 5]])
    split, found = gradients(tiny_config, base_dir, objective, [[5, 1], [3], [0, 4, 2]])
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)
    order = torch.tensor([5, 1, 3, 0, 4, 2])
    for key, rows in split.metrics.items():
        torch.testing.assert_close(rows, whole.metrics[key][order], atol=1e-4, rtol=1e-4)
    scale = max(float(g.abs().max()) for g in expected.values())
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key], atol=2e-6 * scale, rtol=1e-4)


def test_the_log_z_gradient_reaches_the_backbone_unless_detached(tiny_config, base_dir):
    objective = objectives.build("tb", {})
    packed = pack(rollouts())

    def log_z_share(detach):
        """Gradient of the embedding through the head alone: with and without its output layer."""
        config = changed(tiny_config, log_z={"detach_hidden": detach})
        found = []
        for weight in (0.0, 1.0):
            backend = backend_of(config, base_dir, objective.needs)
            output = backend.params["log_z.output.weight"]
            output.data = weight * torch.linspace(-1, 1, output.shape[1])[None]
            hidden = backend._hidden(backend.model, packed)
            assert backend.log_z_head is not None
            backend.log_z_head(hidden, packed).sum().backward()
            grad = backend.params["model.embed_tokens.weight"].grad
            found.append(torch.zeros(1) if grad is None else grad)
        return [float(g.abs().max()) for g in found]

    assert log_z_share(detach=True) == [0.0, 0.0]
    without, through = log_z_share(detach=False)
    assert without == 0.0
    assert through > 0.0


def test_first_update_moves_and_a_non_finite_gradient_does_not(tiny_config, base_dir):
    backend = backend_of(tiny_config, base_dir)
    name, param = next(iter(backend.params.items()))
    for other in backend.params.values():
        other.grad = torch.ones_like(other)
    before = param.detach().clone()
    info = backend.step()
    warmup = tiny_config.optimizer.warmup_updates
    assert info.lr == pytest.approx(tiny_config.optimizer.lr / warmup)
    assert not info.skipped
    assert not torch.equal(before, param), name
    before, moments = param.detach().clone(), backend.optimizer.state[param]["exp_avg"].clone()
    for other in backend.params.values():
        other.grad = torch.ones_like(other)
    param.grad = torch.full_like(param, float("nan"))
    info = backend.step()
    assert info.skipped
    assert backend.policy_version == 1
    torch.testing.assert_close(param.detach(), before, rtol=0, atol=0)
    torch.testing.assert_close(backend.optimizer.state[param]["exp_avg"], moments, rtol=0, atol=0)


def test_what_the_loss_did_not_touch_decays_as_it_does_on_several_ranks(tiny_config, base_dir):
    backend = backend_of(changed(tiny_config, optimizer={"weight_decay": 0.1}), base_dir)
    name, param = next((n, p) for n, p in backend.params.items() if p.ndim == 2)
    for other in backend.params.values():
        other.grad = torch.ones_like(other)
    param.grad = None
    before = param.detach().clone()
    lr = backend.step().lr
    torch.testing.assert_close(param.detach(), before * (1 - lr * 0.1), msg=name)
    assert not torch.equal(param, before)


def test_state_round_trip_is_exact(tiny_config, base_dir, tmp_path):
    def advance(backend, seed):
        generator = torch.Generator().manual_seed(seed)
        for param in backend.params.values():
            param.grad = torch.randn(param.shape, generator=generator)
        return backend.step()

    first = backend_of(tiny_config, base_dir)
    advance(first, 0)
    first.save_state(tmp_path)
    expected = advance(first, 1)
    second = backend_of(tiny_config, base_dir)
    second.load_state(tmp_path)
    assert advance(second, 1) == expected
    for name, param in first.params.items():
        assert torch.equal(param, second.params[name]), name


def test_state_of_another_start_model_is_refused(tiny_config, base_dir, tmp_path):
    backend = backend_of(tiny_config, base_dir)
    backend.save_state(tmp_path)
    text = (tmp_path / "backend.json").read_text()
    fingerprint = text.split('"start_model": "')[1].split('"')[0]
    (tmp_path / "backend.json").write_text(text.replace(fingerprint, "0" * len(fingerprint)))
    with pytest.raises(ConfigError, match="is not the one that this run began with"):
        backend.load_state(tmp_path)


def test_state_without_the_head_is_refused(tiny_config, base_dir, tmp_path):
    backend_of(tiny_config, base_dir, frozenset()).save_state(tmp_path)
    with pytest.raises(ConfigError, match="log_z"):
        backend_of(tiny_config, base_dir).load_state(tmp_path)


def test_a_model_with_another_head_is_refused(base_dir):
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    head: Any = model.get_output_embeddings()
    own, probed = probe(model, ALONE.device)
    model.set_attn_implementation(attention.NAME)
    check_forward(model, own, probed)
    head.bias = torch.nn.Parameter(torch.ones(head.weight.shape[0]))
    model.set_attn_implementation("sdpa")
    own, probed = probe(model, ALONE.device)
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(ConfigError, match=r"hidden @ weight.T"):
        check_forward(model, own, probed)


def test_a_model_that_cannot_tell_packed_sequences_apart_is_refused(base_dir):
    def leaky(*args, packed_cu_seqlens, packed_max_length, **options):
        """All of the row as one sequence, as a recurrent layer would see it."""
        total = int(packed_cu_seqlens[-1])
        sizes = {"packed_cu_seqlens": packed_cu_seqlens[[0, -1]], "packed_max_length": total}
        return attention.packed_attention(*args, **sizes, **options)

    AttentionInterface.register("leaky", leaky)
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    own, probed = probe(model, ALONE.device)
    model.set_attn_implementation("leaky")
    with pytest.raises(ConfigError, match="packed sequences"):
        check_forward(model, own, probed)


def test_bfloat16_compute_keeps_float32_weights(tiny_config, base_dir):
    config = changed(tiny_config, model={"dtype": "bfloat16"})
    objective = objectives.build("flowrl", {})
    backend = backend_of(config, base_dir, objective.needs)
    batch = pack(rollouts())
    expected = one_by_one(base_dir, batch, 1.0)
    error = (backend.logprobs([batch]).logprobs - expected).abs().max()
    assert 0 < error < 0.1
    _, grads = gradients(config, base_dir, objective, [[0, 1, 2, 3, 4, 5]])
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert {t.dtype for _, t in backend.named_weights()} == {torch.bfloat16}


def test_gradient_checkpointing_changes_nothing(tiny_config, base_dir):
    objective = objectives.build("flowrl", {})
    plan = [[0, 1, 2], [3, 4, 5]]
    _, expected = gradients(tiny_config, base_dir, objective, plan)
    config = changed(tiny_config, model={"gradient_checkpointing": True})
    _, found = gradients(config, base_dir, objective, plan)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"softcap": 30.0}, "no soft cap"),
        ({"sliding_window": 3}, "no sliding window"),
    ],
)
def test_attention_features_that_are_missing_are_refused(extra, message):
    x = torch.randn(1, 2, 5, 4)
    sizes = {"packed_cu_seqlens": torch.tensor([0, 5], dtype=torch.int32), "packed_max_length": 5}
    with pytest.raises(ValueError, match=message):
        attention.packed_attention(torch.nn.Identity(), x, x, x, None, **sizes, **extra)


def test_grouped_query_attention_matches_repeated_keys():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 7, 8, generator=generator)
    k, v = (torch.randn(1, 2, 7, 8, generator=generator) for _ in range(2))
    sizes = {
        "packed_cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32),
        "packed_max_length": 4,
    }
    module = torch.nn.Identity()
    found, _ = attention.packed_attention(module, q, k, v, None, **sizes)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    expected, _ = attention.packed_attention(module, q, k, v, None, **sizes)
    torch.testing.assert_close(found, expected)


def test_keys_for_all_heads_stand_as_groups_do():
    q, k, v = (torch.randn(7, heads, 8) for heads in (6, 2, 2))
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    every = attention.for_all_heads(k, v, 6)
    found = attention.attend(q, *every, offsets, 4, None)
    torch.testing.assert_close(found, attention.attend(q, k, v, offsets, 4, None))


def test_attention_computes_in_the_dtype_of_autocast():
    """Float32 angles make q and k float32, whatever autocast says."""
    x = torch.randn(1, 2, 5, 4)
    sizes = {"packed_cu_seqlens": torch.tensor([0, 5], dtype=torch.int32), "packed_max_length": 5}

    class Seen(TorchDispatchMode):
        dtypes: ClassVar[set[torch.dtype]] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "index_copy" in str(func):  # the padding, before SDPA casts for itself
                self.dtypes.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Seen():
        attention.packed_attention(torch.nn.Identity(), x, x, x.bfloat16(), None, **sizes)
    assert Seen.dtypes == {torch.bfloat16}


# --- the log Z head


@pytest.mark.parametrize(("width", "count"), [(3584, 25_715_201), (5120, 52_464_641)])
def test_head_has_the_papers_number_of_parameters(width, count):
    head = LogZHead(width, LogZConfig())
    assert sum(p.numel() for p in head.parameters()) == count


def test_pooling_takes_or_leaves_the_last_prompt_token():
    packed = pack(rollouts())
    hidden = torch.randn(packed.token_ids.numel(), 8, generator=torch.Generator().manual_seed(0))
    start, length = int(packed.model_cu_seqlens[1]), LENGTHS[1][0]
    for include, taken in ((True, length), (False, length - 1), (None, length)):
        head = LogZHead(8, LogZConfig(include_last_prompt_token=include))
        pooled = head._pool(hidden, packed)
        torch.testing.assert_close(pooled[1], hidden[start : start + taken].mean(0))


def test_dropout_is_shared_by_a_group_and_has_its_rate():
    packed = pack(rollouts())
    hidden = torch.ones(packed.token_ids.numel(), 64)
    head = LogZHead(64, LogZConfig(dropout=0.25))
    torch.nn.init.normal_(head.output.weight)
    keys = torch.tensor([7, 7, 8, 8, 9, 9])
    first, second = head(hidden, packed, keys), head(hidden, packed, keys)
    assert torch.equal(first, second)
    torch.testing.assert_close(first[::2], first[1::2])
    assert len({round(value, 3) for value in first.tolist()}) == 3
    assert not torch.equal(first, head(hidden, packed, keys + 1))
    mask = _dropout_mask(torch.arange(2000), 0, 100, 0.25)
    assert float((mask == 0).float().mean()) == pytest.approx(0.25, abs=0.005)
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.01)
    other = _dropout_mask(torch.arange(2000), 1, 100, 0.25)
    agree = ((mask == 0) == (other == 0)).float().mean()
    assert float(agree) == pytest.approx(0.25**2 + 0.75**2, abs=0.01)


def test_log_z_starts_at_zero():
    packed = pack(rollouts())
    hidden = torch.randn(packed.token_ids.numel(), 8)
    assert LogZHead(8, LogZConfig())(hidden, packed).tolist() == [0.0] * 6
