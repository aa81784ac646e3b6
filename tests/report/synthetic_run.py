"""Writes the directory of a finished run, with numbers from simple formulas."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

PHASES = {"generate": 0.31, "reward": 0.02, "logprob": 0.12, "train": 0.4, "sync": 0.03}
BETA = 3.0


def write_run(path: Path, *, steps: int = 60, exact: bool = True, flow: bool = True) -> Path:
    """A run of the modular task (`exact`) or of countdown, of FlowRL (`flow`) or of GRPO."""
    (path / "samples").mkdir(parents=True)
    (path / "evals").mkdir()
    task = "modular" if exact else "countdown"
    (path / "config.toml").write_text(
        f'recipe = "{task}_cpu"\nseed = 7\n\n[task]\nname = "{task}"\n\n[objective]\n'
        f'name = "{"flowrl" if flow else "grpo"}"\n\n[trainer]\nsteps = {steps}\n\n[eval]\n'
        "num_prompts = 49\nsamples = 16\ntemperature = 0.6\ntop_p = 0.95\n"
    )
    write_environment(path, task)
    evals = [0, steps // 2, steps]
    rows = [
        row
        for step in range(steps + 1)
        for row in (
            *([train_row(step, steps, flow)] if step else []),
            *([eval_row(step, steps, task, exact)] if step in evals else []),
        )
    ]
    write_lines(path / "metrics.jsonl", rows)
    write_lines(path / "timing.jsonl", [timing_row(step) for step in range(1, steps + 1)])
    for step in (1, steps // 2, steps):
        write_lines(path / f"samples/step_{step:06d}.jsonl", sample_rows(step, steps, flow))
    for step in evals:
        write_lines(path / f"samples/eval_{step:06d}.jsonl", sample_rows(step, steps, False))
        detail = eval_detail(step / steps, task, exact)
        (path / f"evals/step_{step:06d}.json").write_text(json.dumps(detail))
    return path


def write_environment(path: Path, task: str) -> None:
    environment = {
        "flowrl": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.19.0",
        "platform": "Linux-6.1-x86_64", "cpu_count": 2, "threads": 2, "device": "cpu",
        "kernel_backend": "torch", "git_commit": None, "seed": 7, "world_size": 1,
        "command": f"flowrl train {task}_cpu --seed 7",
    }  # fmt: skip
    (path / "env.json").write_text(json.dumps(environment))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_row(step: int, steps: int, flow: bool) -> dict[str, Any]:
    done, noise = step / steps, math.sin(12.9898 * step) * 0.5
    row = {
        "kind": "train", "step": step,
        "reward/mean": 0.08 + 0.3 * done + 0.04 * noise, "reward/std": 0.3,
        "reward/zero_std_frac": 0.5 - 0.2 * done + 0.05 * noise, "reward/error_rate": 0.0,
        "actor/loss": 2.0 * math.exp(-3 * done) + 0.05 * noise, "actor/entropy": 1.3 - 0.6 * done,
        "actor/grad_norm": 1.5 * math.exp(-done) * (1.2 + noise), "actor/lr": 1e-3,
        "actor/kl_ref": 0.4 * done, "actor/skipped_updates": 0.0,
        "mismatch/logp_abs_diff": 2e-6 * (1.1 + noise), "mismatch/kl": 1e-8,
        "mismatch/max_ratio": 1.00001, "mismatch/ess": 0.99999,
        "response_length/mean": 8.1 - done, "response_length/max": 14 - step % 3,
        "response_length/truncated": 0.04 * (1 - done),
        "diversity/distinct_solutions": 0.6 + 0.8 * done + 0.1 * noise,
    }  # fmt: skip
    if flow:
        row |= {
            "flow/residual_abs": 1.4 * math.exp(-2 * done), "flow/log_z_mean": 1.1 * done**0.5,
            "flow/log_z_gap": -0.9 * (1 - done) + 0.05 * noise, "flow/iw_mean": 1.0,
            "flow/iw_max": 1.3, "flow/iw_ess": 0.97 - 0.05 * done + 0.02 * noise,
            "flow/iw_clip_frac": 0.02 + 0.03 * done,
        }  # fmt: skip
    return row


def eval_row(step: int, steps: int, task: str, exact: bool) -> dict[str, Any]:
    done = step / steps
    row = {
        "kind": "eval", "step": step,
        f"eval/{task}/avg@16": 0.0583 + 0.1128 * done, f"eval/{task}/pass@4": 0.21 - 0.01 * done,
        f"eval/{task}/pass@16": 0.5312 - 0.2187 * done, f"eval/{task}/response_length": 7.5 - done,
        "diversity/distinct_solutions": 0.84 + 0.39 * done, "diversity/mode_coverage": 0.31,
    }  # fmt: skip
    if exact:
        row |= {
            "diversity/l1_to_target": 1.02 - 0.8 * done,
            "diversity/jsd_to_target": 0.21 - 0.19 * done,
            "diversity/kl_to_target": 0.9 - 0.8 * done, "diversity/kl_from_target": 1.1 - done,
            "diversity/success_exact": 0.28 + 0.5 * done, "diversity/success_target": 0.89,
        }  # fmt: skip
    return row


def timing_row(step: int) -> dict[str, Any]:
    seconds = {name: base * (1 + 0.1 * math.sin(step)) for name, base in PHASES.items()}
    row: dict[str, Any] = {"kind": "train", "step": step}
    row |= {f"timing_s/{name}": value for name, value in seconds.items()}
    row["timing_s/step"] = sum(seconds.values()) + 0.01
    if step % 25 == 1 and step > 1:
        row["timing_s/checkpoint"] = 0.2
    row["perf/tokens_per_s"] = 2048 / row["timing_s/step"]
    row["perf/gen_tokens_per_s"] = 2048 / seconds["generate"]
    row["perf/train_tokens_per_s"] = 2048 / seconds["train"]
    row["perf/peak_mem_gb"] = 0.9 + 0.1 * min(1.0, step / 20)
    return row


def sample_rows(step: int, steps: int, flow: bool) -> list[dict[str, Any]]:
    """8 samples of 12 prompts; prompt 100 holds text that would be HTML or console markup."""
    source = random.Random(step)
    rows = []
    for prompt, sample in itertools.product(range(100, 112), range(8)):
        right = source.random() < 0.1 + 0.4 * step / steps
        text = (
            f"{sample}*{prompt}+[bold]<script>alert(1)</script>" if prompt == 100 else f"{sample}6"
        )
        row = {
            "step": step, "prompt_index": prompt, "sample": sample, "prompt": f"{prompt % 7} 5",
            "response": text, "reward": float(right), "correct": right,
            "solution": f"{sample}6" if right else None, "error": None,
            "truncated": not right and sample == 7, "policy_version": step - 1,
            "response_length": len(text),
        }  # fmt: skip
        if flow:
            row["residual"] = source.gauss(-1.0 * (1 - step / steps), 1.2 - 0.8 * step / steps)
            row["importance_weight"] = math.exp(source.gauss(0, 0.1))
            row["log_z"] = 1.1 * (step / steps) ** 0.5
        rows.append(row)
    return rows


def eval_detail(done: float, task: str, exact: bool) -> dict[str, Any]:
    problems = []
    for index in range(8):
        forms = [f"{index + 2}*{i + 1}+{i + 3}-{index}" for i in range(2 + 2 * index)]
        counts = {
            form: n for i, form in enumerate(forms) if (n := round((4 - i) * (0.3 + done))) > 0
        }
        problems.append(
            {"prompt": f"{index} 5 {index + 2}={index + 20}:", "solutions": forms,
             "counts": counts, "num_samples": 16}
        )  # fmt: skip
    prompts = [exact_table(a, done) for a in range(1, 5)]
    return {
        "set": task,
        "problems": problems,
        "exact": {"beta": BETA, "prompts": prompts} if exact else None,
    }


def exact_table(a: int, done: float, p: int = 7) -> dict[str, Any]:
    """a*x + y = 5 mod p: an uneven reference, its target, and a policy between the two."""
    outcomes = [f"{x}{y}" for x in range(p) for y in range(p)]
    rewards = [float((a * int(o[0]) + int(o[1]) - 5) % p == 0) for o in outcomes]
    raw = [
        (int(o[0]) + 1) ** -1.5 * (1.4 if r else 1.0)
        for o, r in zip(outcomes, rewards, strict=True)
    ]
    reference = [0.95 * v / sum(raw) for v in raw]
    weights = [v * math.exp(BETA * r) for v, r in zip(reference, rewards, strict=True)]
    target = [w / sum(weights) for w in weights]
    share = 0.8 * done
    policy = [share * t + (1 - share) * r for t, r in zip(target, reference, strict=True)]
    return {
        "prompt": f"{a} 5", "outcomes": outcomes, "rewards": rewards, "reference": reference,
        "target": target, "policy": policy,
    }  # fmt: skip
