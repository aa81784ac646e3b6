"""`flowrl export RUN --hf DIR`: the newest checkpoint's policy as a Hugging Face directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flowrl import assembly, parallel
from flowrl.models.hf_export import check_export_dir
from flowrl.run_dir import read_config, restore_newest


def run(run_dir: Path, out: Path) -> None:
    recorded = read_config(run_dir)
    layout = recorded.parallel.fitting(parallel.num_processes())
    config, objective = assembly.resolve(dataclasses.replace(recorded, parallel=layout))
    check_export_dir(out)
    ranks = parallel.start(config.model.device, config.parallel)
    backend = assembly.build_backend(config, objective, ranks, print)
    step = restore_newest(run_dir, backend)
    backend.export_hf(out)
    if ranks.is_main:
        print(f"policy of step {step} written to {out}")
    parallel.stop()
