"""What an INT4 GEMM computes, as data: a recipe.

A recipe says, for each region of the output, in which order and in which arithmetic the products ``x[m, k] * w[k, n]`` are
summed. Its tree has chains for leaves (one accumulator that walks over k), and joins, roundings, unordered sums (atomics)
and opaque parts (cuBLAS) above them. A dequantisation rule says what ``w`` is, an output rule what happens to the sum.

Recipes are built in a normal form, so that equal functions have equal hashes: sums are commutative but not associative, the
order of k inside one fused sum does not count, roundings to a type that holds the value already vanish, and neighbouring
rectangles with one tree are one. The normal form is syntactic beyond that: it finds no equality that rests on the numbers.

Vocabulary after FPRev (arXiv 2411.00442) for trees, MMA-Sim (arXiv 2511.10909) for the step of a tensor core.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qlab import hardware
from qlab.errors import QlabError

Type = Literal["fp32", "fp16", "bf16"]
Weights = Literal["rounded", "fused", "integer"]
"""What ``w`` is: ``rounded`` RN((q - z) * s); ``fused`` RN(q * s + RN(-s * z)), one rounding as Machete decodes AWQ;
``integer`` q - z, the scale coming later (in the step or in the output rule)."""
Rows = Literal["natural", "sorted"]
"""Which row of the weight a walk's k means: the k-th, or the k-th after a stable sort by group (act-order)."""
WEIGHTS = {"rounded": "RN((q-z)*s)", "fused": "RN(q*s + RN(-s*z))", "integer": "q-z"}
SCHEMA = "qlab.recipe/1"


@dataclass(frozen=True)
class TensorCore:
    """One fused sum of ``terms`` exact products and the accumulator (see qlab/replay/step.py)."""

    fraction_bits: int
    """F: bits kept below the largest exponent."""
    terms: int
    """L: products per fused sum."""
    zero_exponent: int
    """Exponent of a zero term."""
    accumulator: Type = "fp32"
    """fp32, rounded toward zero after each fused sum, or fp16, rounded to nearest."""

    @classmethod
    def of(cls, step: hardware.Step, accumulator: Type = "fp32") -> TensorCore:
        zero = step.zero_exponent if accumulator == "fp32" else step.zero_exponent_fp16
        return cls(step.fraction_bits, step.terms, zero, accumulator)

    def __str__(self) -> str:
        return f"mma F={self.fraction_bits} L={self.terms} e0={self.zero_exponent} {self.accumulator}"


@dataclass(frozen=True)
class Fma:
    """``acc = RN(x * w + acc)``, one k at a time."""

    accumulator: Type = "fp32"

    @property
    def terms(self) -> int:
        return 1

    def __str__(self) -> str:
        return f"fma {self.accumulator}"


@dataclass(frozen=True)
class HalfDot:
    """ExLlama's step: two fp16 fma chains over the even and the odd k of ``terms``, added in fp32, then fma with the scale.

    ``acc = fma32(fp32(lo) + fp32(hi), s[group], acc)``; w is ``integer``.
    """

    terms: int = 8

    @property
    def accumulator(self) -> Type:
        return "fp32"

    def __str__(self) -> str:
        return f"fp16 dot of {self.terms}, scale by fma fp32"


Step = TensorCore | Fma | HalfDot


@dataclass(frozen=True, order=True)
class Run:
    """``count`` stretches of ``length`` consecutive k, ``stride`` apart."""

    start: int
    length: int
    count: int = 1
    stride: int = 0

    def __str__(self) -> str:
        first = f"{self.start}:{self.start + self.length}"
        return first if self.count == 1 else f"{first} +{self.stride} x{self.count}"


Walk = tuple[Run, ...]


