"""The section [rollout]: who samples, from which distribution, and how its engine is run.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from flowrl.schema import require

Correction = Literal[
    "none", "tis", "seq_tis", "icepop", "seq_mask", "seq_mask_tis", "geo_rs", "k3_rs"
]

MIN_TEMPERATURE = 1e-3  # logits are divided by it in float32

CORRECTION_BOUNDS: dict[str, tuple[float | None, float]] = {
    "tis": (None, 2.0),
    "seq_tis": (None, 2.0),
    "icepop": (0.5, 5.0),
    "seq_mask": (0.0, 3.0),
    "seq_mask_tis": (0.5, 5.0),
    "geo_rs": (0.999, 1.001),
    "k3_rs": (None, 0.01),
}
"""Lower and upper bound as published (docs/rollouts.md); None: there is no lower one."""

VLLM_ONLY = (
    "mode", "server_python", "server_address", "server_token_file", "dtype", "restart",
    "start_timeout_s", "generate_timeout_s", "sync_timeout_s", "sync_bucket_mb",
    "sync_checked_tensors", "sync_transport", "tensor_parallel_size", "gpu_memory_utilization",
    "kv_cache_gb", "sleep", "enforce_eager",
)  # fmt: skip
"""Settings that only the engine vllm reads; another engine refuses them."""


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["hf", "vllm", "replay"] = "hf"
    """Sampler: hf (transformers, in process), vllm, or replay (another run's rollouts)."""
    replay_dir: str = ""
    """Run directory whose recorded rollouts are replayed."""
    temperature: float = 1.0
    """Temperature of the sampled distribution, and of every log-prob in training."""
    max_prompt_tokens: int = 256
    """Longest prompt accepted."""
    max_new_tokens: int = 32
    """Longest response, EOS included; longer ones are truncated."""
    max_batch_sequences: int = 1024
    """Sequences that the sampler generates at once."""
    old_logprobs: Literal["trainer", "rollout"] = "trainer"
    """Whose log-probs are the old policy's: recomputed by the trainer, or the sampler's own."""
    correction: Correction = "none"
    """Correction of the sampler's mismatch, a weight on each token's loss (docs/rollouts.md)."""
    correction_low: float | None = None
    """Lower bound of the correction. Unset: the one its source publishes."""
    correction_high: float | None = None
    """Upper bound (cap) of the correction. Unset: the one its source publishes."""
    max_staleness: int = 0
    """Steps by which the weights that sampled a batch are behind: 0 is on-policy; from 1 on the
    next batches are generated while the policy trains."""
    top_p: float = 1.0
    """Only 1: training samples the whole distribution. Evaluation has eval.top_p."""
    top_k: int = 0
    """Only 0, as above."""
    min_p: float = 0.0
    """Only 0, as above."""
    mode: Literal["server", "in_process"] = "server"
    """Where vLLM runs: in a process of its own, or in the trainer's (its core is a child then)."""
    server_python: str = ""
    """Python of the server's own environment, with vllm in it. Empty: the trainer's."""
    server_address: tuple[str, ...] = ()
    """host:port of a `flowrl serve` on another node, one for each replica. Empty: the trainer
    starts its server itself, on its own node."""
    server_token_file: str = ""
    """File with the token of server_address. Empty: the token is in FLOWRL_ENGINE_TOKEN."""
    dtype: Literal["auto", "fp8"] = "auto"
    """Weights of the engine: auto is model.dtype; fp8 (GPU) needs a correction."""
    restart: int = 0
    """Times that a dead engine is started again, its weights sent again, before the run stops."""
    start_timeout_s: float = 600.0
    """Longest wait for the engine to load, in seconds."""
    generate_timeout_s: float = 1800.0
    """Longest wait for the responses of one step or evaluation, in seconds."""
    sync_timeout_s: float = 600.0
    """Longest wait for one transfer of weights, in seconds."""
    sync_bucket_mb: int = 256
    """Weights are sent in buckets of about this size, in MiB."""
    sync_checked_tensors: int = 64
    """Matrices compared after each transfer, at most, beside all vectors; the others have their
    turn at the transfers that follow."""
    sync_transport: Literal["auto", "files", "ipc", "broadcast"] = "auto"
    """How weights travel: as files in shared memory, by vLLM's CUDA IPC transfer, or by broadcast
    to the engine's workers (gloo on CPUs, NCCL between GPUs).
    auto: ipc where trainer and engine share one GPU whose allocator has no expandable segments,
    files elsewhere."""
    tensor_parallel_size: int = 1
    """GPUs that share one engine; on a CPU, workers."""
    gpu_memory_utilization: float = 0.5
    """Share of a GPU's memory that vLLM takes; the trainer lives on the rest."""
    kv_cache_gb: float = 1.0
    """Memory of vLLM's key-value cache on a CPU, in GiB."""
    sleep: bool = False
    """GPU: free the engine's cache and weights while the policy trains."""
    enforce_eager: bool | None = None
    """Run the engine without compiled graphs. Unset: true on a CPU."""

    def __post_init__(self) -> None:
        require(
            self.temperature >= MIN_TEMPERATURE,
            f"rollout.temperature must be >= {MIN_TEMPERATURE}, got {self.temperature}; greedy "
            "decoding has no importance weights: set rollout.temperature=1.0",
        )
        for name in ("max_prompt_tokens", "max_new_tokens", "max_batch_sequences",
                     "sync_bucket_mb", "sync_checked_tensors", "tensor_parallel_size"):  # fmt: skip
            self._at_least(name, 1)
        for name in ("max_staleness", "restart"):
            self._at_least(name, 0)
        for name in ("start_timeout_s", "generate_timeout_s", "sync_timeout_s", "kv_cache_gb",
                     "gpu_memory_utilization"):  # fmt: skip
            value = getattr(self, name)
            require(value > 0, f"rollout.{name} must be > 0, got {value}; leave it out")
        require(
            self.gpu_memory_utilization <= 1,
            "rollout.gpu_memory_utilization must be <= 1, got "
            f"{self.gpu_memory_utilization}; set rollout.gpu_memory_utilization=0.5",
        )
        require(
            (self.engine == "replay") == bool(self.replay_dir),
            "rollout.engine=replay and rollout.replay_dir go together, got "
            f"engine={self.engine} and replay_dir={self.replay_dir!r}; set both",
        )
        for name, whole in (("top_p", 1), ("top_k", 0), ("min_p", 0)):
            value = getattr(self, name)
            require(
                value == whole,
                f"rollout.{name} must be {whole}, got {value}: a cut distribution gives tokens of "
                "the policy no probability, so there is no importance weight; leave it out, and "
                "set eval.top_p for evaluation",
            )
        self._check_correction()
        self._check_engine()

    def _at_least(self, name: str, low: int) -> None:
        value = getattr(self, name)
        dotted = f"rollout.{name}"
        require(value >= low, f"{dotted} must be >= {low}, got {value}; set {dotted}={low}")

    def _check_correction(self) -> None:
        require(
            self.correction == "none" or self.old_logprobs == "trainer",
            f"rollout.correction={self.correction} weighs the trainer's old log-probs against the "
            "sampler's, got rollout.old_logprobs=rollout; set rollout.old_logprobs=trainer",
        )
        bounds = (self.correction_low, self.correction_high)
        require(
            self.correction != "none" or bounds == (None, None),
            f"rollout.correction_low and correction_high are set to {bounds}, but "
            "rollout.correction is none; leave them out",
        )
        if self.correction != "none":
            low, high = self.correction_bounds
            require(
                self.correction_low is None or CORRECTION_BOUNDS[self.correction][0] is not None,
                f"rollout.correction={self.correction} has no lower bound, got "
                f"rollout.correction_low={self.correction_low}; leave it out",
            )
            require(
                0 <= low < high,
                f"rollout.correction_low must be below correction_high, got {low} and {high}; "
                "leave them out for the published bounds",
            )
        require(
            self.dtype != "fp8" or self.correction != "none",
            "rollout.dtype=fp8 samples from another distribution than the trainer's, got "
            "rollout.correction=none; set rollout.correction=tis",
        )

    def _check_address(self) -> None:
        for address in self.server_address:
            split_address(address)
        require(
            len(set(self.server_address)) == len(self.server_address),
            f"an engine serves one replica, got rollout.server_address={self.server_address}; "
            "start a flowrl serve for each, on a port of its own",
        )
        for name, refused in (
            ("mode", self.mode == "in_process"),
            ("server_python", self.server_python != ""),
            ("sync_transport", self.sync_transport == "ipc"),
        ):
            require(
                not (refused and self.server_address),
                f"rollout.{name}={getattr(self, name)} is for an engine that the trainer starts, "
                "got rollout.server_address, too; leave one out (flowrl serve has a --python)",
            )
        require(
            bool(self.server_address) or not self.server_token_file,
            f"rollout.server_token_file={self.server_token_file!r} is for rollout.server_address, "
            "which is empty; leave it out",
        )

    def address_of(self, replica: int, num_replicas: int) -> str:
        """The server that a replica samples with; empty: one of its own. Raises ConfigError where
        there are more or fewer of them than replicas."""
        found = len(self.server_address)
        require(
            found in (0, num_replicas),
            f"rollout.server_address must have one address for each replica, got {found} and "
            f"{num_replicas} replicas; start {num_replicas} times flowrl serve and give them all",
        )
        return self.server_address[replica] if found else ""

    @property
    def longest_wait_s(self) -> float:
        """Longest time that other ranks may wait while one waits for its engine, restarts included;
        0 without one."""
        if self.engine != "vllm":
            return 0.0
        start, generate, sync = self.start_timeout_s, self.generate_timeout_s, self.sync_timeout_s
        asleep = 2 * sync * self.sleep  # to wake, and to sleep again
        ahead = max(1, self.max_staleness)  # generations that weights wait for
        longest = max(start, ahead * (generate + asleep) + sync)
        return longest + self.restart * (start + generate + sync)

    def by_transformers(self) -> RolloutConfig:
        """The same distribution without an engine to start."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        unused = ("replay_dir", "max_staleness", *VLLM_ONLY)
        return dataclasses.replace(self, engine="hf", **{name: defaults[name] for name in unused})

    @property
    def correction_bounds(self) -> tuple[float, float]:
        """Low and high of the correction; a low of 0 bounds nothing."""
        low, high = CORRECTION_BOUNDS[self.correction]
        low = low if self.correction_low is None else self.correction_low
        return low or 0.0, high if self.correction_high is None else self.correction_high

    def _check_engine(self) -> None:
        if self.engine != "vllm":
            defaults = {f.name: f.default for f in dataclasses.fields(self)}
            given = [name for name in VLLM_ONLY if getattr(self, name) != defaults[name]]
            require(
                not given,
                f"only rollout.engine=vllm reads rollout.{', rollout.'.join(given)}, got "
                f"rollout.engine={self.engine}; set rollout.engine=vllm, or leave them out",
            )
        require(
            not (self.mode == "in_process" and self.server_python),
            f"rollout.server_python={self.server_python!r} is for a server process, got "
            "rollout.mode=in_process; set rollout.mode=server",
        )
        require(
            self.mode == "server" or self.sync_transport != "broadcast",
            "weights are broadcast to a server process, got rollout.mode=in_process; set "
            "rollout.mode=server or rollout.sync_transport=files",
        )
        self._check_address()
        require(
            self.engine != "replay" or self.max_staleness == 0,
            f"a replay generates nothing, got rollout.max_staleness={self.max_staleness}; "
            "set rollout.max_staleness=0",
        )
        require(
            not self.sleep or self.max_staleness == 0,
            "an engine that samples while the policy trains cannot sleep meanwhile, got "
            f"rollout.sleep=true and rollout.max_staleness={self.max_staleness}; set one of them "
            "to its default",
        )


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "node1:8577" or "[::1]:8577". Raises ConfigError for anything else."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    require(
        bool(host) and port.isascii() and port.isdecimal() and int(port) < 1 << 16,
        f"an engine's address is HOST:PORT, got {address!r}; write node1:8577",
    )
    return host, int(port)
