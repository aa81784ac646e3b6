"""Which processes of an engine are there, from /proc. Zombies do not count: they hold nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

GONE_LIMIT_S = 60.0  # a killed process gives its memory back before it is gone, a GPU's slowly
RESOURCE_TRACKER = b"multiprocessing.resource_tracker"


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
    """Kills a process group and waits until it is gone; it may be this process's own.

    Python's resource trackers are left to end by themselves, as they do when all others are gone:
    they remove the shared memory and semaphores that killed processes leave behind."""
    deadline = time.monotonic() + GONE_LIMIT_S
    while (others := _others(group)) and time.monotonic() < deadline:
        for pid in others:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    if os.getpgid(0) == group:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_until_gone(lambda: group_members(group))
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)  # a tracker that hangs


def without_trackers(pids: Iterable[int]) -> list[int]:
    """Those of the processes that are not Python's resource trackers."""
    return sorted(pid for pid in pids if RESOURCE_TRACKER not in _command(pid))


def _others(group: int) -> list[int]:
    return without_trackers(pid for pid in group_members(group) if pid != os.getpid())


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


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
