"""The row protocol by replay: which candidates can have computed the rows that a generator recorded.

A row is checked alone: its input x, its place (row, number of rows M) and the checkpoint's weight give the bits that a
candidate would have written, whatever computed x. Noise of attention and of every other kernel therefore does not enter: this
survives an unknown attention kernel, where log-probabilities are drowned (``python -m qlab.logprobs causes``).

A mismatch excludes a candidate for certain. A match excludes those whose replay differs on that row. What this rests on, and
what a dishonest generator can still do, is in docs/row-protocol.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlab.engine.path import Path
from qlab.errors import QlabError, UnsupportedError
from qlab.logprobs.detection import name as class_name
from qlab.logprobs.row_bench import Layers, RowBench
from qlab.logprobs.row_errors import ERROR
from qlab.logprobs.row_record import Place, Recorded, check_places, row_digest
from qlab.replay.operands import bits

SCHEMA = "qlab.rows.replay/1"
EXCLUDED, SURVIVES, UNDECIDED = "excluded", "survives", "undecided"
ASSUMPTIONS = (
    "the generator is one of the candidates, or none of them survives",
    "recipes are exact: compared with kernels on H100 and H200, a prediction for other GPUs (README)",
    "the rows are the ones that served the tokens: committed to before they were sampled, places as the scheduler's",
)


@dataclass(frozen=True)
class Mismatch:
    """The first element in which a recorded row is not what a candidate gives."""

    linear: str
    sequence: int
    position: int
    element: int
    """-1 where digests were compared."""
    recorded: str
    """Bit pattern in hex, or the digest."""
    replayed: str
    """The same; for atomics the interval of reachable results."""


@dataclass(frozen=True)
class Tried:
    """One candidate."""

    path: str
    verdict: str
    """``excluded`` (for certain), ``survives``, or ``undecided`` (no row could be tested)."""
    reason: str
    """Why rows were not tested; empty where all were."""
    rows: int
    """Rows tested."""
    equal: int
    """Rows with the candidate's bits."""
    possible: int
    """Rows that some order of the candidate's atomics may have given; no proof that one did."""
    mismatch: Mismatch | None = None


@dataclass(frozen=True)
class Replayed:
    """What recorded rows say about the candidates."""

    schema: str
    rows: int
    digests: int
    """Rows of which the generator kept a digest alone."""
    candidates: tuple[Tried, ...]
    classes: tuple[tuple[str, ...], ...]
    """All candidates: those together that are one function on every row, so that no input of such rows tells them apart."""
    survivors: tuple[tuple[str, ...], ...]
    """The classes that are left."""
    altered: float
    """Share of all rows that can have been computed otherwise with all sampled ones passing at a probability of 1e-6."""
    sentence: str
    error: float = 0.0
    """Probability that the generator was excluded: none, provided the assumptions."""
    assumptions: tuple[str, ...] = field(default=ASSUMPTIONS)


def verify_by_replay(
    rows: Sequence[Recorded],
    layers: Layers,
    candidates: Sequence[Path],
    *,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda rows: None,
) -> Replayed:
    """Try every candidate on every row.

    Args:
        rows: claims of the generator; places are checked against their own M here, and against a schedule by
            :func:`qlab.logprobs.row_record.check_places`.
        layers: the weight that a path runs for a linear.
        advance: called with the number of rows times candidates that were tried since the last call.

    Raises QlabError without rows or candidates, for candidates named twice, and for a row that does not fit its linear.
    """
    if not rows or not candidates:
        raise QlabError("a verdict by rows needs one recorded row and one candidate at least")
    if len(set(candidates)) < len(candidates):
        raise QlabError("a candidate is named twice; name each once")
    check_places(rows, ())
    found = {path: _Candidate(path) for path in candidates}
    for linear in dict.fromkeys(r.tap.linear for r in rows):
        mine = [i for i, r in enumerate(rows) if r.tap.linear == linear]
        some = [rows[i] for i in mine]
        benches: dict[int, RowBench] = {}
        for path in candidates:
            layer = layers(path, linear)
            bench = benches.setdefault(id(layer.weight), RowBench(layer, device))
            fits(some, bench)
            found[path].try_rows(mine, some, bench)
            advance(len(some))
    order = {row: i for i, row in enumerate(sorted(range(len(rows)), key=lambda i: rows[i].tap[1:]))}
    tried = tuple(found[path].result(order) for path in candidates)
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in candidates:
        groups.setdefault(tuple(found[path].functions[i] for i in range(len(rows))), []).append(str(path))
    classes = tuple(tuple(g) for g in groups.values())
    alive = {t.path for t in tried if t.verdict == SURVIVES}
    survivors = tuple(c for c in classes if alive & set(c))
    digests = sum(r.y is None for r in rows)
    altered = 1 - ERROR ** (1 / len(rows))
    return Replayed(SCHEMA, len(rows), digests, tried, classes, survivors, altered, _sentence(tried, survivors, len(rows)))


