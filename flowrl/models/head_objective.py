"""An objective as the fused head calls it: on parts of a micro-batch, each of whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowrl.objectives.base import Objective
from flowrl.records import LossBatch


def chunk_objective(
    batch: LossBatch, objective: Objective
) -> Callable[[Tensor, Tensor | None, Any], tuple[Tensor, dict[str, Tensor]]]:
    """`batch` is the micro-batch's record on the head's device."""

    def evaluate(
        logprobs: Tensor, entropy: Tensor | None, rows: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        part = batch
        if (rows.sequences.start, rows.sequences.stop) != (0, batch.num_sequences):
            part = batch.select(torch.arange(batch.num_sequences)[rows.sequences])
        given = {"logprobs": logprobs, "entropy": entropy, "log_z": None, "values": None}
        return objective.loss(part.replace(**{**given, **rows.inputs}))

    return evaluate
