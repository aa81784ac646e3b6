"""`flowrl export RUN --hf DIR`: the newest checkpoint's policy as a Hugging Face directory.

`--model.path DIR` says where the run's starting model lies now.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl import assembly, parallel
from flowrl.models.hf_export import check_export_dir
from flowrl.run_dir import read_config, restore_newest
from flowrl.schema import ConfigError
from flowrl.settings import from_mapping, merge, to_mapping


def run(run_dir: Path, out: Path, overrides: Mapping[str, Any]) -> None:
    recorded = read_config(run_dir)
    if overrides:
        if overrides.keys() != {"model"} or overrides["model"].keys() != {"path"}:
            raise ConfigError("flowrl export takes no setting but model.path; leave the others out")
        recorded = from_mapping(merge(to_mapping(recorded), overrides))
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
