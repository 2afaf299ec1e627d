"""Faults of arithmetic, planted in the parts of a kernel's scheme (qlab.recipes.scheme) or in how its pieces are joined.

The tool that is to name them never sees a scheme: it rewrites trees. Each plant says what it did in the tool's words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from qlab.attribution.fault import Fault
from qlab.attribution.faults_recipe import OTHER_SMS
from qlab.backends.registry import Problem
from qlab.errors import QlabError
from qlab.hardware import HOPPER
from qlab.recipe import Node, Recipe, Type, Walk, fold, join, rounded, unfold
from qlab.recipes import assemble
from qlab.recipes.awq_gemm import Interleaved
from qlab.recipes.build import type_name
from qlab.recipes.rules import CHUNK, Area, Cut, PlainBias
from qlab.recipes.scheme import NATURAL, Partial, Scheme, piece_sum


@dataclass(frozen=True)
class Plan:
    """A kernel to be: its scheme, and how its pieces are joined where no scheme says it."""

    scheme: Scheme
    problem: Problem
    join: Literal["", "pairs", "swapped"] = ""

    def recipe(self) -> Recipe:
        """Raises QlabError where the parts do not fit together."""
        if not self.join:
            return assemble(self.scheme, self.problem)
        s, p = self.scheme, self.problem
        if s.bias != PlainBias() or s.order not in ("ascending", "descending") or s.partial.what == "total":
            raise QlabError("only plain joins can be written out otherwise")
        tiles = []
        for area in s.cut.areas(s.sms):
            bands = s.warps.bands(s.sms) or ((0, p.M, 1),)
            for start, stop, warps in bands:
                rows = max(area.rows[0], start), min(area.rows[1], stop)
                if rows[0] < rows[1]:
                    sums = [piece_sum(s.step, walk, warps, s.k_width, s.lanes) for walk in area.pieces]
                    tree = self._joined([rounded(n, s.partial.type) for n in sums])
                    tiles += list(s.bias.tiles(rows, area.columns, tree, s.scale == "output"))
        return Recipe.of(p.M, p.K, p.N, type_name(p.dtype), tiles, weights=s.weights, rows=s.rows)

    def _joined(self, sums: list[Node]) -> Node:
        kind = self.scheme.type
        if len(sums) < 3:
            raise QlabError("two parts have one order")
        if self.join == "pairs":
            while len(sums) > 1:
                sums = [join(sums[i : i + 2], kind) for i in range(0, len(sums), 2)]
            return sums[0]
        order = sums[::-1] if self.scheme.order == "descending" else sums
        return join([*order[:-2], order[-1], order[-2]], kind)


@dataclass(frozen=True)
class Recut(Cut):
    """Another cut with its pieces changed."""

    inner: Cut
    change: Callable[[tuple[Walk, ...]], tuple[Walk, ...]]

    def areas(self, sms: int) -> Iterator[Area]:
        for a in self.inner.areas(sms):
            yield a._replace(pieces=self.change(a.pieces))

    def text(self, sms: int) -> str:
        return f"{self.inner.text(sms)}, changed"


@dataclass(frozen=True)
class Slices(Cut):
    """awq_gemm with another split_k_iters: ``count`` slices of chunks of 32 rows in turn."""

    m: int
    k: int
    n: int
    count: int

    def areas(self, sms: int) -> Iterator[Area]:
        rows = [range(start, start + CHUNK) for start in range(0, self.k, CHUNK)]
        walks = tuple(fold([k for chunk in rows[i :: self.count] for k in chunk]) for i in range(self.count))
        yield Area((0, self.m), (0, self.n), tuple(w for w in walks if w))

    def text(self, sms: int) -> str:
        return f"{self.count} interleaved slices"


SchemePlant = Callable[[Plan], "tuple[Plan, Fault] | None"]


def _with(fault: str, place: str = "", **changed: object) -> SchemePlant:
    def plant(p: Plan) -> tuple[Plan, Fault]:
        return replace(p, scheme=replace(p.scheme, **changed)), Fault(fault, place)  # type: ignore[arg-type]

    return plant


def other_f(by: int, word: str) -> SchemePlant:
    def plant(p: Plan) -> tuple[Plan, Fault] | None:
        if p.scheme.unit != "tensor core":
            return None
        return _with(f"tensor core: F {word}", fraction_bits=p.scheme.fraction_bits + by)(p)

    return plant


def other_l(factor: float, word: str) -> SchemePlant:
    def plant(p: Plan) -> tuple[Plan, Fault] | None:
        if p.scheme.unit != "tensor core":
            return None
        return _with(f"tensor core: L {word}", terms=int(p.scheme.terms * factor))(p)

    return plant


def other_zero(p: Plan) -> tuple[Plan, Fault] | None:
    """The exponent of a zero term as other GPUs have it; it counts only where it is the largest, that is, hardly ever."""
    by = 1 if p.scheme.terms == HOPPER.terms else -1
    fp32, fp16 = p.scheme.zero_exponents
    if p.scheme.unit != "tensor core":
        return None
    return _with("tensor core: e_zero of another GPU", zero_exponents=(fp32 + by, fp16 + by))(p)


def other_accumulator(p: Plan) -> tuple[Plan, Fault] | None:
    if p.scheme.unit != "tensor core" or type_name(p.problem.dtype) != "fp16":
        return None
    to: Type = "fp16" if p.scheme.accumulator == "fp32" else "fp32"
    return _with(f"tensor core: accumulators in {to}", accumulator=to)(p)


def multiply_adds(p: Plan) -> tuple[Plan, Fault] | None:
    return _with("tensor core: fused multiply-adds in its place", unit="fma")(p) if p.scheme.unit == "tensor core" else None


def other_width(p: Plan) -> tuple[Plan, Fault] | None:
    if p.scheme.unit != "tensor core":
        return None
    if p.scheme.k_width == NATURAL:
        return _with("chains: k in kWidth 4's order within dots of 32", k_width=4)(p)
    return _with("chains: k in natural order within dots of 32", k_width=NATURAL)(p)


def _recut(p: Plan, change: Callable[[tuple[Walk, ...]], tuple[Walk, ...]], fault: Fault) -> tuple[Plan, Fault]:
    return replace(p, scheme=replace(p.scheme, cut=Recut(p.scheme.cut, change))), fault


def backwards(p: Plan) -> tuple[Plan, Fault]:
    """Tiles of k from the last to the first; Marlin's warps share one, of 128 rows."""
    tile = 4 * CHUNK if p.scheme.warps.bands(p.scheme.sms) else CHUNK
    fault = Fault("chains: from the last k to the first", f"{CHUNK} at a time")
    return _recut(p, lambda walks: tuple(fold(unfold(w).reshape(-1, tile)[::-1].ravel()) for w in walks), fault)


