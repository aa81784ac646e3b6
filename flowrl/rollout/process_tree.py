"""Which processes of an engine are there, from /proc. Zombies do not count: they hold nothing."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

GONE_LIMIT_S = 10.0  # a killed process gives its memory back before it is gone
SHARED_MEMORY = re.compile(r"/dev/shm/(?:psm_|sem\.mp-)\S+")  # as Python's multiprocessing names it


def children() -> list[int]:
    """Processes below this one, at any depth."""
    parents: dict[int, list[int]] = {}
    for pid, parent, _ in _processes():
        parents.setdefault(parent, []).append(pid)
    found, queue = [], [os.getpid()]
    while queue:
        below = parents.get(queue.pop(), [])
        found += below
        queue += below
    return found


def group_members(group: int) -> list[int]:
    return sorted(pid for pid, _, pgid in _processes() if pgid == group)


def kill_group(group: int) -> None:
    """Kills a process group and waits until it is gone. Its shared memory goes first, since a
    killed process leaves it behind; the group may be this process's own."""
    for path in shared_memory(group_members(group)):
        path.unlink(missing_ok=True)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    wait_until_gone(lambda: group_members(group))


def shared_memory(pids: Sequence[int]) -> set[Path]:
    """Files of multiprocessing's shared memory that these processes have mapped."""
    found: set[Path] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text()
            found |= {Path(name) for name in SHARED_MEMORY.findall(maps)}
    return found


def is_alive(pid: int) -> bool:
    return _read(Path(f"/proc/{pid}/stat")) is not None


def wait_until_gone(remaining: Callable[[], Sequence[int]]) -> None:
    """Waits for killed processes, as long as a kill can take."""
    deadline = time.monotonic() + GONE_LIMIT_S
    while remaining() and time.monotonic() < deadline:
        time.sleep(0.05)


def _processes() -> Iterator[tuple[int, int, int]]:
    """(pid, parent, group) of each."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = _read(stat)
        if fields is not None:
            yield int(stat.parent.name), fields[0], fields[1]


def _read(stat: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError, IndexError):
        state, parent, group = stat.read_text().rpartition(")")[2].split()[:3]
        if state != "Z":
            return int(parent), int(group)
    return None
