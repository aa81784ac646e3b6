"""Two processes compute what one does.

Adam divides each gradient by its own size, so an entry that is rounding noise moves by the whole
learning rate in an arbitrary direction; an epsilon far above that noise keeps it still."""

import json
import os
import subprocess
import sys

import pytest
from arguments import as_args

from flowrl import parallel
from flowrl.cli import main
from flowrl.schema import ConfigError
from flowrl.settings import merge

STEPS = 3


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def train(tiny, run_dir, *launcher, objective=("--objective.log_z", "learned")):
    settings = merge(
        tiny,
        {
            "run": {"dir": str(run_dir)},
            "trainer": {"steps": STEPS},
            "optimizer": {"lr": 1e-4, "eps": 1e-3},
        },
    )
    args = [*launcher, "-m", "flowrl", "train", *as_args(settings), *objective]
    done = subprocess.run(args, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tiny, base_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    one = train(tiny, folder / "one", sys.executable)
    two = train(tiny, folder / "two", *TORCHRUN)
    return folder, one, two


def test_losses_gradients_and_samples_are_those_of_one_process(runs):
    _, one, two = runs
    assert_same(one, two)


def assert_same(one, two):
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for expected, found in zip(one, two, strict=True):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            if name in ("actor/loss", "actor/grad_norm"):
                assert found[name] == pytest.approx(value, rel=1e-5), name
            elif name != "kind":
                assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_the_batchs_logprobs_are_those_of_one_process(runs):
    folder, _, _ = runs
    for step in range(1, STEPS + 1):
        name = f"samples/step_{step:06d}.jsonl"
        rows = [
            [json.loads(line) for line in (folder / run / name).read_text().splitlines()]
            for run in ("one", "two")
        ]
        for expected, found in zip(*rows, strict=True):
            assert found["response_ids"] == expected["response_ids"]
            assert found["rollout_logprobs"] == pytest.approx(
                expected["rollout_logprobs"], abs=1e-5
            )


def test_a_rank_may_have_nothing_to_sample(tiny, base_dir, tmp_path):
    """Of four prompts three are replayed: the fresh one is rank 0's."""
    replay = ["--objective.name", "vargrad", "--loop.replay_fraction", "0.75"]
    one = train(tiny, tmp_path / "one", sys.executable, objective=replay)
    two = train(tiny, tmp_path / "two", *TORCHRUN, objective=replay)
    assert [row["reward/replayed_frac"] for row in two if row["kind"] == "train"] == [0, 0.75, 0.75]
    assert_same(one, two)


@pytest.mark.parametrize(("argument", "code"), [("--version", 0), ("nonsense", 2)])
def test_a_rank_ends_without_the_interpreters_end(argument, code):
    """Where gloo's threads may still ask for the interpreter."""
    program = (
        "import atexit, sys; atexit.register(print, 'tidied up')\n"
        "sys.argv = ['flowrl', sys.argv[1]]; from flowrl.__main__ import run; run()"
    )
    for ranks, tidied in (("1", True), ("2", False)):
        done = subprocess.run(
            [sys.executable, "-c", program, argument],
            env={**os.environ, "WORLD_SIZE": ranks}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code
        assert ("tidied up" in done.stdout) == tidied
        assert len(done.stdout + done.stderr) > 5


def test_every_rank_ends_with_the_error_of_one(runs, tiny):
    """Rank 0 alone looks at the run directory; the others must not wait for it."""
    folder, _, _ = runs
    args = as_args(merge(tiny, {"run": {"dir": str(folder / "one")}}))
    done = subprocess.run(
        [*TORCHRUN, "-m", "flowrl", "train", *args],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    for rank in (0, 1):
        assert f"flowrl (rank {rank}): run directory {folder / 'one'} exists" in done.stderr
    assert "flowrl/cli.py" not in done.stderr  # a line each, no trace of ours


def test_a_batch_that_does_not_divide_is_refused(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--dry-run", *as_args(tiny)])
    assert stopped.value.code == 2
    assert "got 2 prompts and 3 ranks; set batch.prompts_per_step=6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "2", "RANK, MASTER_ADDR, MASTER_PORT not set; start the processes with"),
        ("WORLD_SIZE", "two", "WORLD_SIZE in the environment must be a number, got 'two'"),
        ("RANK", "-1", "RANK in the environment must be a number, got '-1'"),
    ],
)
def test_an_environment_that_is_not_torchruns(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        parallel.start("cpu")
