"""`flowrl serve HOST:PORT`: vLLM engines on this node for trainers on others."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from flowrl.rollout.engine_listener import EngineListener
from flowrl.rollout.engine_token import read_token
from flowrl.rollout.vllm_start import check_python


def run(address: str, token_file: str, python: str, log: Path) -> None:
    check_python(python)
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
