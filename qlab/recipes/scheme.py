"""A kernel's recipe in named parts: what a family says of itself, and what attribution swaps.

A scheme is a recipe before its sums are written out. Each field is one decision of a kernel, with a value of its own, so that
a scheme with some fields from one kernel and the rest from another is again a scheme: a hybrid. :func:`assemble` writes out
the sums of either, or says which parts do not fit together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from qlab.backends.registry import Problem
from qlab.errors import QlabError
from qlab.hardware import Gpu
from qlab.recipe import (
    WEIGHTS,
    Chain,
    Fma,
    HalfDot,
    Node,
    Opaque,
    Recipe,
    Rows,
    Step,
    TensorCore,
    Tile,
    Type,
    Walk,
    Weights,
    chain,
    join,
    rounded,
    unfold,
    unordered,
    zero,
)
from qlab.recipes.build import type_name
from qlab.recipes.rules import CHUNK, Bias, Cut, OneChain, PlainBias, Ranges, Span, Warps, dealt_to_lanes, dot_order, span

Place = Literal["weight", "step", "output"]
"""Where the scale comes in: multiplied into each weight, behind each fp16 dot, or onto the rounded sum of a whole column."""
PLACES = {"weight": "scale in the weight", "step": "scale behind each dot", "output": "scale on the sum"}
Order = Literal["ascending", "descending", "torch.sum", "atomics", "atomics where allowed"]
"""How pieces are joined: from the first to the last, from the last to the first, as PyTorch's ``sum(0)`` does, or by atomics
onto zero. ``where allowed``: only several pieces, and where the cut permits; elsewhere descending, in fp32, not rounded."""
OPAQUE = "opaque: "
"""What the unit of a sum that qlab does not model begins with; its name follows."""
NATURAL = 2
"""kWidth that leaves the k of a dot in their order."""
ONE_CHAIN, NO_BIAS = OneChain(), PlainBias()
ACCUMULATORS = 4
"""Accumulators of a thread in PyTorch's reduction (vt0 in ATen/native/cuda/Reduce.cuh)."""


@dataclass(frozen=True)
class Partial:
    """What is rounded, and to which type, before it is added to something else."""

    what: Literal["none", "pieces", "total"] = "none"
    """``pieces``: the sum of each piece; ``total``: the running total each time it is handed on."""
    type: Type = "fp32"

    def __str__(self) -> str:
        if self.what == "none":
            return "not rounded"
        return f"{'each piece' if self.what == 'pieces' else 'the running total'} rounded to {self.type}"


UNROUNDED = Partial()


@dataclass(frozen=True)
class Scheme:
    """What one call computes, part by part. The defaults are a tensor-core kernel with K in one piece."""

    fraction_bits: int
    """F of the GPU's tensor core, whether or not the unit is one: a hybrid may be."""
    zero_exponents: tuple[int, int]
    """Exponent of a zero term for an fp32 and an fp16 accumulator; it goes with F."""
    terms: int
    """L of the GPU's tensor core."""
    sms: int
    """Streaming multiprocessors."""
    cut: Cut
    """Which outputs share which pieces of K."""
    weights: Weights = "rounded"
    """What a weight is when it is multiplied."""
    rows: Rows = "natural"
    """The order of the weight's rows along K; ``sorted`` by group under act-order."""
    scale: Place = "weight"
    unit: str = "tensor core"
    """What multiplies: ``tensor core``, ``fma``, ``half dot`` (ExLlama's, see qlab.recipe.HalfDot) or ``opaque: NAME``."""
    accumulator: Type = "fp32"
    """Of a tensor core or fma; the fp16 dot's is fp32."""
    k_width: int = NATURAL
    """kWidth of a dot of 32 rows, which orders its k (qlab.recipes.rules.dot_order)."""
    warps: Warps = ONE_CHAIN
    """How a piece's k are dealt to warp-level accumulators."""
    lanes: int = 1
    """Lanes, a power of two, that each multiply and sum pairs of a warp's k in turn; their sums are joined pairwise in fp32."""
    partial: Partial = UNROUNDED
    order: Order = "ascending"
    type: Type = "fp32"
    """Of the joins of pieces."""
    bias: Bias = NO_BIAS

    @classmethod
    def on(cls, gpu: Gpu, cut: Cut) -> Scheme:
        """The defaults on ``gpu``, with K cut by ``cut``."""
        s = gpu.step
        return cls(s.fraction_bits, (s.zero_exponent, s.zero_exponent_fp16), s.terms, gpu.sms, cut)

    @classmethod
    def opaque(cls, gpu: Gpu, problem: Problem, name: str) -> Scheme:
        """A sum that qlab does not model, named by library, build and algorithm."""
        whole = Ranges.whole(problem.M, problem.K, problem.N)
        s = cls.on(gpu, whole)
        return cls(s.fraction_bits, s.zero_exponents, s.terms, s.sms, whole, unit=f"{OPAQUE}{name}")

    @property
    def step(self) -> Step:
        """The step of every chain. Raises QlabError for an unknown unit."""
        if self.unit == "tensor core":
            zero_exponent = self.zero_exponents[self.accumulator == "fp16"]
            return TensorCore(self.fraction_bits, self.terms, zero_exponent, self.accumulator)
        if self.unit == "fma":
            return Fma(self.accumulator)
        if self.unit == "half dot":
            return HalfDot()
        raise QlabError(f"no unit {self.unit!r} multiplies; known: tensor core, fma, half dot")


