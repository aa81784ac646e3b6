"""A killed run, continued, leaves the bytes of an uninterrupted one; other changes are refused."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from arguments import as_args

from flowrl.checkpoint import Checkpoint
from flowrl.cli import main
from flowrl.commands.train import _check_resumable, resumed_config
from flowrl.config import ConfigError
from flowrl.settings import load, merge

STEPS = 8


def command(tiny, run_dir, *more):
    """A run with a learned log Z head and its dropout, so that both have to resume, too."""
    changes = {
        "run": {"dir": str(run_dir)},
        "trainer": {"steps": STEPS},
        "objective": {"preset": "recipe", "log_z": "learned"},
    }
    args = as_args(merge(tiny, changes))
    return [sys.executable, "-m", "flowrl", "train", *args, *more]


def finish(args):
    done = subprocess.run(args, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_after(args, run_dir, step):
    """Starts the run and ends it with SIGKILL once it has logged `step`."""
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL)
    wait_for_step(process, run_dir, step)
    process.send_signal(signal.SIGKILL)
    process.wait()


def wait_for_step(process, run_dir, step):
    deadline = time.monotonic() + 120
    while last_step(run_dir) < step:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_has_one_trainer(tiny, straight, tmp_path):
    run_dir = tmp_path / "run"
    first = subprocess.Popen(command(tiny, run_dir), stdout=subprocess.DEVNULL)
    wait_for_step(first, run_dir, 1)
    first.send_signal(signal.SIGSTOP)
    second = refused(command(tiny, run_dir, "--resume"))
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=120) == 0
    assert f"run {run_dir} is being trained by process {first.pid} on " in second
    assert (run_dir / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


HOLDER = """
import sys
from pathlib import Path
from flowrl.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_of_two_trainers_that_begin_a_run_one_does(tiny, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, run_dir],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    message = refused(command(tiny, run_dir))
    holder.communicate("")
    assert f"is being trained by process {holder.pid} on " in message
    assert not (run_dir / "config.toml").exists()


def test_a_run_that_was_moved_goes_on_where_it_is(tiny, straight, tmp_path):
    run_dir = tmp_path / "moved"
    shutil.copytree(straight, run_dir)
    args = command(tiny, run_dir, "--resume")
    finish([*args, "--trainer.steps", str(STEPS + 1)])
    assert (last_step(run_dir), last_step(straight)) == (STEPS + 1, STEPS)


def refused(args):
    done = subprocess.run(args, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    return done.stderr


def last_step(run_dir):
    try:
        lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else -1
    except (OSError, ValueError):
        return -1


@pytest.fixture(scope="module")
def straight(tiny, base_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    finish(command(tiny, run_dir))
    return run_dir


def test_killed_twice_and_resumed_leaves_the_same_bytes(tiny, straight, tmp_path):
    run_dir = tmp_path / "run"
    kill_after(command(tiny, run_dir), run_dir, 3)
    kill_after(command(tiny, run_dir, "--resume"), run_dir, 6)
    printed = finish(command(tiny, run_dir, "--resume"))
    assert "resumed from step_" in printed
    assert (run_dir / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    for folder in ("samples", "evals"):
        names = sorted(p.name for p in (straight / folder).iterdir())
        assert sorted(p.name for p in (run_dir / folder).iterdir()) == names
        for name in names:
            expected = (straight / folder / name).read_bytes()
            assert (run_dir / folder / name).read_bytes() == expected, name
    state = "checkpoints/step_000008/state.safetensors"
    assert (run_dir / state).read_bytes() == (straight / state).read_bytes()


def test_a_corrupt_newest_checkpoint_costs_steps_and_no_numbers(tiny, straight, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    state = run_dir / "checkpoints/step_000008/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    (run_dir / "report.html").unlink()
    printed = finish(command(tiny, run_dir, "--resume"))
    assert "step_000008 is corrupt" in printed
    assert "resumed from step_" in printed
    assert (run_dir / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("damage", "what"), [("spoil", "damaged ones"), ("remove", "8 steps")])
def test_a_run_without_a_valid_checkpoint_keeps_what_it_has(
    straight, tmp_path, capsys, damage, what
):
    """To start over would remove it."""
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    for checkpoint in (run_dir / "checkpoints").iterdir():
        if damage == "remove":
            shutil.rmtree(checkpoint)
        else:
            (checkpoint / "manifest.json").write_text("{")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--resume", "--run.dir", str(run_dir)])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert what in message
    assert "start a new run with --run.dir DIR" in message
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_run_without_checkpoints_starts_over(tiny, straight, tmp_path):
    """With checkpoint.every = 0 none was due before the end, so there is nothing to lose."""
    run_dir = tmp_path / "run"
    args = command(tiny, run_dir, "--checkpoint.every", "0")
    kill_after(args, run_dir, 3)
    finish(command(tiny, run_dir, "--resume"))
    assert (run_dir / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_a_run_killed_before_its_report_gets_it(tiny, straight, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    (run_dir / "report.html").unlink()
    finish(command(tiny, run_dir, "--resume"))
    assert (run_dir / "report.html").is_file()
    assert (run_dir / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_the_byte_comparison_would_see_another_seed(tiny, straight, tmp_path):
    run_dir = tmp_path / "run"
    finish(command(merge(tiny, {"checkpoint": {"every": 0}}), run_dir, "--seed", "1"))
    assert (run_dir / "metrics.jsonl").read_bytes() != (straight / "metrics.jsonl").read_bytes()


def test_resume_past_the_end_says_how_to_go_on(straight, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--resume", "--run.dir", str(straight)])
    assert stopped.value.code == 2
    assert "past the end: 8 of 8 steps are done; train on with --trainer.steps" in (
        capsys.readouterr().err
    )


def test_a_new_run_does_not_overwrite_an_old_one(straight, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--run.dir", str(straight)])
    assert stopped.value.code == 2
    assert "continue it with --resume, or choose another" in capsys.readouterr().err


def test_resume_without_a_run_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--resume", "--run.dir", str(tmp_path)])
    assert stopped.value.code == 2
    assert "is no run directory" in capsys.readouterr().err


def test_resume_may_lengthen_a_run_and_change_nothing_else():
    recorded = load("countdown_cpu")
    assert resumed_config(recorded, {"trainer": {"steps": 900}}).trainer.steps == 900
    with pytest.raises(ConfigError, match=r"optimizer.lr is .* and cannot become 0.5 on resume"):
        resumed_config(recorded, {"optimizer": {"lr": 0.5}})
    with pytest.raises(ConfigError, match="objective.name"):
        resumed_config(recorded, {"objective": {"name": "grpo"}})


def test_another_kernel_backend_is_refused_unless_named(straight):
    """The checkpoint says which backend made its numbers."""
    trainer_state = json.loads(
        (straight / "checkpoints" / "step_000008" / "trainer.json").read_text()
    )
    assert trainer_state["kernel_backend"]
    config = load("countdown_cpu")
    found = Checkpoint(straight, 8, {**trainer_state, "kernel_backend": "another"})
    with pytest.raises(ConfigError, match="used kernel backend another"):
        _check_resumable(config, found, {})
    _check_resumable(config, found, {"kernels": {"backend": "torch"}})
