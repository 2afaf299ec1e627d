"""What the lab found, as plain data: reports and comparisons read these (or their JSON), never a screen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qlab.compare import Error, OffDiagonal
from qlab.environment import Environment
from qlab.serial import read_json

SCHEMA = "qlab.kernels/1"
TOTAL = "total"


@dataclass(frozen=True)
class Hardware:
    """What ``--hw`` means on this machine."""

    asked: str
    """Key of the GPU table, e.g. ``h100``."""
    running: str
    """The GPU's name, or the CPU's."""
    device: str
    """``cuda`` or ``cpu``."""
    native: bool
    """SM count, tensor-core step and instruction set of the running GPU are the asked one's: its bits are the asked one's."""
    note: str


@dataclass(frozen=True)
class Input:
    """One layer's weight and activations, as a kernel got them."""

    layer: str
    source: str
    """``awq`` or ``gptq`` where each checkpoint has its own weight (mode ``own``); ``same`` where all kernels share one."""
    M: int
    K: int
    N: int
    group_size: int
    symmetric: bool
    act_order: bool
    weight_digest: str
    input_digest: str


@dataclass(frozen=True)
class Column:
    """One kernel of the table, with the weight it got."""

    key: str
    """The kernel's registry name; with ``@awq`` or ``@gptq`` behind it where one kernel runs on both checkpoints."""
    kernel: str
    source: str
    layout: str
    note: str
    version: str


@dataclass(frozen=True)
class Cell:
    """One kernel on one layer (or, for ``layer`` = total, over every layer of the run)."""

    layer: str
    key: str
    reason: str
    """Why it did not run; empty when it did."""
    digest: str
    """sha256 of the output's bits."""
    error: Error | None
    repeatable: bool | None
    """Every run gave the same bits; None with a single run."""
    noise_floor: float | None
    """Largest relative L2 distance of a repeated run from the first."""
    runs: int
    origin: str = "native"
    """``native``: the kernel ran; ``replay``: its recipe did; ``opaque``: its bits are cuBLAS's and it did not run; empty: it
    cannot run."""
    recipe: str = ""
    """sha256 of the kernel's recipe; for the total, of all its layers' recipes; empty where it has none."""
    replay_bits: int | None = None
    """Output bits in which native and replay differ; None where they were not compared."""


@dataclass(frozen=True)
class Pairs:
    """Distances between the kernels that ran on one layer (or in total)."""

    layer: str
    keys: tuple[str, ...]
    relative_l2: tuple[tuple[float, ...], ...]
    """||y_a - y_b|| / ||exact||; entries between two sources are divided by the mean of both norms."""
    differing: tuple[tuple[float, ...], ...]
    """Share of the outputs whose bits differ."""
    spread: OffDiagonal | None
    classes: tuple[tuple[str, ...], ...]
    """Bitwise equivalence classes."""


@dataclass(frozen=True)
class DispatchRow:
    """Which kernel vLLM runs for a label, on the asked GPU, for one layer."""

    layer: str
    label: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class ProbeFault:
    """A place where a kernel decodes another weight than the one it was given."""

    k: int
    n: int
    expected: float
    got: float


@dataclass(frozen=True)
class ProbeResult:
    """One-hot probe of one kernel on one layer."""

    layer: str
    key: str
    reason: str
    """Why it did not run; empty when it did."""
    mismatches: int
    """Elements of the decoded weight [K, N] whose value is not the expected one."""
    elements: int
    diagnosis: str
    """The named fault that explains every mismatch, or where the mismatches lie; empty when there is none."""
    faults: tuple[ProbeFault, ...]
    """The first few mismatches."""


@dataclass(frozen=True)
class AgainstRow:
    """One kernel, or one of vLLM's labels, on two GPUs, over all layers."""

    key: str
    """Column key or label."""
    kernel: str
    """What the asked GPU runs."""
    other_kernel: str
    """What the other GPU runs; another one where a label's dispatch differs."""
    reason: str
    """Why they were not compared; empty when they were."""
    outputs: int
    differing: int
    """Outputs whose bits differ."""
    bits: int
    """Bits that differ."""
    relative_l2: float
    other_order: tuple[str, ...]
    """Layers on which the two GPUs' recipes differ in more than the tensor core's step: in tiles, stripes or kernel."""


@dataclass(frozen=True)
class Against:
    """The asked GPU's outputs beside another GPU's, which are replayed."""

    gpu: str
    proved: bool
    """Whether whole kernels were proved against their replays on both; otherwise this is a prediction."""
    rows: tuple[AgainstRow, ...]


@dataclass(frozen=True)
class LabResult:
    """The whole answer of ``python -m qlab.kernels``."""

    schema: str
    arguments: dict[str, str]
    environment: Environment
    hardware: Hardware
    mode: str
    """``same`` or ``own``."""
    model: str
    checkpoints: tuple[str, ...]
    """Each directory read, with the zero-point convention that was found in it."""
    dtype: str
    seed: int
    digest: str
    """sha256 over every input and weight of the run."""
    inputs: tuple[Input, ...]
    columns: tuple[Column, ...]
    cells: tuple[Cell, ...]
    pairs: tuple[Pairs, ...]
    dispatch: tuple[DispatchRow, ...]
    probes: tuple[ProbeResult, ...]
    seconds: float
    against: Against | None = None

    def cell(self, layer: str, key: str) -> Cell:
        return next(c for c in self.cells if (c.layer, c.key) == (layer, key))

    def layers(self) -> tuple[str, ...]:
        """Layer names in the order they ran, then the total."""
        return tuple(dict.fromkeys(c.layer for c in self.cells))

    def ran(self) -> tuple[str, ...]:
        """Keys of the kernels that ran on every layer."""
        return next((p.keys for p in self.pairs if p.layer == TOTAL), ())

    @classmethod
    def read(cls, path: Path) -> LabResult:
        """Raises QlabError naming the file when it is missing, damaged or of another schema."""
        return read_json(cls, path, SCHEMA)
