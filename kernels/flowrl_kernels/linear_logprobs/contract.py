"""What linear_logprobs returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearLogprobs(NamedTuple):
    """float32, or float64 for float64 inputs. Rows whose target is -100 hold 0 everywhere."""

    logprobs: Tensor  # (T,) of the targets, <= 0
    lse: Tensor  # (T,) log-sum-exp of the logits after the temperature
    entropy: Tensor | None  # (T,) of the softmax; None unless asked for
