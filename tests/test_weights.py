import pytest
import torch
from torch import nn

from flowrl import weights
from flowrl.weights import checksum, copy_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(3, bias=False)


def test_copies_in_place_and_casts():
    source, target = nn.Linear(3, 2), nn.Linear(3, 2).bfloat16()
    storage = target.weight.data_ptr()
    copy_weights(target, source.named_parameters())
    assert target.weight.data_ptr() == storage
    assert torch.equal(target.weight, source.weight.bfloat16())
    assert torch.equal(target.bias, source.bias.bfloat16())


def test_checksum_tells_values_and_order():
    x = torch.tensor([1.0, 2.0, 3.0])
    assert checksum(x) == checksum(x.clone())
    assert checksum(x) != checksum(torch.tensor([2.0, 1.0, 3.0]))
    assert checksum(x) != checksum(torch.tensor([1.0, 2.0, 3.0000002]))
    assert checksum(torch.zeros(2)) != checksum(torch.tensor([0.0, -0.0]))
    # bits of float16 1.0 and 2.0 are 0x3C00 and 0x4000; factors are 1 and 3
    assert checksum(torch.tensor([1.0, 2.0]).half()) == 0x3C00 + 3 * 0x4000


def test_checksum_does_not_depend_on_the_parts_it_is_made_in(monkeypatch):
    x = torch.arange(23.0)
    whole = checksum(x)
    monkeypatch.setattr(weights, "_CHECKED_AT_ONCE", 5)
    assert checksum(x) == whole


def test_checksum_of_the_whole_changes_with_any_weight():
    module = nn.Linear(3, 2)
    before = copy_weights(module, list(nn.Linear(3, 2).named_parameters()))
    changed = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert copy_weights(module, changed.items()) == before
    changed["bias"][1] += 1e-6
    assert copy_weights(module, changed.items()) != before


def test_either_name_of_a_tied_weight_will_do():
    new = torch.randn(5, 3)
    for name in ("embed.weight", "head.weight"):
        module = Tied()
        copy_weights(module, [(name, new), ("norm.weight", torch.ones(3))])
        assert torch.equal(module.embed.weight, new)
        assert module.head.weight is module.embed.weight


def test_tied_weights_with_different_values_are_refused():
    weights = [("embed.weight", torch.zeros(5, 3)), ("norm.weight", torch.ones(3))]
    with pytest.raises(ValueError, match=r"embed\.weight"):
        copy_weights(Tied(), [*weights, ("head.weight", torch.ones(5, 3))])
    copy_weights(Tied(), [*weights, ("head.weight", torch.zeros(5, 3))])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"weight": (2, 3), "bias": (2,), "gate": (1,)}, "no weight called gate"),
        ({"weight": (3, 2), "bias": (2,)}, r"shape \(2, 3\), got \(3, 2\)"),
        ({"weight": (1, 3), "bias": (2,)}, "shape"),  # copy_ alone would broadcast it
        ({"weight": (2, 3)}, "bias for one"),
    ],
)
def test_refuses_other_names_and_shapes(weights, message):
    with pytest.raises(ValueError, match=message):
        copy_weights(nn.Linear(3, 2), [(k, torch.zeros(v)) for k, v in weights.items()])


def test_sees_weights_that_do_not_arrive():
    """The trainer's tensor changes after it was copied, and the receiver's after it arrived."""
    target = nn.Linear(3, 2)

    def overwritten():
        yield "weight", torch.ones(2, 3)
        yield "bias", torch.ones(2)
        target.weight.data[1, 1] = 0.0

    with pytest.raises(ValueError, match="weight for one"):
        copy_weights(target, overwritten())
