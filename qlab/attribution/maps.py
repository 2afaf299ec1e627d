"""Where a kernel's recipe changes along M, N, K or the number of SMs, read off its recipes without running it.

A row's bits depend on the row of x and on its *row function*: which tree sums each of its columns, under which dequantisation
and output rule. Rows of equal row functions are one batch-invariance class, whatever call they stand in: equal inputs give
equal bits. Rows of different classes may differ. Classes are told apart by the recipes' normal form, which is syntactic.

M counts the rows of one call as the kernel sees them, those that pad a batch among them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import Any, Literal, get_args

from qlab import hardware
from qlab.attribution.forms import Summary, form
from qlab.attribution.map_result import Function, Map, OnGpu, Point, Shape, Strip, ranges
from qlab.backends import dispatch, registry
from qlab.backends.registry import Problem
from qlab.environment import Environment, collect
from qlab.errors import QlabError, UnsupportedError
from qlab.hardware import Gpu
from qlab.recipe import Node, Recipe, key
from qlab.recipes import DEFAULT, Build, recipe
from qlab.recipes.build import type_name

SCHEMA = "qlab.map/1"
Axis = Literal["M", "N", "K", "sms"]
MOST = 1 << 16
"""Values of one map at most, and the largest of them on the axes M and sms."""


def parse_values(text: str, option: str = "--values") -> tuple[int, ...]:
    """``1:512`` (both ends), ``1024:8192:1024`` (with a step) or ``1,16,64``, and mixtures: ascending, each once.

    Raises QlabError naming ``option``.
    """
    found: set[int] = set()
    for part in text.split(","):
        try:
            numbers = [int(n) for n in part.split(":")]
        except ValueError:
            numbers = []
        if not 1 <= len(numbers) <= 3:
            raise QlabError(f"{option} {text!r} is no list of numbers and ranges, for example 1:512 or 1024:8192:1024,14336")
        start, stop, step = (*numbers, *(numbers[0], 1)[len(numbers) - 1 :])
        if min(start, step) < 1 or stop < start:
            raise QlabError(f"{option} {text!r}: {part!r} needs positive numbers, the smaller one first")
        if (stop - start) // step >= MOST:
            raise QlabError(f"{option} {text!r} holds more than {MOST} values; give a larger step, {start}:{stop}:STEP")
        found.update(range(start, stop + 1, step))
    return tuple(sorted(found))


def map_recipes(
    kernels: Sequence[str],
    axis: Axis,
    values: Sequence[int],
    problem: Problem,
    gpu: Gpu,
    build: Build = DEFAULT,
    *,
    environment: Environment | None = None,
    arguments: Mapping[str, str] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Map:
    """The map of ``kernels`` over ``values`` of ``axis``, everything else as ``problem`` and ``gpu`` say.

    ``kernels``: names of the registry, or vLLM's labels, after which ``:vllm`` asks for vLLM's own dispatch where Marlin is
    pinned otherwise (:class:`qlab.engine.path.Path`). A whole-column group follows K. Along N functions are compared over the
    columns that every value has; along K, where no two sums are equal, their forms are: the tree without the lengths of its
    chains. Everything is compared with the smallest M, or on the other axes with the value of ``problem`` or ``gpu`` itself,
    which is added where it is missing. A value at which a kernel does not run is a point with the reason. ``advance`` is called
    after each value of each kernel. Raises QlabError for an unknown axis or kernel and for values that are none.
    """
    if axis not in get_args(Axis):
        raise QlabError(f"there is no map along {axis!r}; along {', '.join(get_args(Axis))} there is")
    chosen = sorted(set(values))
    if not chosen or chosen[0] < 1:
        raise QlabError(f"a map along {axis} needs values, each at least 1")
    base = {"M": chosen[0], "N": problem.N, "K": problem.K, "sms": gpu.sms}[axis]
    chosen = sorted({*chosen, base})
    if axis in ("M", "sms") and chosen[-1] > MOST:
        raise QlabError(f"a map along {axis} ends at {MOST}, before {chosen[-1]}")
    if not kernels or len(set(kernels)) < len(kernels):
        raise QlabError("a map needs at least one kernel, and each kernel once")
    strips = tuple(_Mapper(name, axis, problem, gpu, build, advance).strip(chosen, base) for name in kernels)
    shape = Shape(
        *(problem.M, problem.K, problem.N, problem.group_size, type_name(problem.dtype)),
        *(problem.act_order, problem.symmetric, problem.bias),
    )
    here = environment or collect(details=False)
    return Map(SCHEMA, here, dict(arguments or {}), axis, gpu.key, gpu.sms, shape, tuple(chosen), base, strips)


@dataclass(frozen=True)
class _Part:
    """Columns ``start:stop`` of a row with their sum."""

    start: int
    stop: int
    digest: str
    """Of the tree; along K, of its form."""
    output: str


_Row = tuple[_Part, ...]


@dataclass(frozen=True)
class _Call:
    """What one recipe says, or why there is none."""

    kernel: str
    reason: str
    rules: tuple[str, ...] = ()
    """Of the whole call: the type of its inputs, the dequantisation, the order of rows."""
    bands: tuple[tuple[int, _Row], ...] = ()
    """(number of rows, row) from the first row to the last."""

    @property
    def row(self) -> _Row:
        """Row 0."""
        return self.bands[0][1]


@dataclass
class _Mapper:
    """One kernel or label along one axis. Classes are numbered in order of appearance."""

    name: str
    axis: Axis
    problem: Problem
    gpu: Gpu
    build: Build
    advance: Callable[[], None]
    functions: dict[str, Function] = field(default_factory=dict)
    """By their hashes."""
    sums: dict[str, Summary] = field(default_factory=dict)
    """By the digests of their trees."""
    structures: dict[frozenset[str], int] = field(default_factory=dict)
    """Sets of forms."""

    def __post_init__(self) -> None:
        self.method, colon, self.mode = self.name.partition(":")
        if self.method not in dispatch.LABELS:
            registry.kernel(self.method)
            if colon:
                raise QlabError(f"{self.name!r}: only a label ({', '.join(dispatch.LABELS)}) has a dispatch")
        elif colon and self.mode not in ("pinned", "vllm"):
            raise QlabError(f"{self.name!r}: dispatch {self.mode!r} is neither pinned nor vllm")

    def strip(self, values: Sequence[int], base: int) -> Strip:
        """The kernel over ascending ``values``, compared with ``base``, which is one of them."""
        calls = {}
        for value in values:
            calls[value] = self._call(*self._at(value))
            self.advance()
        width = min((c.row[-1].stop for c in calls.values() if c.bands), default=0)
        if self.axis == "N":
            calls = {v: replace(c, bands=tuple((n, _clip(row, width)) for n, row in c.bands)) for v, c in calls.items()}
        for call in (calls[base], *calls.values()):  # classes of row 0 come first, before those of other rows
            if call.bands:
                self._function(call, call.row)
        points = tuple(self._point(value, call, calls[base]) for value, call in calls.items())
        gpus = tuple(self._on(other) for other in hardware.GPUS) if self.axis == "sms" else ()
        return Strip(self.name, width, tuple(self.functions.values()), points, ranges(points), gpus)

    def _at(self, value: int) -> tuple[Problem, Gpu]:
        p = self.problem
        if self.axis == "K":
            return replace(p, K=value, group_size=value if p.group_size == p.K else p.group_size), self.gpu
        if self.axis == "sms":
            return p, replace(self.gpu, sms=value)
        return replace(p, M=value) if self.axis == "M" else replace(p, N=value), self.gpu

    def _call(self, p: Problem, gpu: Gpu) -> _Call:
        kernel, reason, r = self._recipe(p, gpu)
        if r is None:
            return _Call("", reason)
        digests: dict[int, str] = {}  # many regions share a tree
        bands = []
        for (top, bottom), regions in groupby(r.regions, key=lambda region: region.rows):
            parts = []
            for region in regions:
                if id(region.tree) not in digests:
                    digests[id(region.tree)] = self._digest(region.tree)
                digest, output = digests[id(region.tree)], str(region.output)
                parts += [_Part(a, b, digest, output) for a, b in region.columns]
            bands.append((bottom - top, tuple(sorted(parts, key=lambda part: part.start))))
        return _Call(kernel, reason, (r.dtype, r.weights, r.rows), tuple(bands))

    def _digest(self, tree: Node) -> str:
        digest = _sha256(json.dumps(form(tree)) if self.axis == "K" else key(tree))
        if digest not in self.sums:
            self.sums[digest] = Summary.of(tree)
        return digest

    def _recipe(self, p: Problem, gpu: Gpu) -> tuple[str, str, Recipe | None]:
        """The kernel that runs, why, and its recipe; none with the reason."""
        if p.K % p.group_size:
            return "", f"K={p.K} is no multiple of the group size {p.group_size}", None
        kernel, reason = self.method, ""
        if self.method in dispatch.LABELS:
            found = dispatch.dispatch(self.method, gpu, p, pin_marlin=self.mode != "vllm")
            kernel, reason = found.kernel, found.reason
        try:
            return (kernel, reason, recipe(kernel, p, gpu, self.build)) if kernel else ("", reason, None)
        except UnsupportedError as e:
            return "", str(e), None

    def _point(self, value: int, call: _Call, base: _Call) -> Point:
        if not call.bands:
            return Point(value, "", call.reason)
        rows: list[tuple[int, int]] = []
        for count, row in call.bands:
            function = self._function(call, row)
            if rows and rows[-1][1] == function:
                count += rows.pop()[0]
            rows.append((count, function))
        structure = frozenset(self.sums[part.digest].form for _, row in call.bands for part in row)
        point = Point(
            value,
            call.kernel,
            call.reason,
            function=rows[0][1],
            chains=self._chains(call.row),
            structure=self.structures.setdefault(structure, len(self.structures)),
            rows=tuple(rows) if self.axis == "M" else (),
        )
        if not base.bands:
            return point
        first = self._function(base, base.row)
        states = {list(self.functions.values())[f].state for f in (point.function, first)}
        same = point.function == first if states == {"fixed"} and self.axis != "K" else None
        return replace(point, same=same, changed=None if "opaque" in states else _changed(base, call))

    def _function(self, call: _Call, row: _Row) -> int:
        """The number of a row function; a new one where no row before had it."""
        sums = [self.sums[digest] for digest in dict.fromkeys(part.digest for part in row)]
        opaque = "; ".join(sorted({s.opaque for s in sums if s.opaque}))
        different = sorted({(part.digest, part.output) for part in row})
        parts: Any = different if self.axis == "K" else [(p.start, p.stop, p.digest, p.output) for p in row]
        # Nothing says that two kernels' opaque sums are one.
        hash = _sha256(json.dumps([call.rules, call.kernel if opaque else "", parts]))
        if hash not in self.functions:
            state = "opaque" if opaque else "atomics" if any(s.atomics for s in sums) else "fixed"
            chains = [s.chains for s in sums]
            self.functions[hash] = Function(call.kernel, hash, state, (min(chains), max(chains)), len(different), opaque)
        return list(self.functions).index(hash)

    def _chains(self, row: _Row) -> tuple[tuple[int, int], ...]:
        """(chains, columns that are summed from so many), ascending."""
        found: dict[int, int] = {}
        for part in row:
            count = self.sums[part.digest].chains
            found[count] = found.get(count, 0) + part.stop - part.start
        return tuple(sorted(found.items()))

    def _on(self, other: Gpu) -> OnGpu:
        """Another GPU of the table: its number of SMs on the map's tensor core, and its own whole recipe."""
        with_its_sms = self._call(self.problem, replace(self.gpu, sms=other.sms))
        function = self._function(with_its_sms, with_its_sms.row) if with_its_sms.bands else -1
        kernel, reason, own = self._recipe(self.problem, other)
        return OnGpu(other.key, other.sms, kernel, reason, function, own.hash if own else "")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _clip(row: _Row, width: int) -> _Row:
    return tuple(replace(p, stop=min(p.stop, width)) for p in row if p.start < width)


def _changed(base: _Call, call: _Call) -> float:
    """Share of row 0's columns whose sum, or its form, or a rule differs."""
    if base.rules != call.rules:
        return 1.0
    a, b = list(base.row), list(call.row)
    stop = min(a[-1].stop, b[-1].stop)
    differing, i, j = 0, 0, 0
    for start, end in pairwise(sorted({*(p.start for p in (*a, *b) if p.start < stop), stop})):
        i += a[i].stop <= start
        j += b[j].stop <= start
        differing += (end - start) * ((a[i].digest, a[i].output) != (b[j].digest, b[j].output))
    return differing / stop
