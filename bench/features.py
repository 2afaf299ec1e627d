"""Which parts of a kernel's arithmetic a problem exercises: what a plan of problems is counted by."""

from __future__ import annotations

from bench.problems import Trial
from qlab.backends.registry import Problem
from qlab.hardware import Gpu
from qlab.recipe import Recipe
from qlab.recipes import machete, marlin

ACROSS, WHOLE, LAUNCHES = "stripes across blocks", "whole tiles before stripes", "several launches"
ACT_ORDER, EXPONENTS, BIAS = "act-order", "wide exponents", "bias"
SPLIT, UNORDERED = "stream-K splits", "unordered"


def features(kernel: str, trial: Trial, recipe: Recipe, gpu: Gpu) -> frozenset[str]:
    """Names of what ``trial`` exercises in ``kernel``; ``recipe`` is that of the two."""
    found = {f"group {trial.group_size}", trial.dtype, trial.values}
    if trial.form == "act_order":
        found.add(ACT_ORDER)
    if trial.values in ("wide", "wild", "special"):
        found.add(EXPONENTS)
    if trial.bias:
        found.add(BIAS)
    if not recipe.ordered:
        found.add(UNORDERED)
    if kernel.startswith("vllm.marlin"):
        found |= _marlin(trial.outline(), gpu)
    if kernel.startswith("vllm.machete"):
        found |= _machete(trial.outline(), gpu)
    return frozenset(found)


def _marlin(p: Problem, gpu: Gpu) -> set[str]:
    found: set[str] = set()
    launches = list(marlin.launches(p.M, p.N, p.K, gpu.sms))
    if len(launches) > 1:
        found.add(LAUNCHES)
    for launch in launches:
        found |= {f"tile k{launch.config.thread_k} n{launch.config.thread_n}", f"rows {launch.tile_rows}"}
        group_size = 0 if p.group_size == p.K else p.group_size
        tiles = list(marlin.pieces(launch, p.N, p.K, group_size, gpu.sms))
        most = max(len(cut) for *_, cut in tiles)
        if most > 1:
            found |= {ACROSS, f"{most} pieces" if most < 4 else "4 pieces or more"}
        if most > 1 and whole_tiles(len(tiles), gpu.sms):
            found.add(WHOLE)
    return found


def whole_tiles(tiles: int, sms: int) -> int:
    """Output tiles that single blocks of Marlin sum before the stripes begin (marlin_template.h)."""
    rest = tiles % sms
    if tiles <= sms:
        return 0
    return tiles - (rest + sms if 3 * rest <= sms else rest)


def _machete(p: Problem, gpu: Gpu) -> set[str]:
    s = machete.schedule(p.M, p.N, p.K)
    found = {f"tile {s.columns}x{s.tokens}"}
    if any(len(t.pieces) > 1 for t in machete.partition(p.M, p.N, p.K, gpu.sms)):
        found.add(SPLIT)
    return found
