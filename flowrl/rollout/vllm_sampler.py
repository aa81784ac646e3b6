"""VLLMSampler: rollouts by vLLM, which runs in a process of its own or as a child of the trainer's.

    flowrl train countdown_cpu --rollout.engine vllm --rollout.server_python .venv-vllm/bin/python

Every sequence is one request with its own seed, a function of (seed, step, stream, prompt, sample).
After every transfer of weights the engine's are compared with what was sent. vllm itself is
imported by flowrl/rollout/vllm_engine.py alone.
"""

from __future__ import annotations

import base64
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from flowrl.records import Prompt, Rollout, SampleRequest
from flowrl.rollout.engine_protocol import (
    EngineError,
    EngineHost,
    Message,
    WeightSyncError,
)
from flowrl.rollout.gpu_memory import release_cached
from flowrl.rollout.model_limits import check_request, eos_ids, positions, read_json
from flowrl.rollout.noise import stream_keys
from flowrl.rollout.weight_broadcast import Broadcast, described
from flowrl.rollout.weight_check import compare, sampled
from flowrl.schema import require

CPU = torch.device("cpu")
SLEEPERS = frozenset({"weights", "kv_cache"})  # vLLM's words for what sleeps


@dataclass(frozen=True)
class SyncOptions:
    """Limits of VLLMSampler, in the words of [rollout]."""

    generate_timeout_s: float
    sync_timeout_s: float
    bucket_bytes: int
    checked_tensors: int
    restarts: int
    transport: str = "files"
    device: torch.device = CPU  # the trainer's
    workers: int = 1  # of the engine
    sleep: bool = False


