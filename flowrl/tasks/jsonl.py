"""Prompts and answers from JSON Lines files, scored by exact match or by a user's function.

    {"prompt": "What is 2+2? ", "answer": "4"}

Every line is an object; `prompt_field` and `answer_field` name its two strings, and the whole
object reaches the user's function as `row`:

    def score(prompt: str, response: str, answer: str, row: dict) -> float | bool | dict

Fields, return values and limits: docs/tasks.md.
"""

from __future__ import annotations

import hashlib
import json
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from flowrl.config import build_options
from flowrl.records import Prompt, Rollout, Score
from flowrl.schema import ConfigError, nearest, require
from flowrl.tasks import Outcome
from flowrl.tasks.scorer_process import ScorerProcess
from flowrl.tasks.splits import Splits


@dataclass(frozen=True)
class Options:
    train: str = ""
    """File of training problems, one JSON object a line. Required."""
    eval: str = ""
    """File of evaluation problems. Empty: the last eval_fraction of the training file."""
    eval_fraction: float = 0.1
    """Share of the training file, from its end, held out where `eval` is empty; never no line."""
    prompt_field: str = "prompt"
    """Field of the prompt text, given to the model as it stands."""
    answer_field: str = "answer"
    """Field of the reference answer. Empty, with a scorer of your own: rows need none."""
    scorer: str = "exact"
    """exact (equal after stripping white space), or path/to/file.py:function."""
    scorer_workers: int = 1
    """Processes that run your function, side by side."""
    seed: int = 0
    """Seed of the order of training problems."""

    def __post_init__(self) -> None:
        require(
            bool(self.train), "task.train must name a file, got ''; set --task.train FILE.jsonl"
        )
        require(
            0 < self.eval_fraction < 1,
            f"task.eval_fraction must be in (0, 1), got {self.eval_fraction}; "
            "set task.eval_fraction=0.1",
        )
        require(
            self.scorer_workers >= 1,
            f"task.scorer_workers must be >= 1, got {self.scorer_workers}; "
            "set task.scorer_workers=1",
        )
        require(bool(self.prompt_field), "task.prompt_field must name a field, got ''")
        path, _, function = self.scorer.rpartition(":")
        require(
            self.scorer == "exact" or (path.endswith(".py") and function.isidentifier()),
            f"task.scorer must be exact or path/to/file.py:function, got {self.scorer!r}; write "
            + (f"{self.scorer}:FUNCTION" if self.scorer.endswith(".py") else "exact"),
        )
        require(
            bool(self.answer_field) or self.scorer != "exact",
            "task.scorer=exact needs answers, got task.answer_field=''; name the field",
        )


@dataclass(frozen=True)
class Row:
    prompt: str
    answer: str  # "" without an answer_field
    fields: dict[str, Any]  # the whole line
    problem: str  # identifies the prompt's text


class Jsonl:
    name = "jsonl"
    alphabet: str | None = None

    def __init__(self, options: Options, timeout_s: float) -> None:
        self.options = options
        train = read_rows(Path(options.train), options)
        if options.eval:
            held = read_rows(Path(options.eval), options)
        else:
            count = max(1, round(len(train) * options.eval_fraction))
            require(
                len(train) > count,
                f"{options.train} has {len(train)} problems, too few to hold out {count}; "
                "give task.eval a file of its own",
            )
            train, held = train[:-count], train[-count:]
        self._splits: Splits[Row] = Splits(train, held, options.seed)
        self._scorers: list[ScorerProcess] = []
        if options.scorer != "exact":
            path, _, function = options.scorer.rpartition(":")
            for _ in range(options.scorer_workers):
                self._scorers.append(ScorerProcess(path, function, timeout_s))

    def prompt(self, split: str, index: int) -> Prompt:
        row = self._splits.problem(split, index)
        data = {"problem": row.problem, "answer": row.answer, "row": row.fields}
        return Prompt(index, row.prompt, data=data)

    def num_prompts(self, split: str) -> int:
        return self._splits.num(split)

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Exact match: reward 1 or 0, and the answer as the solution. A user's function: what it
        says; a call that fails has Score.error."""
        if not self._scorers:
            return [_exact(rollout) for rollout in rollouts]
        free: queue.SimpleQueue[ScorerProcess] = queue.SimpleQueue()
        for scorer in self._scorers:
            free.put(scorer)

        def call(rollout: Rollout) -> Score:
            scorer = free.get()
            try:
                data = rollout.prompt.data
                return scorer.score(rollout.prompt.text, rollout.text, data["answer"], data["row"])
            finally:
                free.put(scorer)

        with ThreadPoolExecutor(len(self._scorers)) as pool:
            return list(pool.map(call, rollouts))

    def solutions(self, prompt: Prompt) -> frozenset[str] | None:
        return None if self._scorers else frozenset([prompt.data["answer"].strip()])

    def outcomes(self, prompt: Prompt) -> list[Outcome] | None:
        return None

    def example(self, index: int) -> tuple[str, str] | None:
        return None

    def close(self) -> None:
        for scorer in self._scorers:
            scorer.close()


def build(options: dict[str, Any], timeout_s: float) -> Jsonl:
    return Jsonl(build_options(Options, options, "task"), timeout_s)


def read_rows(path: Path, options: Options) -> list[Row]:
    """The file's problems. Raises ConfigError with file and line for whatever cannot be one."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; correct task.train or task.eval"
        ) from error
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = _read_row(line, f"{path}, line {number}", options)
            if row.prompt in seen:
                raise ConfigError(
                    f"{path}, line {number}: the same prompt as line {seen[row.prompt]}; remove one"
                )
            seen[row.prompt] = number
            rows.append(row)
    require(bool(rows), f"{path} has no problems; write one JSON object a line")
    return rows


def _read_row(line: bytes, where: str, options: Options) -> Row:
    try:
        fields = json.loads(line.decode(), parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:  # of decoding, of JSON, or nested too deeply
        raise ConfigError(f"{where}: not valid UTF-8 JSON: {error}; correct that line") from error
    require(
        isinstance(fields, dict),
        f"{where}: must be a JSON object, got {type(fields).__name__}; "
        f'write {{"{options.prompt_field}": ...}}',
    )
    prompt = _string(fields, options.prompt_field, where, "prompt_field")
    require(bool(prompt), f"{where}: {options.prompt_field!r} is empty; remove that line")
    answer = ""
    if options.answer_field:
        answer = _string(fields, options.answer_field, where, "answer_field")
    digest = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return Row(prompt, answer, fields, digest)


def _string(fields: dict[str, Any], name: str, where: str, option: str) -> str:
    if name not in fields:
        raise ConfigError(
            f"{where}: no field {name!r} (task.{option}){nearest(name, [str(f) for f in fields])}"
        )
    value = fields[name]
    require(
        isinstance(value, str),
        f"{where}: field {name!r} must be a string, got {json.dumps(value)[:60]}; put it in quotes",
    )
    return value


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _exact(rollout: Rollout) -> Score:
    answer = rollout.prompt.data["answer"].strip()
    correct = rollout.text.strip() == answer
    return Score(float(correct), correct, answer if correct else None)
