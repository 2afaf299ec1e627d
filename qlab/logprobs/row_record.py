"""A recorded row, the generator's commitment to all rows of a run, and the opening of those that were asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qlab.engine.run import Row, Tap
from qlab.engine.schedule import Steps, size
from qlab.errors import QlabError
from qlab.logprobs import merkle
from qlab.logprobs.row_sampling import DIGEST, place_index
from qlab.serial import read_json
from qlab.weights import DTYPES

COMMITMENT, OPENING = "qlab.rows.commitment/1", "qlab.rows.opening/1"
Place = tuple[int, int]
"""Row of a kernel's call, and its number of rows M."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """One row of one linear as the generator reports it: everything here is a claim."""

    tap: Tap
    row: int
    M: int
    x: Tensor
    """[K] in the activations' dtype."""
    y: Tensor | None
    """[N], or None where the generator kept a digest of it alone."""
    digest: bytes
    """:func:`row_digest` of y, 16 bytes."""

    @classmethod
    def of(cls, row: Row, *, whole: bool = True) -> Recorded:
        """From an engine's tapped row; without ``whole`` y is dropped and its digest kept."""
        return cls(row.tap, row.row, row.M, row.x, row.y if whole else None, row_digest(row.y))


def row_digest(y: Tensor) -> bytes:
    """First 16 bytes of the sha256 of a row's dtype and bytes (little-endian)."""
    return hashlib.sha256(f"{y.dtype} {y.numel()} ".encode() + _raw(y)).digest()[:DIGEST]


def payload(row: Recorded) -> bytes:
    """What a leaf commits to: linear, sequence, position, row, M, sha256 of x, digest of y."""
    name = row.tap.linear.encode()
    numbers = (len(name), row.tap.sequence, row.tap.position, row.row, row.M)
    head = b"qlab.row/1\0" + b"".join(n.to_bytes(8, "big") for n in numbers) + name
    x = hashlib.sha256(f"{row.x.dtype} {row.x.numel()} ".encode() + _raw(row.x)).digest()
    return head + x + row.digest


def context(model: str, tokens: Sequence[Sequence[int]], linears: Sequence[str], steps: Steps) -> str:
    """sha256, in hex, of what the rows belong to: the checkpoint's digest, the tokens served, the linears, the steps."""
    h = hashlib.sha256(b"qlab.rows.context/1\0")
    spans = [(n, *span) for n, step in enumerate(steps) for span in step]
    for part in (model, *linears):
        h.update(len(part.encode()).to_bytes(8, "big") + part.encode())
    for numbers in (*tokens, *spans):
        h.update(len(numbers).to_bytes(8, "big") + b"".join(int(n).to_bytes(8, "big") for n in numbers))
    return h.hexdigest()


@dataclass(frozen=True)
class Commitment:
    """What the generator publishes before it learns which rows will be asked for."""

    root: str
    """sha256, in hex, of the context, the number of leaves and the Merkle root over all rows."""
    context: str
    linears: tuple[str, ...]
    fed: tuple[int, ...]
    """Tokens fed per sequence: leaves are numbered by sequence, position and linear."""
    schema: str = field(default=COMMITMENT)

    @property
    def leaves(self) -> int:
        return len(self.linears) * sum(self.fed)

    @classmethod
    def read(cls, path: Path) -> Commitment:
        """Raises QlabError naming the file when it is missing, damaged or of another schema."""
        return read_json(cls, path, COMMITMENT)


@dataclass(frozen=True)
class OpenRow:
    """A recorded row as text, with its proof."""

    linear: str
    sequence: int
    position: int
    row: int
    M: int
    dtype: str
    x: str
    """Bytes in hex, little-endian."""
    y: str
    """The same; empty where the digest alone was kept."""
    digest: str
    proof: tuple[str, ...]

    @classmethod
    def of(cls, row: Recorded, proof: Sequence[bytes]) -> OpenRow:
        y = "" if row.y is None else _raw(row.y).hex()
        dtype = str(row.x.dtype).removeprefix("torch.")
        hexes = tuple(p.hex() for p in proof)
        return cls(*row.tap, row.row, row.M, dtype, _raw(row.x).hex(), y, row.digest.hex(), hexes)

    def recorded(self) -> Recorded:
        """Raises QlabError for text that is no row, and where y has another digest than the one beside it."""
        where = f"the opened row of {self.linear}, sequence {self.sequence}, position {self.position}"
        try:
            dtype, digest = DTYPES[self.dtype], bytes.fromhex(self.digest)
            x, y = _tensor(self.x, dtype), _tensor(self.y, dtype) if self.y else None
        except (KeyError, ValueError) as e:
            raise QlabError(f"{where} is no row ({e}); ask for it again") from None
        if min(self.sequence, self.position, self.row, self.M) < 0 or max(self.sequence, self.position, self.row, self.M) >> 63:
            raise QlabError(f"{where} has a place that is none; ask for it again")
        if len(digest) != DIGEST or (y is not None and row_digest(y) != digest):
            raise QlabError(f"{where} has an output row that its digest does not fit")
        return Recorded(Tap(self.linear, self.sequence, self.position), self.row, self.M, x, y, digest)


