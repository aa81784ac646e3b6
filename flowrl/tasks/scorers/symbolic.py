"""Reward by math-verify, which parses LaTeX and compares by algebra: +1 for a right answer, else
-1. What math-verify cannot read or decide within LIMIT_S is a wrong answer; a reference answer that
it cannot read is the data's fault, and raises.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

LIMIT_S = 2  # of one parse or one comparison; math-verify takes whole seconds

logging.getLogger("math_verify").setLevel(logging.ERROR)  # or it prints what a model wrote


def score(prompt: str, response: str, answer: str, row: dict[str, Any]) -> dict[str, Any]:
    given = parse(response, parsing_timeout=LIMIT_S)
    right = verify(reference(answer), given, timeout_seconds=LIMIT_S)
    return {"reward": 1.0 if right else -1.0, "correct": right}


@lru_cache(maxsize=1024)
def reference(answer: str) -> list[Any]:
    """What math-verify reads in a reference answer. Raises ValueError if that is nothing."""
    found = parse(f"\\boxed{{{answer}}}", parsing_timeout=LIMIT_S)
    if not found:
        raise ValueError(f"math-verify cannot read the reference answer {answer!r}")
    return found
