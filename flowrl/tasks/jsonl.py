"""Prompts and answers from JSON Lines files, with a shipped scorer or a user's function.

    {"prompt": "What is 2+2? ", "answer": "4"}

Every line is an object; `prompt_field` and `answer_field` name its prompt (a string, or chat
messages) and its answer, and the whole object reaches the user's function as `row`:

    def score(prompt: str, response: str, answer: str, row: dict) -> float | bool | dict

Fields, return values and limits: docs/tasks.md.
"""

from __future__ import annotations

import importlib.util
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from flowrl.config import build_options
from flowrl.records import Prompt, Rollout, Score
from flowrl.schema import require
from flowrl.tasks import Outcome
from flowrl.tasks.jsonl_rows import Fields, Row, read_rows
from flowrl.tasks.scorer_process import ScorerProcess
from flowrl.tasks.scorers import SHIPPED
from flowrl.tasks.splits import Splits


@dataclass(frozen=True)
class Options:
    train: str = ""
    """File of training problems, one JSON object a line. Required."""
    eval: str = ""
    """File of evaluation problems, or several with commas between: sets, called as their files
    are. Empty: the last eval_fraction of the training file."""
    eval_fraction: float = 0.1
    """Share of the training file, from its end, held out where `eval` is empty; never no line."""
    prompt_field: str = "prompt"
    """Field of the prompt: a string, given to the model as it stands, or a list of chat messages,
    put through the tokenizer's chat template. A dot leads into an object, here and below."""
    answer_field: str = "answer"
    """Field of the reference answer. Empty, with a scorer of your own: rows need none."""
    scorer: str = "exact"
    """exact (equal after stripping white space), answer_line (the line `Answer: ...`, +1 or -1),
    math_verify (by algebra, +1 or -1), or path/to/file.py:function."""
    eval_scorer: str = ""
    """Scorer of evaluation problems. Empty: that of training."""
    scorer_workers: int = 1
    """Processes that run a scorer other than exact, side by side."""
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
        _check_scorer("scorer", self.scorer)
        _check_scorer("eval_scorer", self.scorer_of("eval"))
        shipped = {self.scorer, self.scorer_of("eval")} & {"exact", *SHIPPED}
        require(
            bool(self.answer_field) or not shipped,
            f"the scorer {', '.join(sorted(shipped))} needs answers, got task.answer_field=''; "
            "name the field",
        )
        names = [path.stem for path in self.eval_files]
        require(
            len(set(names)) == len(names) and (len(names) < 2 or "jsonl" not in names),
            "task.eval must name files that differ in their names, none called jsonl, which is all "
            f"of them, got {self.eval}; rename one",
        )

    def scorer_of(self, split: str) -> str:
        return self.eval_scorer if split == "eval" and self.eval_scorer else self.scorer

    @property
    def eval_files(self) -> list[Path]:
        if Path(self.eval).is_file():  # whatever stands in its name
            return [Path(self.eval)]
        return [Path(name.strip()) for name in self.eval.split(",") if name.strip()]


def _check_scorer(option: str, scorer: str) -> None:
    names = ("exact", *SHIPPED)
    path, _, function = scorer.rpartition(":")
    require(
        scorer in names or (path.endswith(".py") and function.isidentifier()),
        f"task.{option} must be {', '.join(names)} or path/to/file.py:function, got {scorer!r}; "
        f"write {f'{scorer}:FUNCTION' if scorer.endswith('.py') else 'exact'}",
    )
    require(
        scorer != "math_verify" or importlib.util.find_spec("math_verify") is not None,
        f"task.{option}=math_verify needs the package math-verify; "
        "pip install 'flowrl-trainer[math]'",
    )


@dataclass(frozen=True)
class Problem:
    row: Row
    eval_set: str | None = None  # the file's name, where there are several


class Jsonl:
    name = "jsonl"
    alphabet: str | None = None

    def __init__(self, options: Options, timeout_s: float) -> None:
        self.options = options
        scorers = {options.scorer, options.scorer_of("eval")}
        self.names_solutions = scorers.isdisjoint(SHIPPED)
        names = Fields(options.prompt_field, options.answer_field, scorers.isdisjoint(SHIPPED))
        train = [Problem(row) for row in read_rows(Path(options.train), names)]
        files = options.eval_files
        names_of_eval = [f"eval {path.stem}" if files[1:] else "eval" for path in files]
        self.data_files = {
            "train": Path(options.train),
            **dict(zip(names_of_eval, files, strict=True)),
        }
        if files:
            sets = [
                [Problem(row, path.stem if files[1:] else None) for row in read_rows(path, names)]
                for path in files
            ]
            # In turn, so that the first n hold some of every set.
            held = [p for turn in zip_longest(*sets) for p in turn if p is not None]
        else:
            count = max(1, round(len(train) * options.eval_fraction))
            require(
                len(train) > count,
                f"{options.train} has {len(train)} problems, too few to hold out {count}; "
                "give task.eval a file of its own",
            )
            train, held = train[:-count], train[-count:]
        self._splits: Splits[Problem] = Splits(train, held, options.seed)
        self._scorers: dict[str, list[ScorerProcess]] = {}
        for scorer in sorted(scorers - {"exact"}):
            path, _, function = scorer.rpartition(":")
            given = (SHIPPED[scorer], "score") if scorer in SHIPPED else (path, function)
            workers = range(options.scorer_workers)
            self._scorers[scorer] = [ScorerProcess(*given, timeout_s) for _ in workers]

    def prompt(self, split: str, index: int) -> Prompt:
        problem = self._splits.problem(split, index)
        row = problem.row
        data = {
            "problem": row.problem,
            "answer": row.answer,
            "row": row.fields,
            "scorer": self.options.scorer_of(split),
        }
        if problem.eval_set is not None:
            data["set"] = problem.eval_set
        return Prompt(index, row.text, data=data, messages=row.messages)

    def num_prompts(self, split: str) -> int:
        return self._splits.num(split)

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Exact match: reward 1 or 0, and the answer as the solution. The other scorers: what they
        say; a call that fails has Score.error."""
        free: dict[str, queue.SimpleQueue[ScorerProcess]] = {}
        for name, scorers in self._scorers.items():
            free[name] = queue.SimpleQueue()
            for scorer in scorers:
                free[name].put(scorer)

        def call(rollout: Rollout) -> Score:
            data = rollout.prompt.data
            if data["scorer"] == "exact":
                return _exact(rollout)
            scorers = free[data["scorer"]]
            scorer = scorers.get()
            try:
                return scorer.score(rollout.prompt.text, rollout.text, data["answer"], data["row"])
            finally:
                scorers.put(scorer)

        with ThreadPoolExecutor(self.options.scorer_workers) as pool:
            return list(pool.map(call, rollouts))

    def solutions(self, prompt: Prompt) -> frozenset[str] | None:
        exact = prompt.data["scorer"] == "exact"
        return frozenset([prompt.data["answer"].strip()]) if exact else None

    def outcomes(self, prompt: Prompt) -> list[Outcome] | None:
        return None

    def example(self, index: int) -> tuple[str, str] | None:
        return None

    def close(self) -> None:
        for scorers in self._scorers.values():
            for scorer in scorers:
                scorer.close()


def build(options: dict[str, Any], timeout_s: float) -> Jsonl:
    return Jsonl(build_options(Options, options, "task"), timeout_s)


def _exact(rollout: Rollout) -> Score:
    answer = rollout.prompt.data["answer"].strip()
    correct = rollout.text.strip() == answer
    return Score(float(correct), correct, answer if correct else None)
