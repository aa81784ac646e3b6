"""The plots over the steps of a run, in sections, each with the definition of its numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from flowrl.report.figures import (
    SERIES,
    Panel,
    Plot,
    Scale,
    Section,
    Series,
    draw_panels,
    finish,
    new_figure,
    put_legend,
    smoothing_window,
    step_ticks,
    value_ticks,
    write_number,
)
from flowrl.run_reader import Row, RunData, read_lines, sample_files, series

# Phases that a step's seconds are split into; a checkpoint is written between steps.
PHASES = ("generate", "reward", "logprob", "train", "sync")
MAX_BARS = 60


def sections(run: RunData) -> list[Section]:
    """All sections but the one on solutions; a plot without data is left out."""
    return [
        _section(
            "learning", "Learning", _reward(run), _eval(run), _eval_sets(run), _optimizer(run)
        ),
        _section("diversity", "Diversity", _entropy(run), _coverage(run), _distance(run)),
        _section(
            "flow", "Trajectory balance", _log_z(run), _residual_histogram(run), _weights(run)
        ),
        _section("responses", "Responses and sampler", _length(run), _mismatch(run)),
        _section("time", "Time and memory", _step_time(run), _throughput(run), _memory(run)),
    ]


def phase_seconds(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Seconds of every step by phase. `other` is what the step took beyond its phases; `checkpoint`
    comes on top of the step. Only phases that took time."""
    seconds = {
        phase: [float(row.get(f"timing_s/{phase}", 0.0)) for row in rows]
        for phase in (*PHASES, "checkpoint")
    }
    inside = np.sum([seconds[phase] for phase in PHASES], axis=0)
    steps = np.array([float(row.get("timing_s/step", 0.0)) for row in rows])
    checkpoint = seconds.pop("checkpoint")
    seconds["other"] = np.maximum(steps - inside, 0.0).tolist()
    seconds["checkpoint"] = checkpoint
    return {phase: values for phase, values in seconds.items() if any(v > 0 for v in values)}


def _section(name: str, title: str, *plots: Plot | None) -> Section:
    return Section(name, title, tuple(plot for plot in plots if plot is not None))


def _panel(
    label: str, rows: Sequence[Row], names: dict[str, str], scale: Scale = "linear", **options
) -> Panel:
    """A panel of several metrics of the same rows: {metric: label of its line}."""
    lines = tuple(Series(text, *series(rows, name), **options) for name, text in names.items())
    return Panel(label, lines, scale)


def _reward(run: RunData) -> Plot | None:
    window = smoothing_window(len(run.train))
    mean = "" if window == 1 else f" Bold: running mean of {window} steps; faint: each step."
    return draw_panels(
        "reward", "Reward in training",
        "Mean over all sequences of a step, as scored, before any shaping. Below: share of groups "
        "whose members all have the same reward, from which a group baseline learns nothing."
        + mean,
        [
            _panel("reward", run.train, {"reward/mean": "reward"}, smooth=True),
            _panel("uniform groups", run.train, {"reward/zero_std_frac": "uniform groups"},
                   "share", smooth=True),
        ],
    )  # fmt: skip


def _eval(run: RunData) -> Plot | None:
    names = {
        name: f"{match[1]}@{match[2]}"
        for whole in run.eval_sets[:1]
        for name in run.evals[0]
        if (match := re.fullmatch(rf"eval/{re.escape(whole)}/(avg|pass)@(\d+)", name))
    }
    return draw_panels(
        "eval", "Held-out problems",
        "avg@k: share of right answers among k samples per problem. pass@k: share of problems with "
        "at least one right answer among k. Step 0 is before training.",
        [_panel("share", run.evals, names, "share", marked=True)],
    )  # fmt: skip


def _eval_sets(run: RunData) -> Plot | None:
    names = {
        name: match[1]
        for name in (run.evals[0] if run.evals else {})
        if (match := re.fullmatch(r"eval/([^/]+)/avg@\d+", name)) and match[1] in run.eval_sets[1:]
    }
    return draw_panels(
        "sets", "Held-out problems, set by set",
        "Share of right answers, mean over the problems of each set.",
        [_panel("share", run.evals, names, "share", marked=True)],
    )  # fmt: skip


def _optimizer(run: RunData) -> Plot | None:
    return draw_panels(
        "optimizer", "Loss and gradient norm",
        "Means over the step's updates. The gradient norm is global over all parameters, before "
        "clipping; a skipped update (non-finite norm) does not count.",
        [
            _panel("loss", run.train, {"actor/loss": "loss"}, smooth=True),
            _panel("gradient norm", run.train, {"actor/grad_norm": "gradient norm"}, "log",
                   smooth=True),
        ],
    )  # fmt: skip


