"""A logits processor of vLLM 0.20.2 that imposes a request's tokens. Importing this imports vLLM.

Log-probabilities are taken from the raw logits before processors run (``logprobs_mode="raw_logprobs"``), so they stay the
model's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from qlab.engine.vllm_plugin import FORCED


class Forced(LogitsProcessor):
    """The n-th token sampled for a request is the n-th of its forced ids; other requests are left alone."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._requests: dict[int, tuple[list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """It decides the argmax, so greedy sampling runs it too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests through the rows of the batch."""
        process_dict_updates(self._requests, batch_update, _of)

    def apply(self, logits: Tensor) -> Tensor:
        """``logits`` [requests, V], changed in place."""
        for row, (forced, sampled) in self._requests.items():
            token = forced[min(len(sampled), len(forced) - 1)]
            logits[row].fill_(float("-inf"))
            logits[row, token] = 0.0
        return logits


def _of(parameters: Any, prompt: list[int] | None, sampled: list[int]) -> tuple[list[int], list[int]] | None:
    forced = (parameters.extra_args or {}).get(FORCED)
    return (list(forced), sampled) if forced else None