def last_tiles_swapped(p: Plan) -> tuple[Plan, Fault] | None:
    if p.scheme.warps.bands(p.scheme.sms):
        return None
    fault = Fault("chains: the last two stretches of k swapped", f"{CHUNK} each")

    def change(walks: tuple[Walk, ...]) -> tuple[Walk, ...]:
        chunks = [unfold(w).reshape(-1, CHUNK) for w in walks]
        return tuple(fold(np.r_[c[:-2], c[-1:], c[-2:-1]].ravel()) if len(c) > 2 else fold(c.ravel()) for c in chunks)

    return _recut(p, change, fault)


def more_pieces(p: Plan) -> tuple[Plan, Fault] | None:
    fault = Fault("split-K: twice as many pieces")
    if isinstance(p.scheme.cut, Interleaved):
        return replace(p, scheme=replace(p.scheme, cut=Slices(p.problem.M, p.problem.K, p.problem.N, 16))), fault
    if p.scheme.warps.bands(p.scheme.sms):
        return None

    def change(walks: tuple[Walk, ...]) -> tuple[Walk, ...]:
        found = []
        for order in map(unfold, walks):
            middle = -(-len(order) // CHUNK // 2) * CHUNK
            found += [fold(part) for part in (order[:middle], order[middle:]) if len(part)]
        return tuple(found)

    return _recut(p, change, fault)


def _fewer(p: Plan, count: Callable[[int], int], fault: Fault) -> tuple[Plan, Fault]:
    if isinstance(p.scheme.cut, Interleaved):
        return replace(p, scheme=replace(p.scheme, cut=Slices(p.problem.M, p.problem.K, p.problem.N, count(8)))), fault

    def change(walks: tuple[Walk, ...]) -> tuple[Walk, ...]:
        per = -(-len(walks) // count(len(walks)))
        return tuple(fold([k for w in walks[i : i + per] for k in unfold(w)]) for i in range(0, len(walks), per))

    return _recut(p, change, fault)


def fewer_pieces(p: Plan) -> tuple[Plan, Fault] | None:
    if any(len(a.pieces) < 3 for a in p.scheme.cut.areas(p.scheme.sms)):
        return None  # half of two is none
    return _fewer(p, lambda have: -(-have // 2), Fault("split-K: half as many pieces"))


def one_piece(p: Plan) -> tuple[Plan, Fault]:
    return _fewer(p, lambda have: 1, Fault("split-K: none"))


def other_sms(p: Plan) -> tuple[Plan, Fault] | None:
    if not p.scheme.cut.uses_sms:
        return None
    sms = 108 if p.scheme.sms != 108 else 132
    return _with(OTHER_SMS, str(sms), sms=sms)(p)


def other_end(p: Plan) -> tuple[Plan, Fault] | None:
    others = {"ascending": "descending", "descending": "ascending", "torch.sum": "ascending"}
    if p.scheme.order not in others:
        return None
    return _with("joins: from the other end, or in turn for PyTorch's sum", order=others[p.scheme.order])(p)


def in_pairs(p: Plan) -> tuple[Plan, Fault] | None:
    return (replace(p, join="pairs"), Fault("joins: in pairs")) if p.scheme.order != "torch.sum" else None


def last_joins_swapped(p: Plan) -> tuple[Plan, Fault] | None:
    if p.scheme.order == "torch.sum":
        return None
    return replace(p, join="swapped"), Fault("joins: last two pieces swapped")


def joins_in_half(p: Plan) -> tuple[Plan, Fault] | None:
    kind = type_name(p.problem.dtype)
    if p.scheme.type != "fp32" or p.scheme.order == "atomics":
        return None
    return _with(f"joins: pieces in {kind}", partial=Partial("pieces", kind), type=kind)(p)


def pieces_rounded(p: Plan) -> tuple[Plan, Fault] | None:
    kind = type_name(p.problem.dtype)
    if p.scheme.order == "atomics":
        return None
    return _with(f"partial sums: each piece rounded to {kind}", partial=Partial("pieces", kind))(p)


def total_rounded(p: Plan) -> tuple[Plan, Fault] | None:
    kind = type_name(p.problem.dtype)
    if p.scheme.order in ("atomics", "torch.sum"):
        return None
    return _with(f"partial sums: the running total rounded to {kind}", partial=Partial("total", kind))(p)


def not_rounded(p: Plan) -> tuple[Plan, Fault] | None:
    if p.scheme.partial.what == "none":
        return None
    fp32 = _with("partial sums: not rounded", partial=Partial(), type="fp32")
    return fp32(replace(p, scheme=replace(p.scheme, order="ascending")) if p.scheme.order == "atomics" else p)


def other_decoding(p: Plan) -> tuple[Plan, Fault] | None:
    if p.problem.symmetric:
        return None
    if p.scheme.weights == "rounded":
        return _with("weights: RN(q*s + RN(-s*z)), one fused multiply-add", weights="fused")(p)
    return _with("weights: RN((q-z)*s)", weights="rounded")(p) if p.scheme.weights == "fused" else None


def other_scale(p: Plan) -> tuple[Plan, Fault] | None:
    """Whole columns' scales multiplied into the weights for the output, and the other way round."""
    if p.problem.group_size != p.problem.K or p.scheme.scale == "step" or p.problem.bias:
        return None
    if p.scheme.scale == "output":
        return _with("scale: before the sum", weights="rounded", scale="weight")(p)
    return _with("scale: after the sum", weights="integer", scale="output")(p)


def scale_before_dot(p: Plan) -> tuple[Plan, Fault] | None:
    if p.scheme.scale != "step":
        return None
    return _with("scale: before the dot, in fp32 multiply-adds", weights="rounded", scale="weight", unit="fma")(p)


def other_rows(p: Plan) -> tuple[Plan, Fault] | None:
    if not p.problem.act_order or p.scheme.scale == "step":
        return None
    if p.scheme.rows == "sorted":
        return _with("act-order: rows summed in the checkpoint's order", rows="natural")(p)
    return _with("act-order: rows summed in order of groups", rows="sorted")(p)


STRIPES = "stripes"
FAMILIES: Mapping[str, Sequence[SchemePlant]] = {
    "F": (other_f(1, "one bit more"), other_f(-1, "one bit less"), other_f(-2, "two bits less")),
    "L": (other_l(0.5, "halved"), other_l(2, "doubled"), other_zero),
    "accumulator": (other_accumulator, multiply_adds),
    "order of k": (other_width, backwards, last_tiles_swapped),
    "split-K": (more_pieces, fewer_pieces, one_piece),
    STRIPES: (other_sms,),
    "order of joins": (other_end, in_pairs, last_joins_swapped),
    "type of joins": (joins_in_half, pieces_rounded, total_rounded, not_rounded),
    "decoding": (other_decoding, other_scale, scale_before_dot),
    "act-order": (other_rows,),
}


MAY_DO_NOTHING = (other_zero, other_sms)
"""Plants that are planted where they make the same recipe, too."""


def planted(plant: SchemePlant, plan: Plan) -> tuple[Plan, Fault] | None:
    """The plan with the plant in it; None where it is not possible or makes no recipe, or but for a few the same one."""
    try:
        found = plant(plan)
        if found is None:
            return None
        made = found[0].recipe()
    except (QlabError, ValueError):  # a walk that does not divide into tiles
        return None
    return found if made.ordered and (plant in MAY_DO_NOTHING or made.hash != plan.recipe().hash) else None