def _length(run: RunData) -> Plot | None:
    return draw_panels(
        "length", "Response length and truncation",
        "Response tokens of training samples, end of text included. Truncated: share of responses "
        "that reached rollout.max_new_tokens without ending.",
        [
            _panel("tokens", run.train,
                   {"response_length/mean": "mean", "response_length/max": "longest"}, "zero"),
            _panel("truncated", run.train, {"response_length/truncated": "truncated"}, "share"),
        ],
    )  # fmt: skip


def _entropy(run: RunData) -> Plot | None:
    distinct = "diversity/distinct_solutions"
    title, caption = "Entropy", "Entropy of the policy, mean over response tokens of the step."
    if any(distinct in row for row in run.train):
        title += " and distinct solutions"
        caption += (
            " Distinct solutions: different right answers per problem; in training among a group's "
            "members, in evaluation among its own number of samples, so the two curves differ in "
            "level."
        )
    return draw_panels(
        "entropy", title, caption,
        [
            _panel("nats per token", run.train, {"actor/entropy": "entropy"}, "zero", smooth=True),
            Panel("per problem", (
                Series("training", *series(run.train, distinct), smooth=True),
                Series("held out", *series(run.evals, distinct), marked=True),
            ), "zero"),
        ],
    )  # fmt: skip


def _coverage(run: RunData) -> Plot | None:
    name = "diversity/mode_coverage"
    return draw_panels(
        "coverage", "Mode coverage",
        "Share of all the solutions of a held-out problem that its samples found, mean over "
        "problems. All solutions are known from an exhaustive search.",
        [_panel("solutions found", run.evals, {name: "mode coverage"}, "share", marked=True)],
    )  # fmt: skip


def _distance(run: RunData) -> Plot | None:
    names = {
        "diversity/l1_to_target": "L1",
        "diversity/jsd_to_target": "JSD",
        "diversity/kl_to_target": "KL(policy || target)",
        "diversity/kl_from_target": "KL(target || policy)",
    }
    return draw_panels(
        "distance", "Distance to the exact target",
        "Between the policy and pi_ref exp(beta r) / Z (Flow of Reasoning: P_B in place of "
        "pi_ref), both tabulated over every answer; mean over prompts. L1 is 0 to 2; the "
        "divergences are in nats.",
        [
            _panel("L1, JSD", run.evals, dict(list(names.items())[:2]), "zero", marked=True),
            _panel("KL (nats)", run.evals, dict(list(names.items())[2:]), "zero", marked=True),
        ],
    )  # fmt: skip


def _log_z(run: RunData) -> Plot | None:
    steps, mean = series(run.train, "flow/log_z_mean")
    gap_steps, gap = series(run.train, "flow/log_z_gap")
    if not mean or steps != gap_steps:
        return None
    if max(map(abs, gap)) < 1e-6 * max(1.0, *map(abs, mean)):
        return None  # the loss uses the group's own estimate
    group = [m - g for m, g in zip(mean, gap, strict=True)]
    return draw_panels(
        "log-z", "log Z and the group's own estimate",
        "log Z as the loss uses it against the estimate that each group of samples gives, the mean "
        "of beta * reward + mean log pi_ref - mean log pi; means over sequences. They agree when "
        "log Z is learned.",
        [Panel("log Z", (Series("log Z", steps, mean), Series("group estimate", steps, group)))],
    )  # fmt: skip


def _residual_histogram(run: RunData) -> Plot | None:
    ends = _residuals(run)
    if not ends:
        return None
    pooled = np.concatenate([values for _, values in ends])
    low, high = np.percentile(pooled, [1, 99])
    pad = 0.05 * (high - low) or 0.5
    bins = np.linspace(low - pad, high + pad, 37)
    figure = new_figure(232)
    axis = figure.subplots()
    told = []
    for (step, values), color in zip(ends, SERIES, strict=False):
        clipped = np.clip(values, bins[0], bins[-1])
        weights = np.full(len(values), 1 / len(values))
        shown = {"bins": bins, "weights": weights, "color": color}
        axis.hist(clipped, histtype="stepfilled", alpha=0.25, **shown)
        axis.hist(clipped, histtype="step", linewidth=1.5, label=f"step {step}", **shown)
        told.append(
            f"step {step}: median {write_number(float(np.median(values)))}, middle half from "
            f"{write_number(float(np.percentile(values, 25)))} to "
            f"{write_number(float(np.percentile(values, 75)))} ({len(values)} sequences)."
        )
    axis.set_xlabel("residual")
    axis.set_ylabel("sequences")
    value_ticks(axis, share=True)
    put_legend(axis)
    return finish(
        figure, "residual", "Residuals, first and last step",
        "log Z + mean log pi - beta * reward - mean log pi_ref of each sequence: what the loss "
        "squares. 0 means balance. The outermost bins hold all that lies beyond.",
        "Histogram. " + " ".join(told),
    )  # fmt: skip


