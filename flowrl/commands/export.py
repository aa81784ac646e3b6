"""`flowrl export RUN --hf DIR`: the newest checkpoint's policy as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from flowrl import assembly, parallel
from flowrl.run_dir import read_config, restore_newest


def run(run_dir: Path, out: Path) -> None:
    config, _ = assembly.resolve(read_config(run_dir))
    parts = assembly.assemble(config, parallel.start(config.model.device), print)
    step = restore_newest(run_dir, parts.backend)
    parts.backend.export_hf(out)
    parts.close()
    print(f"policy of step {step} written to {out}")
