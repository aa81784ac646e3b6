"""Temporary folders that do not outlive their owner for long.

A process that is killed cannot remove its folder; the next one that makes a folder of that name
does it. The owner holds a lock on its folder, which ends with the process: unlike a process number
a lock means the same in every container that shares the memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from pathlib import Path

_owned: set[Path] = set()  # by this process


class OwnedFolder:
    """`parent`/`prefix`XXXXXXXX, locked by this process until `remove`."""

    def __init__(self, prefix: str, parent: Path) -> None:
        self._removing = threading.Lock()
        remove_abandoned(prefix, parent)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            with contextlib.suppress(FileNotFoundError):
                self._lock = os.open(self.path, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                if self.path.is_dir():
                    _owned.add(self.path)
                    return
                os.close(self._lock)  # somebody took it for abandoned before it was locked

    def remove(self) -> None:
        """Also when it is removed already, and by several threads."""
        with self._removing:
            shutil.rmtree(self.path, ignore_errors=True)
            _owned.discard(self.path)
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1


def remove_owned() -> None:
    """All that this process still owns: for one that is about to kill itself."""
    for path in list(_owned):
        shutil.rmtree(path, ignore_errors=True)


def remove_abandoned(prefix: str, parent: Path) -> None:
    """Folders of that name whose owner is gone. Those of other users are left alone."""
    for path in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # locked, not ours, or gone meanwhile
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(descriptor)
