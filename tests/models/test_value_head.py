"""The value head on the backbone: gradients, detaching, its own learning rate, its state."""

import pytest
import torch
from test_hf_backend import backend_of, changed, rollouts

from flowrl.data.packing import pack
from flowrl.models import Microbatch
from flowrl.objectives.base import Objective, count_totals
from flowrl.records import LossBatch


class Regression(Objective):
    """Half the squared distance of the values from 1, summed over tokens."""

    name = "regression"

    def __init__(self):
        super().__init__(None)

    @property
    def needs(self):
        return frozenset({"values"})

    def prepare(self, batch, all_reduce=lambda x: x):
        return batch

    def loss(self, batch):
        assert batch.values is not None
        loss = 0.5 * (batch.values - 1.0).square().sum()
        return loss, {"first": batch.values[batch.cu_seqlens[:-1].long()].detach()}


def micro():
    packed = pack(rollouts())
    n = packed.num_sequences
    batch = LossBatch(torch.zeros(n), torch.arange(n), packed.cu_seqlens)
    return Microbatch(packed, batch.replace(totals=count_totals(batch)))


def test_values_start_at_zero_and_learn_with_their_own_rate(tiny_config, base_dir):
    config = changed(
        tiny_config, value_head={"lr": 0.5}, optimizer={"lr": 1e-4, "warmup_updates": 0}
    )
    backend = backend_of(config, base_dir, frozenset({"values"}))
    part = micro()
    before = backend.logprobs([part.packed])
    assert before.values is not None
    assert before.values.tolist() == [0.0] * before.logprobs.numel()
    output = backend.forward_backward([part], Regression())
    assert output.loss == pytest.approx(0.5 * before.logprobs.numel())
    assert output.metrics["first"].shape == (6,)
    backend.step()
    after = backend.logprobs([part.packed]).values
    assert after is not None
    assert float(after.mean()) > 0.1
    rates = {g["peak_lr"] for g in backend.optimizer.param_groups}
    assert rates == {1e-4, 0.5}


@pytest.mark.parametrize("detach", [False, True])
def test_the_gradient_reaches_the_backbone_unless_detached(tiny_config, base_dir, detach):
    config = changed(tiny_config, value_head={"detach_hidden": detach})
    backend = backend_of(config, base_dir, frozenset({"values"}))
    with torch.no_grad():
        backend.params["value_head.output.weight"].fill_(0.1)
    backend.forward_backward([micro()], Regression())
    grads = [
        p.grad.abs().sum() for n, p in backend.params.items()
        if not n.startswith("value_head") and p.grad is not None
    ]  # fmt: skip
    assert (float(sum(grads)) > 0) is not detach


def test_the_head_is_in_the_state_and_not_in_the_weights(tiny_config, base_dir, tmp_path):
    backend = backend_of(tiny_config, base_dir, frozenset({"values"}))
    with torch.no_grad():
        backend.params["value_head.output.bias"].fill_(3.0)
    backend.save_state(tmp_path)
    again = backend_of(tiny_config, base_dir, frozenset({"values"}))
    again.load_state(tmp_path)
    assert again.params["value_head.output.bias"].item() == 3.0
    assert not [name for name, _ in again.named_weights() if "value" in name]