def fits(rows: Sequence[Recorded], bench: RowBench) -> None:
    """Raise QlabError for a row whose x or y is not of the linear's size or dtype."""
    k, n, dtype = bench.weight.K, bench.weight.N, bench.weight.dtype
    for r in rows:
        where = f"the row of {r.tap.linear}, sequence {r.tap.sequence}, position {r.tap.position}"
        for name, t, size in (("x", r.x, k), ("y", r.y, n)):
            if t is not None and (tuple(t.shape) != (size,) or t.dtype != dtype):
                raise QlabError(
                    f"{where}: {name} is {t.dtype} {list(t.shape)}, and the checkpoint's linear has {dtype} [{size}]"
                )


class _Candidate:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.functions: dict[int, str] = {}
        self.rows = self.equal = self.possible = 0
        self.reasons: dict[str, int] = {}
        self.mismatches: dict[int, Mismatch] = {}

    def try_rows(self, numbers: Sequence[int], rows: Sequence[Recorded], bench: RowBench) -> None:
        fixed: list[int] = []
        free: list[int] = []
        for i, r in enumerate(rows):
            place = (r.row, r.M)
            self.functions[numbers[i]] = f"{bench.digest} {bench.function(self.path, place)}"
            try:
                (fixed if bench.ordered(self.path, place) else free).append(i)
            except UnsupportedError as e:
                self._skip(str(e))
        if fixed:
            self._fixed([numbers[i] for i in fixed], [rows[i] for i in fixed], bench)
        whole = [i for i in free if rows[i].y is not None]
        for _ in range(len(free) - len(whole)):
            self._skip("a digest says nothing about atomics, whose order is not known")
        if whole:
            self._free([numbers[i] for i in whole], [rows[i] for i in whole], bench)

    def _fixed(self, numbers: Sequence[int], rows: Sequence[Recorded], bench: RowBench) -> None:
        replayed = bench.replay(self.path, _places(rows), torch.stack([r.x for r in rows]))
        self.rows += len(rows)
        for number, row, y in zip(numbers, rows, replayed, strict=True):
            found = _differs(row, y)
            if found is None:
                self.equal += 1
            else:
                self.mismatches[number] = found

    def _free(self, numbers: Sequence[int], rows: Sequence[Recorded], bench: RowBench) -> None:
        x, y = torch.stack([r.x for r in rows]), torch.stack([r.y for r in rows if r.y is not None])
        try:
            out = bench.unreachable(self.path, _places(rows), x, y)
        except UnsupportedError as e:
            for _ in rows:
                self._skip(str(e))
            return
        self.rows += len(rows)
        self.possible += len(rows) - len(out)
        for i, (element, low, high) in out.items():
            interval = f"{low:g} to {high:g}"
            self.mismatches[numbers[i]] = Mismatch(*rows[i].tap, element, _pattern(y[i], element), interval)

    def _skip(self, reason: str) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def result(self, order: dict[int, int]) -> Tried:
        verdict = EXCLUDED if self.mismatches else SURVIVES if self.rows else UNDECIDED
        skipped = sum(self.reasons.values())
        reason = "; ".join(self.reasons)
        if skipped and self.rows:
            reason = f"{skipped} rows not tested: {reason}"
        first = min(self.mismatches, key=order.__getitem__, default=None)
        mismatch = None if first is None else self.mismatches[first]
        return Tried(str(self.path), verdict, reason, self.rows, self.equal, self.possible, mismatch)


def _places(rows: Sequence[Recorded]) -> list[Place]:
    return [(r.row, r.M) for r in rows]


def _differs(row: Recorded, y: Tensor) -> Mismatch | None:
    if row.y is None:
        again = row_digest(y)
        return None if again == row.digest else Mismatch(*row.tap, -1, row.digest.hex(), again.hex())
    other = (bits(row.y) != bits(y)).nonzero()[0]
    if not len(other):
        return None
    element = int(other[0])
    return Mismatch(*row.tap, element, _pattern(row.y, element), _pattern(y, element))


def _pattern(y: Tensor, element: int) -> str:
    return f"{int(bits(y[element : element + 1])[0]):04x}"


def _sentence(tried: Sequence[Tried], survivors: Sequence[Sequence[str]], rows: int) -> str:
    out = [t for t in tried if t.verdict == EXCLUDED]
    open_ = [t.path for t in tried if t.verdict == UNDECIDED]
    rest = f"; {', '.join(open_)} stay undecided" if open_ else ""
    if not survivors:
        if not out:
            return f"undecided: no candidate can be tested{rest}"
        near = max(out, key=lambda t: (t.equal + t.possible) / max(t.rows, 1))
        agree = f"the nearest, {near.path}, agrees on {near.equal + near.possible} of {near.rows}"
        return f"no candidate computed all {rows} rows: {agree}{rest}"
    names = " or ".join(class_name(c) for c in survivors)
    partial = any(t.rows < rows or t.possible for t in tried if t.verdict == SURVIVES)
    certain = f"{len(out)} other candidate{'s are' if len(out) != 1 else ' is'} excluded for certain by {rows} rows"
    if len(survivors) == 1 and not open_:
        how = ", though not every row could be tested by equal bits" if partial else ""
        return f"consistent with class {names}; {certain}{how}"
    return f"undecided between {names}{rest}; {certain}"