@dataclass(frozen=True)
class Opening:
    """The rows that were asked for, each with its proof."""

    rows: tuple[OpenRow, ...]
    schema: str = field(default=OPENING)

    @classmethod
    def read(cls, path: Path) -> Opening:
        """Raises QlabError naming the file when it is missing, damaged or of another schema."""
        return read_json(cls, path, OPENING)


class Ledger:
    """The generator's side: every row of a run under one root.

    ``rows`` must hold each of the ``linears`` for each token ``fed``, once. Raises QlabError naming a row that is missing.
    """

    def __init__(self, rows: Sequence[Recorded], linears: Sequence[str], fed: Sequence[int], context: str) -> None:
        self._rows: dict[int, Recorded] = {}
        for row in rows:
            index = place_index(row.tap, linears, fed)
            if index in self._rows:
                raise QlabError(f"{row.tap.linear} at position {row.tap.position} of sequence {row.tap.sequence} comes twice")
            self._rows[index] = row
        leaves = len(linears) * sum(fed)
        missing = next((i for i in range(leaves) if i not in self._rows), None)
        if missing is not None:
            raise QlabError(
                f"{len(rows)} of {leaves} rows are recorded, and a commitment covers all: {linears[missing % len(linears)]} is "
                "the first that is missing; record with --rows '*'"
            )
        self._tree = merkle.Tree([merkle.leaf(i, payload(self._rows[i])) for i in range(leaves)])
        root = _bound(self._tree.root, leaves, context)
        self.commitment = Commitment(root, context, tuple(linears), tuple(fed))

    def open(self, taps: Sequence[Tap], *, whole: bool = True) -> Opening:
        """The rows of ``taps`` with their proofs; without ``whole`` their outputs' digests in place of the outputs."""
        c, found = self.commitment, []
        for tap in taps:
            index = place_index(tap, c.linears, c.fed)
            row = self._rows[index]
            kept = row if whole else Recorded(row.tap, row.row, row.M, row.x, None, row.digest)
            found.append(OpenRow.of(kept, (*self._tree.prove(index), self._tree.root)))
        return Opening(tuple(found))


def check_opening(commitment: Commitment, opening: Opening, taps: Sequence[Tap]) -> tuple[Recorded, ...]:
    """The opened rows, in the order of ``taps``.

    Raises QlabError naming the row that was asked for and is missing, was altered since the commitment, or stands elsewhere.
    """
    by_tap = {Tap(r.linear, r.sequence, r.position): r for r in opening.rows}
    found = []
    for tap in taps:
        where = f"{tap.linear}, sequence {tap.sequence}, position {tap.position}"
        if tap not in by_tap:
            raise QlabError(f"the row of {where} was asked for and is not in the opening")
        row = by_tap[tap].recorded()
        try:
            *proof, tree = (bytes.fromhex(p) for p in by_tap[tap].proof)
        except ValueError:
            raise QlabError(f"the proof of {where} is not hexadecimal, or empty") from None
        index = place_index(tap, commitment.linears, commitment.fed)
        known = _bound(tree, commitment.leaves, commitment.context) == commitment.root
        if not known or not merkle.proves(tree, commitment.leaves, index, merkle.leaf(index, payload(row)), proof):
            raise QlabError(f"the row of {where} is not the one that was committed to")
        found.append(row)
    return tuple(found)


def check_places(rows: Sequence[Recorded], steps: Steps) -> None:
    """Raise QlabError for a row whose place is not that of its token in the steps that were run.

    Steps are a claim, too, but one for all rows: whoever knows the scheduler's rule can compute them.
    """
    places: dict[Place, Place] = {}
    for step in steps:
        tokens = [(s.sequence, t) for s in step for t in range(s.start, s.stop)]
        places |= {token: (row, size(step)) for row, token in enumerate(tokens)}
    for r in rows:
        known = places.get((r.tap.sequence, r.tap.position))
        where = f"{r.tap.linear}, sequence {r.tap.sequence}, position {r.tap.position}"
        if not 0 <= r.row < r.M:
            raise QlabError(f"the row of {where} says that it is row {r.row} of {r.M}, which none is")
        if steps and known != (r.row, r.M):
            told = "no step has it" if known is None else f"the steps have it as row {known[0]} of {known[1]}"
            raise QlabError(f"the row of {where} says that it is row {r.row} of {r.M}, and {told}")


def _bound(root: bytes, leaves: int, context: str) -> str:
    return hashlib.sha256(b"\x02" + leaves.to_bytes(8, "big") + context.encode() + root).hexdigest()


def _raw(t: Tensor) -> bytes:
    return bytes(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _tensor(text: str, dtype: torch.dtype) -> Tensor:
    raw = np.frombuffer(bytes.fromhex(text), np.int16).copy()
    if not len(raw):
        raise ValueError("an empty row")
    return torch.from_numpy(raw).view(dtype)
