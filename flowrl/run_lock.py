"""One trainer at a time in a run directory.

    with RunLock(Path("runs/a")):     # ConfigError while another process holds it
        ...

The operating system frees the lock of a process that ends, however it ends. On a file system that
keeps no locks nothing is locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from pathlib import Path

from flowrl.schema import ConfigError

FILE = "lock"
HELD = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """Of a directory that exists."""

    def __init__(self, directory: Path) -> None:
        self._file = (directory / FILE).open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in HELD:
                return
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ConfigError(
                f"run {directory} is being trained by {holder}; wait for its end or stop it, or "
                "choose another with --run.dir DIR"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}\n")
        self._file.flush()

    def release(self) -> None:
        """The file stays: one that is removed could be locked by two."""
        self._file.truncate(0)
        self._file.close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()
