"""A user's function in its own process: results, failures, kills, and no process left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flowrl.config import ConfigError
from flowrl.tasks.scorer_process import ScorerProcess

GRADE = """
import os, re, signal, subprocess, sys, threading, time
print("loaded")  # must not reach the pipe

def score(prompt, response, answer, row):
    print("scoring", response)
    if response == "sleep":
        time.sleep(60)
    if response == "late":
        time.sleep(0.6)
        return 0.125
    if response == "spin":  # one call into C that never lets go of the interpreter's lock
        re.match(r"(a+)+$", "a" * 60 + "b")
    if response == "exit":
        os._exit(7)
    if response == "sys.exit":
        sys.exit(3)
    if response == "killed":
        os.kill(os.getpid(), signal.SIGTERM)
    if response == "raise":
        raise KeyError("no such unit")
    if response == "child":
        return {"reward": subprocess.Popen(["sleep", "60"]).pid}
    if response == "stdin":
        return sys.stdin.read() == ""
    if response == "modules":
        return "torch" not in sys.modules and "flowrl" not in sys.modules
    if response == "thread":
        return threading.current_thread() is threading.main_thread()
    return eval(response, {"answer": answer, "row": row, "nan": float("nan")})
"""


@pytest.fixture
def scorer(tmp_path):
    (tmp_path / "grade.py").write_text(GRADE)
    process = ScorerProcess(tmp_path / "grade.py", "score", timeout_s=1.0)
    yield process
    process.close()


def ask(scorer: ScorerProcess, response: str, answer: str = "4", row: dict | None = None):
    return scorer.score("2+2=", response, answer, row or {})


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether the process ends in time; one that ended but was not collected counts."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("response", "reward", "correct", "solution"),
    [
        ("True", 1.0, True, None),
        ("False", 0.0, False, None),
        ("1", 1.0, True, None),
        ("0.5", 0.5, False, None),
        ("-1", -1.0, False, None),
        ("answer == '4'", 1.0, True, None),
        ("row['level'] * 2", 6.0, True, None),
        ("{'reward': 0.25}", 0.25, False, None),
        ("{'reward': 0.25, 'correct': True, 'solution': 's'}", 0.25, True, "s"),
        ("{'reward': 3, 'correct': False, 'solution': 's'}", 3.0, False, None),
        ("__import__('numpy').bool_(True)", 1.0, True, None),
        ("__import__('numpy').float32(0.5)", 0.5, False, None),
        ("{'reward': 0.25, 'correct': __import__('numpy').array(True)}", 0.25, True, None),
        ("stdin", 1.0, True, None),
        ("modules", 1.0, True, None),
        ("thread", 1.0, True, None),
    ],
)
def test_results(scorer, response, reward, correct, solution):
    score = ask(scorer, response, row={"level": 3})
    assert score.error is None, score.error
    assert (score.reward, score.correct, score.solution) == (reward, correct, solution)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("raise", r"KeyError: 'no such unit' \(grade.py, line 21\)"),
        ("sys.exit", "SystemExit: 3"),
        ("None", "got None"),
        ("nan", "got nan"),
        ("1e999", "got inf"),
        ("10**400", "OverflowError"),
        ("'1'", "got a str"),
        ("1j", "got a complex"),
        ("{'correct': True}", r"got a dict with \['correct'\]"),
        ("{'reward': 1, 'score': 1}", r"got a dict with \['reward', 'score'\]"),
        ("{'reward': None}", "got None"),
        ("{'reward': 1, 'correct': 1}", "correct must be a bool, got a int"),
        ("{'reward': 1, 'solution': 1}", "solution must be a string or None, got a int"),
    ],
)
def test_failures_are_errors_and_the_process_stays(scorer, response, message):
    before = scorer.pid
    score = ask(scorer, response)
    assert (score.reward, score.correct, score.solution) == (0.0, False, None)
    assert score.error is not None
    assert re.search(message, score.error), score.error
    assert scorer.pid == before
    assert ask(scorer, "True").reward == 1.0


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("sleep", "no result within 1 s"),
        ("spin", "no result within 1 s"),
        ("exit", "exit code 7"),
        ("killed", "signal SIGTERM"),
    ],
)
def test_a_process_that_hangs_or_dies_is_replaced(scorer, response, message):
    before = scorer.pid
    start = time.monotonic()
    score = ask(scorer, response)
    assert time.monotonic() - start < 3
    assert (score.reward, score.correct) == (0.0, False)
    assert message in (score.error or "")
    assert gone(before)
    assert ask(scorer, "True").reward == 1.0
    assert scorer.pid != before


def test_an_interrupted_call_leaves_no_reply_for_the_next_one(scorer):
    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(scorer, "late")
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, previous)
    time.sleep(0.5)  # the late reply would be there by now
    assert ask(scorer, "True").reward == 1.0


def test_large_and_strange_texts_arrive_unchanged(tmp_path):
    (tmp_path / "g.py").write_text(
        "def f(prompt, response, answer, row):\n"
        "    return {'reward': len(response), 'correct': True, 'solution': response[:20]}\n"
    )
    scorer = ScorerProcess(tmp_path / "g.py", "f", 10.0)
    for text in ("x" * 3_000_000, 'a\n{"b": "\u2028é\x00\ud800"}', ""):
        score = ask(scorer, text)
        assert (score.reward, score.solution, score.error) == (len(text), text[:20], None)
    scorer.close()


def test_close_ends_the_process_and_what_it_started(scorer):
    grandchild = int(ask(scorer, "child").reward)
    child = scorer.pid
    assert not gone(grandchild, within_s=0.1)  # the check can see a living process
    scorer.close()
    assert gone(child)
    assert gone(grandchild)
    scorer.close()  # twice is fine
    assert ask(scorer, "True").reward == 1.0  # and a later call starts it again


PARENT = """
import sys, threading, time
from flowrl.tasks.scorer_process import ScorerProcess
scorer = ScorerProcess(sys.argv[1], "score", timeout_s=float(sys.argv[3]))
print(scorer.pid, flush=True)
if sys.argv[2]:
    scorer.score("", sys.argv[2], "", {})
