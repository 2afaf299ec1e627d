"""The parts of a scheme that are rules: how K is cut for each output, how a piece is dealt to warps, what is done with a bias.

A rule is frozen data with what it needs of the problem's shape; only the number of SMs comes from outside, so that it can be
swapped alone. Families with cuts of their own (Marlin, Machete) define them in their files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlab.recipe import Node, Output, Run, Tile, Walk

CHUNK = 32
"""Rows of one dot, and of a warp's turn. Pieces are whole chunks, but for the one with the last k where K is not."""


Span = tuple[int, int]
output = lru_cache(Output)
"""The output rule, one object for all tiles."""


class Area(NamedTuple):
    """A rectangle of the output whose sums are cut alike."""

    rows: Span
    columns: Span
    pieces: tuple[Walk, ...]
    """Every k once: each piece is one block's, its k in the order in which it is walked."""
    atomics: bool = True
    """Whether a kernel that asks for leave may join the pieces by atomics here."""


class Cut(ABC):
    """Which outputs share which pieces of K."""

    uses_sms: ClassVar[bool] = False
    """Whether the areas depend on the number of SMs."""

    def blocks(self, sms: int) -> int:
        """Thread blocks to which the pieces are dealt end to end; 0 where a piece has one of its own."""
        return sms if self.uses_sms else 0

    @abstractmethod
    def areas(self, sms: int) -> Iterator[Area]:
        """Rectangles that cover the output [M, N] once, for a GPU with ``sms`` SMs. May raise UnsupportedError."""

    @abstractmethod
    def text(self, sms: int) -> str:
        """A few words for a table: ``8 interleaved slices``."""


class Warps(ABC):
    """How many warp-level accumulators share a piece: its k are dealt to them in turns of CHUNK, and their sums joined in fp32.

    They join as Marlin's do (marlin_template.h, thread_block_reduce): ``acc0 + (acc1 + (acc3 + acc2))``.
    """

    uses_sms: ClassVar[bool] = False

    @abstractmethod
    def bands(self, sms: int) -> tuple[tuple[int, int, int], ...]:
        """(first row, row behind the last, accumulators); empty where every row has one."""

    @abstractmethod
    def text(self, sms: int) -> str:
        """A few words for a table: ``4 warp rows``."""


class Bias(ABC):
    """What is done with a bias, behind the sum and its rounding."""

    @abstractmethod
    def tiles(self, rows: Span, columns: Span, tree: Node, scale: bool) -> Iterator[Tile]:
        """A rectangle of the output under its rule, cut where parts of it differ; ``scale``: the output is scaled."""

    @abstractmethod
    def text(self) -> str:
        """A few words for a table: ``added``."""


def span(start: int, stop: int) -> Walk:
    """The walk over ``start:stop``."""
    return (Run(start, stop - start),)


@dataclass(frozen=True)
class Ranges(Cut):
    """One and the same cut for all outputs [m, n]: contiguous ranges of k, ascending."""

    m: int
    n: int
    ranges: tuple[Span, ...]
    name: str = "slices"
    """What the ranges are called: ``slices``, ``blocks of 128``."""

    @classmethod
    def whole(cls, m: int, k: int, n: int) -> Ranges:
        """K in one piece."""
        return cls(m, n, ((0, k),))

    def areas(self, sms: int) -> Iterator[Area]:
        yield Area((0, self.m), (0, self.n), tuple(span(*r) for r in self.ranges))

    def text(self, sms: int) -> str:
        return f"{len(self.ranges)} {self.name}" if len(self.ranges) > 1 else "K in one piece"


@dataclass(frozen=True)
class OneChain(Warps):
    """One accumulator for each piece."""

    def bands(self, sms: int) -> tuple[tuple[int, int, int], ...]:
        return ()

    def text(self, sms: int) -> str:
        return "one accumulator"


@dataclass(frozen=True)
class PlainBias(Bias):
    """No bias inside the call, or ``RN(y + bias)`` at its end."""

    rule: Literal["none", "added"] = "none"

    def tiles(self, rows: Span, columns: Span, tree: Node, scale: bool) -> Iterator[Tile]:
        yield Tile(rows, columns, tree, output(scale, self.rule))

    def text(self) -> str:
        return "no bias" if self.rule == "none" else "RN(y + bias)"


def pieces_text(cut: Cut, sms: int) -> str:
    """``2 to 5 pieces``: into how many pieces the outputs' sums are cut."""
    counts = {len(a.pieces) for a in cut.areas(sms)}
    least, most = min(counts), max(counts)
    return f"{least} to {most} pieces" if least < most else f"{most} piece{'s' * (most > 1)}"


def dot_order(rows: int, k_width: int) -> NDArray[np.int64]:
    """The k of one ``tl.dot`` as mma.sync m16n8k16 takes them: 16 to an instruction, its first half before its second.

    ``k_width`` is the kWidth of both operands' layout (16-bit elements): of each ``8 * k_width`` k, lane t of four holds the
    ``k_width`` from ``k_width * t`` on, and as many ``4 * k_width`` further. Instruction j takes the j-th pair of those as its
    k 2t and 2t + 1, the j-th pair of these as its k 2t + 8 and 2t + 9 (Triton, MMAv2.cpp). kWidth 2 is the natural order.
    """
    k = np.arange(rows).reshape(-1, 2, 4, k_width // 2, 2)  # [8 * k_width k, half, lane, instruction, pair]
    return k.transpose(0, 3, 1, 2, 4).ravel()


def dealt_to_lanes(order: NDArray[np.integer[Any]], lanes: int) -> list[NDArray[np.integer[Any]]]:
    """The k of each lane, as fragments of mma.sync deal them: pairs in turn, so that lane c of four has 2c and 2c + 1 of 8."""
    lane = np.arange(len(order)) // 2 % lanes
    return [order[lane == c] for c in range(lanes)]
