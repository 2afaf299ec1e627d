"""Parts of a kernel's recipe that can be swapped on their own, for two schemes of each linear layer.

A part is one or more fields of :class:`qlab.recipes.scheme.Scheme`. Of the candidates, finest first, those stay in which two
recipes differ; what no hybrid separates, because the one does not fit without the other, becomes one part: the fp16 dot needs
weights without scales, so that unit, dequantisation rule and place of the scale are swapped together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import Any, NamedTuple

from qlab.backends.registry import Problem
from qlab.errors import QlabError
from qlab.recipe import WEIGHTS
from qlab.recipes.rules import Area, Cut
from qlab.recipes.scheme import NATURAL, PLACES, Scheme, misfit

Pair = tuple[Scheme, Scheme, Problem]
"""One linear layer: its schemes on path A and on path B, and the problem that both are of."""


@dataclass(frozen=True)
class Part:
    """What of a scheme, or of a quantisation's settings, moves together."""

    name: str
    category: str
    """weights, group layout, dequantisation, tensor core, hardware, order of summation, rounding of partial sums or output
    rule."""
    attributes: tuple[str, ...]
    """Fields of a Scheme (or of qlab.attribution.settings.Settings)."""


CANDIDATES = (
    Part("dequantisation rule", "dequantisation", ("weights",)),
    Part("order of rows under act-order", "group layout", ("rows",)),
    Part("place of the scale", "group layout", ("scale",)),
    Part("unit of multiplication", "tensor core", ("unit",)),
    Part("accumulator type", "tensor core", ("accumulator",)),
    Part("tensor core: F, fraction bits", "tensor core", ("fraction_bits", "zero_exponents")),
    Part("tensor core: L, terms per sum", "tensor core", ("terms",)),
    Part("order of k inside a dot", "order of summation", ("k_width",)),
    Part("SM count (stripes and tile choice)", "hardware", ("sms",)),
    Part("cut of K (split-K, stripes)", "order of summation", ("cut",)),
    Part("warp-level slices of K", "order of summation", ("warps",)),
    Part("lane-level slices of K", "order of summation", ("lanes",)),
    Part("rounding of partial sums", "rounding of partial sums", ("partial",)),
    Part("order of joins", "order of summation", ("order",)),
    Part("type of joins", "rounding of partial sums", ("type",)),
    Part("output rule", "output rule", ("bias",)),
)
"""Every field of a Scheme once."""
OF_THE_GPU = frozenset({"fraction_bits", "zero_exponents", "terms", "sms"})
"""Fields that a GPU decides, whatever the kernel."""


def parts(pairs: Sequence[Pair]) -> tuple[Part, ...]:
    """The parts in which A's and B's recipes differ in some layer, in the order of CANDIDATES, none inseparable from another.

    Swapped one by one in some order, all of them, they lead from A to B through hybrids that can be built. Raises QlabError
    where A or B itself cannot.
    """
    found = [p for p in CANDIDATES if any(_differs(p, pair) for pair in pairs)]
    fits = admissible(found, pairs)
    for mask, who in (0, "A"), ((1 << len(found)) - 1, "B"):
        if not fits(mask):
            raise QlabError(f"path {who} has a layer whose recipe cannot be built: {_misfit(found, pairs, mask)}")
    groups = _inseparable(len(found), fits)
    for size in range(2, len(groups) + 1):
        if _leads(groups, fits):
            break
        ways = (_union(groups, some) for some in combinations(range(len(groups)), size))
        groups = next((w for w in ways if _leads(w, fits)), groups)
    return tuple(_merged([found[i] for i in g]) for g in groups)


def mixed(a: Scheme, b: Scheme, chosen: Sequence[Part]) -> Scheme:
    """The hybrid: ``chosen`` parts from ``b``, all others from ``a``. Nothing is checked; qlab.recipes.assemble does."""
    changed: dict[str, Any] = {x: getattr(b, x) for part in chosen for x in part.attributes}
    return replace(a, **changed)


