"""The Megatron backend on one process: what does not need ranks to go wrong."""

import dataclasses
import math
from typing import Any

import megatron_cases as cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowrl import objectives, parallel
from flowrl.data.packing import pack
from flowrl.models import Microbatch, megatron_checkpoint
from flowrl.models.hf_backend import HFBackend
from flowrl.models.megatron_backend import MegatronBackend
from flowrl.models.megatron_cpu_shim import on_cpu, silence_megatron
from flowrl.models.megatron_layers import check_transformer_engine
from flowrl.objectives.base import TrustRegion
from flowrl.parallel import Parallel
from flowrl.records import Prompt, Rollout
from flowrl.schema import ConfigError

ALONE = Parallel(0, 1, torch.device("cpu"))
NEEDS = frozenset({"ref", "log_z"})
ALL = megatron_checkpoint.PART_ELEMENTS


@pytest.fixture(scope="module", autouse=True)
def _one_process():
    silence_megatron()
    yield
    parallel.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "qwen3"
    cases.make_model(directory, "qwen3", tied=False)
    return directory


def backend_of(directory, needs=NEEDS, **sections) -> Any:
    config = cases.config_of({}, "megatron", **sections)
    return MegatronBackend(config, directory, needs, ALONE)


def advance(backend):
    output = backend.forward_backward(cases.microbatches(cases.batch()), cases.objective())
    return output.loss, backend.step()


def tensors(backend):
    return {name: tensor.clone() for name, tensor in backend.named_weights()}


@pytest.mark.parametrize(
    ("reference", "part"), [("copy", 1 << 28), ("swap", 1 << 28), ("swap", 500)]
)
def test_state_round_trip_is_exact_after_resets(model, tmp_path, monkeypatch, reference, part):
    """Read at once, or a few parameters at a time."""
    monkeypatch.setattr(megatron_checkpoint, "PART_ELEMENTS", part)
    layout = {"reference": reference}
    config = cases.config_of(layout, "megatron")
    first = MegatronBackend(config, model, NEEDS, ALONE)
    advance(first)
    first.reset_reference()
    first.reset_optimizer()
    advance(first)
    first.save_state(tmp_path)
    expected = [advance(first), advance(first)]
    second = MegatronBackend(config, model, NEEDS, ALONE)
    second.load_state(tmp_path)
    assert (second.policy_version, second.reference_version) == (2, 1)
    assert [advance(second), advance(second)] == expected
    packed = [cases.batch()]
    scores = [b.logprobs(packed, reference=True).logprobs for b in (first, second)]
    assert torch.equal(*scores)
    for name, tensor in tensors(first).items():
        assert torch.equal(tensor, dict(second.named_weights())[name]), name


def test_a_reset_reference_is_the_policy(model):
    backend = backend_of(model)
    packed = [cases.batch()]
    start = backend.logprobs(packed, reference=True).logprobs
    advance(backend)
    own = backend.logprobs(packed).logprobs
    assert torch.equal(backend.logprobs(packed, reference=True).logprobs, start)
    backend.reset_reference()
    assert torch.equal(backend.logprobs(packed, reference=True).logprobs, own)
    assert not torch.equal(own, start)


@pytest.mark.parametrize("part", [ALL, 500])
def test_a_checkpoint_that_reads_back_differently_fails_when_it_is_written(
    model, tmp_path, monkeypatch, part
):
    """One bit of a weight changes between writing and reading."""
    monkeypatch.setattr(megatron_checkpoint, "PART_ELEMENTS", part)
    backend = backend_of(model)
    weight = backend.policy.chunks[0].module.decoder.layers[2].mlp.linear_fc2.weight
    weight = weight.detach().numpy().tobytes()
    save = megatron_checkpoint.dist_checkpointing.save

    def damaging(*args):
        save(*args)
        for file in tmp_path.rglob("*.distcp"):
            data = bytearray(file.read_bytes())
            place = data.find(weight)
            if place >= 0:
                data[place] ^= 1
                file.write_bytes(bytes(data))
                return
        raise AssertionError("the weight is in no file")

    monkeypatch.setattr(megatron_checkpoint.dist_checkpointing, "save", damaging)
    with pytest.raises(megatron_checkpoint.CheckpointMismatchError, match="read"):
        backend.save_state(tmp_path)


def test_state_of_other_heads_is_refused(model, tmp_path):
    backend_of(model, frozenset()).save_state(tmp_path)
    with pytest.raises(ConfigError, match="log_z"):
        backend_of(model).load_state(tmp_path)


def test_state_of_a_smaller_head_is_refused(model, tmp_path):
    backend_of(model, log_z={"layers": 1}).save_state(tmp_path)
    with pytest.raises(ConfigError, match="other parameters"):
        backend_of(model).load_state(tmp_path)


