"""The few parts of vLLM 0.20.2 that qlab's plugin touches, as small as they go: attributes, calls and signatures as there.

From vllm/logprobs.py, model_executor/layers/linear.py, v1/worker/gpu_model_runner.py and v1/sample/logits_processor/.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


@dataclass
class FlatLogprobs:
    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, ids: list[int], logprobs: list[float]) -> None:
        self.start_indices.append(len(self.logprobs))
        self.token_ids += ids
        self.logprobs += logprobs
        self.end_indices.append(len(self.logprobs))


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def listed(logprobs: torch.Tensor, actual: int, k: int) -> tuple[list[int], list[float]]:
    """As vLLM's sampler gathers one position: the actual token, then the k largest by torch.topk."""
    top = logprobs.topk(k)
    return [actual, *top.indices.tolist()], [float(logprobs[actual]), *top.values.tolist()]


class UnquantizedLinearMethod:
    def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return x


class AWQLinearMethod:
    """Doubles; ``calls`` counts, so that a wrapper that calls twice shows."""

    def __init__(self) -> None:
        self.calls = 0

    def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        self.calls += 1
        y = torch.cat((x, 2 * x), -1)
        return y if bias is None else y + bias


class MarlinLinearKernel:
    pass


class GPTQMarlinLinearMethod(AWQLinearMethod):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = MarlinLinearKernel()


class LinearBase(torch.nn.Module):
    def __init__(self, size: int, quant_config: Any = None, prefix: str = "", *, method: Any = None) -> None:
        super().__init__()
        self.quant_config, self.prefix = quant_config, prefix
        self.quant_method = method if quant_config is not None else UnquantizedLinearMethod()


class RowParallelLinear(LinearBase):
    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(size, **options)
        self.reduce = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x, None)


class GPUModelRunner:
    """``batch``: request id, tokens computed before this step, of each row of the persistent batch."""

    def __init__(self, batch: list[tuple[str, int]], extra: dict[str, dict | None]) -> None:
        computed = np.array([n for _, n in batch] + [77] * 3, dtype=np.int32)
        self.input_batch = SimpleNamespace(req_ids=[r for r, _ in batch], num_computed_tokens_cpu=computed)
        self.requests = {r: SimpleNamespace(sampling_params=SimpleNamespace(extra_args=e)) for r, e in extra.items()}

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> str:
        return f"prepared {scheduler_output}"


def process_dict_updates(entries: dict, batch_update: Any, new_state: Any) -> bool:
    if not batch_update:
        return False
    for index, params, prompt, output in batch_update.added:
        if (state := new_state(params, prompt, output)) is not None:
            entries[index] = state
        else:
            entries.pop(index, None)
    for index in batch_update.removed:
        entries.pop(index, None)
    for a, b, swap in batch_update.moved:
        a_entry, b_entry = entries.pop(a, None), entries.pop(b, None)
        if a_entry is not None:
            entries[b] = a_entry
        if b_entry is not None and swap:
            entries[a] = b_entry
    return True
