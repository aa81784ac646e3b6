"""trajectory_balance on ragged sequences: memory moves, so GB/s are what counts. 64 Ki tokens on a
CPU; 32 Mi on a GPU, more than its cache holds. A call checks its offsets on the host, so these are
few and long sequences; 20 calls are timed together.
"""

from __future__ import annotations

from typing import Any

import torch
from flowrl_kernels import WeightBound, backends, trajectory_balance
from torch import Tensor

from bench import measure

NUM_SEQUENCES = {"cpu": 64, "cuda": 256}
MEAN_LENGTH = {"cpu": 1024, "cuda": 131072}
CALLS = {"cpu": 1, "cuda": 20}


def bytes_moved(num_tokens: int) -> int:
    """Log-probs, old, reference (4 bytes each) and the mask read, the mask read again, gradients
    written; per-sequence tensors are left out."""
    return num_tokens * (3 * 4 + 1 + 1 + 4)


def make(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_sequences = NUM_SEQUENCES[device.type]
    spread = torch.rand(num_sequences, generator=generator) * 2
    lengths = (MEAN_LENGTH[device.type] * spread).long()
    total = int(lengths.sum())
    logprobs = -torch.rand(total, generator=generator)
    noise = torch.randn(2, total, generator=generator)
    batch = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.001 * noise[0],
        "ref_logprobs": logprobs + 0.3 * noise[1],
        "log_z": torch.randn(num_sequences, generator=generator),
        "rewards": torch.randn(num_sequences, generator=generator),
        "response_mask": torch.rand(total, generator=generator) < 0.9,
    }
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    return {name: x.to(device) for name, x in {**batch, "cu_seqlens": cu_seqlens}.items()}


def evaluate(batch: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    leaves = {name: batch[name].detach().requires_grad_() for name in ("logprobs", "log_z")}
    loss = trajectory_balance(
        **{**batch, **leaves},  # type: ignore[arg-type]
        beta=15.0,
        weight_bound=WeightBound(high=10.0),
        scale=1 / batch["log_z"].numel(),
        backend=backend,
    ).loss
    loss.backward()
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": loss.detach(), **found}


def run(device: torch.device, repeats: int, names: str, rows: list[Any]) -> dict[str, Any]:
    """Appends to `rows`; says what was measured."""
    from bench.run import Row, wanted

    batch = make(device)
    exact = {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}
    truth = evaluate(exact, "reference")
    steps = {}
    for backend in backends.implemented("trajectory_balance"):
        row = Row(f"flowrl {backend}")
        if not wanted(row.provider, names):
            continue
        rows.append(row)
        try:
            backends.resolve("trajectory_balance", backend, backends.Call(device, torch.float32))
        except ValueError as reason:
            row.skipped = str(reason)
            continue
        if backend == "reference" and device.type == "cuda":
            row.skipped = "the definition, a loop over sequences: thousands of launches a call"
            continue
        try:
            found = evaluate(batch, backend)
        except Exception as error:  # the other backends go on
            row.fail(error)
            continue
        row.errors = {
            name: float(f"{(found[name].double() - x).abs().max() / x.abs().max():.3g}")
            for name, x in truth.items()
        }
        worst = max(row.errors.values())
        row.wrong = None if worst <= 1e-4 else f"relative error {worst:.2g}"
        if row.wrong is None:
            steps[row.provider] = lambda backend=backend: evaluate(batch, backend)
            row.extra_bytes = measure.extra_bytes(steps[row.provider], device)
    timings = measure.interleaved(steps, max(repeats, 10), device, CALLS[device.type])
    for row in rows:
        row.timing = timings.get(row.provider)
    num_tokens = batch["logprobs"].numel()
    num_sequences = batch["log_z"].numel()
    return {"tokens": num_tokens, "sequences": num_sequences, "bytes": bytes_moved(num_tokens)}
