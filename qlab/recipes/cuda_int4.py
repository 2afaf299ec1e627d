"""qlab's CUDA INT4 kernels (csrc/int4_mma.cuh, csrc/int4_wgmma.cuh): Marlin's recipe, and two of their own.

Both of those have one chain over each of a few contiguous slices of K, joined in fp32 from the first to the last, weights that
were multiplied out before and rounded once, whole columns too, and rows sorted by group under act-order. ``cuda.split`` takes
as many slices as are fastest for M, K and N on the GPU (tuned.py), ``cuda.batch_invariant`` a number that K and N alone decide.
Tiles, and which of the two kernels runs, change no bit.

Where the output tiles make no whole number of waves over the SMs, ``cuda.split`` may lay the last of them end to end and share
them out evenly, as Marlin does (stream-K, arXiv 2301.03598): then the tile and the number of SMs are part of the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from qlab.backends.registry import Problem
from qlab.hardware import Gpu
from qlab.recipes import marlin, tuned
from qlab.recipes.build import Build
from qlab.recipes.rules import Area, Cut, Ranges, pieces_text, span
from qlab.recipes.scheme import Scheme

BLOCK = 128
"""Rows of K that stripes are multiples of."""
ROW_TILES = 8
"""Row tiles that walk along the columns together."""
MOST_SHARED = 3
"""The last wave is shared out together with one more unless it has a tile for every third thread block, as Marlin does."""


@dataclass(frozen=True)
class Striped(Cut):
    """Output tiles of x [m, k] and a weight [k, n] in whole waves over the SMs; the K of the rest is cut into equal stripes.

    ``per_sm`` thread blocks run on an SM at once, and there are as many stripes.
    """

    m: int
    k: int
    n: int
    tile_rows: int
    tile_columns: int
    per_sm: int = 1
    uses_sms = True

    def blocks(self, sms: int) -> int:
        return sms * self.per_sm

    def areas(self, sms: int) -> Iterator[Area]:
        rows = [(top, min(top + self.tile_rows, self.m)) for top in range(0, self.m, self.tile_rows)]
        columns = [(left, min(left + self.tile_columns, self.n)) for left in range(0, self.n, self.tile_columns)]
        tiles = [(r, c) for i in range(0, len(rows), ROW_TILES) for c in columns for r in rows[i : i + ROW_TILES]]
        length, at_once = -(-self.k // BLOCK), self.blocks(sms)
        striped = len(tiles)
        if striped > at_once:
            striped %= at_once
            if 0 < striped * MOST_SHARED <= at_once:
                striped += at_once
        stripe = -(-length * striped // at_once)
        for i, (row, column) in enumerate(tiles):
            first = (i - (len(tiles) - striped)) * length
            cuts = range((first // stripe + 1) * stripe, first + length, stripe) if first >= 0 else ()
            ends = [0, *((c - first) * BLOCK for c in cuts), self.k]
            yield Area(row, column, tuple(span(a, b) for a, b in pairwise(ends)))

    def text(self, sms: int) -> str:
        stripes = f"{self.blocks(sms)} stripes over {sms} SMs"
        return f"{stripes}, tiles of {self.tile_rows} x {self.tile_columns}: {pieces_text(self, sms)}"


def cut(choice: tuned.Choice, m: int, k: int, n: int) -> Cut:
    """How K is cut for a choice of the table: stripes where it says how many an SM has, else slices."""
    if per_sm := int(choice.get("striped", 0)):
        return Striped(m, k, n, int(choice.get("rows", 128)), int(choice.get("columns", 256)), per_sm)
    return Ranges(m, n, tuned.ranges(k, choice.slices))


def sliced(problem: Problem, gpu: Gpu, build: Build, *, kernel: str) -> Scheme:
    """The scheme of ``kernel``, whose table says how many slices K has."""
    m, k, n = problem.M, problem.K, problem.N
    choice = tuned.choice(kernel, gpu.key, m, k, n)
    return replace(Scheme.on(gpu, cut(choice, m, k, n)), rows="sorted" if problem.act_order else "natural")


KERNELS = {
    "cuda.marlin": marlin.scheme,
    "cuda.split": partial(sliced, kernel="cuda.split"),
    "cuda.batch_invariant": partial(sliced, kernel="cuda.batch_invariant"),
}
