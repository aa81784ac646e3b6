"""`flowrl serve HOST:PORT`: vLLM engines on this node for trainers on others."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from flowrl.rollout.engine_listener import EngineListener
from flowrl.rollout.engine_token import read_token
from flowrl.schema import require


def run(address: str, token_file: str, python: str, log: Path) -> None:
    require(
        not python or shutil.which(python) is not None,
        f"--python {python} is no program; give the Python of an environment that has vllm",
    )
    listener = EngineListener(address, read_token(token_file), python, log)
    signal.signal(signal.SIGTERM, _end)
    host = address.rpartition(":")[0]
    print(f"flowrl: engines for trainers at {host}:{listener.port}; log {log}", flush=True)
    try:
        listener.serve()
    finally:
        listener.close()


def _end(*_: Any) -> None:
    sys.exit(128 + signal.SIGTERM)
