"""What killed processes leave behind: their folders and their shared memory go."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from flowrl.rollout.owned_folder import OwnedFolder, remove_abandoned
from flowrl.rollout.process_tree import (
    group_members,
    kill_group,
    wait_until_gone,
    without_trackers,
)

OWNER = """
import sys, time
from pathlib import Path
from flowrl.rollout.owned_folder import OwnedFolder
folder = OwnedFolder("mine-", Path(sys.argv[1]))
(folder.path / "inside").mkdir()
(folder.path / "inside" / "weights").write_text("w")
print(folder.path, flush=True)
time.sleep(300)
"""
SHARER = """
import time
from multiprocessing import shared_memory
memory = shared_memory.SharedMemory(create=True, size=4096)
print("/dev/shm/" + memory.name, flush=True)
time.sleep(300)
"""


def started(code, *args):
    """A process of its own group, and the path that it prints."""
    command = [sys.executable, "-c", code, *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_folder_is_removed_when_its_owner_has_been_killed_and_not_before(tmp_path):
    process, path = started(OWNER, tmp_path)
    foreign = tmp_path / "other-1"
    foreign.mkdir()
    mine = OwnedFolder("mine-", tmp_path)
    assert (path / "inside/weights").exists()  # its owner lives
    process.kill()
    process.wait()
    remove_abandoned("mine-", tmp_path)
    assert not path.exists()
    assert mine.path.is_dir()
    assert foreign.is_dir()
    mine.remove()
    mine.remove()
    assert list(tmp_path.iterdir()) == [foreign]


def test_the_next_folder_clears_away_what_was_abandoned(tmp_path):
    abandoned = tmp_path / "mine-1"
    abandoned.mkdir()
    folder = OwnedFolder("mine-", tmp_path)
    assert list(tmp_path.iterdir()) == [folder.path]
    folder.remove()


def test_two_threads_may_remove_a_folder(tmp_path, monkeypatch):
    """A second close could be of a descriptor that somebody else has by now."""
    folder = OwnedFolder("mine-", tmp_path)
    closed, close = [], os.close

    def slow_close(descriptor):
        closed.append(descriptor)
        time.sleep(0.2)
        close(descriptor)

    monkeypatch.setattr("os.close", slow_close)
    threads = [threading.Thread(target=folder.remove) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert closed.count(closed[-1]) == 1
    assert not folder.path.exists()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "mine-link").symlink_to(tmp_path / "precious")
    OwnedFolder("mine-", tmp_path).remove()
    assert (tmp_path / "precious").is_dir()


def test_a_killed_group_leaves_no_shared_memory():
    process, path = started(SHARER)
    tracker = [pid for pid in group_members(process.pid) if pid != process.pid]
    assert tracker, "Python's resource tracker is in the group, and must not be killed with it"
    wait_until_gone(lambda: without_trackers(tracker))  # it has a name of its own once it runs
    assert path.exists()
    began = time.monotonic()
    kill_group(process.pid)
    process.wait()
    assert time.monotonic() - began < 8
    assert not path.exists()
    assert group_members(process.pid) == []