def misfit(s: Scheme, problem: Problem) -> str:
    """Why the parts of a scheme do not fit together, one sentence; empty where they do."""
    return next(_misfits(s, problem), "")


def _misfits(s: Scheme, p: Problem) -> Iterator[str]:
    if s.unit.startswith(OPAQUE):
        if s.warps != ONE_CHAIN or s.cut != Ranges.whole(p.M, p.K, p.N):
            yield f"{s.unit.removeprefix(OPAQUE)} is not modelled, so that its sum cannot be cut into other pieces"
        return
    word = WEIGHTS[s.weights]
    if s.weights != "integer" and s.scale != "weight":
        yield f"a weight {word} holds its scale, and a {PLACES[s.scale]} would multiply by it once more"
    if s.weights == "integer" and s.scale == "weight":
        yield f"nothing would multiply by the scale: the weight is {word}, and neither the step nor the output is to be scaled"
    if (s.scale == "step") != (s.unit == "half dot"):
        yield f"a scale behind each fp16 dot needs the fp16 dot and the other way round: here {s.unit}, {PLACES[s.scale]}"
    if s.scale == "output" and p.group_size != p.K:
        yield f"the output can be scaled where a column has one scale, and this weight has groups of {p.group_size}"
    if s.unit == "half dot" and (p.act_order and s.rows != "sorted" and p.group_size != p.K):
        yield "an fp16 dot has one scale for its 8 rows, and under act-order rows of a group lie together only when sorted"
    if s.unit == "half dot" and p.group_size != p.K and p.group_size % CHUNK:
        yield f"an fp16 dot has one scale for its 8 rows: groups of {p.group_size} are no multiple of {CHUNK}"
    if s.unit == "tensor core" and s.accumulator == "fp16" and type_name(p.dtype) == "bf16":
        yield "no tensor core adds products of bf16 numbers in fp16"
    if s.type != "fp32" and s.partial != Partial("pieces", s.type):
        yield f"a join in {s.type} takes parts that are rounded to {s.type}, and here it gets: {s.partial}"
    if s.order.startswith("atomics") and s.partial.what == "total":
        yield "atomics add to memory, in the type of the joins: there is no running total to round"
    if s.order.startswith("atomics") and s.bias != NO_BIAS:
        yield "a bias that one of several atomic additions carries is not modelled"
    if s.lanes > 1 and s.unit != "fma":
        yield f"lanes that each sum k of their own multiply by fma, and here {s.unit} multiplies"
    if s.k_width != NATURAL and p.K % CHUNK:
        yield f"K={p.K} ends inside a dot of {CHUNK} rows, whose k kWidth {s.k_width} would permute"
    if p.K % s.step.terms:
        yield f"K={p.K} ends inside a fused sum of {s.step.terms} terms, which a chain cannot express"


def assemble(scheme: Scheme, problem: Problem) -> Recipe:
    """The recipe of a scheme, with its sums written out. Raises QlabError where its parts do not fit together (misfit)."""
    if why := misfit(scheme, problem):
        raise QlabError(why)
    m, k, n = problem.M, problem.K, problem.N
    if scheme.unit.startswith(OPAQUE):
        tiles = [Tile((0, m), (0, n), Opaque(scheme.unit.removeprefix(OPAQUE)))]
    else:
        tiles = list(_tiles(scheme))
    return Recipe.of(m, k, n, type_name(problem.dtype), tiles, weights=scheme.weights, rows=scheme.rows)