def selected(parts: Sequence[Part], mask: int) -> tuple[Part, ...]:
    """The parts of a coalition: part i where bit i is set."""
    return tuple(p for i, p in enumerate(parts) if mask >> i & 1)


def admissible(parts: Sequence[Part], pairs: Sequence[Pair]) -> Callable[[int], bool]:
    """Whether the hybrids of a coalition (a bit mask over ``parts``) can be built in every layer."""
    distinct = list(dict.fromkeys(pairs))
    own = [sum(1 << i for i, p in enumerate(parts) if _unequal(p, a, b)) for a, b, _ in distinct]
    known: dict[tuple[int, int], bool] = {}

    def fits(mask: int) -> bool:
        for at, (a, b, problem) in enumerate(distinct):
            key = at, mask & own[at]
            if key not in known:
                known[key] = not misfit(mixed(a, b, selected(parts, key[1])), problem)
            if not known[key]:
                return False
        return True

    return fits


class Unions(NamedTuple):
    """A partition of the parts, for Owen values."""

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    """Indices of parts, ascending; the unions stand in the order of their first part."""


def unions(
    parts: Sequence[Part],
    kernels: tuple[str, str],
    gpus: tuple[str, str],
    moved: Iterable[tuple[Scheme, Scheme]] = (),
) -> Unions:
    """Parts below another kernel family, and below another tensor core, as unions; every other part is one of its own.

    ``kernels`` and ``gpus`` are A's and B's names. Where the kernels differ, whatever the GPU does not decide belongs to the
    kernel. The GPU decides F, L and the number of SMs, and what differs in ``moved``: schemes of A's kernels on A's GPU and on
    B's (``scheme_of(..., check=False)``), say Marlin's fp16 accumulator on Turing.
    """
    moves = {x for here, there in moved for p in CANDIDATES for x in p.attributes if _other(x, here, there)}
    of_gpu = (OF_THE_GPU | moves) if gpus[0] != gpus[1] else frozenset()
    names: dict[str, list[int]] = {}
    cores = [i for i, p in enumerate(parts) if p.attributes[0] in ("fraction_bits", "terms") and set(p.attributes) <= of_gpu]
    for i, p in enumerate(parts):
        if kernels[0] != kernels[1] and not set(p.attributes) <= of_gpu:
            name = f"kernel ({kernels[0]} or {kernels[1]})"
        elif i in cores and len(cores) > 1:
            name = f"tensor core ({gpus[0]} or {gpus[1]})"
        else:
            name = p.name
        names.setdefault(name, []).append(i)
    return Unions(tuple(names), tuple(map(tuple, names.values())))


def text(part: Part, scheme: Scheme) -> str:
    """What the part is in a scheme, in a few words: ``8 interleaved slices``, ``F=24``."""
    return ", ".join(_TEXTS[x](scheme) for x in part.attributes if x in _TEXTS)


_TEXTS: dict[str, Callable[[Scheme], str]] = {
    "weights": lambda s: WEIGHTS[s.weights],
    "rows": lambda s: "rows sorted by group" if s.rows == "sorted" else "rows as they are",
    "scale": lambda s: PLACES[s.scale],
    "unit": lambda s: "fp16 dot" if s.unit == "half dot" else s.unit,
    "accumulator": lambda s: f"{'fp32' if s.unit == 'half dot' else s.accumulator} accumulator",
    "fraction_bits": lambda s: f"F={s.fraction_bits}" if s.unit == "tensor core" else "no tensor core",
    "terms": lambda s: f"L={s.terms}" if s.unit == "tensor core" else "no tensor core",
    "k_width": lambda s: "k in order" if s.k_width == NATURAL else f"k permuted, kWidth {s.k_width}",
    "sms": lambda s: f"{s.sms} SMs",
    "cut": lambda s: s.cut.text(s.sms),
    "warps": lambda s: s.warps.text(s.sms),
    "lanes": lambda s: f"pairs of k dealt to {s.lanes} lanes" if s.lanes > 1 else "k not dealt to lanes",
    "partial": lambda s: str(s.partial),
    "order": lambda s: s.order,
    "type": lambda s: s.type,
    "bias": lambda s: s.bias.text(),
}
"""Of each field; exponents of zero go with F unsaid."""


