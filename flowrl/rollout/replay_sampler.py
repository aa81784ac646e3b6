"""ReplaySampler: the recorded rollouts of another run, verbatim.

    flowrl train --rollout.engine replay --rollout.replay_dir runs/recorded

For parity tests, and for finding training bugs without a sampler. The run must have been recorded
with run.samples = "full": samples/step_*.jsonl then holds one JSON object per response, with the
keys step, prompt_index, sample, prompt_ids, response, response_ids, rollout_logprobs, truncated and
policy_version. Python's JSON gives every float back exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowrl.records import Prompt, Rollout, SampleRequest
from flowrl.schema import ConfigError, read_toml, require


class ReplaySampler:
    """Answers step n's request with what the run recorded at step n. See `Sampler`."""

    def __init__(self, run_dir: Path) -> None:
        """Raises ConfigError if `run_dir` is no run directory or has no recorded samples."""
        self.run_dir = run_dir
        require(
            (run_dir / "config.toml").is_file(),
            f"{run_dir} is not a run directory (no config.toml); set rollout.replay_dir to one",
        )
        self._files = {
            int(match[1]): file
            for file in (run_dir / "samples").glob("step_*.jsonl")
            if (match := re.fullmatch(r"step_(\d+)\.jsonl", file.name))
        }
        require(
            bool(self._files),
            f"{run_dir} has no samples/step_*.jsonl to replay; record it with run.samples=full",
        )
        rollout = read_toml(run_dir / "config.toml").get("rollout", {})
        self._temperature: float | None = rollout.get("temperature")

    def sample(self, request: SampleRequest) -> list[Rollout]:
        """Raises ConfigError unless exactly the requested prompts, samples and temperature were
        recorded at `request.step`."""
        require(
            request.stream == "train",
            f"replay has training rollouts only, not those of {request.stream}; "
            "set eval.num_prompts=0",
        )
        require(
            request.temperature == self._temperature,
            f"{self.run_dir} was sampled at temperature {self._temperature}, this run trains at "
            f"{request.temperature}; set rollout.temperature={self._temperature}",
        )
        groups = self._read(request.step)
        return [
            _rollout(row, prompt)
            for prompt in request.prompts
            for row in self._group(groups, prompt, request)
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Nothing to do: recorded rollouts keep the version that made them."""

    def close(self) -> None:
        """Nothing is held open."""

    def _read(self, step: int) -> dict[int, dict[int, Mapping[str, Any]]]:
        """Recorded responses of the step by prompt index and sample, of all ranks."""
        if step not in self._files:
            last = max(self._files)
            raise ConfigError(
                f"{self.run_dir} has no samples of step {step}, its last is {last}; "
                f"set trainer.steps={last}"
            )
        file = self._files[step]
        groups: dict[int, dict[int, Mapping[str, Any]]] = {}
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                group = groups.setdefault(row["prompt_index"], {})
                if not row.keys() >= {"prompt_ids", "response_ids", "rollout_logprobs"}:
                    raise ConfigError(
                        f"{file} keeps the text only, without token ids and log-probs; record the "
                        "run with run.samples=full"
                    )
                group[row["sample"]] = row
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{file}:{number} is not a recorded response ({error!r}); record the run again"
                ) from error
        return groups

    def _group(
        self,
        groups: Mapping[int, Mapping[int, Mapping[str, Any]]],
        prompt: Prompt,
        request: SampleRequest,
    ) -> list[Mapping[str, Any]]:
        """The recorded members of the prompt's group, in order."""
        members = groups.get(prompt.index, {})
        same_prompt = all(tuple(r["prompt_ids"]) == prompt.token_ids for r in members.values())
        require(
            bool(members) and same_prompt,
            f"{self.run_dir} did not record prompt {prompt.index} ({prompt.text!r}) at step "
            f"{request.step}; use its seed, task, base or model, and batch.prompts_per_step",
        )
        require(
            sorted(members) == list(range(request.group_size)),
            f"{self.run_dir} recorded {len(members)} samples of prompt {prompt.index} at step "
            f"{request.step}, this run takes {request.group_size}; "
            f"set batch.group_size={len(members)}",
        )
        return [members[sample] for sample in range(request.group_size)]


def _rollout(row: Mapping[str, Any], prompt: Prompt) -> Rollout:
    return Rollout(
        prompt=prompt,
        sample=row["sample"],
        response_ids=tuple(row["response_ids"]),
        rollout_logprobs=tuple(row["rollout_logprobs"]),
        truncated=row["truncated"],
        policy_version=row["policy_version"],
        text=row["response"],
    )
