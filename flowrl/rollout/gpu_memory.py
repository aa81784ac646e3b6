"""A GPU's memory, shared by a trainer and an engine in two processes."""

from __future__ import annotations

import gc

import torch


def release_cached() -> None:
    """Gives back what torch's allocator keeps for later, so that the engine can have it."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
