"""Settings as command-line arguments."""

from __future__ import annotations

from typing import Any


def as_args(overrides: dict[str, Any]) -> list[str]:
    """The overrides as command-line arguments."""
    return [
        f"--{section}.{key}={value}"
        for section, values in overrides.items()
        for key, value in values.items()
    ]
