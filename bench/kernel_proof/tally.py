"""Counts of one part: what was compared, what differed, and the first failures in detail."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qlab.environment import Environment
from qlab.errors import QlabError
from qlab.serial import write_json

SCHEMA = "qlab.bench.prove-kernels/1"
DETAILS = 20
"""Failures of a part that are listed."""
WRITTEN = 10.0
"""Seconds between two writings of a part's file."""


@dataclass(frozen=True)
class Failure:
    """One comparison that failed, or could not be made."""

    claim: str
    problem: str
    what: str
    outputs: int = 0
    """Compared."""
    differing: int = 0
    bits: int = 0


@dataclass(frozen=True)
class Claim:
    """One claim's counts."""

    name: str
    problems: int = 0
    outputs: int = 0
    differing_problems: int = 0
    differing_outputs: int = 0
    differing_bits: int = 0
    failed: int = 0
    """Problems that raised."""


@dataclass(frozen=True)
class Part:
    """What one part found."""

    name: str
    seconds: float = 0.0
    complete: bool = False
    """Whether everything planned was done."""
    claims: tuple[Claim, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    """Problems that were not compared, by reason."""
    facts: dict[str, int] = field(default_factory=dict)
    """Other counts, by what they are."""
    kernels: dict[str, str] = field(default_factory=dict)
    """Build of each kernel."""
    failures: int = 0
    details: tuple[Failure, ...] = ()
    """The first failures."""
    error: str = ""
    """What ended the part early."""

    @property
    def good(self) -> bool:
        """Whether each claim was compared with something, nothing differed and nothing failed."""
        return not self.error and not self.failures and bool(self.claims) and all(c.problems for c in self.claims)


@dataclass(frozen=True)
class Result:
    schema: str
    gpu: str
    environment: Environment
    extension: str
    """Build of vLLM's extension, or why there is none."""
    seconds: float
    parts: tuple[Part, ...]

    @property
    def good(self) -> bool:
        return all(p.good for p in self.parts)


class Tally:
    """Collects one part; what it holds is written now and then, so that a part that dies leaves what it had."""

    def __init__(self, name: str, path: Path | None = None) -> None:
        self.name, self.path, self.began, self.written = name, path, time.monotonic(), time.monotonic()
        self.claims: dict[str, Claim] = {}
        self.left_out: dict[str, int] = {}
        self.facts: dict[str, int] = {}
        self.kernels: dict[str, str] = {}
        self.failures = 0
        self.details: list[Failure] = []
        self.complete = False
        self.error = ""

    def claim(self, name: str, **counts: int) -> None:
        """Add to a claim's counts."""
        held = self.claims.setdefault(name, Claim(name))
        self.claims[name] = replace(held, **{key: getattr(held, key) + more for key, more in counts.items()})

    def compare(self, claim: str, problem: object, ours: Tensor, theirs: Tensor) -> bool:
        """Count where two outputs differ bit by bit; whether they are equal."""
        self.claim(claim, problems=1, outputs=theirs.numel())
        elements, bits, what = apart(ours, theirs)
        if elements:
            self.claim(claim, differing_problems=1, differing_outputs=elements, differing_bits=bits)
            self.fail(Failure(claim, str(problem), what, theirs.numel(), elements, bits))
        self.write()
        return not elements

    def fact(self, what: str, count: int = 1) -> None:
        self.facts[what] = self.facts.get(what, 0) + count

    def skip(self, reason: str, count: int = 1) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + count

    def fail(self, failure: Failure) -> None:
        self.failures += 1
        if len(self.details) < DETAILS:
            self.details.append(failure)
            print(f"{self.name}: {failure.claim}: {failure.problem}: {failure.what}", flush=True)

    @contextmanager
    def guard(self, claim: str, problem: object) -> Iterator[None]:
        """What raises inside fails the claim on that problem, and nothing else, unless the GPU is gone with it."""
        try:
            yield
        except Exception as error:
            line = (str(error).strip().splitlines() or ["no message"])[0]
            self.claim(claim, failed=1)
            self.fail(Failure(claim, str(problem), f"{type(error).__name__}: {line}"))
            if torch.cuda.is_available():
                try:
                    torch.cuda.synchronize()
                except RuntimeError as dead:
                    raise QlabError(f"{claim} on {problem} stopped the GPU: {line}") from dead

    def part(self) -> Part:
        return Part(
            self.name,
            time.monotonic() - self.began,
            self.complete,
            tuple(self.claims.values()),
            dict(self.left_out),
            dict(self.facts),
            dict(self.kernels),
            self.failures,
            tuple(self.details),
            self.error,
        )

    def write(self, now: bool = False) -> None:
        if self.path and (now or time.monotonic() - self.written > WRITTEN):
            self.written = time.monotonic()
            write_json(self.path, self.part())


def apart(ours: Tensor, theirs: Tensor) -> tuple[int, int, str]:
    """Elements and bits that differ, and the first place; all of ``theirs`` where shapes or dtypes do."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        what = f"{ours.dtype} {list(ours.shape)}, not {theirs.dtype} {list(theirs.shape)}"
        return theirs.numel(), 16 * theirs.numel(), what
    a, b = (t.contiguous().view(torch.int16) for t in (ours, theirs))
    if torch.equal(a, b):
        return 0, 0, ""
    x = (a.int() ^ b.int()) & 0xFFFF
    bits = sum(int((x >> i & 1).sum()) for i in range(16))
    place = x.nonzero()[0].tolist()
    got, want = (int(t[tuple(place)]) & 0xFFFF for t in (a, b))
    elements, rows = int((x != 0).sum()), int((x != 0).any(-1).sum())
    return elements, bits, f"{elements} outputs in {rows} rows differ, first {tuple(place)}: {got:#06x}, not {want:#06x}"


def show(result: Result) -> None:
    """One line for each claim, then what was left out, other counts and the failures."""
    console = Console(width=150)
    console.print(f"{result.environment.gpu}, driver {result.environment.driver}, {result.extension}, {result.seconds:.0f} s")
    table = Table("part", "claim", box=box.SIMPLE_HEAD)
    for column in ("problems", "outputs", "differing", "bits", "raised"):
        table.add_column(column, justify="right")
    for part in result.parts:
        for c in part.claims:
            counts = (c.problems, c.outputs, c.differing_outputs, c.differing_bits, c.failed)
            table.add_row(part.name, c.name, *(f"{n:,}" for n in counts))
    console.print(table)
    for part in result.parts:
        state = part.error or ("good" if part.good else f"{part.failures} failures" if part.failures else "nothing compared")
        more = "" if part.complete else ", not all that was planned"
        console.print(f"{part.name}: {state}, {part.seconds:.0f} s{more}", highlight=False)
        for what, count in (*part.facts.items(), *((f"left out: {r}", c) for r, c in part.left_out.items())):
            console.print(f"  {count:,} {what}", highlight=False)
        for f in part.details:
            console.print(f"  FAILED {f.claim}: {f.problem}: {f.what}", highlight=False)
