"""What ``bench.layers`` writes: one file for a GPU, which several runs fill, a layer and a number of rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.model_layers import BLOCK
from qlab.environment import Environment
from qlab.errors import QlabError
from qlab.serial import read_json, write_json

SCHEMA = "qlab.bench.layers/1"


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this run, on random data."""

    copy: float
    """Bytes per second of a large copy, read and written."""
    read: float
    """Bytes per second of a large sum, read alone."""
    matmul: float
    """Floating-point operations per second of a large square product in the run's dtype."""


@dataclass(frozen=True)
class Copies:
    """The copies of a layer's weight that a kernel's calls rotate over."""

    kernel: str
    layer: str
    """``MODEL.LAYER``."""
    bytes_each: int
    """Bytes of one packed weight, scales and zero points included."""
    pointers: tuple[int, ...]
    """Address of each copy's largest tensor."""


@dataclass(frozen=True)
class Run:
    """One process."""

    command: dict[str, str]
    """The options that it was started with."""
    environment: Environment
    device: str
    l2_bytes: int
    """The GPU's L2; 0 where unknown."""
    ceilings: Ceilings
    versions: dict[str, str]
    """Build of every kernel that was timed."""
    copies: tuple[Copies, ...]
    left_out: tuple[str, ...]
    """What the time budget or an error kept from being measured."""
    seconds: float


@dataclass(frozen=True)
class Entry:
    """One kernel in one cell."""

    kernel: str
    dtype: str
    reason: str
    """Why there is no speed; empty when there is one."""
    relative_error: float | None = None
    """Largest relative L2 distance from float64 among the outputs that were checked; None when nothing ran."""
    worst_error: float | None = None
    """Largest distance of one output, in root mean squares of the exact outputs."""
    bound: float | None = None
    """What ``relative_error`` must not exceed; ``worst_error`` must not exceed gate.WORST times that."""
    variant: str = ""
    """The schedule that was the fastest of those swept; empty where the kernel has no choice."""
    launched: str = ""
    """``CUDA graph``, with programmatic dependent launch where the kernel has it, or ``plain calls`` with the reason."""
    copies: int = 0
    calls: int = 0
    """Calls in one pass of the graph: every copy once, or several times."""
    rounds: int = 0
    median: float = 0.0
    """Seconds per call (of a block: per block), as are p10 and p90, over the rounds."""
    p10: float = 0.0
    p90: float = 0.0
    bytes: int = 0
    """What a call must move at least: packed codes, scales, zero points where they vary, x and y."""
    of_memory: float = 0.0
    """``bytes`` per median second as a share of the copy ceiling."""
    of_compute: float = 0.0
    """2 M K N per median second as a share of the matmul ceiling."""
    to_cublas: float | None = None
    """cuBLAS's median on the dequantised weight over this one: above 1 this kernel is faster."""
    to_best: float | None = None
    """The same for the fastest of Marlin, Machete (whatever its schedule) and ExLlama."""
    recipe: str = ""
    """Hash of what it computes, or ``opaque`` with a name; empty where neither is known."""


@dataclass(frozen=True)
class Cell:
    """Every kernel on one layer (or block) with M rows, timed in turn by one process."""

    model: str
    layer: str
    """``block`` for a decoder block's four layers in one graph."""
    M: int
    K: int
    """0 for a block, as N."""
    N: int
    run: int
    """Index of the process in ``runs``."""
    state_before: dict[str, str]
    """nvidia-smi's clocks, power, temperature and reasons for lower clocks, the GPU warm."""
    state_after: dict[str, str]
    entries: tuple[Entry, ...]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.model, self.layer, self.M

    def entry(self, kernel: str) -> Entry | None:
        return next((e for e in self.entries if e.kernel == kernel), None)

    def median(self, kernel: str) -> float | None:
        """Seconds per call; None where the kernel has no speed."""
        e = self.entry(kernel)
        return e.median if e and e.median > 0 else None


@dataclass(frozen=True)
class Result:
    """All cells of one GPU for one dtype, group size and kind of zero point."""

    schema: str
    dtype: str
    group_size: int
    symmetric: bool
    runs: tuple[Run, ...]
    cells: tuple[Cell, ...]

    @classmethod
    def read(cls, path: Path) -> Result:
        return read_json(cls, path, SCHEMA)

    def write(self, path: Path) -> None:
        write_json(path, self)

    def has(self, key: tuple[str, str, int], kernels: Iterable[str]) -> bool:
        """Whether a cell holds every one of ``kernels``."""
        found = next((c for c in self.cells if c.key == key), None)
        return found is not None and set(kernels) <= {e.kernel for e in found.entries}

    def kernels(self) -> tuple[str, ...]:
        """Kernels that have a speed somewhere, in the order of their first."""
        return tuple(dict.fromkeys(e.kernel for c in self.cells for e in c.entries if e.median > 0))

    def with_cells(self, run: int, cells: Sequence[Cell]) -> Result:
        """``cells`` of run number ``run``, each in the place of an older one: speeds of two runs never stand side by side."""
        new = {c.key: replace(c, run=run) for c in cells}
        kept = [new.pop(c.key, c) for c in self.cells]
        return replace(self, cells=(*kept, *new.values()))

    def with_run(self, run: Run, at: int) -> Result:
        """``run`` as number ``at``, which is the next one or the one that is being filled."""
        return replace(self, runs=(*self.runs[:at], run))


def merge(results: Sequence[Result]) -> Result:
    """One result of several files, the later cell where two have the same. Raises QlabError when they are not alike."""
    first = results[0]
    for r in results[1:]:
        if (r.dtype, r.group_size, r.symmetric) != (first.dtype, first.group_size, first.symmetric):
            raise QlabError("the files differ in dtype, group size or kind of zero point; they are results of their own")
        gpus = {x.environment.gpu for x in (*first.runs, *r.runs)}
        if len(gpus) > 1:
            raise QlabError(f"the files are of different GPUs: {' and '.join(sorted(gpus))}")
        offset = len(first.runs)
        first = replace(first, runs=(*first.runs, *r.runs))
        for i in range(len(r.runs)):
            first = first.with_cells(offset + i, [c for c in r.cells if c.run == i])
    return first


def is_block(cell: Cell) -> bool:
    return cell.layer == BLOCK