def test_a_step_is_shortened_and_taken_back(model):
    backend = backend_of(model)
    before = tensors(backend)
    start = backend.snapshot()
    advance(backend)
    after = tensors(backend)
    backend.interpolate(start, 0.5)
    for name, tensor in backend.named_weights():
        torch.testing.assert_close(tensor, (before[name] + after[name]) / 2)
    backend.interpolate(start, 0.0)
    for name, tensor in backend.named_weights():
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(ConfigError, match="no natural gradient"):
        backend.natural_step([], TrustRegion(0.1, "conjugate_gradient"))


def test_a_non_finite_gradient_moves_nothing(model):
    backend = backend_of(model)
    advance(backend)
    before = tensors(backend)
    backend.policy.chunks[0].module.output_layer.weight.main_grad[0, 0] = math.nan
    info = backend.step()
    assert info.skipped
    assert backend.policy_version == 1
    for name, tensor in backend.named_weights():
        assert torch.equal(tensor, before[name]), name


def test_values_are_those_of_the_hugging_face_backend(model):
    needs = frozenset({"values"})
    one = backend_of(model, needs)
    other = HFBackend(cases.config_of({}, "hf"), model, needs, ALONE)
    heads = [one.policy.chunks[0].module.heads["value"], other.value_head]
    for head in heads:
        assert head is not None
        torch.nn.init.constant_(head.output.weight, 0.1)
    found, expected = (backend.logprobs([cases.batch()]).values for backend in (one, other))
    torch.testing.assert_close(found, expected)
    assert one.logprobs([cases.batch()], reference=True).values is None


def test_bfloat16_keeps_float32_beside_the_weights(model):
    backend = backend_of(model, model={"backend": "megatron", "dtype": "bfloat16"})
    exact = backend_of(model).logprobs([cases.batch()]).logprobs
    error = (backend.logprobs([cases.batch()]).logprobs - exact).abs().max()
    assert 0 < error < 0.15
    advance(backend)
    chunk = backend.policy.chunks[0].module
    assert {t.dtype for _, t in backend.named_weights()} == {torch.bfloat16}
    assert {p.dtype for p in chunk.heads.parameters()} == {torch.float32}
    mains = backend.optimizer.snapshot()
    assert {main.dtype for main in mains} == {torch.float32}
    weight = chunk.output_layer.weight
    main = backend.optimizer.gather_state(weight, torch.distributed.group.WORLD)["param"]
    assert torch.equal(main.bfloat16(), weight)
    assert not torch.equal(main, weight.float())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize(("limit_mb", "whole"), [(1, False), (64, True)])
def test_no_logits_of_all_tokens_exist(tmp_path, limit_mb, whole):
    """4 x 300 tokens over 4001 words: 4.8 million logits, against 0.26 million in a chunk of 1 MiB.
    With a limit that holds them all the same watch sees them."""
    cases.make_model(tmp_path / "model", "qwen3", False, vocabulary=4001)
    kernels = {"backend": "torch", "max_logits_mb": limit_mb}
    backend = backend_of(tmp_path / "model", kernels=kernels)
    rollouts = [
        Rollout(Prompt(0, "", (5, 6)), n, tuple(range(300)), (0.0,) * 300, False, 0, "")
        for n in range(4)
    ]
    packed = pack(rollouts)
    loss = dataclasses.replace(
        cases.microbatches(cases.batch())[0].loss,
        rewards=torch.tensor([1.0, 0, 0, 1]),
        group_ids=torch.zeros(4, dtype=torch.int64),
        cu_seqlens=packed.cu_seqlens,
        old_logprobs=torch.full((1200,), -8.0),
        ref_logprobs=torch.full((1200,), -8.0),
        advantages=torch.tensor([1.0, -1, -1, 1]),
    )
    objective = objectives.build("flowrl", cases.OBJECTIVE, backend="torch")
    with Largest() as watch:
        backend.forward_backward([Microbatch(packed, loss)], objective)
    assert (watch.elements >= 1200 * 4001) == whole


def test_fp8_without_transformer_engine_says_what_to_install():
    if torch.cuda.is_available():
        pytest.skip("Transformer Engine may be installed here")
    with pytest.raises(ConfigError, match="set model.fp8=off"):
        check_transformer_engine()


def test_fp8_is_refused_before_anything_is_built(model):
    if torch.cuda.is_available():
        pytest.skip("Transformer Engine may be installed here")
    fp8 = {"backend": "megatron", "dtype": "bfloat16", "fp8": "hybrid"}
    with pytest.raises(ConfigError, match="Transformer Engine"):
        backend_of(model, model=fp8)


def test_the_shim_takes_itself_back():
    before = torch.cuda.current_device, torch.cuda.synchronize
    cpu = torch.device("cpu")
    with on_cpu(cpu), on_cpu(cpu):
        assert torch.zeros(2, device="cuda").cuda().device.type == "cpu"
        assert torch.cuda.current_device() == torch.device("cpu")
    assert (torch.cuda.current_device, torch.cuda.synchronize) == before
    with on_cpu(torch.device("cuda")):
        assert (torch.cuda.current_device, torch.cuda.synchronize) == before
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(2, device="cuda")
