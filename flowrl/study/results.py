"""study.json: every number of a study with its command, from the run directories."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from flowrl import diversity
from flowrl.metrics import pass_at_k
from flowrl.run_reader import eval_files, read_lines, read_run, sample_files
from flowrl.study.plan import Run, Study, arm_label

Values = dict[str, list[float]]  # measure -> value per prompt

EXACT = (
    "success_exact", "reward_exact", "expected_coverage", "effective_modes", "length_exact",
    "l1_to_target", "jsd_to_target", "kl_to_target", "kl_from_target",
    "l1_to_fixed_point", "jsd_to_fixed_point", "kl_to_fixed_point", "kl_from_fixed_point",
    "mode_mass_error", "log_z_error", "rank_correlation", "kl_to_reference",
)  # fmt: skip
"""diversity/* of the exact tables that a study keeps."""
PASS_KS = (1, 4, 16, 64)
LAST_STEPS = 0.1  # share of the training steps over which the learned log Z is averaged


def collect(
    study: Study, runs: Sequence[Run], failures: Mapping[str, str], controls: Iterable[Path]
) -> dict[str, Any]:
    """The whole of study.json. `failures` maps run labels to what went wrong."""
    rows = [_run_row(run, failures.get(run.label)) for run in runs]
    for world in study.worlds:
        _add_creativity([r for r in rows if r["world"] == world])
    return {
        "study": study.name,
        "about": study.about,
        "seeds": list(study.seeds),
        "worlds": {name: asdict(world) for name, world in study.worlds.items()},
        "families": {name: arm.family for name, arm in study.arms.items()},
        "points": _points(rows),
        "controls": _control_points(controls),
        "runs": rows,
    }


# --- one run


def _run_row(run: Run, failure: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "world": run.world,
        "arm": run.arm,
        "point": run.point,
        "seed": run.seed,
        "command": run.command,
        "directory": str(run.directory),
        "status": "missing",
    }
    if failure is not None:
        return {**row, "status": "failed", "message": failure}
    if not (run.directory / "report.html").is_file():
        return row
    data = read_run(run.directory)
    last = data.evals[-1]["step"]
    detail = json.loads(eval_files(run.directory)[last].read_text())
    samples = read_lines(sample_files(run.directory, "eval")[last])[0]
    values = _sampled(detail, samples) | _exact(detail)
    exact = detail["exact"] or {}
    log_z = _learned_log_z_error(data.train, exact.get("per_prompt", {}))
    if log_z is not None:
        values["learned_log_z_error"] = [log_z]
    return {
        **row,
        "status": "done",
        "step": last,
        "seconds": round(sum(r.get("timing_s/step", 0.0) for r in data.timing), 1),
        "environment": {k: data.environment.get(k) for k in ("flowrl", "git_commit", "torch")},
        "objective": {k: data.config["objective"].get(k) for k in ("name", "options")},
        "target": {
            k: exact.get(k) for k in ("beta", "nominal_beta", "fixed_point", "reference_version")
        },
        "reference": _context(exact),
        "found": _found(samples),
        "per_prompt": {name: [_short(v) for v in held] for name, held in values.items()},
    }


def _exact(detail: Mapping[str, Any]) -> Values:
    per_prompt = (detail["exact"] or {}).get("per_prompt", {})
    return {
        name: per_prompt[f"diversity/{name}"] for name in EXACT if f"diversity/{name}" in per_prompt
    }


def _context(exact: Mapping[str, Any]) -> dict[str, float]:
    """What the target and pi_ref themselves have, mean over prompts."""
    kept = ("_target", "_reference", "_fixed_point")
    names = ("success", "expected_coverage", "effective_modes", "log_z")
    return {
        name.removeprefix("diversity/"): _short(float(np.mean(values)))
        for name, values in exact.get("per_prompt", {}).items()
        if name.endswith(kept) and name.removeprefix("diversity/").startswith(names)
    }


def _sampled(detail: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Values:
    """Of the last evaluation's samples, per problem."""
    problems = detail["problems"]
    values: Values = {"distinct_solutions": [float(len(p["counts"])) for p in problems]}
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in samples:
        groups.setdefault(row["prompt_index"], []).append(row)
    held = [groups[p["index"]] for p in problems]
    right = [sum(row["correct"] for row in group) for group in held]
    for k in PASS_KS:
        if all(k <= len(group) for group in held):
            pairs = zip(held, right, strict=True)
            values[f"pass@{k}"] = [pass_at_k(len(group), count, k) for group, count in pairs]
    texts = [[row["response"] for row in group] for group in held]
    if all(len(t) > 1 for t in texts):
        values["self_bleu"] = [diversity.self_bleu(t) for t in texts]
        values["vendi"] = [diversity.vendi(diversity.ngram_similarity(t)) for t in texts]
        values["distinct_2"] = [diversity.distinct_n(t, 2) for t in texts]
    judged = diversity.JUDGED_RESPONSES
    if all(len(t) >= judged for t in texts):
        classes = [
            [diversity.approach(r["correct"], r["solution"], r["response"]) for r in group]
            for group in held
        ]
        values["judge_score"] = [float(diversity.judge_score(c[:judged])) for c in classes]
    return values


def _found(samples: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """(prompt, solution) of every right answer, once."""
    found = {(r["prompt"], r["solution"]) for r in samples if r["correct"] and r["solution"]}
    return [list(pair) for pair in sorted(found)]


def _learned_log_z_error(
    train: Sequence[Mapping[str, Any]], per_prompt: Mapping[str, Sequence[float]]
) -> float | None:
    """|mean of the log Z that the loss used, over the last steps - mean exact log Z| of the fixed
    point; None where the loss has no log Z or the fixed point none."""
    exact = per_prompt.get("diversity/log_z_fixed_point")
    used = [row["flow/log_z_mean"] for row in train if "flow/log_z_mean" in row]
    if exact is None or not used:
        return None
    last = used[-max(1, round(LAST_STEPS * len(used))) :]
    return abs(float(np.mean(last)) - float(np.mean(exact)))


# --- several runs


def _add_creativity(rows: Sequence[dict[str, Any]]) -> None:
    """Share of all arms' solutions that one alone found, seed by seed; arms' own points only."""
    own = [r for r in rows if r["status"] == "done" and not r["point"]]
    for seed in {r["seed"] for r in own}:
        members = {r["arm"]: r for r in own if r["seed"] == seed}
        found = {arm: {tuple(pair) for pair in r["found"]} for arm, r in members.items()}
        for arm, share in diversity.creativity(found).items():
            members[arm]["per_prompt"]["creativity"] = [_short(share)]
    for row in own:
        solved = [n for n in row["per_prompt"]["distinct_solutions"] if n >= 1]
        row["per_prompt"]["for_diversity"] = [_short(float(np.mean(solved)) if solved else 0.0)]


def _points(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per world, arm and sweep value: intervals over seeds and prompts."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["world"], arm_label(row["arm"], row["point"])), []).append(row)
    points = []
    for (world, label), members in groups.items():
        done = [m for m in members if m["status"] == "done"]
        point = {
            "world": world,
            "label": label,
            "arm": members[0]["arm"],
            "point": members[0]["point"],
            "seeds": [m["seed"] for m in done],
            "not_done": [m["seed"] for m in members if m["status"] != "done"],
        }
        if done:
            point |= {k: done[0][k] for k in ("objective", "target", "reference")}
            point["intervals"] = intervals([m["per_prompt"] for m in done])
        points.append(point)
    return points


def intervals(tables: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Bootstrap interval of every measure that all seeds have."""
    names = [name for name in tables[0] if all(name in table for table in tables)]
    found = {}
    for name in names:
        interval = diversity.bootstrap([table[name] for table in tables])
        found[name] = {k: _short(v) for k, v in asdict(interval).items()}
    return found


def _control_points(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Of every control file; the seeds of a temperature are pooled."""
    pooled: dict[tuple[str, str, str, float], list[dict[str, Any]]] = {}
    for file in files:
        world, source = file.parent.parent.name, file.stem.partition("_seed_")[0]
        for point in json.loads(file.read_text())["points"]:
            key = (world, source, point["kind"], point["value"])
            pooled.setdefault(key, []).append(point["per_prompt"])
    found = []
    for (world, source, kind, value), tables in pooled.items():
        named = [{k.removeprefix("diversity/"): v for k, v in t.items()} for t in tables]
        kept = [{k: v for k, v in t.items() if k in EXACT} for t in named]
        head = {"world": world, "source": source, "kind": kind, "value": value}
        found.append({**head, "seeds": len(tables), "intervals": intervals(kept)})
    return found


def _short(value: float) -> float:
    """Six significant digits: far more than the seeds agree on."""
    return float(f"{value:.6g}")
