"""Workers: one thread each, and a job that raises or dies leaves the others alone."""

import os

from jobs_for_tests import TouchJob

from flowrl.study.runner import Workers, as_command


def test_a_failing_and_a_dying_job_leave_the_others_alone(tmp_path):
    before = dict(os.environ)
    kinds = ["touch", "raise", "touch", "die", "touch"]
    jobs = [TouchJob(tmp_path / f"job_{i}", what) for i, what in enumerate(kinds)]
    told: list[str] = []
    with Workers(2, told.append) as pool:
        failures = pool.run(jobs[:4]) + pool.run(jobs[4:])
    assert {f.job.label for f in failures} == {"job_1", "job_3"}
    messages = {f.job.label: f.message for f in failures}
    assert messages["job_1"] == "ValueError: wrong on purpose"
    assert "exit code 3" in messages["job_3"]
    for index in (0, 2, 4):
        assert (tmp_path / f"job_{index}").read_text() == "1"  # one thread
    assert len(told) == 5
    assert told[3].startswith("[4/4] ")
    assert told[4].startswith("[1/1] ")
    assert sum("FAILED" in line for line in told) == 2
    assert "working at job_1" in (tmp_path / "job_1.log").read_text()
    assert "Traceback" in (tmp_path / "job_1.log").read_text()
    assert dict(os.environ) == before


def test_no_jobs_start_no_worker():
    with Workers(2, print) as pool:
        assert pool.run([]) == []


def test_a_run_writes_down_the_command_that_repeats_it(monkeypatch):
    import sys

    monkeypatch.setattr(sys, "argv", ["flowrl", "compare", "x"])
    with as_command(["train", "y"]):
        assert sys.argv == ["flowrl", "train", "y"]
    assert sys.argv == ["flowrl", "compare", "x"]