class VLLMSampler:
    """See `Sampler`. `start` starts the engine; it is called again when a dead one is replaced."""

    def __init__(
        self,
        model_dir: Path,
        tokenizer: Any,
        dtype: torch.dtype,
        start: Callable[[], EngineHost],
        options: SyncOptions,
    ) -> None:
        self.model_dir = model_dir
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.options = options
        self.policy_version = 0
        self.restarts = 0
        self.compared = 0  # tensors whose checksums were compared at the last transfer
        self.eos_ids = eos_ids(model_dir, tokenizer)
        self._expected = _tensors(model_dir)
        self._transfers = 0  # that were compared: whose turn it is at the next one
        self._closing = False
        self._sent: list[tuple[str, Tensor]] | None = None  # kept where a restart needs it
        self._asleep: frozenset[str] = frozenset()
        self._broadcast: Broadcast | None = None
        self._start_engine = start
        self.host = self._start()

    def close(self) -> None:
        self.host.close()

    def interrupt(self) -> None:
        """Ends the engine, so that a call in another thread fails soon, and for good."""
        self._closing = True
        self.host.interrupt()

    def _start(self) -> EngineHost:
        """In the memory that the trainer is done with."""
        release_cached()
        return self._start_engine()

    # --- sampling

    def sample(self, request: SampleRequest) -> list[Rollout]:
        """Raises ConfigError for prompts without tokens or too long for the model, and EngineError
        when the engine is lost and may not be started again."""
        self._check(request)
        rows = [(prompt, i) for prompt in request.prompts for i in range(request.group_size)]
        if not rows:
            return []
        message = Message("generate", self._options(request), self._arrays(request, rows))
        return self._rollouts(rows, self._retried(lambda: self._generate(message), "generate"))

    def _generate(self, message: Message) -> Message:
        self._wake(SLEEPERS)
        reply = self.host.call(message, self.options.generate_timeout_s)
        if self.options.sleep:
            self.host.call(Message("sleep"), self.options.sync_timeout_s)
            self._asleep = SLEEPERS
        return reply

    def _wake(self, parts: frozenset[str]) -> None:
        """Those of them that sleep, in the memory that the trainer is done with."""
        sleeping = sorted(self._asleep & parts)
        if sleeping:
            release_cached()
            self.host.call(Message("wake", {"parts": sleeping}), self.options.sync_timeout_s)
            self._asleep -= parts

    def _options(self, request: SampleRequest) -> dict[str, Any]:
        return {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "max_new_tokens": request.max_new_tokens,
            "eos_ids": sorted(self.eos_ids),
        }

    def _arrays(
        self, request: SampleRequest, rows: Sequence[tuple[Prompt, int]]
    ) -> dict[str, np.ndarray]:
        lengths = [len(p.token_ids) for p in request.prompts]
        indices, samples = [p.index for p, _ in rows], [i for _, i in rows]
        keys = stream_keys(request.seed, request.step, request.stream, indices, samples)
        return {
            "prompt_lengths": np.array(lengths, np.int64),
            "prompt_tokens": np.array([t for p in request.prompts for t in p.token_ids], np.int64),
            "prompt_of_row": np.arange(len(request.prompts)).repeat(request.group_size),
            "seeds": (keys >> np.uint64(1)).astype(np.int64),
        }

    def _rollouts(self, rows: Sequence[tuple[Prompt, int]], reply: Message) -> list[Rollout]:
        ends = reply.arrays["lengths"].cumsum()[:-1]
        tokens = [part.tolist() for part in np.split(reply.arrays["tokens"], ends)]
        logprobs = [part.tolist() for part in np.split(reply.arrays["logprobs"], ends)]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [
            Rollout(
                prompt=prompt,
                sample=index,
                response_ids=tuple(ids),
                rollout_logprobs=tuple(values),
                truncated=ids[-1] not in self.eos_ids,
                policy_version=self.policy_version,
                text=text,
            )
            for (prompt, index), ids, values, text in zip(
                rows, tokens, logprobs, texts, strict=True
            )
        ]

    def _check(self, request: SampleRequest) -> None:
        require(
            request.stream != "train" or request.top_p == 1,
            f"training samples the whole distribution, got top_p={request.top_p}; set it to 1",
        )
        check_request(request, positions(read_json(self.model_dir / "config.json")))

    # --- weights

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Raises WeightSyncError if what the engine holds afterwards is not what was sent."""
        cast = ((name, t.detach().to(self.dtype).contiguous()) for name, t in weights)
        weights = cast
        if self.options.restarts:  # a copy: the policy trains on, and a restart sends it again
            weights = self._sent = [
                (name, t.cpu().clone() if _is_shared(t) else t.cpu()) for name, t in cast
            ]
        self.policy_version = policy_version
        self._retried(lambda: self._transfer(weights), "weights", resend=False)

    def _transfer(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """All tensors in buckets within one limit, then the comparison."""
        deadline = time.monotonic() + self.options.sync_timeout_s
        lap, chosen = self._turn()

        def call(message: Message) -> Message:
            return self.host.call(message, max(0.0, deadline - time.monotonic()))

        self._wake(frozenset({"weights"}))
        call(Message("begin_weights"))
        names: set[str] = set()
        to_check: dict[str, Tensor] = {}

        def noted() -> Iterator[list[tuple[str, Tensor]]]:
            for bucket in _buckets(weights, self.options.bucket_bytes):
                for name, tensor in bucket:
                    names.add(name)
                    if tensor.ndim < 2 or name in chosen:
                        to_check[name] = sampled(tensor, lap).cpu()
                yield bucket

        buckets = noted()
        if self.options.transport == "broadcast":
            self._send_by_broadcast(buckets, call)
        elif self.options.transport == "ipc":
            for bucket in buckets:
                # Copies: a parameter that is itself exported would keep something of every export.
                # The name keeps their memory alive until the answer.
                copies = [(n, t.to(self.options.device, copy=True)) for n, t in bucket]
                call(_ipc_message(copies))
        else:
            for bucket in buckets:
                call(_file_message(bucket))
        self._check_names(names)
        reply = call(Message("end_weights", {"check": list(to_check), "lap": lap}))
        self.compared = compare(to_check, reply.fields["reports"], self.policy_version)
        self._transfers += 1

    def _turn(self) -> tuple[int, frozenset[str]]:
        """The matrices that this transfer compares, at most `checked_tensors` of them, and how
        often all of them have had their turn before it."""
        matrices = sorted(name for name, dimensions in self._expected.items() if dimensions > 1)
        turns = max(1, -(-len(matrices) // self.options.checked_tensors))
        lap, turn = divmod(self._transfers, turns)
        return lap, frozenset(matrices[turn::turns])

    def _send_by_broadcast(
        self, buckets: Iterator[list[tuple[str, Tensor]]], call: Callable[[Message], Message]
    ) -> None:
        def ask(operation: str, fields: dict[str, Any]) -> None:
            call(Message(operation, fields))

        options = self.options
        if self._broadcast is None:
            place = self.host.trainer_address, options.workers, options.device
            self._broadcast = Broadcast(*place, options.sync_timeout_s, ask)
        try:
            self._broadcast.transfer(buckets, ask)
        except BaseException:
            self._broadcast = None  # a group that was left in the middle
            raise

    def _check_names(self, names: set[str]) -> None:
        missing = sorted(self._expected.keys() - names)
        unknown = sorted(names - self._expected.keys())
        if missing or unknown:
            what = f"{missing[0]} did not come" if missing else f"{unknown[0]} is not one of them"
            raise WeightSyncError(
                f"the engine needs the {len(self._expected)} weights of {self.model_dir}, got "
                f"{len(names)}: {what}; send every weight of this model"
            )

    # --- a lost engine

    def _retried(self, action: Callable[[], Any], what: str, resend: bool = True) -> Any:
        """The action's result; a dead engine is replaced, and the weights that it had sent again,
        as often as rollout.restart allows."""
        is_lost = False
        while True:
            try:
                if is_lost:
                    self.host = self._start()
                    self._asleep, self._broadcast = frozenset(), None
                    if self._closing:
                        raise EngineError("the engine was interrupted while it started")
                    if resend and self._sent is not None:
                        self._transfer(self._sent)
                return action()
            except EngineError as error:
                self._count_restart(error, what)
                is_lost = True

    def _count_restart(self, error: EngineError, what: str) -> None:
        """Raises EngineError where no restart is left."""
        self.host.close()
        if self._closing:
            raise error
        if self.restarts >= self.options.restarts:
            limit = self.options.restarts
            allowed = f"all {limit} restarts are used" if limit else "rollout.restart is 0"
            raise EngineError(f"{error}; {allowed}, set rollout.restart higher") from error
        self.restarts += 1
        print(
            f"flowrl: {error}; starting the engine again for {what} "
            f"({self.restarts} of {self.options.restarts})",
            file=sys.stderr,
        )


def _tensors(model_dir: Path) -> dict[str, int]:
    """Names of the model's weights, a tied head left out, and how many dimensions each has."""
    found: dict[str, int] = {}
    for file in model_dir.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                found[name] = len(tensors.get_slice(name).get_shape())
    require(bool(found), f"{model_dir} has no *.safetensors; export the model with flowrl export")
    if read_json(model_dir / "config.json").get("tie_word_embeddings"):
        found.pop("lm_head.weight", None)
    return found


def _is_shared(tensor: Tensor) -> bool:
    """Whether `.cpu()` gives the trainer's own memory."""
    return tensor.device.type == "cpu"


def _buckets(
    weights: Iterable[tuple[str, Tensor]], limit_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """At most `limit_bytes` together, but at least one tensor."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > limit_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def _file_message(bucket: Sequence[tuple[str, Tensor]]) -> Message:
    arrays = {
        name: t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for name, t in bucket
    }
    return Message("weights", {"tensors": described(bucket)}, arrays)


def _ipc_message(bucket: Sequence[tuple[str, Tensor]]) -> Message:
    """CUDA IPC handles, in the form of vLLM's IPCWeightTransferUpdateInfo. The bucket's tensors
    must stay alive until the answer."""
    from torch.multiprocessing.reductions import reduce_tensor

    handles = []
    for _, tensor in bucket:
        gpu = str(torch.cuda.get_device_properties(tensor.device).uuid)
        handles.append({gpu: reduce_tensor(tensor)[1]})
    update = {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(t.dtype).removeprefix("torch.") for _, t in bucket],
        "shapes": [list(t.shape) for _, t in bucket],
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
    }
    return Message("ipc_weights", {"update": update})
