"""Every registered objective through the trainer: it learns something, goes on from a checkpoint to
the same numbers, and does the same on two processes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from every_objective import cases, trainer

from flowrl.parallel import Parallel

ALONE = Parallel(0, 1, torch.device("cpu"))
SCRIPT = Path(__file__).parent / "every_objective.py"
NAMES = list(cases())


@pytest.fixture(scope="module")
def ranks(base_dir, tmp_path_factory):
    """Metrics of two steps by objective, of one process and of two."""
    out = tmp_path_factory.mktemp("objectives")
    launchers = {
        "one": [],
        "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    }
    for name, launcher in launchers.items():
        command = [sys.executable, *launcher, str(SCRIPT), str(base_dir.parent), f"{out}/{name}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
    return tuple(json.loads((out / name).read_text()) for name in launchers)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_compute_what_one_does(ranks, name):
    one, two = (found[name] for found in ranks)
    for expected, found in zip(one, two, strict=True):
        assert found.keys() == expected.keys()
        for key in expected:
            assert math.isfinite(found[key]), key
            assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=2e-5), key


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_goes_on_to_the_same_numbers(name, base_dir, tmp_path):
    overrides = cases()[name]
    cache = str(base_dir.parent)
    straight = trainer(overrides, cache, ALONE)
    straight.step(1)
    straight.save(tmp_path)
    state = json.loads(json.dumps(straight.state()))
    expected = straight.step(2)
    resumed = trainer(overrides, cache, ALONE)
    resumed.load(state, tmp_path)
    found = resumed.step(2)
    assert found.metrics == expected.metrics
    assert found.rollouts == expected.rollouts
    after, again = (dict(t.backend.named_weights()) for t in (straight, resumed))
    for key, weight in after.items():
        assert torch.equal(again[key], weight), key


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_move(ranks, name):
    one, _ = ranks
    assert sum(row["actor/grad_norm"] for row in one[name]) > 0
