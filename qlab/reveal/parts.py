"""A tree of sums read as chains and additions, and, once their types are known, as a recipe's node."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlab import hardware
from qlab.recipe import Chain, Fma, HalfDot, Node, Opaque, Step, TensorCore, Type, chain, join, rounded, value_type
from qlab.reveal.topology import Tree, first, leaves


@dataclass
class Walk:
    """One accumulator that takes the leaves of one step after the other."""

    steps: list[tuple[int, ...]]
    accumulator: Type | None = None
    """None until measured; a single step does not show it."""
    leaves_as: Type | None = None
    """Type in which the value reaches the addition above; None at the root."""

    @property
    def terms(self) -> int:
        return len(self.steps[0])


@dataclass
class Add:
    """Two parts added."""

    parts: tuple[Part, Part]
    type: Type = "fp32"
    leaves_as: Type | None = None


@dataclass
class Unknown:
    """A fused sum that takes more than leaves and one accumulator."""

    tree: Tree
    leaves_as: Type | None = None


Part = Walk | Add | Unknown
UNCUT = 40
"""F that stands for a fused sum in which nothing was seen to be cut."""


@dataclass(frozen=True)
class Core:
    """What the probes say of a tensor core's step."""

    fraction_bits: int | None
    """F; None where nothing is cut within the range of the probes."""
    terms: int
    """L."""
    cut: str
    """What happens to the bits below the cut: ``toward zero`` or ``to nearest``."""
    rounding: str
    """How the accumulator is rounded; empty where every chain has one step only."""


def parse(tree: Tree) -> Part:
    """Chains as long as they can be, additions above them."""
    spine: list[tuple[int, ...]] = []
    while not isinstance(tree, int) and len(sums := [c for c in tree if not isinstance(c, int)]) == 1:
        spine.append(tuple(sorted(c for c in tree if isinstance(c, int))))
        tree = sums[0]
    part = _bottom(tree)
    for step in reversed(spine):
        if isinstance(part, Walk) and part.terms == len(step):
            part.steps.append(step)
        elif len(step) == 1:
            part = Add((part, Walk([step])))
        else:
            part = Unknown((*leaves_of(part), *step))
    return part


def _bottom(tree: Tree) -> Part:
    if isinstance(tree, int):
        return Walk([(tree,)])
    mine = tuple(sorted(c for c in tree if isinstance(c, int)))
    sums = [c for c in tree if not isinstance(c, int)]
    if not sums:
        return Walk([(k,) for k in mine]) if len(mine) == 2 else Walk([mine])
    if len(sums) == 2 and not mine:
        return Add((parse(sums[0]), parse(sums[1])))
    return Unknown(tree)


def leaves_of(part: Part) -> Iterator[int]:
    if isinstance(part, Walk):
        for step in part.steps:
            yield from step
    elif isinstance(part, Add):
        for p in part.parts:
            yield from leaves_of(p)
    else:
        yield from leaves(part.tree)


def any_leaf(part: Part) -> int:
    while isinstance(part, Add):
        part = part.parts[0]
    return part.steps[0][0] if isinstance(part, Walk) else first(part.tree)


def wide(part: Part) -> bool:
    """Whether two leaves of a part are known to be added, so that its value can need more bits than a leaf's."""
    return isinstance(part, Add) or (isinstance(part, Walk) and len(part.steps) * part.terms > 1)


def last_pair(part: Part) -> tuple[int, int]:
    """Two leaves that meet as late as a part's leaves can: in an addition's two parts, or in a chain's last step."""
    if isinstance(part, Add):
        return any_leaf(part.parts[0]), any_leaf(part.parts[1])
    assert isinstance(part, Walk)
    last = part.steps[-1]
    return (last[0], last[1]) if len(last) > 1 else (part.steps[-2][0], last[0])


def visit(part: Part, outside: int | None) -> Iterator[tuple[Part, int | None]]:
    """Every part, those above first, with a leaf that is added to it next; None at the root."""
    yield part, outside
    if isinstance(part, Add):
        a, b = part.parts
        yield from visit(a, any_leaf(b))
        yield from visit(b, any_leaf(a))


def to_node(part: Part, cores: Sequence[Core]) -> Node:
    """A measured part as a recipe's node, in normal form. ``cores`` is one for all chains, or each chain's own as visited."""
    own = iter(cores) if len(cores) > 1 else itertools.repeat(cores[0] if cores else None)
    return _node(part, own)


def _node(part: Part, cores: Iterator[Core | None]) -> Node:
    node: Node
    if isinstance(part, Unknown):
        every = sorted(leaves(part.tree))
        node = Opaque(f"a fused sum of partial sums, over {len(every)} k from {every[0]} to {every[-1]}")
    elif isinstance(part, Walk):
        node = chain(step_of(part, next(cores) if part.terms > 2 else None), [k for step in part.steps for k in step])
    elif (dots := half_dots(part)) is not None:
        node = Chain(HalfDot(), chain(Fma(), dots).walk)
    else:
        parts = [_node(p, cores) for p in part.parts]
        if part.type != "fp32" and any(value_type(p) not in (part.type, None) for p in parts):
            node = Opaque(f"an addition in {part.type} of wider sums, over {len(list(leaves_of(part)))} k")
        else:
            node = join(parts, part.type)
    return rounded(node, part.leaves_as or "fp32")


def step_of(walk: Walk, core: Core | None) -> Step:
    accumulator = walk.accumulator or "fp32"
    if walk.terms == 1:
        return Fma(accumulator)
    f = UNCUT if core is None or core.fraction_bits is None else core.fraction_bits
    # With fp32 accumulators no fp16 or bf16 input shows the exponent of a zero, so it is that of the core with this F.
    known = next((s for s in (hardware.VOLTA, hardware.AMPERE, hardware.HOPPER) if s.fraction_bits == f), hardware.HOPPER)
    return TensorCore(f, walk.terms, TensorCore.of(known, accumulator).zero_exponent, accumulator)


def half_dots(part: Part) -> list[int] | None:
    """The k of a chain of ExLlama's dot products, each two fp16 chains over even and odd k of eight, added up in fp32."""
    later: list[list[int]] = []
    while (here := _dot(part)) is None:
        if not isinstance(part, Add) or part.type != "fp32":
            return None
        a, b = part.parts
        if (dot := _dot(b)) is None:
            a, b = b, a
            if (dot := _dot(b)) is None:
                return None
        later.append(dot)
        part = a
    dots = [here, *reversed(later)]
    dots[:2] = sorted(dots[:2])
    return [k for dot in dots for k in dot]


def _dot(part: Part) -> list[int] | None:
    if not isinstance(part, Add) or not all(isinstance(p, Walk) and p.accumulator == "fp16" for p in part.parts):
        return None
    chains = sorted([k for (k,) in p.steps] if isinstance(p, Walk) and p.terms == 1 else [] for p in part.parts)
    start = chains[0][0] if chains[0] else 0
    if part.type != "fp32" or chains != [[start + i for i in range(j, 8, 2)] for j in (0, 1)]:
        return None
    return list(range(start, start + 8))
