"""How far do an A100 and an H100 lie apart, and why? The same kernels replayed with one part exchanged at a time.

    python -m bench.cross_hardware --json results/cross-hardware.json

For every shape: Marlin on both GPUs; Marlin on an H100's tensor core with the tiles and stripes of 108 and of 132 SMs; awq_gemm
on both; and, for scale, awq_gemm against Marlin on one H100. Weights and inputs are made from seeds. Everything is a replay: of
an H100 it is proved (results/*/proof.json), of an A100 it is a prediction.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from qlab import compare
from qlab.backends.registry import Problem
from qlab.environment import Environment, collect
from qlab.hardware import gpu
from qlab.inputs import random_activations, random_weight
from qlab.recipe import Recipe
from qlab.recipes import recipe
from qlab.replay import replay
from qlab.serial import write_json

SCHEMA = "qlab.cross_hardware/1"
SHAPES = (
    (1, 4096, 1024),
    (16, 4096, 512),
    (64, 4096, 256),
    (100, 2048, 256),
    (1, 14336, 512),
    (1, 4096, 4096),
    (16, 4096, 4096),
)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Pair:
    """Two paths on one input."""

    what: str
    relative_l2: float
    """||y_a - y_b|| / ||exact||."""
    outputs: int
    differing: int
    """Outputs whose bits differ."""


@dataclass(frozen=True)
class Shape:
    M: int
    K: int
    N: int
    group_size: int
    dtype: str
    seed: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Result:
    schema: str
    environment: Environment
    shapes: tuple[Shape, ...]


def measure(m: int, k: int, n: int, dtype: str, seed: int) -> Shape:
    """Every pair on one AWQ weight in groups of 128."""
    weight = random_weight(k, n, 128, dtype=DTYPES[dtype], seed=seed)
    x = random_activations(m, k, dtype=DTYPES[dtype], seed=seed + 1)
    problem, a100, h100 = Problem.of(weight, m), gpu("a100"), gpu("h100")
    marlin = {
        "A100": recipe("vllm.marlin.awq", problem, a100),
        "H100": recipe("vllm.marlin.awq", problem, h100),
        "108 SMs": recipe("vllm.marlin.awq", problem, replace(h100, sms=a100.sms)),
    }
    pairs = {
        "Marlin, A100 to H100": (marlin["A100"], marlin["H100"]),
        "Marlin, 108 to 132 SMs, one tensor core": (marlin["108 SMs"], marlin["H100"]),
        "Marlin, one order, A100's to H100's core": (marlin["A100"], marlin["108 SMs"]),
    }
    if dtype == "fp16":
        awq = {g.key: recipe("vllm.awq_gemm", problem, g) for g in (a100, h100)}
        pairs["awq_gemm, A100 to H100"] = (awq["a100"], awq["h100"])
        pairs["awq_gemm to Marlin, both H100"] = (awq["h100"], marlin["H100"])
    exact = x.double() @ weight.dequantize(torch.float64)
    norm = float(exact.square().sum())
    outputs = {r.hash: replay(r, x, weight) for both in pairs.values() for r in both}
    return Shape(m, k, n, 128, dtype, seed, tuple(_pair(what, *both, outputs, norm) for what, both in pairs.items()))


def _pair(what: str, a: Recipe, b: Recipe, outputs: dict[str, torch.Tensor], norm: float) -> Pair:
    first, second = outputs[a.hash], outputs[b.hash]
    apart = compare.Moments(compare.moments(first, second.double()).squared_error, norm)
    return Pair(what, apart.relative_l2, first.numel(), compare.differing(first, second))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shapes = tuple(measure(*shape, dtype, 100 + i) for dtype in DTYPES for i, shape in enumerate(SHAPES))
    if args.json:
        write_json(args.json, Result(SCHEMA, collect(), shapes))
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("M, K, N", "", "pair"):
        table.add_column(column, no_wrap=True)
    for column in ("rel. L2", "differ"):
        table.add_column(column, justify="right", no_wrap=True)
    for s in shapes:
        for p in s.pairs:
            table.add_row(f"{s.M}, {s.K}, {s.N}", s.dtype, p.what, f"{p.relative_l2:.1e}", f"{p.differing / p.outputs:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
