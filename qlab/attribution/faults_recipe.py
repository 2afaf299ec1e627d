"""Faults of arithmetic: the recipes that a clean one becomes by one or two changes, with the names of the changes.

A change is a rewrite of the tree (qlab.attribution.rewrites) or of the pieces that K is cut into (qlab.attribution.cuts).
Where the recipe is that of a registered kernel on a GPU of the table, its tiles on other numbers of SMs are changes, too, and
the same kernel on another GPU, or another kernel, is a compound: one name for what may be several changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from qlab.attribution import cuts, rewrites
from qlab.attribution.fault import Fault, distinct
from qlab.attribution.rewrites import Rewrite
from qlab.backends.registry import Problem
from qlab.errors import QlabError
from qlab.hardware import GPUS, Gpu
from qlab.recipe import Chain, Recipe, TensorCore, nodes
from qlab.recipes import builders, recipe
from qlab.recipes.rules import dot_order
from qlab.replay.program import Program, compile_recipe

DOT = 32
STRETCHES = (16, 32, 64)
"""k of an instruction, of a dot and of a tile, which a kernel may walk over in another order."""
OTHER_SMS = "stripes: those of another number of SMs"
OTHER_GPU = "kernel: the same as on another GPU"
OTHER_KERNEL = "kernel: another one ran"


@dataclass(frozen=True, eq=False)
class Variant:
    """A recipe and the changes that made it."""

    recipe: Recipe
    faults: tuple[Fault, ...]
    also: tuple[tuple[Fault, ...], ...] = ()
    """Other changes, of as many parts, that make the same recipe."""

    @property
    def striped(self) -> bool:
        """Whether it is what another number of SMs makes, to which no rewrite leads: other changes come after it."""
        return any(f.kind == OTHER_SMS for name in (self.faults, *self.also) for f in name)

    @cached_property
    def program(self) -> Program:
        """Compiled, and kept as long as the variant."""
        return compile_recipe(self.recipe)


def changes(said: Recipe, problem: Problem) -> Iterator[tuple[Fault, Rewrite]]:
    """Every change by name."""
    kind = said.dtype
    step = next(n.step for r in said.regions for n in nodes(r.tree) if isinstance(n, Chain))
    if isinstance(step, TensorCore):
        f = step.fraction_bits
        for by, word in ((1, "one bit more"), (-1, "one bit less"), (2, "two bits more"), (-2, "two bits less")):
            yield Fault(f"tensor core: F {word}", f"F={f + by} for {f}"), rewrites.fraction_bits(by)
        for factor, word in ((0.5, "halved"), (2.0, "doubled"), (0.25, "quartered")):
            yield Fault(f"tensor core: L {word}", f"L={int(step.terms * factor)} for {step.terms}"), rewrites.terms(factor)
        for by in (1, -1):
            e = step.zero_exponent
            yield Fault("tensor core: e_zero of another GPU", f"{e + by} for {e}"), rewrites.zero_exponent(by)
        if step.accumulator == "fp32":
            yield Fault("tensor core: accumulators in fp16"), rewrites.other_accumulator
        else:
            yield Fault("tensor core: accumulators in fp32", "their sums rounded to fp16"), rewrites.wider_accumulator
            yield Fault("tensor core: accumulators in fp32", "their sums as they are"), rewrites.other_accumulator
        yield Fault("tensor core: fused multiply-adds in its place"), rewrites.multiply_adds
        yield Fault("chains: k in kWidth 4's order within dots of 32"), rewrites.dots(dot_order(DOT, 4))
        yield Fault("chains: k in natural order within dots of 32"), rewrites.dots(np.arange(DOT))
    for size in sorted({step.terms, *STRETCHES} if step.terms > 1 else STRETCHES):
        yield Fault("chains: from the last k to the first", f"{size} at a time"), rewrites.blocks(lambda b: b[::-1], size)
    for size in sorted({step.terms, DOT}):
        yield Fault("chains: the last two stretches of k swapped", f"{size} each"), _swapped(size)
    yield Fault("split-K: twice as many pieces"), cuts.changed(cuts.doubled)
    yield Fault("split-K: half as many pieces"), cuts.changed(cuts.halved)
    yield Fault("split-K: none"), cuts.changed(cuts.whole)
    yield Fault("joins: from the other end, or in turn for PyTorch's sum"), cuts.changed(cuts.other_way)
    yield Fault("joins: in pairs"), cuts.changed(cuts.in_pairs)
    yield Fault("joins: last two pieces swapped"), cuts.changed(cuts.last_swapped)
    yield Fault("joins: last two swapped, in every join"), rewrites.joins(rewrites.swap_last_two)
    yield Fault(f"joins: pieces in {kind}"), cuts.changed(cuts.summed_in(kind))
    yield Fault(f"joins: all in {kind}, those of warps and lanes too"), rewrites.join_type
    yield Fault(f"partial sums: each piece rounded to {kind}"), cuts.changed(cuts.rounding("pieces", kind))
    yield Fault(f"partial sums: the running total rounded to {kind}"), cuts.changed(cuts.rounding("total", kind))
    yield Fault("partial sums: not rounded"), rewrites.without_rounding
    yield Fault(f"partial sums: all rounded to {kind}, those of warps and lanes too"), rewrites.with_rounding
    yield Fault("weights: RN(q*s + RN(-s*z)), one fused multiply-add"), rewrites.weights("fused", "rounded")
    yield Fault("weights: RN((q-z)*s)"), rewrites.weights("rounded", "fused")
    yield Fault("scale: before the sum"), rewrites.scale_before
    if problem.group_size == problem.K:
        yield Fault("scale: after the sum"), rewrites.scale_after
    yield Fault("scale: before the dot, in fp32 multiply-adds"), rewrites.scale_before_dot
    yield Fault("scale: left out"), rewrites.unscaled
    if problem.bias:
        yield Fault("bias: added to the rounded output"), rewrites.bias("added")
        yield Fault("bias: fused with the scale"), rewrites.bias("fused")
    if problem.act_order:
        other = "the checkpoint's order" if said.rows == "sorted" else "order of groups"
        yield Fault(f"act-order: rows summed in {other}"), rewrites.rows


def _swapped(size: int) -> Rewrite:
    return rewrites.blocks(rewrites.swap_last_blocks, size)


class Variants:
    """What a clean recipe becomes, by number of changes; each recipe once, under the first name that makes it."""

    def __init__(self, clean: Recipe, problem: Problem) -> None:
        self.clean, self.problem = clean, problem
        self._seconds: dict[int, list[Variant]] = {}

    @cached_property
    def source(self) -> tuple[str, Gpu] | None:
        """The registered kernel and the GPU whose recipe this is."""
        return source(self.clean, self.problem)

    @cached_property
    def single(self) -> tuple[Variant, ...]:
        """One change."""
        return self._distinct([*self._rewritten(Variant(self.clean, ())), *self._striped()], ())

    @cached_property
    def double(self) -> tuple[Variant, ...]:
        """Two changes, in either order where that matters."""
        return self._distinct([v for first in self.single for v in self._after(first)], self.single)

    def after(self, firsts: Sequence[Variant]) -> tuple[Variant, ...]:
        """Two changes, the first of them among ``firsts``; fewer to build than :attr:`double`."""
        return self._distinct([v for first in firsts for v in self._after(first)], self.single)

    def _after(self, first: Variant) -> list[Variant]:
        at = self.single.index(first)
        if at not in self._seconds:
            self._seconds[at] = self._rewritten(first)
        return self._seconds[at]

    @cached_property
    def compound(self) -> tuple[Variant, ...]:
        """The same kernel on another GPU, and other kernels on the same GPU."""
        return self._distinct(list(self._compounds()), ())

    @cached_property
    def none(self) -> Variant:
        """The clean recipe."""
        return Variant(self.clean, ())

    def _rewritten(self, first: Variant) -> list[Variant]:
        """``first`` with one change more, under each of its names."""
        found = []
        for fault, rewrite in self._changes:
            names = [n for n in (first.faults, *first.also) if fault.kind not in {f.kind for f in n}]
            if names and (made := rewrite(first.recipe)) is not None and made.ordered:
                found += [Variant(made, (*name, fault)) for name in names]
        return found

    @cached_property
    def _changes(self) -> tuple[tuple[Fault, Rewrite], ...]:
        return tuple(changes(self.clean, self.problem))

    def _striped(self) -> Iterator[Variant]:
        if self.source is None:
            return
        name, gpu = self.source
        alike: dict[str, tuple[Recipe, list[int]]] = {}
        for sms in sorted({g.sms for g in GPUS} - {gpu.sms}):
            if (made := self._built(name, replace(gpu, sms=sms))) is not None:
                alike.setdefault(made.hash, (made, []))[1].append(sms)
        for made, counts in alike.values():
            yield Variant(made, (Fault(OTHER_SMS, f"{' or '.join(map(str, counts))} for {gpu.sms}"),))

    def _compounds(self) -> Iterator[Variant]:
        if self.source is None:
            return
        mine, gpu = self.source
        alike: dict[str, tuple[Recipe, list[str]]] = {}
        for g in GPUS:
            if g.key != gpu.key and (made := self._built(mine, g)) is not None:
                alike.setdefault(made.hash, (made, []))[1].append(g.key)
        for made, keys in alike.values():
            yield Variant(made, (Fault(OTHER_GPU, " or ".join(keys)),))
        for name in _names():
            if name != mine and (made := self._built(name, gpu)) is not None:
                yield Variant(made, (Fault(OTHER_KERNEL, f"{name} for {mine}"),))

    def _built(self, name: str, gpu: Gpu) -> Recipe | None:
        try:
            made = recipe(name, self.problem, gpu)
        except QlabError:  # the kernel does not run this problem there
            return None
        return made if made.ordered and not made.opaque and made.hash != self.clean.hash else None

    def _distinct(self, found: list[Variant], known: tuple[Variant, ...]) -> tuple[Variant, ...]:
        old = {self.clean.hash, *(v.recipe.hash for v in known)}
        alike: dict[str, list[Variant]] = {}
        for v in found:
            if v.recipe.hash not in old:
                alike.setdefault(v.recipe.hash, []).append(v)
        return tuple(_one(same) for same in alike.values())


def _one(same: Sequence[Variant]) -> Variant:
    """Variants of one recipe as one, under every name; the order in which two changes were made counts no more."""
    first, *others = distinct(v.faults for v in same)
    return Variant(same[0].recipe, first, tuple(others))


def _names() -> list[str]:
    """Kernels that have recipes, vLLM's first: one of ours that gives a kernel's bits is another name for it."""
    return sorted(builders(), key=lambda name: not name.startswith("vllm."))


def source(said: Recipe, problem: Problem) -> tuple[str, Gpu] | None:
    """The first registered kernel and GPU that have this recipe; GPUs with proved replays first."""
    for gpu in sorted(GPUS, key=lambda g: (not g.proved, g.key != "a100")):
        for name in _names():
            try:
                if recipe(name, problem, gpu).hash == said.hash:
                    return name, gpu
            except QlabError:  # the kernel does not run this problem there
                continue
    return None


_KEPT = 64
_variants: dict[tuple[str, Problem], Variants] = {}


def variants(clean: Recipe, problem: Problem) -> Variants:
    """The variants of a clean recipe; those of the last ones are kept, for many kernels may be probed under one."""
    key = clean.hash, problem
    found = _variants.pop(key, None) or Variants(clean, problem)
    _variants[key] = found
    if len(_variants) > _KEPT:
        del _variants[next(iter(_variants))]
    return found
