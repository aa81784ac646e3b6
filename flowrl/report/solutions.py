"""How often each answer is given: against the exact target where answers can be tabulated, and
before against after where all solutions of a problem are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from flowrl.report.figures import (
    MUTED,
    SERIES,
    Plot,
    Section,
    finish,
    new_figure,
    put_legend,
    value_ticks,
    write_number,
    write_share,
)
from flowrl.run_reader import RunData, read_eval_ends
from flowrl.targets import PRIORS

NUM_PROMPTS = 6
NUM_OUTCOMES = 18  # drawn one by one; the rest is one more
NUM_SOLUTIONS = 9
LABEL_CHARACTERS = 16


def section(run: RunData) -> Section:
    """From the first and the last evaluation; empty without two of them."""
    ends = read_eval_ends(run.path)
    plots: list[Plot] = []
    if ends is not None:
        before, after = ends
        exact = after.get("exact")
        if exact:
            prompts = exact["prompts"][:NUM_PROMPTS]
            point = exact.get("fixed_point") or {}
            prior = PRIORS[point.get("prior", "reference")]
            target = f"{prior}exp({exact['beta']:g} r) / Z"
            plots = [_exact_plot(i, prompt, target) for i, prompt in enumerate(prompts)]
        else:
            pairs = _varied_problems(before, after)
            plots = [_counts_plot(i, *pair) for i, pair in enumerate(pairs)]
    return Section("solutions", "How often each solution is given", tuple(plots))


# --- against the exact target


def _exact_plot(index: int, prompt: dict[str, Any], formula: str) -> Plot:
    target, reference, policy = (
        np.asarray(prompt[name], dtype=np.float64) for name in ("target", "reference", "policy")
    )
    order = np.argsort(-target, kind="stable")
    shown = order[:NUM_OUTCOMES]
    labels = [_short(prompt["outcomes"][i]) for i in shown]
    columns = {}
    for label, values in (("target", target), ("policy", policy), ("before", reference)):
        rest = [float(values[order[NUM_OUTCOMES:]].sum())] if len(order) > len(shown) else []
        columns[label] = [*values[shown], *rest, max(0.0, 1.0 - float(values.sum()))]
    if len(order) > len(shown):
        labels.append(f"{len(order) - len(shown)} others")
    labels.append("ill-formed")
    num_right = sum(prompt["rewards"][i] > 0 for i in shown)
    distance = float(np.abs(policy - target).sum() + max(0.0, 1.0 - policy.sum()))
    figure = new_figure(262)
    _draw_exact(figure.subplots(), labels, columns, num_right)
    told = "; ".join(
        f"{labels[i]}: target {write_number(columns['target'][i])}, "
        f"policy {write_number(columns['policy'][i])}"
        for i in range(num_right)
    )
    return finish(
        figure, f"exact-{index}", f"Prompt “{prompt['prompt']}”",
        f"Exact probability of each answer. Target: {formula}; policy: after "
        "training; before: pi_ref. Answers by target, right ones left of the line; “ill-formed” is "
        f"all other text. L1 of policy to target: {distance:.3f}.",
        f"Probability of each answer under target and policy. {told}. L1 distance {distance:.3f}.",
    )  # fmt: skip


def _draw_exact(
    axis: Axes, labels: Sequence[str], columns: dict[str, list[float]], num_right: int
) -> None:
    at = np.arange(len(labels))
    target = axis.bar(at, columns["target"], 0.8, color=SERIES[5], alpha=0.45, label="target")
    (before,) = axis.plot(
        at, columns["before"], color=SERIES[1], marker="_", markersize=9, markeredgewidth=1.8,
        linestyle="none", label="before (pi_ref)",
    )  # fmt: skip
    (policy,) = axis.plot(
        at, columns["policy"], color=SERIES[0], marker="o", markersize=5, linestyle="none",
        label="policy",
    )  # fmt: skip
    if 0 < num_right < len(labels):
        axis.axvline(num_right - 0.5, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    axis.set_xticks(at, labels, rotation=90, fontsize=9.5, family="monospace")
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.7, len(labels) - 0.3)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("probability")
    value_ticks(axis, share=True)
    put_legend(axis, handles=(target, policy, before))


# --- before against after


def _varied_problems(
    before: dict[str, Any], after: dict[str, Any]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The problems with most solutions that were solved at either end, in both evaluations."""
    earlier = {problem["prompt"]: problem for problem in before.get("problems", [])}
    pairs = [
        (earlier[problem["prompt"]], problem)
        for problem in after.get("problems", [])
        if problem.get("solutions") and problem["prompt"] in earlier
    ]
    solved = [pair for pair in pairs if pair[0]["counts"] or pair[1]["counts"]]
    return sorted(solved, key=lambda pair: -len(pair[1]["solutions"]))[:NUM_PROMPTS]


def _counts_plot(index: int, before: dict[str, Any], after: dict[str, Any]) -> Plot:
    rates = {
        solution: tuple(p["counts"].get(solution, 0) / p["num_samples"] for p in (before, after))
        for solution in after["solutions"]
    }
    ranked = sorted(rates, key=lambda solution: (-sum(rates[solution]), solution))
    shown = ranked[:NUM_SOLUTIONS]
    found = [sum(rate[end] > 0 for rate in rates.values()) for end in (0, 1)]
    right = [sum(rate[end] for rate in rates.values()) for end in (0, 1)]
    figure = new_figure(86 + 21 * len(shown))
    axis = figure.subplots()
    at = np.arange(len(shown))
    for end, (label, color) in enumerate((("before", SERIES[1]), ("after", SERIES[0]))):
        heights = [rates[solution][end] for solution in shown]
        axis.barh(at + 0.2 * (2 * end - 1), heights, 0.36, color=color, label=label)
    axis.set_yticks(at, [_short(s) for s in shown], family="monospace", fontsize=9.5)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", visible=True)
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.xaxis.set_major_formatter(write_share)
    axis.set_xlabel("share of samples")
    put_legend(axis)
    unseen = len(ranked) - len(shown)
    more = f" {unseen} more solutions are not drawn." if unseen > 0 else ""
    return finish(
        figure, f"solutions-{index}", f"Problem “{after['prompt']}”",
        f"Share of the {after['num_samples']} samples that gave each solution, in its normal form. "
        f"Found before {found[0]}, after {found[1]} of {len(ranked)}; right answers before "
        f"{right[0]:.0%}, after {right[1]:.0%}.{more}",
        "Bars of the share of samples by solution. " + "; ".join(
            f"{s}: before {rates[s][0]:.0%}, after {rates[s][1]:.0%}" for s in shown
        ) + ".",
    )  # fmt: skip


def _short(text: str) -> str:
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= LABEL_CHARACTERS else text[: LABEL_CHARACTERS - 1] + "…"
