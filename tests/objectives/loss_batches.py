"""Loss batches that the tests of objectives share: two with golden values, and random ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl.objectives import LossResult, loss, names
from flowrl.records import Actions, LossBatch, to_cu_seqlens


def batch_from_rows(
    rows: dict[str, list[list[float]]], rewards: list[float], group_ids: list[int]
) -> LossBatch:
    """A float64 batch from one list of per-token numbers per sequence and field."""
    lengths = torch.tensor([len(row) for row in rows["logprobs"]])
    flat: dict[str, Any] = {
        name: torch.tensor([x for row in values for x in row], dtype=torch.float64)
        for name, values in rows.items()
    }
    return LossBatch(
        rewards=torch.tensor(rewards, dtype=torch.float64),
        group_ids=torch.tensor(group_ids),
        cu_seqlens=to_cu_seqlens(lengths),
        log_z=torch.zeros(len(rewards), dtype=torch.float64),
        **flat,
    )


def one_group_of_four() -> LossBatch:
    """The batch of the golden table of FlowRL's bounds: rewards +1 -1 -1 +1, log Z = 0.25."""
    rows = {
        "logprobs": [[-0.5, -1.0, -0.25], [-2.0, -0.1], [-0.3, -0.3, -0.3], [-1.2]],
        "old_logprobs": [[-0.6, -0.9, -0.35], [-3.5, -1.6], [-0.1, -0.2, -0.4], [-1.2]],
        "ref_logprobs": [[-0.7, -1.1, -0.30], [-1.5, -0.4], [-0.4, -0.1, -0.3], [-1.0]],
    }
    rows["old_values"] = [[0.3, 0.5, -0.2], [0.0, -0.4], [0.1, 0.2, 0.0], [0.6]]
    rows["values"] = [[0.4, 0.1, -0.2], [0.9, -0.5], [0.1, -0.6, 0.2], [0.7]]
    batch = batch_from_rows(rows, [1.0, -1.0, -1.0, 1.0], [0, 0, 0, 0])
    return batch.replace(log_z=torch.full((4,), 0.25, dtype=torch.float64))


LENGTHS = (3, 5, 1, 4, 2, 5, 3, 4)


def two_groups_of_four() -> LossBatch:
    """The batch of the golden table of all objectives: log Z = 0.3 and -0.2."""
    positions = [[(i, t) for t in range(length)] for i, length in enumerate(LENGTHS)]
    old = [[-0.2 * (1 + (3 * i + 5 * t) % 7) for i, t in row] for row in positions]

    def moved(change) -> list[list[float]]:
        return [
            [o + change(i, t) for o, (i, t) in zip(o_row, row, strict=True)]
            for o_row, row in zip(old, positions, strict=True)
        ]

    rows = {
        "old_logprobs": old,
        "logprobs": moved(lambda i, t: 0.15 * ((2 * i + 3 * t) % 5 - 2)),
        "ref_logprobs": moved(lambda i, t: -0.10 * ((i + 2 * t) % 3 - 1)),
        "rollout_logprobs": moved(lambda i, t: 0.05 * ((3 * i + t) % 4 - 1.5)),
    }
    batch = batch_from_rows(rows, [1, 0, 0, 1, 1, 1, 0, 1], [0] * 4 + [1] * 4)
    return batch.replace(log_z=torch.tensor([0.3] * 4 + [-0.2] * 4, dtype=torch.float64))


def random_batch(seed: int, group_sizes: list[int], masked: bool = True) -> LossBatch:
    """Ragged sequences of 1 to 6 tokens, groups shuffled among each other, random mask."""
    generator = torch.Generator().manual_seed(seed)

    def normal(n: int) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    num_sequences = sum(group_sizes)
    lengths = torch.randint(1, 7, (num_sequences,), generator=generator)
    num_tokens = int(lengths.sum())
    cu_seqlens = to_cu_seqlens(lengths)
    old_logprobs = -normal(num_tokens).abs()
    mask = torch.rand(num_tokens, generator=generator) < 0.7
    mask[cu_seqlens[:-1].long()] = True  # every sequence keeps a token
    groups = torch.arange(len(group_sizes)).repeat_interleave(torch.tensor(group_sizes))
    order = torch.randperm(num_sequences, generator=generator)
    batch = LossBatch(
        rewards=normal(num_sequences),
        group_ids=groups[order] * 7 - 3,
        cu_seqlens=cu_seqlens,
        old_logprobs=old_logprobs,
        logprobs=old_logprobs + 0.2 * normal(num_tokens),
        ref_logprobs=old_logprobs + 0.3 * normal(num_tokens),
        response_mask=mask if masked else None,
        log_z=normal(len(group_sizes))[groups[order]],
    )
    old_values = normal(num_tokens)
    values = old_values + 0.4 * normal(num_tokens)
    places = torch.cat([torch.arange(size) for size in group_sizes])[order]
    trajectories = groups[order] * 10 + places // 2  # pairs of candidates, the first one taken
    actions = Actions(trajectories, trajectories, places % 2 == 0, -0.1 * places.double())
    return batch.replace(old_values=old_values, values=values, actions=actions)


Cases = list[tuple[str, dict[str, Any]]]


def every_objective(variants: Cases, without: Cases | None = None) -> Cases:
    """The variants, and every objective with its defaults: a registered one joins by itself.
    Objectives of `without` stay out unless they are among the variants."""
    left_out = {name for name, _ in without or []}
    rest = [name for name in names() if (name, {}) not in variants and name not in left_out]
    return [*variants, *((name, {}) for name in rest)]


def leaf(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.detach().clone().requires_grad_()


def evaluate(name: str, batch: LossBatch, **options) -> tuple[LossResult, Tensor, Tensor | None]:
    """The one-call form: its result, d loss / d logprobs (T,) and d loss / d log_z (N,) or None."""
    batch = batch.replace(logprobs=leaf(batch.logprobs), log_z=leaf(batch.log_z))
    result = loss(name, batch, **options)
    result.loss.backward()
    assert batch.logprobs is not None
    assert batch.log_z is not None
    assert batch.logprobs.grad is not None
    return result, batch.logprobs.grad, batch.log_z.grad


def assert_close(actual, expected, atol: float = 1e-12, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        atol=atol,
        rtol=rtol,
    )
