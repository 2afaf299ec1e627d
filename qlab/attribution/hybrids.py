"""Which recipe each linear gets in each coalition: the chosen parts are those of B's kernel, all others those of A's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from qlab import hardware
from qlab.attribution import parts as p
from qlab.attribution.parts import CANDIDATES, Pair, Part, mixed
from qlab.attribution.storage import packing_round_trip
from qlab.attribution.subject import Call, Choice, Layer, Model
from qlab.backends import registry
from qlab.backends.registry import Problem
from qlab.backends.vllm_marlin import Marlin
from qlab.engine.path import Path
from qlab.errors import QlabError, UnsupportedError
from qlab.recipe import Recipe
from qlab.recipes import scheme_of
from qlab.recipes.scheme import OPAQUE, Scheme, assemble


class Hybrids:
    """The kernels of two paths on a subject, part by part.

    A linear's kernels are those that the two ends run; where the weights differ, both are taken for each state's weight.
    Raises UnsupportedError where an end's kernel cannot run, is not known, or is cuBLAS.
    """

    def __init__(self, subject: Layer | Model, a: Path, b: Path, full_state: int) -> None:
        self.subject, self.paths, self._full = subject, (a, b), full_state
        self._kernels: dict[tuple[str, int], tuple[str, str]] = {}
        self._problems: dict[tuple[int, str, int], Problem] = {}
        self.calls = {(c.linear, c.M): c for c in subject.calls}
        """One call of each linear for each number of tokens."""
        found: dict[Pair, None] = {}
        for call in self.calls.values():
            ends = [(0, a), (full_state, b)]
            self._kernels[call.linear, call.M] = tuple(p.kernel(self._problem(s, call)) for s, p in ends)  # type: ignore[assignment]
            for state in dict.fromkeys((0, full_state)):
                found[self.pair(state, call)] = None
        self.pairs: Sequence[Pair] = tuple(found)
        self.parts = p.parts(self.pairs)
        """Those in which the kernels differ."""
        self.admissible = p.admissible(self.parts, self.pairs)
        """Whether a coalition of ``parts`` can be built, by its mask."""

    @property
    def same(self) -> tuple[Part, ...]:
        """The parts that are equal on both sides, or whose difference shows in no sum."""
        swapped = {x for part in self.parts for x in part.attributes}
        return tuple(c for c in CANDIDATES if not swapped & set(c.attributes))

    @property
    def unions(self) -> p.Unions:
        """Which of ``parts`` are swapped together."""
        a, b = self.paths
        names = zip(*(kernels for _, kernels in self._all()), strict=True)
        first, second = ("/".join(sorted({n.removeprefix("vllm.") for n in side})) for side in names)
        return p.unions(self.parts, (first, second), (a.gpu, b.gpu), self._moved())

    def _moved(self) -> Iterator[tuple[Scheme, Scheme]]:
        """A's kernels on A's GPU and on B's, where both are modelled."""
        for call, (kernel, _) in self._all():
            there = _scheme(kernel, self._problem(0, call), self.paths[1].gpu, check=False)
            if isinstance(there, Scheme):
                yield self.pair(0, call)[0], there

    def texts(self, part: Part) -> tuple[str, str]:
        """What the part is in A's kernels and in B's, in words."""
        return _listed([p.text(part, a) for a, _, _ in self.pairs]), _listed([p.text(part, b) for _, b, _ in self.pairs])

    def pair(self, state: int, call: Call) -> Pair:
        """The two schemes of a call with the state's weight."""
        problem = self._problem(state, call)
        sides = []
        for kernel, path, end in zip(self._kernels[call.linear, call.M], self.paths, (0, self._full), strict=True):
            scheme = _scheme(kernel, problem, path.gpu, check=state == end)
            if isinstance(scheme, str):
                raise UnsupportedError(f"{path}: {call.linear} with {call.M} tokens: {scheme}")
            sides.append(scheme)
        return sides[0], sides[1], problem

    def choice(self, state: int, chosen: Sequence[Part]) -> Choice:
        """The recipes of the hybrid that takes ``chosen`` from B's kernel; one that cannot be built raises QlabError."""

        def choose(linear: str, m: int) -> Recipe:
            a, b, problem = self.pair(state, self.calls[linear, m])
            return _assembled(mixed(a, b, chosen), problem)

        return choose

    def packing(self) -> tuple[str, str]:
        """What each side's storage gives back, in words; every linear's weight is packed and unpacked.

        Raises QlabError where that is another weight: hybrids multiply the weight, and not what such a storage holds.
        """
        sides = []
        for side, state in ((0, 0), (1, self._full)):
            said: list[str] = []
            for call, kernels in self._all():
                trip = packing_round_trip(kernels[side], self.subject.weight(state, call))
                if trip.exact is False:
                    raise QlabError(f"{call.linear}: {trip.kernel} does not multiply the weight that it was given: {trip.text}")
                found = "gives back every bit" if trip.exact else "cannot be read back here"
                said.append(found if trip.storage == "none" else f"{trip.storage} layout: {found}")
            sides.append(_listed(said))
        return sides[0], sides[1]

    def _all(self) -> Iterator[tuple[Call, tuple[str, str]]]:
        """A call of each linear for each number of tokens, with A's kernel and B's."""
        for at, call in self.calls.items():
            yield call, self._kernels[at]

    def _problem(self, state: int, call: Call) -> Problem:
        key = (state, call.linear, call.M)
        if key not in self._problems:
            self._problems[key] = self.subject.problem(state, call)
        return self._problems[key]


def _listed(texts: Sequence[str]) -> str:
    """What layers have, each once: two are named, more are counted. What stands before a colon in all of them is said once."""
    known = list(dict.fromkeys(texts))
    head = {text.rpartition(": ")[0] for text in known}
    if len(known) > 1 and len(head) == 1 and (said := head.pop()):
        return f"{said}: {_listed([text.rpartition(': ')[2] for text in known])}"
    return " or ".join(known) if len(known) < 3 else f"{known[0]} and {len(known) - 1} others, by layer"


@lru_cache(maxsize=4096)
def _scheme(kernel: str, problem: Problem, gpu: str, *, check: bool) -> Scheme | str:
    """A kernel's scheme, or why it has none. Only Marlin adds a bias itself; it is added behind any other kernel.

    ``check``: whether the kernel must be able to run the problem; inside a hybrid only its arithmetic is taken.
    """
    inside = problem.bias and isinstance(registry.kernel(kernel), Marlin)
    try:
        scheme = scheme_of(kernel, replace(problem, bias=inside), hardware.gpu(gpu), check=check)
    except UnsupportedError as e:
        return str(e)
    if scheme.unit.startswith(OPAQUE):
        return f"{scheme.unit}; its order of summation is not known, so that none of its parts can be swapped"
    return scheme


@lru_cache(maxsize=1 << 14)
def _assembled(scheme: Scheme, problem: Problem) -> Recipe:
    return assemble(scheme, problem)
