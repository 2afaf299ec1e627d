"""What an INT4 GEMM computes, as data: a recipe.

A recipe says, for each region of the output, in which order and in which arithmetic the products ``x[m, k] * w[k, n]`` are
summed. Its tree has chains for leaves (one accumulator that walks over k), and joins, roundings, unordered sums (atomics)
and opaque parts (cuBLAS) above them. A dequantisation rule says what ``w`` is, an output rule what happens to the sum.

Recipes are built in a normal form, so that equal functions have equal hashes: sums are commutative but not associative, the
order of k inside one fused sum does not count, roundings to a type that holds the value already vanish, and neighbouring
rectangles with one tree are one. The normal form is syntactic beyond that: it finds no equality that rests on the numbers. It
keeps apart what differs in the sign of a zero alone: a sum left to atomics starts at +0 and never gives -0, a join may.

Vocabulary after FPRev (arXiv 2411.00442) for trees, MMA-Sim (arXiv 2511.10909) for the step of a tensor core.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from qlab import hardware
from qlab.errors import QlabError

Type = Literal["fp32", "fp16", "bf16"]
TYPES: tuple[Type, ...] = ("fp32", "fp16", "bf16")
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
    """Parts added to +0 in an order that is not fixed (atomics), each addition rounded in ``type``; two have one result."""

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
    if step.terms < 1 or step.accumulator not in ("fp32", "fp16") or (isinstance(step, HalfDot) and step.terms % 2):
        raise QlabError(f"no step of a chain: {step!r}")
    if len(k) % step.terms:
        raise QlabError(f"a chain over {len(k)} k does not divide into steps of {step.terms}")
    if isinstance(step, TensorCore):
        k = np.sort(k.reshape(-1, step.terms), axis=1).ravel()
    return Chain(step, fold(k))


def zero(node: Node) -> Chain:
    """+0: a chain over nothing, of a step that the node has."""
    return Chain(next(n.step for n in nodes(node) if isinstance(n, Chain)), ())


def join(parts: Sequence[Node], type: Type = "fp32") -> Node:
    """A left fold in normal form: one part is itself, each addition commutes, a leading join of the same type is flattened."""
    total, *rest = _addends(parts, type)
    for part in rest:
        # a + b = b + a: a join goes first, so that it can be flattened; of two the longer one; then the smaller text.
        leads = [len(n.parts) if isinstance(n, Join) and n.type == type else 0 for n in (total, part)]
        if leads[1] > leads[0] or (leads[1] == leads[0] and key(part) < key(total)):
            total, part = part, total
        flat = total.parts if isinstance(total, Join) and total.type == type else (total,)
        total = Join((*flat, part), type)
    return total


def rounded(node: Node, type: Type) -> Node:
    """The node rounded; itself where its values are of that type, or of one that it holds, already."""
    return node if value_type(node) in (type, None) or type == "fp32" else Round(node, type)


def unordered(parts: Sequence[Node], type: Type, *, scaled: bool = False) -> Unordered:
    """Atomics in normal form: the parts sorted."""
    return Unordered(tuple(sorted(_addends(parts, type), key=key)), type, scaled)


def _addends(parts: Sequence[Node], type: Type) -> list[Node]:
    """The parts of a sum. fp16 and bf16 sums take values of their own type, so that one part alone needs no rounding."""
    if not parts or type not in TYPES or (type != "fp32" and any(value_type(p) not in (type, None) for p in parts)):
        raise QlabError(f"a sum in {type} needs parts, and in fp16 or bf16 parts rounded to that type")
    return list(parts)


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

    def __post_init__(self) -> None:
        if self.bias not in ("none", "added", "fused") or (self.bias == "fused" and not self.scale):
            raise QlabError(f"no output rule: bias {self.bias!r} with scale {self.scale}; only a scale can fuse with a bias")

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
        if dtype not in ("fp16", "bf16") or weights not in WEIGHTS or rows not in ("natural", "sorted"):
            raise QlabError(f"no recipe has dtype {dtype!r}, weights {weights!r} and rows {rows!r}")
        found = [replace(t, tree=t.tree.node) if isinstance(t.tree, Round) and t.tree.type == dtype else t for t in tiles]
        for tree in {id(t.tree): t.tree for t in found}.values():
            _check(tree, k, dtype)
        return cls(m, k, n, dtype, weights, rows, _regions(m, n, found))

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
            [list(r.rows), [list(c) for c in r.columns], trees.setdefault(key(r.tree), len(trees)), list(astuple(r.output))]
            for r in self.regions
        ]
        head = {"schema": SCHEMA, "shape": [self.M, self.K, self.N], "dtype": self.dtype, "weights": self.weights}
        return head | {"rows": self.rows, "trees": [json.loads(t) for t in trees], "regions": regions}

    @classmethod
    def from_plain(cls, data: Any) -> Recipe:
        """Inverse of :meth:`plain`; trees not in normal form are brought into it. Raises QlabError for what is no recipe."""
        try:
            if data["schema"] != SCHEMA:
                raise QlabError(f"holds {data['schema']!r}, not {SCHEMA!r}")
            trees = dict(enumerate(node_from_plain(t) for t in data["trees"]))
            tiles = [
                Tile(_whole(rows, 2), _whole(c, 2), trees[tree], Output(_flag(scale), bias))
                for rows, columns, tree, (scale, bias) in data["regions"]
                for c in columns
            ]
            m, k, n = _whole(data["shape"], 3)
            return cls.of(m, k, n, data["dtype"], tiles, weights=data["weights"], rows=data["rows"])
        except (KeyError, IndexError, TypeError, ValueError, RecursionError) as e:
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
        return chain(_step(data[1]), unfold(tuple(_run(r) for r in data[2])))
    if kind == "join":
        return join([node_from_plain(p) for p in data[2]], data[1])
    if kind == "unordered":
        return unordered([node_from_plain(p) for p in data[2]], data[1], scaled=_flag(data[3]))
    if kind == "round" and data[1] in TYPES:
        return rounded(node_from_plain(data[2]), data[1])
    if kind == "opaque" and isinstance(data[1], str):
        return Opaque(data[1])
    raise QlabError(f"no node of a recipe: {str(data)[:80]}")


def _run(data: Any) -> Run:
    run = Run(*_whole(data, 4))
    last = run.start + run.stride * (run.count - 1)
    largest = max(run.start, last, abs(run.stride), run.length * run.count)
    if min(run.start, last, run.length - 1, run.count - 1) < 0 or largest >> 24:
        raise QlabError(f"no run of k: {data}")
    return run


def _whole(data: Any, count: int) -> Any:
    """The data as a tuple of ints."""
    if len(data) != count or any(type(v) is not int for v in data):
        raise QlabError(f"not {count} whole numbers: {str(data)[:80]}")
    return tuple(data)


def _flag(data: Any) -> bool:
    if type(data) is not bool:
        raise QlabError(f"neither true nor false: {str(data)[:80]}")
    return data


_STEPS: dict[str, tuple[Any, int]] = {"mma": (TensorCore, 3), "fma": (Fma, 0), "half dot": (HalfDot, 1)}


def _step(data: Any) -> Step:
    kind, numbers = _STEPS[data[0]]
    if max(map(abs, _whole([v for v in data[1:] if v not in TYPES], numbers)), default=0) >> 10:
        raise QlabError(f"no step of a chain: {data}")
    return cast(Step, kind(*data[1:]))


def _plain_step(step: Step) -> list[Any]:
    if isinstance(step, TensorCore):
        return ["mma", step.fraction_bits, step.terms, step.zero_exponent, step.accumulator]
    return ["fma", step.accumulator] if isinstance(step, Fma) else ["half dot", step.terms]


def _check(tree: Node, k: int, dtype: Type) -> None:
    for n in nodes(tree):
        if isinstance(n, Chain):
            order = unfold(n.walk)
            if order.size and (order.min() < 0 or order.max() >= k):
                raise QlabError(f"{n} leaves the rows 0:{k} of the weight")
            if isinstance(n.step, TensorCore) and (dtype, n.step.accumulator) == ("bf16", "fp16"):
                raise QlabError("no tensor core adds products of bf16 numbers in fp16")


def _regions(m: int, n: int, tiles: list[Tile]) -> tuple[Region, ...]:
    """Bands of rows with the same columns below each other become one; columns of one tree side by side, too."""
    row_cuts = sorted({0, m, *(r for t in tiles for r in t.rows)})
    column_cuts = sorted({0, n, *(c for t in tiles for c in t.columns)})
    row_at, column_at = ({v: i for i, v in enumerate(cuts)} for cuts in (row_cuts, column_cuts))
    texts = {i: key(tree) for i, tree in {id(t.tree): t.tree for t in tiles}.items()}  # many tiles share a tree
    kinds: dict[tuple[str, Output], int] = {}
    found: list[Tile] = []
    grid = np.full((len(row_cuts) - 1, len(column_cuts) - 1), -1)
    for t in tiles:
        (top, bottom), (left, right) = t.rows, t.columns
        where = f"the tile of rows {top}:{bottom}, columns {left}:{right}"
        if not (0 <= top < bottom <= m and 0 <= left < right <= n):
            raise QlabError(f"{where} is empty or leaves the {m} x {n} output")
        kind = kinds.setdefault((texts[id(t.tree)], t.output), len(kinds))
        if kind == len(found):
            found.append(t)
        cell = grid[row_at[top] : row_at[bottom], column_at[left] : column_at[right]]
        if (cell != -1).any():
            raise QlabError(f"{where} overlaps another")
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
        for a, b in pairwise(cuts):
            ranges.setdefault(int(grid[i, a]), []).append((column_cuts[a], column_cuts[b]))
        rows = row_cuts[i], row_cuts[j]
        out += [Region(rows, tuple(columns), found[kind].tree, found[kind].output) for kind, columns in ranges.items()]
        i = j
    return tuple(out)