def _other(attribute: str, a: Scheme, b: Scheme) -> bool:
    return bool(getattr(a, attribute) != getattr(b, attribute))


def _unequal(part: Part, a: Scheme, b: Scheme) -> bool:
    return any(_other(x, a, b) for x in part.attributes)


def _differs(part: Part, pair: Pair) -> bool:
    """Whether the two schemes differ in a part in a way that shows in a recipe: of one of the two, or of a hybrid."""
    a, b, _ = pair
    if not _unequal(part, a, b):
        return False
    units, orders, field = {a.unit, b.unit}, {a.order, b.order}, part.attributes[0]
    if field in ("fraction_bits", "terms"):
        return "tensor core" in units
    if field == "accumulator":
        return bool(units & {"tensor core", "fma"})
    if field == "sms":
        return any(c.uses_sms and _areas(c, a.sms) != _areas(c, b.sms) for c in (a.cut, b.cut)) or any(
            w.uses_sms and w.bands(a.sms) != w.bands(b.sms) for w in (a.warps, b.warps)
        )
    areas = [area for c in (a.cut, b.cut) for sms in {a.sms, b.sms} for area in _areas(c, sms)]
    if field == "cut":
        asked = "atomics where allowed" in orders
        return len({(x.pieces, x.atomics and asked) for x in areas}) > 1
    if field in ("partial", "order", "type"):
        # Atomics and PyTorch's sum add even one piece to something: +0.
        return bool(orders & {"atomics", "torch.sum"}) or any(len(x.pieces) > 1 for x in areas)
    return True


@lru_cache(maxsize=64)
def _areas(cut: Cut, sms: int) -> tuple[Area, ...]:
    return tuple(cut.areas(sms))


def _misfit(parts: Sequence[Part], pairs: Sequence[Pair], mask: int) -> str:
    return next(why for a, b, p in pairs if (why := misfit(mixed(a, b, selected(parts, mask)), p)))


Groups = list[tuple[int, ...]]
"""A partition of the candidates that differ."""


def _inseparable(count: int, fits: Callable[[int], bool]) -> Groups:
    """Candidates that every buildable coalition has all or none of, together."""
    masks = [m for m in range(1 << count) if fits(m)]
    together: dict[tuple[int, ...], list[int]] = {}
    for i in range(count):
        together.setdefault(tuple(m >> i & 1 for m in masks), []).append(i)
    return [tuple(g) for g in together.values()]


def _leads(groups: Groups, fits: Callable[[int], bool]) -> bool:
    """Whether swapping one group after the other can lead from nothing to all of them through buildable coalitions."""
    bits = [sum(1 << i for i in g) for g in groups]
    reached = {0}
    for _ in groups:
        reached = {m | b for m in reached for b in bits if not m & b and fits(m | b)}
    return bool(reached)


def _union(groups: Groups, some: Sequence[int]) -> Groups:
    """The groups with ``some`` of them made one, which stands where the first stood."""
    one = tuple(sorted(i for at in some for i in groups[at]))
    return [one if at == some[0] else g for at, g in enumerate(groups) if at == some[0] or at not in some]


def _merged(members: Sequence[Part]) -> Part:
    """One part of several: the first one's category, all names without what stands in brackets."""
    if len(members) == 1:
        return members[0]
    name = " + ".join(p.name.split(" (")[0] for p in members)
    return Part(name, members[0].category, tuple(x for p in members for x in p.attributes))
