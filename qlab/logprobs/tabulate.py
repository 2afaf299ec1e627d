"""From runs to tables. Each pair of runs is compared once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from qlab.compare import equivalence_classes
from qlab.engine.path import Path
from qlab.logprobs.distance import compare, distances, fingerprint
from qlab.logprobs.statistics import Array, mean, ratio
from qlab.logprobs.tables import AcrossRow, BatchRow, Cells, Entry, Found, Matrix, NoiseFloor, Spread, Tables
from qlab.logprobs.telling import Telling, tell

ABSENT = "not asked for"
MODES = ("prefill", "decode", "decode, free")


@dataclass(frozen=True, eq=False)
class Pair:
    """A generator's run beside a re-executor's."""

    distances: Array
    """[prompts]."""
    identical: bool
    digest: str
    """Of the re-executor's values at the generator's ids."""
    unlisted: int = 0


@dataclass
class Compared:
    """Compares runs on demand and keeps what it found."""

    cells: Cells
    top_k: int | None = None
    decimals: int | None = None
    _known: dict[tuple[str, Path, Path], Pair | str] = field(default_factory=dict)

    def pair(self, mode: str, g: Path, r: Path) -> Pair | str:
        """One cell of a matrix of ``mode``, or the reason why there is none."""
        key = (mode, g, r)
        if key not in self._known:
            self._known[key] = self._pair(mode, g, r)
        return self._known[key]

    def _pair(self, mode: str, g: Path, r: Path) -> Pair | str:
        c = self.cells
        if mode == "prefill":
            return self.forced(c.prefill.get((g, g), ABSENT), c.prefill.get((g, r), ABSENT))
        generated = c.recordings.get(g, ABSENT)
        if mode == "decode":
            return self.forced(generated, c.decode.get((g, r), generated if g == r else ABSENT), decoded=True)
        # Another path's run is one of its own: atomics add in another order than they did for the generator.
        return self.free(generated, (c.recordings if g == r else c.again).get(r, ABSENT))

    def forced(self, a: Found, b: Found, *, decoded: bool = False) -> Pair | str:
        """Runs over the same tokens; ``decoded`` leaves the rows of the prompts out."""
        if isinstance(a, str) or isinstance(b, str):
            return a if isinstance(a, str) else str(b)
        found = [compare(x, y, top_k=self.top_k, decimals=self.decimals) for x, y in zip(a, b, strict=True)]
        rows = [slice(x.prompt if decoded else 0, None) for x in a]
        digest = hashlib.sha256(b"".join(f.values[r].numpy().tobytes() for f, r in zip(found, rows, strict=True)))
        return Pair(
            np.array([float(f.distances[r].square().sum().sqrt()) for f, r in zip(found, rows, strict=True)]),
            all(bool(f.identical[r].all()) for f, r in zip(found, rows, strict=True)),
            digest.hexdigest(),
            sum(int(f.unlisted[r].sum()) for f, r in zip(found, rows, strict=True)),
        )

    def free(self, a: Found, b: Found) -> Pair | str:
        """Runs that each chose their own tokens: infinite where these split apart, else over the decoded rows."""
        if isinstance(a, str) or isinstance(b, str):
            return a if isinstance(a, str) else str(b)
        options = {"top_k": self.top_k, "decimals": self.decimals}
        mine, other = (fingerprint(x, **options) for x in (a, b))
        return Pair(distances(a, b, "generated", **options).numpy(), mine == other, other)


def tabulate(cells: Cells, paths: Sequence[Path], *, top_k: int | None = None, decimals: int | None = None) -> Tables:
    """Every table of the experiment from its runs.

    Args:
        paths: in the order of rows and columns; methods and GPUs appear in the order in which they are first met.
        top_k: log-probabilities compared per row; needed where runs list wanted ids behind their top-k.
        decimals: round log-probabilities first, as an API does.

    Raises QlabError where runs that should hold the same tokens do not.
    """
    compared = Compared(cells, top_k, decimals)
    gpus = tuple(dict.fromkeys(p.gpu for p in paths))
    pairs = [compared.pair("prefill", g, r) for g in paths for r in paths]
    return Tables(
        noise_floor=tuple(_noise_floor(compared, p) for p in paths),
        within=tuple(matrix(compared, mode, [p for p in paths if p.gpu == gpu], gpu) for mode in MODES for gpu in gpus),
        across=tuple(_across(compared, paths, a, b, gs) for gs in combinations(gpus, 2) for a, b in method_pairs(paths)),
        batches=tuple(_batch(compared, p, name) for p, name in cells.batches),
        full=tuple(matrix(compared, mode, paths, "") for mode in MODES) if len(gpus) > 1 else (),
        unlisted=sum(p.unlisted for p in pairs if not isinstance(p, str)),
        detection=tuple(_tellings(compared, paths, gpus)),
    )


def label(path: Path) -> str:
    """A path without its GPU: what is compared across GPUs."""
    return str(path).replace(f"@{path.gpu}", "")


def method_pairs(paths: Sequence[Path]) -> list[tuple[str, str]]:
    return list(combinations(dict.fromkeys(label(p) for p in paths), 2))


def entry(pair: Pair | str) -> Entry:
    """A cell with its interval; where tokens split apart, the mean over the other prompts beside it."""
    if isinstance(pair, str):
        return Entry(None, pair)
    finite = pair.distances[np.isfinite(pair.distances)]
    apart = 0 < len(finite) < len(pair.distances)
    return Entry(mean(pair.distances), "", pair.identical, mean(finite) if apart else None)


def matrix(compared: Compared, mode: str, paths: Sequence[Path], gpu: str) -> Matrix:
    """Distances between some paths; ``gpu`` is its name."""
    rows = [[compared.pair(mode, g, r) for r in paths] for g in paths]
    off = [p.distances for i, row in enumerate(rows) for j, p in enumerate(row) if i != j and not isinstance(p, str)]
    spread = None
    if off:
        means = [float(d.mean()) for d in off]
        spread = Spread(mean(np.mean(off, axis=0)), min(means), max(means), len(off))
    digests = {}
    generated = [row for i, row in enumerate(rows) if not isinstance(row[i], str)]
    for j, path in enumerate(paths):
        column = [row[j] for row in generated]
        if column and not any(isinstance(p, str) for p in column):
            digests[str(path)] = "".join(p.digest for p in column if not isinstance(p, str))
    keys = tuple(str(p) for p in paths)
    cells = tuple(tuple(entry(p) for p in row) for row in rows)
    return Matrix(gpu, mode, keys, cells, spread, equivalence_classes(digests))


def _noise_floor(compared: Compared, p: Path) -> NoiseFloor:
    c = compared.cells
    prefill = compared.forced(c.prefill.get((p, p), ABSENT), c.prefill_again.get(p, ABSENT))
    decode = compared.free(c.recordings.get(p, ABSENT), c.again.get(p, ABSENT))
    return NoiseFloor(str(p), label(p), p.gpu, entry(prefill), entry(decode))


def _across(compared: Compared, paths: Sequence[Path], a: str, b: str, gpus: tuple[str, str]) -> AcrossRow:
    at = {(label(p), p.gpu): p for p in paths}
    signal = [((x, g), (y, g)) for g in gpus for x, y in ((a, b), (b, a))]
    noise = [((m, g), (m, r)) for m in (a, b) for g, r in (gpus, gpus[::-1])]
    found = []
    for wanted in (signal, noise):
        pairs = [compared.pair("prefill", at[g], at[r]) if g in at and r in at else ABSENT for g, r in wanted]
        if reason := next((p for p in pairs if isinstance(p, str)), ""):
            return AcrossRow((a, b), gpus, None, None, None, reason)
        found.append(np.mean([p.distances for p in pairs if not isinstance(p, str)], axis=0))
    return AcrossRow((a, b), gpus, mean(found[0]), mean(found[1]), ratio(*found))


def _batch(compared: Compared, p: Path, schedule: str) -> BatchRow:
    a, b = compared.cells.prefill.get((p, p), ABSENT), compared.cells.batches[p, schedule]
    pair = compared.forced(a, b)
    if isinstance(pair, str) or isinstance(a, str) or isinstance(b, str):
        return BatchRow(str(p), schedule, entry(pair), None, None, None)
    rows = [compare(x, y, top_k=compared.top_k, decimals=compared.decimals) for x, y in zip(a, b, strict=True)]
    lengths = [len(f.identical) for f in rows]
    return BatchRow(
        str(p),
        schedule,
        entry(pair),
        ratio([int((~f.identical).sum()) for f in rows], lengths),
        ratio([int(f.flips.sum()) for f in rows], lengths),
        max(float(f.largest.max()) for f in rows),
    )


def _verified(compared: Compared, g: Path, r: Path) -> Pair | str:
    """g's tokens prefilled by r as a run of its own: where r is g, it adds atomics in another order than g did."""
    if g != r:
        return compared.pair("prefill", g, r)
    return compared.forced(compared.cells.prefill.get((g, g), ABSENT), compared.cells.prefill_again.get(g, ABSENT))


def _tellings(compared: Compared, paths: Sequence[Path], gpus: tuple[str, ...]) -> list[Telling]:
    """Every pair of methods, generated on one GPU and verified on another (or the only one), and every method on two GPUs."""
    at = {(label(p), p.gpu): p for p in paths}
    asked = []
    for g, r in list(combinations(gpus, 2)) or [(gpu, gpu) for gpu in gpus]:
        asked += [((a, g), (b, g), (a, r)) for a, b in method_pairs(paths)]
        asked += [((m, g), (m, r), (m, g)) for m in dict.fromkeys(label(p) for p in paths) if g != r]
    found = []
    for names in asked:
        if not all(name in at for name in names):
            continue
        claimed, other, verifier = (at[name] for name in names)
        pairs = [_verified(compared, p, verifier) for p in (claimed, other)]
        scores = [p.distances for p in pairs if not isinstance(p, str)]
        generated = compared.cells.prefill.get((claimed, claimed), ABSENT)
        if len(scores) == 2 and not isinstance(generated, str):
            tokens = sum(len(s.ids) for s in generated) / len(generated)
            found.append(tell(str(claimed), str(other), str(verifier), scores[0], scores[1], tokens))
    return found
