"""One process of the parity tests: runs cases and writes how far each is from one process.

torchrun --nproc-per-node 2 megatron_worker.py FOLDER CASES.json OUT.json
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron_cases as cases
import torch
import torch.distributed as dist
from flowrl_kernels.head import vocab_parallel
from interpreter import interpret_liger
from megatron.core import parallel_state

from flowrl import parallel
from flowrl.models import megatron_weights as weights
from flowrl.models.megatron_backend import MegatronBackend
from flowrl.models.megatron_cpu_shim import silence_megatron
from flowrl.parallel_config import ParallelConfig


def differences(case: cases.Case, folder: Path) -> dict[str, float]:
    model = {"backend": "megatron", "liger": case.liger}
    config = cases.config_of(case.layout, "megatron", model=model)
    expected = torch.load(folder / f"{case.model}.pt")
    ranks = place(config)
    backend = MegatronBackend(config, folder / case.model, cases.objective().needs, ranks)
    if case.breaks == "norm_flag":
        for chunk in backend.policy.chunks:
            for name, param in chunk.named_parameters():
                if "layernorm" in name:
                    param.sequence_parallel = False  # type: ignore
    found = {"weights_in_and_out": distance(dict(backend.named_weights()), expected["weights"])}
    packed = cases.batch()
    for reference in (True, False):
        scores = backend.logprobs([packed], reference=reference, entropy=True)
        found[f"logprobs{reference}"] = largest(scores.logprobs - expected["logprobs"])
        found[f"entropy{reference}"] = largest(scores.entropy - expected["entropy"])
    for update in range(case.updates):
        run_update(backend, ranks, expected["updates"][update], found, case)
        if case.breaks:
            return found
    found["trained_weights"] = distance(dict(backend.named_weights()), expected["trained"])
    reference = backend.logprobs([packed], reference=True)
    found["reference_after_training"] = largest(reference.logprobs - expected["logprobs"])
    return found


def run_update(
    backend: MegatronBackend, ranks: parallel.Parallel, expected: Any, found: dict, case: cases.Case
) -> None:
    mine = cases.microbatches(cases.batch())[ranks.rank :: ranks.world_size]
    with unreduced_head(case.breaks == "head_gradient"):
        output = backend.forward_backward(mine, cases.objective(), entropy=True)
    loss = float(ranks.all_reduce(torch.tensor(output.loss).double()))
    keep(found, "loss", abs(loss / expected["loss"] - 1))
    if ranks.world_size == 1:
        keep(found, "loss_logprobs", largest(output.logprobs - expected["logprobs"]))
        for name, rows in expected["metrics"].items():
            keep(found, f"metric_{name}", largest(output.metrics[name] - rows))
    keep(found, "gradients", distance(gradients(backend), expected["gradients"], relative=True))
    info = backend.step()
    keep(found, "grad_norm", abs(info.grad_norm / expected["grad_norm"] - 1))
    keep(found, "lr", abs(info.lr - expected["lr"]))


def gradients(backend: MegatronBackend) -> dict[str, torch.Tensor]:
    """Of this update, whole, under Hugging Face names; heads where this process has them."""
    policy = backend.policy
    gathered = []
    for chunk in policy.chunks:
        params = {}
        for name, param in chunk.module.named_parameters():
            params[name] = whole_gradient(backend, param)
        gathered.append(SimpleNamespace(decoder=chunk.module.decoder, params=params))

    def find(layer: int | None, name: str) -> torch.Tensor:
        for chunk in gathered:
            for own, value in chunk.params.items():
                parts = own.split(".")
                if parts[:2] == ["decoder", "layers"]:
                    number = chunk.decoder.layers[int(parts[2])].layer_number - 1
                    if (number, ".".join(parts[3:])) == (layer, name):
                        return value
                elif layer is None and own == name:
                    return value
        raise KeyError(name)

    made = dict(weights.stream(policy.layout, policy.place, find))
    for chunk in gathered:
        for name, value in chunk.params.items():
            if name.startswith("heads."):
                made[name.removeprefix("heads.")] = value
    return made


def whole_gradient(backend: MegatronBackend, param: Any) -> torch.Tensor:
    """After the reduction each replica's buffer holds the sum in its own share only."""
    _, place = backend.optimizer._share(param)
    whole = torch.zeros(param.numel())
    whole[place] = param.main_grad.flatten()[place]
    torch.distributed.all_reduce(whole, group=parallel_state.get_data_parallel_group())
    return whole.view_as(param)


@contextmanager
def unreduced_head(active: bool):
    """The head's gradient of the hidden states stays this rank's share of the vocabulary."""
    original = vocab_parallel.dist
    if active:
        vocab_parallel.dist = SimpleNamespace(
            all_gather=original.all_gather, all_reduce=lambda *_, **__: None
        )  # type: ignore
    try:
        yield
    finally:
        vocab_parallel.dist = original


def distance(found: dict, expected: dict, *, relative: bool = False) -> float:
    """Largest difference of any tensor, relative to its largest entry if asked (some are zero but
    for rounding, such as the key's bias); infinite where a backbone tensor is missing."""
    backbone = {n for n in expected if not n.startswith("log_z.")}
    if backbone != {n for n in found if not n.startswith("log_z.")}:
        return float("inf")
    largest_of_all = max(largest(tensor) for tensor in expected.values())
    worst = 0.0
    for name, tensor in found.items():
        scale = float(expected[name].abs().max()) + 1e-3 * largest_of_all if relative else 1.0
        worst = max(worst, largest(tensor - expected[name]) / scale)
    return worst


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


def keep(found: dict, name: str, value: float) -> None:
    found[name] = max(found.get(name, 0.0), value)


def place(config: Any) -> parallel.Parallel:
    world = torch.distributed
    return parallel.place(
        world.get_rank(), world.get_world_size(), config.parallel, torch.device("cpu")
    )


def new_world(number: int) -> parallel.Parallel:
    """All processes, in groups of their own: those of an earlier case would keep their threads."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    agents = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), count, False)  # type: ignore
    store = dist.PrefixStore(f"case{number}", agents)  # type: ignore
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    return parallel.place(rank, count, ParallelConfig(), torch.device("cpu"))


def main(folder: Path, wanted: Path, out: Path) -> None:
    torch.set_num_threads(1)
    silence_megatron()
    listed = cases.from_json(wanted.read_text())
    if any(case.liger for case in listed):
        interpret_liger()
    report = {}
    for number, case in enumerate(listed):
        everyone = new_world(number)
        mine = differences(case, folder)
        every = everyone.gather_all(mine)
        report[case.name] = {name: max(one[name] for one in every) for name in mine}
        if everyone.is_main:
            out.write_text(json.dumps(report))
        everyone.gather_all(None)  # all are done with the case
        parallel.stop()
    parallel.leave(0)


if __name__ == "__main__":
    main(*(Path(arg) for arg in sys.argv[1:]))
