"""Scorers that are shipped, by the name that `task.scorer` takes. Each is a file that runs in a
`ScorerProcess` as a user's would and imports nothing of flowrl; its function is `score`."""

from pathlib import Path

SHIPPED = {
    name: Path(__file__).parent / file
    for name, file in {"answer_line": "answer_line.py", "math_verify": "symbolic.py"}.items()
}
