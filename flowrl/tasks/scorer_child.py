"""The child's side of `flowrl.tasks.scorer_process`: runs one user's function, call by call.

    python -P scorer_child.py FILE.py FUNCTION TIMEOUT_S

Run as a script in a session of its own: imports the standard library and the user's file, nothing
else, so it starts fast and holds no torch. One JSON object a line: requests on stdin, replies on
stdout. What the user's code prints goes to stderr, and it finds its own stdin empty.

The function runs in the main thread (math-verify and everything else that uses signals need it). A
second thread reads stdin and ends the whole process group when the parent is gone. Should the
function hold the interpreter's lock then, faulthandler's watchdog, which needs no lock, ends it.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import math
import numbers
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

ORPHAN_GRACE_S = 2.0  # past the limit, at which a living parent has killed this process
MAX_MESSAGE = 500  # characters of an error message
RESULT_FORMS = "return a bool, a finite number, or a dict with reward, correct, solution"


def main(path: Path, function_name: str, timeout_s: float) -> None:
    inbox, reply_to = _take_pipes()
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(inbox, requests), daemon=True).start()
    try:
        function = load_function(path, function_name)
    except (Exception, SystemExit) as error:
        _reply(reply_to, {"load_error": describe(error, path)})
        return
    _reply(reply_to, {"ready": True})
    while True:
        request = json.loads(requests.get())
        faulthandler.dump_traceback_later(timeout_s + ORPHAN_GRACE_S, exit=True, file=sys.stderr)
        try:
            reply = read_result(function(**request))
        except (Exception, SystemExit) as error:
            reply = {"error": describe(error, path)}
        faulthandler.cancel_dump_traceback_later()
        _reply(reply_to, reply)


def load_function(path: Path, name: str) -> Callable[..., Any]:
    """The function `name` of the file; its folder is importable, as for a script."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("flowrl_user_scorer", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise AttributeError(f"no function called {name!r}; it has: {', '.join(names) or 'none'}")
    return function


def read_result(result: Any) -> dict[str, Any]:
    """The reply for what the user's function returned. Raises TypeError or ValueError."""
    if not isinstance(result, dict):
        return {"reward": _reward(result), "correct": _reward(result) >= 1, "solution": None}
    unknown = set(result) - {"reward", "correct", "solution"}
    if unknown or "reward" not in result:
        raise ValueError(f"scorer must {RESULT_FORMS}; got a dict with {sorted(map(str, result))}")
    reward = _reward(result["reward"])
    correct = _plain(result.get("correct", reward >= 1))
    solution = result.get("solution")
    if not isinstance(correct, bool):
        raise TypeError(f"scorer's correct must be a bool, got {_kind(correct)}")
    if solution is not None and not isinstance(solution, str):
        raise TypeError(f"scorer's solution must be a string or None, got {_kind(solution)}")
    return {"reward": reward, "correct": correct, "solution": solution if correct else None}


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python's own."""
    return value.item() if getattr(value, "shape", None) == () else value


def _reward(value: Any) -> float:
    value = _plain(value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"scorer must {RESULT_FORMS}; got {_kind(value)}")
    if not math.isfinite(value):
        raise ValueError(f"scorer must {RESULT_FORMS}; got {float(value)}")
    return float(value)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def describe(error: BaseException, path: Path) -> str:
    """Type, message and the last line of the user's file that the error passed through."""
    text = f"{type(error).__name__}: {error}"[:MAX_MESSAGE]
    files = (str(path), str(path.resolve()))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    return f"{text} ({path.name}, line {frames[-1].lineno})" if frames else text


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The two pipes under private numbers; fd 0 becomes empty and fd 1 a copy of stderr."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return inbox, outbox


def _read(inbox: IO[bytes], requests: queue.SimpleQueue[bytes]) -> None:
    for line in inbox:
        requests.put(line)
    os.killpg(os.getpid(), signal.SIGKILL)  # the parent closed the pipe or is gone


def _reply(outbox: IO[bytes], message: dict[str, Any]) -> None:
    outbox.write(json.dumps(message).encode() + b"\n")
    outbox.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
