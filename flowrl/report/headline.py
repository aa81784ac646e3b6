"""The first table of the report: every number of the evaluation before and after training, what it
measures, and whether it became better or worse."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flowrl.run_reader import RunData

Good = Literal["up", "down", "neither"]


@dataclass(frozen=True)
class Measure:
    """One kind of number: how it is called, written and read."""

    pattern: str  # of the metric's whole name
    title: str  # may use the pattern's groups
    definition: str
    good: Good
    unit: Literal["share", "count", "distance"]


MEASURES = (
    Measure(
        r"eval/(?P<set>[^/]+)/avg@(?P<k>\d+)",
        "avg@{k}",
        "Share of right answers: {k} samples per problem, then the mean over problems.",
        "up",
        "share",
    ),
    Measure(
        r"eval/(?P<set>[^/]+)/pass@(?P<k>\d+)",
        "pass@{k}",
        "Share of problems with at least one right answer among {k} samples (unbiased estimate). "
        "It falls when the policy gives up variety.",
        "up",
        "share",
    ),
    Measure(
        r"diversity/distinct_solutions",
        "distinct solutions",
        "Different right answers per problem among its samples; answers that differ only in the "
        "order of terms count once.",
        "up",
        "count",
    ),
    Measure(
        r"diversity/mode_coverage",
        "mode coverage",
        "Share of all the solutions a problem has that were found at least once, mean over "
        "problems.",
        "up",
        "share",
    ),
    Measure(
        r"diversity/l1_to_target",
        "L1 to target",
        "Sum over all answers of |policy - target|, mean over prompts: 0 is equal, 2 is disjoint. "
        "Exact, not sampled.",
        "down",
        "distance",
    ),
    Measure(
        r"diversity/jsd_to_target",
        "JSD to target",
        "Jensen-Shannon divergence of policy and target, in nats, mean over prompts: 0 to 0.693.",
        "down",
        "distance",
    ),
    Measure(
        r"diversity/kl_to_target",
        "KL(policy || target)",
        "In nats, mean over prompts. Large where the policy puts mass on answers the target lacks.",
        "down",
        "distance",
    ),
    Measure(
        r"diversity/kl_from_target",
        "KL(target || policy)",
        "In nats, mean over prompts. Large where the policy misses answers the target has.",
        "down",
        "distance",
    ),
    Measure(
        r"diversity/l1_to_fixed_point",
        "L1 to fixed point",
        "The same to where the objective's own training ends, which differs from the target where "
        "the loss divides by the length or z-scores the reward.",
        "down",
        "distance",
    ),
    Measure(
        r"diversity/effective_modes",
        "effective modes",
        "exp of the entropy over the right answers, given a right one; from the table.",
        "up",
        "count",
    ),
    Measure(
        r"diversity/expected_coverage",
        "expected coverage",
        "Share of all right answers that 64 samples would hit at least once; from the table.",
        "up",
        "share",
    ),
    Measure(
        r"diversity/judge_score",
        "judge score",
        "The paper's diversity rubric, 1 to 5, computed: the largest class of equal answers among "
        "16 samples.",
        "up",
        "count",
    ),
    Measure(
        r"diversity/success_exact",
        "exact success",
        "Probability that the policy gives to right answers, summed over the table, not sampled.",
        "up",
        "share",
    ),
    Measure(
        r"diversity/success_target",
        "exact success of the target",
        "The same for the target pi_ref exp(beta r) / Z (Flow of Reasoning: P_B in place of "
        "pi_ref): what a policy that matches it reaches.",
        "neither",
        "share",
    ),
    Measure(
        r"eval/(?P<set>[^/]+)/response_length",
        "response length",
        "Tokens per evaluation response, end of text included.",
        "neither",
        "count",
    ),
)

_FORMATS: dict[str, Callable[[float], str]] = {
    "share": lambda value: f"{100 * value:.1f}%",
    "count": lambda value: f"{value:.2f}",
    "distance": lambda value: f"{value:.3f}",
}
_CHANGES: dict[str, Callable[[float], str]] = {
    "share": lambda value: f"{100 * value:+.1f} pts",
    "count": lambda value: f"{value:+.2f}",
    "distance": lambda value: f"{value:+.3f}",
}


@dataclass(frozen=True)
class Line:
    """One row of the table, as text."""

    metric: str
    title: str
    definition: str
    before: str
    after: str
    change: str
    verdict: Literal["better", "worse", "same", "neither"]


@dataclass(frozen=True)
class Headline:
    before_step: int
    after_step: int | None  # None: only one evaluation
    lines: tuple[Line, ...]


def headline(run: RunData) -> Headline | None:
    """None for a run without an evaluation."""
    if not run.evals:
        return None
    first = run.evals[0]
    last = run.evals[-1] if len(run.evals) > 1 else None
    lines = [
        line
        for measure in MEASURES
        for name in first
        if (line := _line(measure, name, first, last, run.eval_sets[1:])) is not None
    ]
    return Headline(first["step"], last["step"] if last else None, tuple(lines))


def summary(found: Headline) -> str:
    """One plain sentence of what became better and what became worse."""
    if found.after_step is None:
        return "Only one evaluation was recorded, so there is nothing to compare it with."
    parts = []
    for verdict in ("better", "worse"):
        held = [
            f"{line.title} ({line.before} → {line.after})"
            for line in found.lines
            if line.verdict == verdict
        ]
        parts.append(f"{verdict.capitalize()}: {', '.join(held) if held else 'none'}.")
    return " ".join(parts)


def _line(
    measure: Measure,
    name: str,
    first: Mapping[str, Any],
    last: Mapping[str, Any] | None,
    sets: Sequence[str],
) -> Line | None:
    """Of `sets` avg@k alone, called after the set."""
    match = re.fullmatch(measure.pattern, name)
    if match is None:
        return None
    groups = match.groupdict()
    title = measure.title.format(**groups)
    if groups.get("set") in sets:
        if "/avg@" not in name:
            return None
        title += f", {groups['set']}"
    write = _FORMATS[measure.unit]
    after = last.get(name) if last else None
    change, verdict = "", "neither"
    if after is not None:
        change = _CHANGES[measure.unit](after - first[name])
        verdict = _verdict(measure.good, change)
    return Line(
        metric=name,
        title=title,
        definition=measure.definition.format(**groups),
        before=write(first[name]),
        after="" if after is None else write(after),
        change=change,
        verdict=verdict,
    )


def _verdict(good: Good, change: str) -> Literal["better", "worse", "same", "neither"]:
    """Judged on the change as it is written, so that +0.0 is never called better."""
    if good == "neither":
        return "neither"
    value = float(change.split()[0])
    if value == 0:
        return "same"
    return "better" if (value > 0) == (good == "up") else "worse"
