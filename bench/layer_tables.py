"""Figures of the layers' benchmark, from its file alone: geometric means over layers, shares of the limits, targets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.layer_kernels import MACHETE, MARLIN, OURS, STRONGEST, TRITON, matches
from bench.layer_results import Cell, Result, is_block
from bench.model_layers import MODELS

LIBRARY = ("cublas", "matmul")
REFERENCES: dict[str, tuple[str, ...]] = {
    "best of Marlin, Machete, ExLlama": STRONGEST,
    "Marlin": MARLIN,
    "Machete": MACHETE,
    "cuBLAS": LIBRARY,
    "awq_gemm": ("vllm.awq_gemm",),
}
"""What is compared against: the fastest kernel of each set of globs, cell by cell."""
CONTENDERS: dict[str, tuple[str, ...]] = {"best of ours": OURS, "our Triton": TRITON}
MIDDLE = (30e6, 70e6)
"""Bytes of the layers whose share of the memory limit has a target."""


@dataclass(frozen=True)
class Mean:
    """A geometric mean over layers."""

    value: float
    layers: int
    """Layers in it: those where both sides have a speed."""
    missing: int
    """Layers where one side has none."""
    lowest: float
    lowest_layer: str


def layers(r: Result, m: int) -> list[Cell]:
    """The cells of single layers with m rows."""
    return [c for c in r.cells if not is_block(c) and m == c.M]


def rows(r: Result) -> tuple[int, ...]:
    return tuple(sorted({c.M for c in r.cells}))


def fastest(cell: Cell, globs: tuple[str, ...]) -> float | None:
    """Smallest median among the kernels that match; None where none has a speed."""
    return min((e.median for e in cell.entries if e.median > 0 and matches(e.kernel, globs)), default=None)


def ratio(cells: Iterable[Cell], ours: tuple[str, ...], theirs: tuple[str, ...]) -> Mean | None:
    """Geometric mean of their fastest over our fastest: above 1 ours is faster. None without a layer that has both."""
    found: dict[str, float] = {}
    missing = 0
    for c in cells:
        a, b = fastest(c, ours), fastest(c, theirs)
        if a and b:
            found[f"{c.model}.{c.layer}"] = b / a
        else:
            missing += 1
    return _mean(found, missing)


def memory_share(r: Result, m: int, globs: tuple[str, ...]) -> Mean | None:
    """Geometric mean of the best share of the copy ceiling over the layers of 30 to 70 MB."""
    found: dict[str, float] = {}
    missing = 0
    for c in layers(r, m):
        own = [e for e in c.entries if e.median > 0 and matches(e.kernel, globs)]
        if not MIDDLE[0] <= weight_bytes(r, c) <= MIDDLE[1]:
            continue
        if own:
            found[f"{c.model}.{c.layer}"] = max(e.of_memory for e in own)
        else:
            missing += 1
    return _mean(found, missing)


def weight_bytes(r: Result, c: Cell) -> int:
    """Bytes of a layer's weight with its scales and zero points."""
    group = c.K if r.group_size == -1 else r.group_size
    groups = c.K // group
    return c.K * c.N // 2 + groups * c.N * 2 + (0 if r.symmetric else groups * c.N // 2)


def limit(r: Result, c: Cell) -> float:
    """Seconds that a cell takes at the roofline of the run that measured it."""
    ceilings, moved = r.runs[c.run].ceilings, weight_bytes(r, c) + 2 * c.M * (c.K + c.N)
    return max(moved / ceilings.copy, 2 * c.M * c.K * c.N / ceilings.matmul)


@dataclass(frozen=True)
class Target:
    """One target of the project and what was reached."""

    what: str
    rows: tuple[int, ...]
    aim: float
    reached: float | None
    """None where nothing was measured."""
    note: str

    @property
    def met(self) -> bool:
        return self.reached is not None and self.reached >= self.aim


def targets(r: Result) -> list[Target]:
    """Every target with what was reached; of several numbers of rows, the worst counts."""
    best, triton = OURS, TRITON
    found = [
        _ratio_target(r, "best of ours against the best of Marlin, Machete and ExLlama", m, best, STRONGEST, 1.3)
        for m in ((1,), (16,), (64,), (256,), (1024, 4096))
    ]
    for m in (1, 16):
        mean = memory_share(r, m, best)
        note = _note(mean) if mean else "not measured"
        found.append(Target("share of the memory limit, layers of 30 to 70 MB", (m,), 0.85, mean and mean.value, note))
    for m, aim in (((64,), 2.0), ((256,), 0.9), ((1024, 4096), 0.93)):
        found.append(_ratio_target(r, "best of ours against cuBLAS fp16", m, best, LIBRARY, aim))
    every = rows(r)
    found.append(
        _ratio_target(r, "our Triton against the better of Marlin and Machete", every, triton, (*MARLIN, *MACHETE), 1.0)
    )
    slowest = [x for m in every if (x := ratio(layers(r, m), best, ("vllm.awq_gemm",)))]
    low = min(slowest, key=lambda x: x.lowest, default=None)
    note = f"lowest on {low.lowest_layer}" if low else "not measured"
    found.append(Target("best of ours against awq_gemm, the slowest cell", every, 1.0, low and low.lowest, note))
    return found


def _ratio_target(r: Result, what: str, m: Sequence[int], ours: tuple[str, ...], theirs: tuple[str, ...], aim: float) -> Target:
    means = [(x, mean) for x in m if (mean := ratio(layers(r, x), ours, theirs))]
    if not means:
        return Target(what, tuple(m), aim, None, "not measured")
    at, worst = min(means, key=lambda pair: pair[1].value)
    where = f"at M = {at}: " if len(m) > 1 else ""
    return Target(what, tuple(m), aim, worst.value, where + _note(worst))


def _note(mean: Mean) -> str:
    left = f", {mean.missing} without a speed" if mean.missing else ""
    return f"{mean.layers} layers{left}; lowest {mean.lowest:.2f} on {mean.lowest_layer}"


def _mean(found: dict[str, float], missing: int) -> Mean | None:
    if not found:
        return None
    lowest = min(found, key=lambda name: found[name])
    value = math.exp(sum(map(math.log, found.values())) / len(found))
    return Mean(value, len(found), missing, found[lowest], lowest)


def order(r: Result) -> list[tuple[str, str]]:
    """(model, layer) of every cell, the known models' first, in their order, blocks behind their layers."""
    keys = dict.fromkeys((c.model, c.layer) for c in r.cells)
    models = [*MODELS, *dict.fromkeys(m for m, _ in keys if m not in MODELS)]
    return [key for model in models for key in keys if key[0] == model]


def reasons(r: Result) -> dict[str, dict[str, int]]:
    """Why kernels have no speed: by reason the kernels, each with its number of cells."""
    found: dict[str, dict[str, int]] = {}
    for e in (e for c in r.cells for e in c.entries if e.reason):
        names = found.setdefault(e.reason, {})
        names[e.kernel] = names.get(e.kernel, 0) + 1
    return found
