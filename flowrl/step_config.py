"""[steps]: how answers are explored where the policy chooses among legal actions."""

from __future__ import annotations

from dataclasses import dataclass

from flowrl.schema import require


@dataclass(frozen=True)
class StepsConfig:
    """The defaults are those of Flow of Reasoning, arXiv:2406.05673. Training only; evaluation
    samples from the policy itself. Values move linearly over the first `anneal_steps` steps."""

    epsilon_start: float = 0.3
    """Chance of a uniform legal action instead of the policy's, at step 1."""
    epsilon_end: float = 0.01
    """The same from step anneal_steps on."""
    tempered_share: float = 0.5
    """Share of the trajectories that are drawn at another temperature than 1."""
    tempered_start: float = 4.0
    """That temperature, of the actions' log-probabilities, at step 1; it ends at 1."""
    anneal_steps: int = 200
    """Steps until epsilon and the temperature have reached their ends."""
    local_search_tries: int = 16
    """Tries to better the best trajectory of a group: its first half is kept, the rest drawn
    uniformly, and the first one with a higher reward takes the place of the group's worst; 0: none.
    """

    def __post_init__(self) -> None:
        for name in ("epsilon_start", "epsilon_end", "tempered_share"):
            value = getattr(self, name)
            require(
                0 <= value <= 1,
                f"steps.{name} must be in [0, 1], got {value}; set steps.{name}=0",
            )
        require(
            self.tempered_start > 0,
            f"steps.tempered_start must be > 0, got {self.tempered_start}; set "
            "steps.tempered_start=1",
        )
        for name, low in (("anneal_steps", 1), ("local_search_tries", 0)):
            value = getattr(self, name)
            require(
                value >= low,
                f"steps.{name} must be >= {low}, got {value}; set steps.{name}={low}",
            )

    def epsilon(self, step: int) -> float:
        return _between(self.epsilon_start, self.epsilon_end, self._progress(step))

    def temperature(self, step: int) -> float:
        return _between(self.tempered_start, 1.0, self._progress(step))

    def _progress(self, step: int) -> float:
        return min(1.0, (step - 1) / max(1, self.anneal_steps - 1))


def _between(start: float, end: float, progress: float) -> float:
    return start + (end - start) * progress
