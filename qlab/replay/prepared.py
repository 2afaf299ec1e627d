"""A recipe and a weight made ready once, for any number of inputs: the weight decoded, the program compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from qlab.errors import QlabError, UnsupportedError
from qlab.recipe import Recipe
from qlab.replay import cuda, native, reference, tensor_cores
from qlab.replay.operands import DTYPES, Operands, bits, check, operands, row_order, values
from qlab.replay.program import Program, compile_recipe
from qlab.weights import Int4Weight

Engine = Literal["auto", "reference", "native", "cuda", "tensor-cores"]
ON_GPU: tuple[Engine, ...] = ("cuda", "tensor-cores")
PANEL = 1 << 24
"""Elements of the decoded weight at once where it is not held: bounds the memory beside the operands."""
FEW_PRODUCTS = 1 << 22
"""Up to so many products a call takes one thread: starting more costs as long as they save."""


def choose(x: Tensor) -> Engine:
    """The fastest engine for x that replays every GPU's arithmetic."""
    return _fastest(x.device)


def _fastest(device: torch.device) -> Engine:
    if device.type == "cuda" and not cuda.reason():
        return "cuda"
    return "reference" if native.reason() else "native"


def missing(engine: Engine) -> str:
    """Why an engine cannot run here; empty when it can."""
    reasons: dict[str, Callable[[], str]] = {
        "cuda": cuda.reason,
        "tensor-cores": tensor_cores.reason,
        "native": native.reason,
        "reference": str,
    }
    if engine not in reasons:
        raise QlabError(f"unknown engine {engine!r}; known: auto, {', '.join(reasons)}")
    return reasons[engine]()


@dataclass(frozen=True, eq=False)
class Panel:
    """Columns ``start:stop`` of a decoded weight."""

    start: int
    stop: int
    operands: Operands

    @cached_property
    def arrays(self) -> tuple[native.Bits16, native.Bits16, native.Int32, native.Bits16]:
        """w, scales, group and bias as the CPU engine takes them."""
        o = self.operands
        return bits(o.w), bits(o.scales), o.group.cpu().numpy(), bits(o.bias)

    def run(self, engine: Engine, program: Program, x: Tensor) -> Tensor:
        """y [M, stop - start] of a program of these columns."""
        o = self.operands
        if engine in ON_GPU:
            run = cuda.run if engine == "cuda" else tensor_cores.run
            return run(program, x, o.w, o.scales, o.group, o.bias)
        threads = 1 if x.shape[0] * o.w.numel() <= FEW_PRODUCTS else 0
        return values(native.run(program, bits(x), *self.arrays, bf16=x.dtype == torch.bfloat16, threads=threads), x.dtype)


