"""What an engine is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from qlab.engine.path import Path
from qlab.engine.schedule import Batching, Steps


class Tap(NamedTuple):
    """One row of one linear layer: the input and output of the token at ``position`` of a sequence."""

    linear: str
    """As vLLM fuses it, e.g. ``model.layers.0.self_attn.qkv_proj``."""
    sequence: int
    position: int


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily (temperature 0; the smallest id of equals), or drawn with a seed."""

    temperature: float = 0.0
    seed: int = 0


ALONE = Batching()
GREEDY = Sampling()


@dataclass(frozen=True, eq=False)
class Request:
    """Sequences to compute. ``new_tokens`` are sampled after each prompt, or imposed where ``forced`` names them."""

    prompts: tuple[tuple[int, ...], ...]
    """Token ids, at least one per prompt."""
    new_tokens: int
    """Tokens after each prompt, 1 or more; the last one is chosen but never fed to the model."""
    forced: tuple[tuple[int, ...], ...] | None = None
    """The tokens after each prompt, ``new_tokens`` of them, in place of sampling."""
    batching: Batching = ALONE
    sampling: Sampling = GREEDY
    top_k: int = 5
    """Log-probabilities kept per row, the largest first; 0 keeps the whole vocabulary in order of ids."""
    wanted: tuple[Tensor, ...] | None = None
    """int64 [rows, w] per sequence: further ids whose log-probabilities are kept, behind the top-k."""
    taps: frozenset[Tap] = frozenset()
    """Rows of linear layers to keep whole."""
    digests: bool = False
    """Keep a digest of every row of every linear's output."""
    seed: int = 0
    """Of the order of atomics where a kernel is replayed."""
    first: int = 0
    """Number of the first sequence, for whatever is drawn at random by sequence: part of a request draws as the whole would."""


@dataclass(frozen=True, eq=False)
class Scored:
    """One sequence. Row r is the distribution over the token that follows tokens[:r + 1]; rows = len(tokens) - 1."""

    tokens: Tensor
    """int64 [prompt + new_tokens]."""
    prompt: int
    """Tokens of the prompt; rows from ``prompt`` on were decoded, those before prefilled."""
    ids: Tensor
    """int64 [rows, k (+ w)]: the k largest, largest first (smaller id first among equals), then the wanted ones."""
    logprobs: Tensor
    """float32 [rows, k (+ w)], natural logarithm, at ``ids``; NaN where an engine could not give a wanted one."""
    digests: Tensor | None = None
    """int64 [linears, rows]: :func:`row_digest` of each row of each linear's output, linears in the order of the model."""


@dataclass(frozen=True)
class Call:
    """Calls of one linear layer with one number of tokens."""

    linear: str
    M: int
    kernel: str
    """Registry name where it is known, else the class that vLLM reported."""
    origin: str
    """``native`` or ``replay``."""
    recipe: str
    """Hash of the recipe for this M on the path's GPU; empty where there is none."""
    count: int


@dataclass(frozen=True, eq=False)
class Row:
    """A tapped row with its place in the kernel's batch: what a bit-exact replay needs beside the weight."""

    tap: Tap
    row: int
    M: int
    kernel: str
    x: Tensor
    """[K] in the activations' dtype."""
    y: Tensor
    """[N] in the activations' dtype."""


@dataclass(frozen=True, eq=False)
class Run:
    """What an engine computed."""

    sequences: tuple[Scored, ...]
    steps: Steps
    """As the engine ran them; empty where it cannot say."""
    calls: tuple[Call, ...]
    rows: tuple[Row, ...] = ()
    linears: tuple[str, ...] = ()
    """Names of the linears, in the order of the model: the first axis of :attr:`Scored.digests`."""
    notes: dict[str, str] = field(default_factory=dict)
    """What else the engine reports, e.g. vLLM's attention backend."""


Advance = Callable[[int], None]
"""Called with the number of tokens that were computed since the last call."""


class Engine(Protocol):
    """A model on one path."""

    name: str
    """``builtin`` or ``vllm``."""
    path: Path

    def run(self, request: Request, advance: Advance = lambda tokens: None) -> Run:
        """Raises UnsupportedError with the reason where the path cannot be computed here (``opaque: cuBLAS``)."""
        ...


def row_digest(y: Tensor) -> Tensor:
    """int64 [rows]: the first 8 bytes (little-endian) of the sha256 of each row's bytes, y [rows, N]."""
    import hashlib

    import torch

    raw = y.detach().cpu().contiguous()
    digests = [hashlib.sha256(bytes(r.reshape(-1).view(torch.uint8).numpy().data)).digest()[:8] for r in raw]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64)
