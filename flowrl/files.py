"""Files that are there whole or not at all, and what is in them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Written aside and renamed: a reader never sees half a file, nor two writers a mixture."""
    aside = path.with_suffix(f".{os.getpid()}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def sha256(path: Path) -> str:
    """Hex digest of the contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
