"""Jobs that workers import by name: one that goes well, one that raises, one that dies."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class TouchJob:
    path: Path
    what: str = "touch"

    @property
    def label(self) -> str:
        return self.path.name

    @property
    def log(self) -> Path:
        return self.path.with_suffix(".log")

    def work(self) -> None:
        print(f"working at {self.path.name}")
        if self.what == "raise":
            raise ValueError("wrong on purpose")
        if self.what == "die":
            os._exit(3)
        self.path.write_text(f"{torch.get_num_threads()}")
