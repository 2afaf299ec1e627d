"""What ``python -m qlab.layers`` finds, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qlab import serial
from qlab.environment import Environment

SCHEMA = "qlab.layers/1"
EMBEDDING, HEAD = "embedding", "norm and head"
"""Swaps of what is no linear, where two checkpoints differ in it."""


@dataclass(frozen=True)
class LinearRow:
    """One linear, as vLLM fuses it. Divergences are L2 norms over all tokens, relative to A's output on A's input."""

    name: str
    kernels: tuple[str, str]
    """Registry names, A's first."""
    origins: tuple[str, str]
    """``native`` or ``replay``."""
    local: float
    """B's kernel against A's, on A's input."""
    differing: float
    """Share of those outputs whose bits differ; where the sides scale them differently, whose values do."""
    inherited: float
    """A's kernel on B's input, against its own."""
    total: float
    """B's kernel on B's input, against A's on A's."""
    local_by_token: tuple[float, ...]
    total_by_token: tuple[float, ...]
    """The same, row by row."""


@dataclass(frozen=True)
class StreamRow:
    """The residual stream behind a decoder layer."""

    name: str
    divergence: float
    """L2 of B's minus A's, relative to A's."""
    growth: float
    """Over that before the layer; NaN where there was none."""


@dataclass(frozen=True)
class SwapRow:
    """What comes from B at one step of the way from A to B. ``v`` is the squared L2 of log-probabilities from A's."""

    name: str
    linears: tuple[str, ...]
    """Empty for the embedding, and for the final norm and head."""
    nested: float
    """v with this and everything before it from B."""
    share: float
    """What that adds to v: over all rows they add up to v of B."""
    share_by_token: tuple[float, ...]
    """The same of each row's v."""
    projection: float
    """What that adds to the projection on B's difference, which ends at 1."""
    response: float
    """The same by one backward pass: the gradient at A of that projection, times the local difference of the outputs."""
    single: float | None
    """v with this alone from B; None where it was left out."""


@dataclass(frozen=True)
class LayersResult:
    """Two paths, layer by layer, over one text in one prefill step."""

    schema: str
    arguments: dict[str, str]
    environment: Environment
    paths: tuple[str, str]
    """A and B."""
    checkpoints: tuple[str, str]
    dtype: str
    scales: str
    """Where AWQ's input scales between two checkpoints come from: ``kept`` or ``estimated``; empty for one checkpoint."""
    tokens: tuple[str, ...]
    """The text that went in, token by token."""
    top_k: int
    """Log-probabilities per row, at the ids that A finds most probable; 0 for the whole vocabulary."""
    total: float
    """v of B: the squared L2 of the log-probabilities, over all rows."""
    residual: float
    """v of B minus the sum of all shares, as exact fractions."""
    total_by_token: tuple[float, ...]
    linears: tuple[LinearRow, ...]
    stream: tuple[StreamRow, ...]
    swaps: tuple[SwapRow, ...]
    """In the order of the network."""
    singles: float | None
    """Sum of the single swaps' v, in units of the total."""
    singles_gap: float | None
    """L2 distance of single swaps from nested shares, relative to the latter."""
    response: float
    """Sum of the linear responses; 1 where the network is linear."""
    response_gap: float
    """L2 distance of linear responses from nested projections, relative to the latter."""
    seconds: float

    @classmethod
    def read(cls, path: Path) -> LayersResult:
        """Inverse of :func:`qlab.serial.write_json`. Raises QlabError naming the file."""
        return serial.read_json(cls, path, SCHEMA)
