"""A recipe compiled to flat arrays: what the compiled engines execute, one postfix program per region of the output.

Every output element has a stack of fp32 values (fp16 and bf16 values are held in fp32). Programs of regions that share chains
share their stretches of ``order``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from qlab.errors import UnsupportedError
from qlab.recipe import (
    Chain,
    Fma,
    HalfDot,
    Join,
    Node,
    Opaque,
    Recipe,
    Region,
    Round,
    Step,
    TensorCore,
    Type,
    Unordered,
    unfold,
    zero,
)

Int32 = NDArray[np.int32]
MAX_DEPTH = 8
"""Values that an engine's stack holds."""
TYPES: dict[Type, int] = {"fp32": 0, "fp16": 1, "bf16": 2}


class Op(enum.IntEnum):
    """First column of ``Program.ops``; the other three are its arguments."""

    CHAIN = 0
    """(step, start, stop): push the chain over ``order[start:stop]``."""
    ADD = 1
    """(type): pop b, then a; push RN(a + b)."""
    ROUND = 2
    """(type): round the top."""
    SCALE = 3
    """(type): multiply the top by the whole column's scale, rounded."""
    BIAS = 4
    """(type): add the column's bias to the top, rounded."""
    SCALE_BIAS = 5
    """(type): RN(top * scale + bias), rounded once."""


class Kind(enum.IntEnum):
    """First column of ``Program.steps``."""

    TENSOR_CORE = 0
    FMA = 1
    HALF_DOT = 2


@dataclass(frozen=True, eq=False)
class Program:
    """A recipe, flat. All arrays int32, C-contiguous."""

    order: Int32
    """[T] indices of k; chains are stretches of it."""
    steps: Int32
    """[S, 6]: kind, F, L, e_zero, accumulator (0 fp32, 1 fp16), terms."""
    ops: Int32
    """[P, 4]: opcode and arguments."""
    regions: Int32
    """[R, 6]: rows m0:m1, columns n0:n1, ops start:stop."""

    def columns(self, start: int, stop: int) -> Program:
        """The program of columns ``start:stop`` alone, numbered from 0; order, steps and ops are shared."""
        r = self.regions[(self.regions[:, 2] < stop) & (self.regions[:, 3] > start)].copy()
        r[:, 2:4] = np.clip(r[:, 2:4], start, stop) - start
        return replace(self, regions=np.ascontiguousarray(r))


def compile_recipe(recipe: Recipe, seed: int | None = None) -> Program:
    """The program of a recipe. Atomics are added in an order drawn from ``seed``, one for each region.

    Raises UnsupportedError for opaque parts, and for atomics without a seed.
    """
    if recipe.opaque:
        raise UnsupportedError(f"opaque: {recipe.opaque}; its order of summation is not known, so it cannot be replayed")
    if seed is None and not recipe.ordered:
        raise UnsupportedError("the order of atomics is not fixed: name a seed to replay one order, or sample several")
    return _Compiler(recipe, np.random.default_rng(seed)).program()


class _Compiler:
    def __init__(self, recipe: Recipe, random: np.random.Generator) -> None:
        self.recipe, self.random = recipe, random
        self.order: list[Int32] = []
        self.length = 0
        self.stretches: dict[Chain, tuple[int, int]] = {}
        self.steps: dict[Step, int] = {}
        self.ops: list[tuple[int, int, int, int]] = []

    def program(self) -> Program:
        regions: list[tuple[int, ...]] = []
        for region in self.recipe.regions:
            for columns in region.columns:
                start = len(self.ops)
                self._region(region)
                regions.append((*region.rows, *columns, start, len(self.ops)))
        steps = [_step_row(s) for s in self.steps]
        return Program(
            np.concatenate(self.order) if self.order else np.zeros(0, np.int32),
            np.array(steps, np.int32).reshape(-1, 6),
            np.array(self.ops, np.int32).reshape(-1, 4),
            np.array(regions, np.int32).reshape(-1, 6),
        )

    def _region(self, region: Region) -> None:
        dtype = TYPES[self.recipe.dtype]
        self._node(region.tree)
        self._emit(Op.ROUND, dtype)
        if region.output.bias == "fused":
            self._emit(Op.SCALE_BIAS, dtype)
            return
        if region.output.scale:
            self._emit(Op.SCALE, dtype)
        if region.output.bias == "added":
            self._emit(Op.BIAS, dtype)

    def _emit(self, op: Op, *arguments: int) -> None:
        self.ops.append((int(op), *arguments, *[0] * (3 - len(arguments))))  # type: ignore[arg-type]

    def _node(self, node: Node) -> None:
        match node:
            case Chain():
                self._emit(Op.CHAIN, self.steps.setdefault(node.step, len(self.steps)), *self._stretch(node))
            case Join():
                self._fold(node.parts, node.type)
            case Round():
                self._node(node.node)
                self._emit(Op.ROUND, TYPES[node.type])
            case Unordered():
                self._node(zero(node))
                for i in self.random.permutation(len(node.parts)):
                    self._node(node.parts[i])
                    if node.scaled:
                        self._emit(Op.SCALE, TYPES[node.type])
                    self._emit(Op.ADD, TYPES[node.type])
            case Opaque():
                raise UnsupportedError(f"opaque: {node.name}")

    def _fold(self, parts: Sequence[Node], type: Type) -> None:
        """Addition commutes, and the deeper of two values first needs the smaller stack."""
        *rest, last = parts
        if not rest:
            self._node(last)
        elif depth(last) > _fold_depth(rest):
            self._node(last)
            self._fold(rest, type)
        else:
            self._fold(rest, type)
            self._node(last)
        if rest:
            self._emit(Op.ADD, TYPES[type])

    def _stretch(self, node: Chain) -> tuple[int, int]:
        if node not in self.stretches:
            k = unfold(node.walk)
            self.order.append(k)
            self.stretches[node] = (self.length, self.length + len(k))
            self.length += len(k)
        return self.stretches[node]


def depth(node: Node) -> int:
    """Values on the stack while a node is computed, its own included."""
    match node:
        case Round():
            return depth(node.node)
        case Join():
            return _fold_depth(node.parts)
        case Unordered():  # above the sum so far
            return 1 + max(depth(p) for p in node.parts)
    return 1


def _fold_depth(parts: Sequence[Node]) -> int:
    first, *rest = (depth(p) for p in parts)
    return reduce(lambda a, b: max(a, b, min(a, b) + 1), rest, first)


def _step_row(step: Step) -> tuple[int, ...]:
    match step:
        case TensorCore():
            accumulator = TYPES[step.accumulator]
            return Kind.TENSOR_CORE, step.fraction_bits, step.terms, step.zero_exponent, accumulator, step.terms
        case Fma():
            return Kind.FMA, 0, 1, 0, TYPES[step.accumulator], 1
        case HalfDot():
            return Kind.HALF_DOT, 0, step.terms, 0, 0, step.terms
