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
MARLIN, TILES, CORE = (
    "Marlin, A100 to H100",
    "Marlin, 108 to 132 SMs, one tensor core",
    "Marlin, one order, A100's to H100's core",
)
AWQ, KERNELS = "awq_gemm, A100 to H100", "awq_gemm to Marlin, both H100"
PREDICTED = {
    (1, 4096, 1024): {MARLIN: (1.4e-5, 0.0020), TILES: (1.5e-5, 0.0029), AWQ: (0.0, 0.0), KERNELS: (3.2e-4, 0.449)},
    (16, 4096, 512): {MARLIN: (1.0e-5, 0.0013), TILES: (1.4e-7, 0.0010), AWQ: (2.3e-5, 0.0016), KERNELS: (3.3e-4, 0.419)},
    (64, 4096, 256): {MARLIN: (9.7e-6, 0.0008), TILES: (6.5e-6, 0.0008), AWQ: (1.3e-5, 0.0014), KERNELS: (3.2e-4, 0.403)},
    (100, 2048, 256): {MARLIN: (2.9e-6, 0.0008), TILES: (0.0, 0.0), AWQ: (1.7e-5, 0.0012), KERNELS: (3.3e-4, 0.419)},
    (1, 14336, 512): {MARLIN: (9.5e-6, 0.0020), TILES: (9.5e-6, 0.0020), AWQ: (4.3e-5, 0.0039), KERNELS: (3.1e-4, 0.434)},
}
"""What an earlier model of the kernels, never held against one, said of fp16 on other random inputs: relative L2 distance and
share of the outputs that differ."""
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
    predicted: tuple[float, ...] = ()
    """The earlier model's relative L2 distance and share of differing outputs; empty where it said nothing."""


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
        MARLIN: (marlin["A100"], marlin["H100"]),
        TILES: (marlin["108 SMs"], marlin["H100"]),
        CORE: (marlin["A100"], marlin["108 SMs"]),
    }
    if dtype == "fp16":
        awq = {g.key: recipe("vllm.awq_gemm", problem, g) for g in (a100, h100)}
        pairs[AWQ] = (awq["a100"], awq["h100"])
        pairs[KERNELS] = (awq["h100"], marlin["H100"])
    exact = x.double() @ weight.dequantize(torch.float64)
    norm = float(exact.square().sum())
    outputs = {r.hash: replay(r, x, weight) for both in pairs.values() for r in both}
    said = PREDICTED.get((m, k, n), {}) if dtype == "fp16" else {}
    found = (_pair(what, *both, outputs, norm, said.get(what, ())) for what, both in pairs.items())
    return Shape(m, k, n, 128, dtype, seed, tuple(found))


def _pair(what: str, a: Recipe, b: Recipe, outputs: dict[str, torch.Tensor], norm: float, predicted: tuple[float, ...]) -> Pair:
    first, second = outputs[a.hash], outputs[b.hash]
    apart = compare.Moments(compare.moments(first, second.double()).squared_error, norm)
    return Pair(what, apart.relative_l2, first.numel(), compare.differing(first, second), predicted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shapes = tuple(measure(*shape, dtype, 100 + i) for dtype in DTYPES for i, shape in enumerate(SHAPES))
    if args.json:
        write_json(args.json, Result(SCHEMA, collect(), shapes))
    print(f"{'M, K, N':16} {'pair':40} {'differ':>8} {'rel. L2':>9}")
    for s in shapes:
        for p in s.pairs:
            print(f"{f'{s.M}, {s.K}, {s.N}':16} {p.what:40} {p.differing / p.outputs:8.2%} {p.relative_l2:9.1e} {s.dtype}")


if __name__ == "__main__":
    main()