def _tiles(s: Scheme) -> Iterator[Tile]:
    """Every rectangle of the output with its sum; equal sums are one object."""
    bands, step = s.warps.bands(s.sms), s.step
    sums: dict[tuple[Walk, int], Node] = {}
    trees: dict[tuple[tuple[Walk, ...], int, bool], Node] = {}
    for area in s.cut.areas(s.sms):
        for rows, warps in _banded(area.rows, bands):
            atomics = s.order == "atomics" or (s.order == "atomics where allowed" and area.atomics and len(area.pieces) > 1)
            at = (area.pieces, warps, atomics)
            if at not in trees:
                for walk in area.pieces:
                    if (walk, warps) not in sums:
                        sums[walk, warps] = piece_sum(step, walk, warps, s.k_width, s.lanes)
                trees[at] = joined([sums[walk, warps] for walk in area.pieces], s, atomics)
            scale = s.scale == "output" and not atomics  # atomics scale each addend
            yield from s.bias.tiles(rows, area.columns, trees[at], scale)


def _banded(rows: Span, bands: tuple[tuple[int, int, int], ...]) -> list[tuple[Span, int]]:
    """The rows of each band, and how many accumulators a piece has there."""
    if not bands:
        return [(rows, 1)]
    cut = [((max(rows[0], start), min(rows[1], stop)), count) for start, stop, count in bands]
    return [((top, bottom), count) for (top, bottom), count in cut if top < bottom]


@lru_cache(maxsize=1024)
def piece_sum(step: Step, walk: Walk, warps: int = 1, k_width: int = NATURAL, lanes: int = 1) -> Node:
    """One piece's sum: a chain for each warp over its turns of 32 k, joined ``acc0 + (acc1 + (acc3 + acc2))`` in fp32.

    With several lanes a warp's sum is joined from theirs, ``(lane0 + lane1) + (lane2 + lane3)``.
    """
    if warps == 1 and k_width == NATURAL and lanes == 1:
        return _walked(step, walk)
    order = unfold(walk)
    whole = len(order) // CHUNK * CHUNK
    chunks, rest = order[:whole].reshape(-1, CHUNK), order[whole:]
    if k_width != NATURAL:
        chunks = chunks[:, dot_order(CHUNK, k_width)]
    dealt = [chunks[warp::warps].ravel() for warp in range(warps)]
    if len(rest):  # the end of K
        last = len(chunks) % warps
        dealt[last] = np.r_[dealt[last], rest]
    parts = [_in_pairs([chain(step, own) for own in dealt_to_lanes(order, lanes)]) for order in dealt]
    return join(parts[::-1])


def _in_pairs(sums: Sequence[Node]) -> Node:
    """``(sums[0] + sums[1]) + (sums[2] + sums[3])``, and so on."""
    while len(sums) > 1:
        sums = [join(sums[i : i + 2]) for i in range(0, len(sums), 2)]
    return sums[0]


def _walked(step: Step, walk: Walk) -> Node:
    """`chain` over a walk; stretches of whole steps are in normal form as they are."""
    if len(walk) == 1 and walk[0].length % step.terms == 0:
        run = walk[0]
        if run.count == 1:
            return Chain(step, span(run.start, run.start + run.length))
        if run.stride != run.length:
            return Chain(step, walk)
    return chain(step, unfold(walk))


def joined(sums: Sequence[Node], s: Scheme, atomics: bool) -> Node:
    """The pieces' sums, given from the first piece to the last, as ``s`` rounds and joins them."""
    if s.order == "atomics where allowed" and not atomics:
        return join(sums[::-1])
    parts = [rounded(n, s.partial.type) for n in sums] if s.partial.what == "pieces" else list(sums)
    if atomics:
        return unordered(parts, s.type, scaled=s.scale == "output")
    handed: Type = s.partial.type if s.partial.what == "total" else "fp32"
    if s.order == "torch.sum":
        return torch_sum(parts, s.type, handed)
    return _fold(parts[::-1] if s.order == "descending" else parts, s.type, handed)


def torch_sum(partials: Sequence[Node], type: Type = "fp32", handed: Type = "fp32") -> Node:
    """PyTorch's ``sum(0)`` over a few matrices: i, i + 4, ... in turn, then the four sums in turn. Totals go on as ``handed``.

    Its accumulators start at +0, which shows where every partial sum is -0. One +0 anywhere does what four at the start do.
    """
    lanes = [_fold(partials[i::ACCUMULATORS], type, handed) for i in range(min(ACCUMULATORS, len(partials)))]
    total = _fold([rounded(lane, handed) for lane in lanes], type, handed)
    return join([total, rounded(zero(partials[0]), type)], type)


def _fold(parts: Sequence[Node], type: Type, handed: Type) -> Node:
    """``((parts[0] + parts[1]) + parts[2]) + ...``, the total rounded to ``handed`` each time before something is added."""
    if handed == "fp32":
        return join(parts, type)
    total = parts[0]
    for part in parts[1:]:
        total = join((rounded(total, handed), part), type)
    return total
