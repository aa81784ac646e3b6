"""Checkpoints: whole or absent, and the newest valid one is found."""

import pytest
import torch

from flowrl import checkpoint
from flowrl.parallel import Parallel

ALONE = Parallel(0, 1, torch.device("cpu"))


def write(run_dir, step, text="weights", keep_last=3):
    state = {"step": step, "lengths": {}}

    def backend(directory):
        (directory / "state.bin").write_text(text)

    return checkpoint.save(run_dir, step, state, backend, ALONE, keep_last)


def test_newest_is_found_and_old_ones_are_dropped(tmp_path):
    for step in (1, 2, 3, 10):
        write(tmp_path, step, keep_last=2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000003", "step_000010"]
    found = checkpoint.newest_valid(tmp_path, print)
    assert found is not None
    assert found.step == 10


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["state.bin", "trainer.json", "manifest.json"])
def test_a_corrupt_checkpoint_is_passed_over_and_named(tmp_path, damage, name):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    damage(newest / name)
    said = []
    found = checkpoint.newest_valid(tmp_path, said.append)
    assert found is not None
    assert found.step == 1
    assert len(said) == 1
    assert "step_000002 is corrupt" in said[0]


def test_every_flipped_bit_of_a_manifest_is_seen(tmp_path):
    manifest = write(tmp_path, 1) / "manifest.json"
    whole = manifest.read_bytes()
    for position in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        manifest.write_bytes(bytes(damaged))
        same = damaged.split() == whole.split()  # only the white space differs
        assert same or checkpoint.find_problem(manifest.parent), position
    for text in ("{}", "[]", "null"):
        manifest.write_text(text)
        assert checkpoint.find_problem(manifest.parent)


def test_a_corrupt_newer_checkpoint_is_dropped_and_never_outlives_a_new_one(tmp_path):
    for step in (1, 150, 200):
        write(tmp_path, step)
    checkpoint.drop_newer(tmp_path, 1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    for step in (150, 200):
        write(tmp_path, step, keep_last=3)
    newest = write(tmp_path, 50, keep_last=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [newest.name]


def test_nothing_valid_is_none(tmp_path):
    assert checkpoint.newest_valid(tmp_path, print) is None


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    write(tmp_path, 1)

    def full(directory):
        (directory / "state.bin").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(checkpoint.CheckpointError, match="step 2 could not be written.*No space"):
        checkpoint.save(tmp_path, 2, {"step": 2}, full, ALONE, 3)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_a_partial_directory_of_a_killed_run_is_not_taken_for_a_checkpoint(tmp_path):
    write(tmp_path, 1)
    partial = tmp_path / "checkpoints" / ".step_000002.partial"
    partial.mkdir()
    found = checkpoint.newest_valid(tmp_path, print)
    assert found is not None
    assert found.step == 1
    write(tmp_path, 2)
    assert not partial.exists()