class Decoded:
    """A weight, with its bias, as one engine takes it: serves every recipe that has the same rules ``weights`` and ``rows``.

    Held, it is decoded once, 2 bytes an element; otherwise panel by panel whenever it is used.
    """

    def __init__(
        self,
        recipe: Recipe,
        weight: Int4Weight,
        bias: Tensor | None = None,
        *,
        engine: Engine = "auto",
        device: torch.device | None = None,
        hold: bool = True,
    ) -> None:
        self.device = weight.device if device is None else device
        self.engine: Engine = _fastest(self.device) if engine == "auto" else engine
        if self.engine in ON_GPU and self.device.type != "cuda":
            raise UnsupportedError(f"the {self.engine} engine needs x on a GPU: x.cuda()")
        if reason := missing(self.engine):
            raise UnsupportedError(f"the {self.engine} engine cannot run: {reason}")
        self.recipe, self.bias = recipe, bias
        self.K, self.N, self.dtype, self.groups = weight.K, weight.N, weight.dtype, weight.groups
        self._weight: Int4Weight | None = weight
        order = row_order(recipe, weight)
        self.order = None if order is None else order.to(self.device)
        self._order = order
        self._held: tuple[Panel, ...] = ()
        if hold:
            self._held = (self._panel(0, self.N),)
            self._weight = self._order = None

    def serves(self, recipe: Recipe) -> bool:
        """Whether the operands are what ``recipe`` multiplies."""
        mine = self.recipe
        return (recipe.weights, recipe.rows, recipe.dtype) == (mine.weights, mine.rows, mine.dtype)

    def panels(self) -> Iterator[Panel]:
        """The columns in turn: one panel where the weight is held."""
        if self._held:
            yield from self._held
            return
        width = self.N if self.engine == "reference" else max(64, PANEL // self.K // 64 * 64)
        for start in range(0, self.N, width):
            yield self._panel(start, min(start + width, self.N))

    def _panel(self, start: int, stop: int) -> Panel:
        assert self._weight is not None
        o = operands(self.recipe, self._weight, slice(start, stop), self._order, self.bias)
        home = self.device if self.engine in ON_GPU else torch.device("cpu")
        return Panel(start, stop, Operands(*(t.to(home) for t in (o.w, o.scales, o.group, o.bias))))


class Prepared:
    """A recipe on a decoded weight."""

    def __init__(self, recipe: Recipe, decoded: Decoded) -> None:
        if not decoded.serves(recipe):
            raise QlabError("the weight was decoded for another recipe: decode it anew")
        self.recipe, self.decoded = recipe, decoded
        self.ordered = recipe.ordered
        self._made: tuple[int | None, Program] | None = None
        check(recipe, (recipe.M, recipe.K), DTYPES[recipe.dtype], decoded, decoded.bias)

    def run(self, x: Tensor, seed: int | None = None) -> Tensor:
        """y [M, N] for x [M, K], as :func:`qlab.replay.replay`, which names the errors; x on the device of the weight."""
        recipe, engine = self.recipe, self.decoded.engine
        check(recipe, x.shape, x.dtype, self.decoded, self.decoded.bias)
        check_seed(seed)
        if self.decoded.order is not None:
            x = x[:, self.decoded.order]
        if engine == "reference":
            return self._interpreted(x)
        program = self._program(seed)
        y: Tensor | None = None
        for panel in self.decoded.panels():
            if (panel.start, panel.stop) == (0, recipe.N):
                return panel.run(engine, program, x).to(x.device)
            if y is None:
                y = torch.empty((recipe.M, recipe.N), dtype=x.dtype, device=x.device)
            columns = slice(panel.start, panel.stop)
            y[:, columns] = panel.run(engine, program.columns(panel.start, panel.stop), x)
        assert y is not None  # a weight has columns
        return y

    def _interpreted(self, x: Tensor) -> Tensor:
        if not self.ordered:
            raise UnsupportedError("the reference engine replays no order of atomics: take native or cuda with a seed")
        (panel,) = self.decoded.panels()
        return values(reference.run(self.recipe, bits(x), panel.operands), x.dtype).to(x.device)

    def _program(self, seed: int | None) -> Program:
        """The last one is kept: a run asks for one order of atomics again and again."""
        key = None if self.ordered else seed
        if self._made is None or self._made[0] != key:
            self._made = key, _programs(_ByHash(self.recipe), key)
        return self._made[1]


def prepare(
    recipe: Recipe,
    weight: Int4Weight | Decoded,
    bias: Tensor | None = None,
    *,
    engine: Engine = "auto",
    device: torch.device | None = None,
) -> Prepared:
    """``recipe`` ready to run on many x on ``device`` (the weight's): the weight decoded and held, 2 bytes an element.

    Recipes of one weight for several M share a :class:`Decoded` where it :meth:`~Decoded.serves` them; it brings its own bias,
    engine and device. Raises as :func:`qlab.replay.replay`.
    """
    if isinstance(weight, Int4Weight):
        check(recipe, (recipe.M, recipe.K), DTYPES[recipe.dtype], weight, bias)
        weight = Decoded(recipe, weight, bias, engine=engine, device=device)
    return Prepared(recipe, weight)


def check_seed(seed: int | None) -> None:
    """Raise QlabError for a seed that numpy's generator would not take."""
    if seed is not None and seed < 0:
        raise QlabError(f"the seed of an order of atomics must be 0 or more, not {seed}")


@lru_cache(maxsize=64)
def _programs(recipe: _ByHash, seed: int | None) -> Program:
    return compile_recipe(recipe.recipe, seed)


class _ByHash:
    """A recipe that is equal to another where their hashes are."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __hash__(self) -> int:
        return hash(self.recipe.hash)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByHash) and self.recipe.hash == other.recipe.hash
