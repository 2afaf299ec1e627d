"""The tables of the experiment, as plain data. Reports read these or their JSON."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path as File

from qlab.engine.path import Path
from qlab.engine.run import Call, Scored
from qlab.environment import Environment
from qlab.logprobs.statistics import Figure
from qlab.logprobs.telling import Telling
from qlab.serial import read_json

SCHEMA = "qlab.logprobs/1"
Found = tuple[Scored, ...] | str
"""One sequence per prompt, or why there are none, e.g. ``opaque: cuBLAS``."""


@dataclass(frozen=True, eq=False)
class Cells:
    """The runs that the tables are made from; an absent one was not asked for. (g, r): g generated, r re-executed."""

    recordings: MutableMapping[Path, Found] = field(default_factory=dict)
    """Each path on its own: prompts prefilled, then continued."""
    again: MutableMapping[Path, Found] = field(default_factory=dict)
    """The same once more, with atomics in another order."""
    prefill: MutableMapping[tuple[Path, Path], Found] = field(default_factory=dict)
    """g's tokens, prefilled by r; (g, g) is what the others of its row are compared with."""
    prefill_again: MutableMapping[Path, Found] = field(default_factory=dict)
    """(g, g) once more, with atomics in another order."""
    decode: MutableMapping[tuple[Path, Path], Found] = field(default_factory=dict)
    """g's prompts prefilled by r, g's generated tokens imposed on it."""
    batches: MutableMapping[tuple[Path, str], Found] = field(default_factory=dict)
    """g's own tokens, prefilled by g under another schedule, by the schedule's name."""


@dataclass(frozen=True)
class Entry:
    """One cell: a distance, or why there is none."""

    figure: Figure | None
    reason: str = ""
    """Why the cell cannot be had, e.g. ``opaque: cuBLAS``; empty where there is a figure."""
    identical: bool = False
    """Every compared log-probability has equal bits."""
    together: Figure | None = None
    """Where tokens split apart on some prompts: the mean over the others."""


@dataclass(frozen=True)
class NoiseFloor:
    """One path against itself, run again (atomics in another order)."""

    path: str
    method: str
    gpu: str
    prefill: Entry
    """Its own tokens, prefilled twice."""
    decode: Entry
    """Its prompts, continued twice: infinite where the tokens split apart."""


@dataclass(frozen=True)
class Spread:
    """A matrix off its diagonal."""

    mean: Figure
    low: float
    """Smallest cell."""
    high: float
    """Largest cell."""
    cells: int


@dataclass(frozen=True)
class Matrix:
    """Distances between paths: rows generate, columns re-execute."""

    gpu: str
    """Key of the GPU; empty for the matrix of all paths."""
    mode: str
    """``prefill``, ``decode`` (the generator's tokens imposed) or ``decode, free`` (each continues on its own)."""
    keys: tuple[str, ...]
    cells: tuple[tuple[Entry, ...], ...]
    off_diagonal: Spread | None
    """None where there is no figure off the diagonal."""
    classes: tuple[tuple[str, ...], ...]
    """Paths whose log-probabilities have equal bits for every generator that ran; those with a reason instead are in none."""


@dataclass(frozen=True)
class AcrossRow:
    """Two methods on two GPUs. Signal: the methods apart on one GPU. Noise: one method apart on the two GPUs."""

    methods: tuple[str, ...]
    gpus: tuple[str, ...]
    signal: Figure | None
    noise: Figure | None
    snr: Figure | None
    reason: str = ""


@dataclass(frozen=True)
class BatchRow:
    """One path's own tokens, prefilled in another batch."""

    path: str
    schedule: str
    distance: Entry
    differing: Figure | None
    """Share of rows with a log-probability of other bits."""
    flips: Figure | None
    """Share of rows with another most probable token."""
    largest: float | None
    """Largest difference of a log-probability."""


@dataclass(frozen=True)
class Dispatched:
    """What one path's linears really ran."""

    path: str
    calls: tuple[Call, ...]
    reason: str = ""


@dataclass(frozen=True)
class Prompts:
    """What went in."""

    count: int
    tokens: int
    """Of all prompts together."""
    new_tokens: int
    """Generated per prompt."""
    digest: str


@dataclass(frozen=True)
class Tables:
    """Everything that follows from the runs alone."""

    noise_floor: tuple[NoiseFloor, ...]
    within: tuple[Matrix, ...]
    """Per GPU and mode."""
    across: tuple[AcrossRow, ...]
    batches: tuple[BatchRow, ...]
    full: tuple[Matrix, ...]
    """All paths, per mode."""
    unlisted: int
    """Entries that a re-executor did not list, over all cells of prefill; its smallest listed value stands in."""
    detection: tuple[Telling, ...] = ()


@dataclass(frozen=True)
class ExperimentResult:
    """The whole answer of ``python -m qlab.logprobs experiment``."""

    schema: str
    arguments: dict[str, str]
    environment: Environment
    engine: str
    models: tuple[str, ...]
    """Each checkpoint with its digest."""
    prompts: Prompts
    top_k: int
    """Log-probabilities compared per row."""
    dispatched: tuple[Dispatched, ...]
    tables: Tables
    seconds: float
    notes: dict[str, str]

    def matrix(self, gpu: str, mode: str) -> Matrix | None:
        """The matrix within a GPU, or of all paths where ``gpu`` is empty."""
        return next((m for m in (*self.tables.within, *self.tables.full) if (m.gpu, m.mode) == (gpu, mode)), None)

    @classmethod
    def read(cls, path: File) -> ExperimentResult:
        """Raises QlabError naming the file when it is missing, damaged or of another schema."""
        return read_json(cls, path, SCHEMA)
