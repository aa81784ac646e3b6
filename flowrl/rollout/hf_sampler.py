"""HFSampler: batched generation with any transformers causal LM, in the trainer's process.

Each prompt is prefilled once and its cache shared out to the group's members. One uniform number a
token, by inverse distribution function in float64: what is sampled does not depend on which other
sequences are in the batch, up to the rounding of the model itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as hf_logging

from flowrl.records import Prompt, Rollout, SampleRequest
from flowrl.rollout.model_limits import check_request, eos_ids, positions
from flowrl.rollout.noise import stream_keys, uniform
from flowrl.weights import copy_weights

MAX_PROB_CELLS = 1 << 25  # rows x vocabulary sampled at once: 256 MiB of float64
COMPACT_SHARE = 0.15  # finished rows leave the batch when they are this share of it


@dataclass(frozen=True)
class _Row:
    """One sequence to be generated; `place` is its index in the rollouts returned."""

    place: int
    prompt: Prompt
    sample: int


class HFSampler:
    """Owns a copy of the model; the trainer's weights arrive by `load_weights`. See `Sampler`."""

    def __init__(
        self,
        model_dir: Path,
        dtype: torch.dtype,
        device: torch.device,
        tokenizer: Any,
        max_batch_sequences: int,
    ) -> None:
        """Raises ConfigError if neither tokenizer nor model names an end-of-sequence token."""
        self.model = _load(model_dir, dtype, device)
        self.tokenizer = tokenizer
        self.device = device
        self.max_batch_sequences = max_batch_sequences
        self.policy_version = 0
        self.eos_ids = eos_ids(model_dir, tokenizer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Raises ValueError for names or shapes of another model, and for weights that do not
        arrive as they were sent."""
        copy_weights(self.model, weights)
        self.policy_version = policy_version

    def close(self) -> None:
        del self.model

    @torch.inference_mode()
    def sample(self, request: SampleRequest) -> list[Rollout]:
        check_request(request, positions(self.model.config.get_text_config().to_dict()))
        rows = [
            _Row(place, prompt, place % request.group_size)
            for place, prompt in enumerate(
                p for p in request.prompts for _ in range(request.group_size)
            )
        ]
        # Neighbours in length share a batch, so that little is padded.
        rows.sort(key=lambda row: (len(row.prompt.token_ids), row.place))
        rollouts: dict[int, Rollout] = {}
        for start in range(0, len(rows), self.max_batch_sequences):
            batch = rows[start : start + self.max_batch_sequences]
            responses, logprobs = self._generate(batch, request)
            texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
            for row, ids, values, text in zip(batch, responses, logprobs, texts, strict=True):
                rollouts[row.place] = Rollout(
                    prompt=row.prompt,
                    sample=row.sample,
                    response_ids=tuple(ids),
                    rollout_logprobs=tuple(values),
                    truncated=ids[-1] not in self.eos_ids,
                    policy_version=self.policy_version,
                    text=text,
                )
        return [rollouts[place] for place in range(len(rows))]

    def _generate(
        self, rows: Sequence[_Row], request: SampleRequest
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Response ids and their log-probs, row by row."""
        keys = stream_keys(
            request.seed,
            request.step,
            request.stream,
            [row.prompt.index for row in rows],
            [row.sample for row in rows],
        )
        positions = range(request.max_new_tokens)
        noise = torch.from_numpy(uniform(keys[:, None], positions)).to(self.device)  # (B, max_new)
        tokens = torch.full(noise.shape, -1, dtype=torch.int64, device=self.device)
        logprobs = torch.zeros_like(noise)
        eos = torch.tensor(sorted(self.eos_ids), device=self.device)
        decoding = _Decoding(self.model, rows, self.tokenizer.pad_token_id or 0, self.device)
        for position in positions:
            live = decoding.live  # (b,) rows of the batch that are still computed
            new, values = sample_tokens(
                decoding.logits, noise[live, position], request.temperature, request.top_p
            )
            active = decoding.active  # (b,) bool: no EOS yet
            tokens[live, position] = new.where(active, -1)
            logprobs[live, position] = values.where(active, 0.0)
            if position + 1 == request.max_new_tokens or not decoding.advance(
                new, active & ~torch.isin(new, eos)
            ):
                break
        if not torch.isfinite(logprobs).all():
            bad = rows[int((~torch.isfinite(logprobs)).nonzero()[0, 0])].prompt.index
            raise ValueError(
                f"the policy's logits must be finite, got NaN for prompt {bad} at policy "
                f"version {self.policy_version}; lower optimizer.lr"
            )
        lengths = (tokens >= 0).sum(1).tolist()
        return _ragged(tokens, lengths), _ragged(logprobs, lengths)


class _Decoding:
    """A batch under way: cache, attention mask and next-token logits of the rows still computed."""

    def __init__(self, model: Any, rows: Sequence[_Row], pad_id: int, device: torch.device) -> None:
        """Prefills each distinct prompt once, padded on the left."""
        self.model = model
        prompts: dict[int, int] = {}  # id of a prompt record -> its row of the prefill
        owner = [prompts.setdefault(id(row.prompt), len(prompts)) for row in rows]
        token_ids = list({id(row.prompt): row.prompt.token_ids for row in rows}.values())
        longest = max(map(len, token_ids))
        ids = torch.tensor([[pad_id] * (longest - len(t)) + list(t) for t in token_ids])
        mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in token_ids])
        self.cache = DynamicCache(config=model.config)
        self.padded = bool((mask == 0).any())
        self.mask = mask.to(device)  # (P, L)
        self.next_positions = self.mask.sum(1, keepdim=True)  # (P, 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.logits = self._forward(ids.to(device), positions)  # (P, V)
        self.active = torch.ones(len(rows), dtype=torch.bool, device=device)
        self.live = torch.arange(len(rows), device=device)
        self._take(torch.tensor(owner, device=device))

    def advance(self, tokens: Tensor, active: Tensor) -> bool:
        """Feeds the tokens (b,) just sampled. False when no row is active any more."""
        self.active = active
        num_active = int(active.sum())
        if not num_active:
            return False
        if num_active <= (1 - COMPACT_SHARE) * active.numel():
            kept = active.nonzero().squeeze(1)
            self.live, self.active, tokens = self.live[kept], active[kept], tokens[kept]
            self._take(kept)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        self.logits = self._forward(tokens.unsqueeze(1), self.next_positions)
        self.next_positions = self.next_positions + 1
        return True

    def _take(self, indices: Tensor) -> None:
        self.cache.batch_select_indices(indices)
        self.mask, self.logits = self.mask[indices], self.logits[indices]
        self.next_positions = self.next_positions[indices]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits after the last token, (b, V)."""
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask if self.padded else None,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def sample_tokens(
    logits: Tensor,  # (B, V)
    noise: Tensor,  # (B,) float64 in (0, 1)
    temperature: float,
    top_p: float,
) -> tuple[Tensor, Tensor]:
    """Tokens (B,) drawn from softmax(logits / temperature), and their log-probs (B,) float64.

    With top_p < 1 from the smallest set of most likely tokens that holds at least that mass,
    renormalised; the log-probs are of the renormalised distribution. token = the first with
    cdf(token) > noise * total, so a token of probability 0 is never drawn. A row with a NaN gives a
    NaN log-prob."""
    parts = zip(*(x.split(max(1, MAX_PROB_CELLS // logits.shape[1])) for x in (logits, noise)),
                strict=True)  # fmt: skip
    drawn = [_sample_part(part, u, temperature, top_p) for part, u in parts]
    return torch.cat([d[0] for d in drawn]), torch.cat([d[1] for d in drawn])


def _sample_part(
    logits: Tensor, noise: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(logits.double() / temperature, dim=-1)  # (b, V)
    probs = logprobs.exp()
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        dropped = ordered.cumsum(-1) - ordered >= top_p  # mass before the token suffices
        probs = probs.scatter(-1, order, ordered.masked_fill(dropped, 0.0))
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    tokens = torch.searchsorted(cdf, noise.unsqueeze(1) * total, right=True)
    tokens = tokens.clamp(max=logits.shape[1] - 1)  # a NaN row; its log-prob says so
    drawn = logprobs.gather(1, tokens)
    if top_p < 1:
        drawn = drawn - total.log()
    return tokens.squeeze(1), drawn.squeeze(1)


def _load(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    had_bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    finally:
        if had_bars:
            hf_logging.enable_progress_bar()
    return model.to(device).eval().requires_grad_(False)


def _ragged(values: Tensor, lengths: Sequence[int]) -> list[list[Any]]:
    return [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]
