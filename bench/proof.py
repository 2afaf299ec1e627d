"""The result of bench/prove_replay.py as data: one shard's, and how shards are joined and shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.problems import Trial
from qlab.environment import Environment
from qlab.errors import QlabError
from qlab.serial import read_json, write_json

SCHEMA = "qlab.proof/1"


@dataclass(frozen=True)
class Failure:
    """One problem on which a kernel and its replay disagree, or on which one of them raised."""

    family: str
    kernel: str
    problem: Trial
    what: str
    outputs: int = 0
    """Compared."""
    differing: int = 0
    """Outputs that differ, or that no order of the atomics gives."""


@dataclass(frozen=True)
class Family:
    """One family's counts; they add up over shards."""

    name: str
    problems: int = 0
    comparisons: int = 0
    """Problems times kernels compared."""
    outputs: int = 0
    """Outputs compared bit by bit."""
    differing_outputs: int = 0
    differing_bits: int = 0
    sampled: int = 0
    """Outputs of unordered sums held against everything that some order gives."""
    unreachable: int = 0
    """Of those, outputs that no order gives."""
    kernels: dict[str, int] = None  # type: ignore[assignment]
    """Comparisons of each kernel."""
    features: dict[str, int] = None  # type: ignore[assignment]
    """Problems that exercise each part of the arithmetic."""
    skipped: dict[str, int] = None  # type: ignore[assignment]
    """What was planned and not compared, by reason."""

    def __post_init__(self) -> None:
        for name in ("kernels", "features", "skipped"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, {})

    def __add__(self, other: Family) -> Family:
        """The sum of every count."""
        changed: dict[str, object] = {}
        for f in fields(self):
            a, b = getattr(self, f.name), getattr(other, f.name)
            if isinstance(a, dict):
                changed[f.name] = {key: a.get(key, 0) + b.get(key, 0) for key in sorted(a.keys() | b.keys())}
            elif f.name != "name":
                changed[f.name] = a + b
        return replace(self, **changed)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Proof:
    """What one shard, or all of them, found."""

    schema: str
    gpu: str
    """Key in qlab's table."""
    environment: Environment
    extension: dict[str, str]
    """Version and sha256 of vLLM's extension."""
    kernels: dict[str, str]
    """Build of each kernel."""
    engine: str
    """That replayed."""
    seed: int
    """Of the plan."""
    shards: tuple[int, ...]
    """Which of ``of`` are in here."""
    of: int
    planned: int
    done: int
    seconds: float
    """Of the slowest shard."""
    families: tuple[Family, ...]
    failures: tuple[Failure, ...]

    @property
    def complete(self) -> bool:
        return self.done == self.planned and len(self.shards) == self.of


def merge(parts: Sequence[Proof]) -> Proof:
    """One proof of several shards. Raises QlabError unless they are shards of one run."""
    if not parts:
        raise QlabError("there are no shards to merge")
    first = parts[0]
    for p in parts[1:]:
        for what, a, b in (
            ("GPUs", first.environment.gpu, p.environment.gpu),
            ("drivers", first.environment.driver, p.environment.driver),
            ("builds of vLLM", first.extension, p.extension),
            ("engines", first.engine, p.engine),
            ("plans", (first.seed, first.of), (p.seed, p.of)),
        ):
            if a != b:
                raise QlabError(f"the shards are of different {what}: {a} and {b}")
    shards = [i for p in parts for i in p.shards]
    if len(set(shards)) != len(shards):
        raise QlabError(f"a shard is there twice: {sorted(shards)}")
    families: dict[str, Family] = {}
    for p in parts:
        for f in p.families:
            families[f.name] = families[f.name] + f if f.name in families else f
    return replace(
        first,
        kernels={name: build for p in parts for name, build in p.kernels.items()},
        shards=tuple(sorted(shards)),
        planned=sum(p.planned for p in parts),
        done=sum(p.done for p in parts),
        seconds=max(p.seconds for p in parts),
        families=tuple(families.values()),
        failures=tuple(f for p in parts for f in p.failures),
    )


def merge_folder(folder: Path) -> Proof:
    """Every shard in a folder, joined and written to ``proof.json`` there."""
    found = merge([read_json(Proof, path, SCHEMA) for path in sorted(folder.glob("proof.*-of-*.json"))])
    write_json(folder / "proof.json", found)
    return found


def show(proof: Proof) -> None:
    """One line for each family, then what it exercised, then every failure."""
    console = Console(width=150)
    state = (
        "complete" if proof.complete else f"{proof.done} of {proof.planned} problems, {len(proof.shards)} of {proof.of} shards"
    )
    console.print(
        f"{proof.environment.gpu}, driver {proof.environment.driver}, vLLM {proof.extension.get('version', 'missing')}, "
        f"{proof.engine} engine, {proof.seconds:.0f} s: {state}"
    )
    table = Table("family", box=box.SIMPLE_HEAD)
    for column in ("problems", "kernel runs", "outputs", "differing", "bits", "sampled", "unreachable", "failures"):
        table.add_column(column, justify="right")
    for f in proof.families:
        failed = sum(x.family == f.name for x in proof.failures)
        counts = (f.problems, f.comparisons, f.outputs, f.differing_outputs, f.differing_bits, f.sampled, f.unreachable, failed)
        table.add_row(f.name, *(f"{c:,}" for c in counts))
    console.print(table)
    for f in proof.families:
        console.print(f"{f.name}: " + ", ".join(f"{name} {count}" for name, count in sorted(f.features.items())))
        for reason, count in sorted(f.skipped.items()):
            console.print(f"  not compared, {count}: {reason}")
    for x in proof.failures:
        console.print(f"FAILED {x.kernel} on {x.problem}: {x.what}", highlight=False)