def fold(order: Sequence[int] | NDArray[np.integer[Any]]) -> Walk:
    """An order of k as runs: stretches of consecutive k, equally long and equally spaced ones folded. Inverse of `unfold`."""
    k = np.asarray(order, np.int64)
    if not k.size:
        return ()
    cuts = np.flatnonzero(np.diff(k) != 1) + 1
    starts, ends = np.r_[0, cuts], np.r_[cuts, k.size]
    runs: list[Run] = []
    stretches = [(int(k[a]), int(b - a)) for a, b in zip(starts, ends, strict=True)]
    i = 0
    while i < len(stretches):
        start, length = stretches[i]
        j = i + 1
        stride = stretches[j][0] - start if j < len(stretches) else 0
        while j < len(stretches) and stretches[j] == (start + (j - i) * stride, length):
            j += 1
        if j == i + 1:
            stride = 0
        runs.append(Run(start, length, j - i, stride))
        i = j
    return tuple(runs)


def unfold(walk: Walk) -> NDArray[np.int32]:
    """The order of k that a walk stands for: int32 [n]."""
    parts = [
        (r.start + r.stride * np.arange(r.count, dtype=np.int32)[:, None] + np.arange(r.length, dtype=np.int32)).ravel()
        for r in walk
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


@dataclass(frozen=True)
class Chain:
    """One accumulator, started at +0, that takes the products of a walk, ``step.terms`` at a time."""

    step: Step
    walk: Walk

    def __str__(self) -> str:
        return f"chain[{', '.join(map(str, self.walk))}]"


@dataclass(frozen=True)
class Join:
    """``(((parts[0] + parts[1]) + parts[2]) + ...)``, each addition rounded to nearest in ``type``."""

    parts: tuple[Node, ...]
    type: Type = "fp32"


@dataclass(frozen=True)
class Round:
    """The value rounded to nearest even to ``type``."""

    node: Node
    type: Type


@dataclass(frozen=True)
class Unordered:
    """Parts added to zero in an order that is not fixed (atomics), each addition rounded in ``type``."""

    parts: tuple[Node, ...]
    type: Type
    scaled: bool = False
    """Whether each part is multiplied by the whole column's scale, and rounded, before it is added."""


@dataclass(frozen=True)
class Opaque:
    """A sum that qlab does not model, named by library, build and algorithm; excluded from every bit-exact claim."""

    name: str


Node = Chain | Join | Round | Unordered | Opaque


def chain(step: Step, order: Sequence[int] | NDArray[np.integer[Any]]) -> Chain:
    """A chain in normal form. The order of k inside one fused sum of a tensor core does not count, so it is sorted there."""
    k = np.asarray(order, np.int64)
    if len(k) % step.terms:
        raise QlabError(f"a chain over {len(k)} k does not divide into steps of {step.terms}")
    if isinstance(step, TensorCore):
        k = np.sort(k.reshape(-1, step.terms), axis=1).ravel()
    return Chain(step, fold(k))


def join(parts: Sequence[Node], type: Type = "fp32") -> Node:
    """A left fold in normal form: one part is itself, a leading join of the same type is flattened, the first two commute."""
    found = list(parts)
    if len(found) > 1:
        # a + b = b + a: a leading join goes first, so that it can be flattened; otherwise the smaller text does.
        found[:2] = sorted(found[:2], key=lambda n: (not _flattens(n, type), key(n)))
    if len(found) > 1 and isinstance(found[0], Join) and found[0].type == type:
        found[:1] = found[0].parts
    return found[0] if len(found) == 1 else Join(tuple(found), type)


def _flattens(node: Node, type: Type) -> bool:
    return isinstance(node, Join) and node.type == type


def rounded(node: Node, type: Type) -> Node:
    """The node rounded; itself where its values are of that type, or of one that it holds, already."""
    return node if value_type(node) in (type, None) or type == "fp32" else Round(node, type)


def unordered(parts: Sequence[Node], type: Type, *, scaled: bool = False) -> Node:
    """Atomics onto zero: of one part or two there is only one order."""
    if len(parts) <= 2 and not scaled:
        return join(parts, type)
    return Unordered(tuple(sorted(parts, key=key)), type, scaled)


def value_type(node: Node) -> Type | None:
    """The type that holds a node's values; None where it is opaque."""
    if isinstance(node, Chain):
        return node.step.accumulator
    return None if isinstance(node, Opaque) else node.type


def key(node: Node) -> str:
    """A node as canonical text, for sorting and hashing."""
    return json.dumps(plain(node), separators=(",", ":"))


@dataclass(frozen=True)
class Output:
    """What happens to a sum: rounded to the activations' dtype, then scaled, then biased, each rounded."""

    scale: bool = False
    """``RN(y * s)`` with the whole column's scale (Marlin without groups)."""
    bias: Literal["none", "added", "fused"] = "none"
    """``added``: RN(y + bias); ``fused``: RN(y * s + bias), one rounding in place of two."""

    def __str__(self) -> str:
        first = ", RN(y*s + bias) fused" if self.bias == "fused" else ", RN(y*s)" if self.scale else ""
        return f"RN{first}{', RN(y + bias)' if self.bias == 'added' else ''}"


@dataclass(frozen=True)
class Tile:
    """A rectangle of the output with its sum; what builders hand to :meth:`Recipe.of`."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    tree: Node
    output: Output = Output()


@dataclass(frozen=True)
class Region:
    """Rows ``rows[0]:rows[1]`` of several column ranges, all summed by one tree."""

    rows: tuple[int, int]
    columns: tuple[tuple[int, int], ...]
    tree: Node
    output: Output = Output()


@dataclass(frozen=True)
class Recipe:
    """What one call computes. Build with :meth:`of`, which brings it into normal form."""

    M: int
    K: int
    N: int
    dtype: Type
    """Of activations and output: fp16 or bf16."""
    weights: Weights
    rows: Rows
    regions: tuple[Region, ...] = field(repr=False)

    @classmethod
    def of(
        cls, m: int, k: int, n: int, dtype: Type, tiles: Iterable[Tile], *, weights: Weights = "rounded", rows: Rows = "natural"
    ) -> Recipe:
        """A recipe in normal form. Raises QlabError unless the tiles cover the output exactly once."""
        return cls(m, k, n, dtype, weights, rows, _regions(m, n, list(tiles)))

    @cached_property
    def hash(self) -> str:
        """sha256 of the canonical JSON: equal for equal functions of one shape."""
        return hashlib.sha256(json.dumps(self.plain(), separators=(",", ":"), sort_keys=True).encode()).hexdigest()

    @property
    def opaque(self) -> str:
        """Names of the opaque parts, joined; empty where every bit is modelled."""
        return "; ".join(sorted({n.name for r in self.regions for n in nodes(r.tree) if isinstance(n, Opaque)}))

    @property
    def ordered(self) -> bool:
        """True where no sum of three parts or more is left to atomics, so that the bits are determined."""
        return not any(isinstance(n, Unordered) and len(n.parts) > 2 for r in self.regions for n in nodes(r.tree))

    def plain(self) -> dict[str, Any]:
        """Data for JSON; trees that several regions share are written once."""
        trees: dict[str, int] = {}
        regions = [
            [list(r.rows), [list(c) for c in r.columns], trees.setdefault(key(r.tree), len(trees)), [r.output.scale, r.output.bias]]
            for r in self.regions
        ]
        return {
            "schema": SCHEMA,
            "shape": [self.M, self.K, self.N],
            "dtype": self.dtype,
            "weights": self.weights,
            "rows": self.rows,
            "trees": [json.loads(t) for t in trees],
            "regions": regions,
        }

    @classmethod
    def from_plain(cls, data: Any) -> Recipe:
        """Inverse of :meth:`plain`. Raises QlabError when the data is not a recipe of this version."""
        try:
            if data["schema"] != SCHEMA:
                raise QlabError(f"holds {data['schema']!r}, not {SCHEMA!r}")
            trees = [node_from_plain(t) for t in data["trees"]]
            tiles = [
                Tile((rows[0], rows[1]), (c[0], c[1]), trees[tree], Output(scale, bias))
                for rows, columns, tree, (scale, bias) in data["regions"]
                for c in columns
            ]
            m, k, n = data["shape"]
            return cls.of(m, k, n, data["dtype"], tiles, weights=data["weights"], rows=data["rows"])
        except (KeyError, IndexError, TypeError, ValueError) as e:
            raise e if isinstance(e, QlabError) else QlabError(f"not a recipe: {type(e).__name__}: {e}") from None

    def __str__(self) -> str:
        from qlab.report.recipe import recipe_text

        return recipe_text(self)


def nodes(node: Node) -> Iterator[Node]:
    """The node and everything below it, parents first."""
    yield node
    if isinstance(node, Join | Unordered):
        for part in node.parts:
            yield from nodes(part)
    elif isinstance(node, Round):
        yield from nodes(node.node)


def plain(node: Node) -> list[Any]:
    """A node as nested lists, its kind first."""
    if isinstance(node, Chain):
        return ["chain", _plain_step(node.step), [[r.start, r.length, r.count, r.stride] for r in node.walk]]
    if isinstance(node, Join):
        return ["join", node.type, [plain(p) for p in node.parts]]
    if isinstance(node, Unordered):
        return ["unordered", node.type, [plain(p) for p in node.parts], node.scaled]
    if isinstance(node, Round):
        return ["round", node.type, plain(node.node)]
    return ["opaque", node.name]


def node_from_plain(data: Any) -> Node:
    """Inverse of :func:`plain`."""
    kind = data[0]
    if kind == "chain":
        return Chain(_STEPS[data[1][0]](*data[1][1:]), tuple(Run(*r) for r in data[2]))
    if kind == "join":
        return Join(tuple(node_from_plain(p) for p in data[2]), data[1])
    if kind == "unordered":
        return Unordered(tuple(node_from_plain(p) for p in data[2]), data[1], data[3])
    if kind == "round":
        return Round(node_from_plain(data[2]), data[1])
    if kind == "opaque":
        return Opaque(data[1])
    raise QlabError(f"unknown kind of node {kind!r}")


_STEPS: dict[str, Any] = {"mma": TensorCore, "fma": Fma, "half dot": HalfDot}


def _plain_step(step: Step) -> list[Any]:
    if isinstance(step, TensorCore):
        return ["mma", step.fraction_bits, step.terms, step.zero_exponent, step.accumulator]
    return ["fma", step.accumulator] if isinstance(step, Fma) else ["half dot", step.terms]


def _regions(m: int, n: int, tiles: list[Tile]) -> tuple[Region, ...]:
    """Bands of rows with the same columns below each other become one; columns of one tree side by side, too."""
    row_cuts = sorted({0, m, *(r for t in tiles for r in t.rows)})
    column_cuts = sorted({0, n, *(c for t in tiles for c in t.columns)})
    row_at, column_at = ({v: i for i, v in enumerate(cuts)} for cuts in (row_cuts, column_cuts))
    kinds: dict[tuple[str, Output], int] = {}
    texts: dict[int, str] = {}  # trees are shared by many tiles; each object's text is made once
    found: list[Tile] = []
    grid = np.full((len(row_cuts) - 1, len(column_cuts) - 1), -1)
    for t in tiles:
        text = texts.setdefault(id(t.tree), "") or key(t.tree)
        texts[id(t.tree)] = text
        kind = kinds.setdefault((text, t.output), len(kinds))
        if kind == len(found):
            found.append(t)
        cell = grid[row_at[t.rows[0]] : row_at[t.rows[1]], column_at[t.columns[0]] : column_at[t.columns[1]]]
        if not cell.size or (cell != -1).any() or row_cuts[-1] != m or column_cuts[-1] != n:
            raise QlabError(f"tile rows {t.rows}, columns {t.columns} is empty, overlaps another or leaves the {m} x {n} output")
        cell[:] = kind
    if (grid == -1).any():
        raise QlabError(f"the tiles leave a part of the {m} x {n} output without a sum")
    out: list[Region] = []
    i = 0
    while i < len(grid):
        j = i + 1
        while j < len(grid) and (grid[j] == grid[i]).all():
            j += 1
        ranges: dict[int, list[tuple[int, int]]] = {}
        cuts = [0, *(np.flatnonzero(np.diff(grid[i])) + 1).tolist(), grid.shape[1]]
        for a, b in zip(cuts, cuts[1:], strict=False):
            ranges.setdefault(int(grid[i, a]), []).append((column_cuts[a], column_cuts[b]))
        for kind, columns in ranges.items():
            out.append(Region((row_cuts[i], row_cuts[j]), tuple(columns), found[kind].tree, found[kind].output))
        i = j
    return tuple(out)