time.sleep(60)
"""


@pytest.mark.parametrize("busy_with", ["", "sleep"])
def test_no_orphan_when_the_parent_is_killed(tmp_path, busy_with):
    (tmp_path / "grade.py").write_text(GRADE)
    assert _orphan_is_gone(tmp_path, busy_with, timeout_s=60.0, within_s=5.0)


def test_no_orphan_even_while_it_holds_the_interpreter_lock(tmp_path):
    (tmp_path / "grade.py").write_text(GRADE)  # the watchdog: timeout_s + 2 s
    assert _orphan_is_gone(tmp_path, "spin", timeout_s=0.5, within_s=8.0)


def _orphan_is_gone(tmp_path: Path, busy_with: str, timeout_s: float, within_s: float) -> bool:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "grade.py"), busy_with, str(timeout_s)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert not gone(child, within_s=0.2)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    if gone(child, within_s):
        return True
    os.kill(child, signal.SIGKILL)
    return False


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def score(:\n", "SyntaxError"),
        ("import nothing_of_that_name\n", "No module named 'nothing_of_that_name'"),
        ("1/0\n", r"ZeroDivisionError: division by zero \(bad.py, line 1\)"),
        ("def other(): pass\n", "no function called 'score'; it has: other"),
        ("score = 3\n", "no function called 'score'"),
        ("import os\nos._exit(4)\n", r"exit code 4"),
    ],
)
def test_a_file_that_does_not_load_is_a_config_error(tmp_path, source, message):
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(ConfigError, match=message):
        ScorerProcess(tmp_path / "bad.py", "score", 1.0)


def test_missing_file_and_bad_limit(tmp_path):
    with pytest.raises(ConfigError, match="file not found"):
        ScorerProcess(tmp_path / "none.py", "score", 1.0)
    (tmp_path / "grade.py").write_text(GRADE)
    with pytest.raises(ConfigError, match=r"reward\.timeout_s must be > 0"):
        ScorerProcess(tmp_path / "grade.py", "score", 0.0)


def test_the_files_own_folder_is_importable_and_the_package_folder_is_not(tmp_path):
    (tmp_path / "units.py").write_text("SCALE = 3\n")
    (tmp_path / "g.py").write_text(
        "import importlib.util, units\n"
        "def f(prompt, response, answer, row):\n"
        "    assert importlib.util.find_spec('countdown') is None\n"
        "    return units.SCALE\n"
    )
    scorer = ScorerProcess(tmp_path / "g.py", "f", 5.0)
    score = ask(scorer, "")
    scorer.close()
    assert (score.reward, score.error) == (3.0, None)