def _residuals(run: RunData) -> list[tuple[int, np.ndarray]]:
    """(step, residuals) of the first and of the last step whose samples have them."""
    files = list(sample_files(run.path, "train").items())
    found = []
    for step, file in files[:1] + files[1:][-1:]:
        rows, _ = read_lines(file)
        values = [row["residual"] for row in rows if isinstance(row.get("residual"), int | float)]
        if values:
            found.append((step, np.asarray(values, dtype=np.float64)))
    return found


def _weights(run: RunData) -> Plot | None:
    return draw_panels(
        "weights", "Importance weights",
        "Effective share of sequences, (sum w)^2 / (N sum w^2), of the weights that multiply the "
        "loss; 100% means that all count alike. Clipped: share of sequences whose ratio to "
        "the policy that sampled was outside the bound.",
        [
            _panel("effective share", run.train, {"flow/iw_ess": "effective share"}, "share"),
            _panel("clipped", run.train, {"flow/iw_clip_frac": "clipped"}, "share"),
        ],
    )  # fmt: skip


def _mismatch(run: RunData) -> Plot | None:
    difference = _panel(
        "nats per token", run.train, {"mismatch/logp_abs_diff": "|difference|"}, "log"
    )
    return draw_panels(
        "mismatch", "Sampler against trainer",
        "Mean over response tokens of |log-prob by the trainer - log-prob by the sampler| for the "
        "same weights: below 0.005 is normal, above 0.01 is suspect. Below: effective share of "
        "sequences if they were reweighted by that ratio.",
        [
            Panel(difference.label, difference.series, "log", ((0.01, "suspect above 0.01"),)),
            _panel("effective share", run.train, {"mismatch/ess": "effective share"}, "share"),
        ],
    )  # fmt: skip


def _step_time(run: RunData) -> Plot | None:
    seconds = phase_seconds(run.timing)
    if not seconds:
        return None
    steps = np.array([row["step"] for row in run.timing])
    width = -(-len(steps) // MAX_BARS)
    starts = np.arange(0, len(steps), width)
    sizes = np.diff(np.append(starts, len(steps)))
    heights = np.array([np.add.reduceat(v, starts) / sizes for v in seconds.values()])
    figure = new_figure(262)
    axis = figure.subplots()
    base = np.zeros(len(starts))
    for phase, values, color in zip(seconds, heights, SERIES, strict=False):
        edge = {"color": color, "edgecolor": color, "linewidth": 0.5}  # closes hairline gaps
        axis.bar(steps[starts], values, width, bottom=base, align="edge", label=phase, **edge)
        base += values
    step_ticks(axis)
    axis.set_ylabel("seconds per step")
    value_ticks(axis)
    axis.set_ylim(0, float(base.max()) * 1.1)
    put_legend(axis)
    total = sum(sum(values) for values in seconds.values())
    told = ", ".join(f"{phase} {sum(v) / total:.0%}" for phase, v in seconds.items())
    mean = "" if width == 1 else f" A bar is the mean of {width} steps."
    return finish(
        figure, "step-time", "Time of a step, by phase",
        "Wall-clock seconds of rank 0; each phase waits for its device. Writing a checkpoint comes "
        "on top of a step; evaluation is not counted." + mean,
        f"Stacked chart of seconds by phase over steps. Shares of the whole: {told}.",
    )  # fmt: skip


def _throughput(run: RunData) -> Plot | None:
    names = {
        "perf/gen_tokens_per_s": "generate",
        "perf/train_tokens_per_s": "train",
        "perf/tokens_per_s": "whole step",
    }
    return draw_panels(
        "throughput", "Throughput",
        "Response tokens of all ranks per second: over the seconds of generation, of the updates "
        "(forward, backward, optimizer), and of the whole step.",
        [_panel("tokens per second", run.timing, names, "zero", smooth=True)],
    )  # fmt: skip


def _memory(run: RunData) -> Plot | None:
    return draw_panels(
        "memory", "Memory",
        "Peak so far on rank 0, in GB (1e9 bytes): of the CUDA allocator on a GPU, of the whole "
        "process on a CPU.",
        [_panel("peak GB", run.timing, {"perf/peak_mem_gb": "peak memory"}, "zero")],
    )  # fmt: skip
