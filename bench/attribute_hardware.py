"""Why the same kernel gives other bits on an A100 than on an H100: tensor core, number of SMs, or another kernel altogether.

    python -m bench.attribute_hardware --json results/attribution/hardware.json

For every shape one random layer, on which each pair of paths is explained: Marlin, awq_gemm and our Triton kernels on both
GPUs, and what vLLM dispatches for awq_marlin on them (Marlin and Machete). Everything is replayed; of an A100 it is a
prediction.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path as File

import torch

from qlab.attribution.explain import OneWeight, explain
from qlab.attribution.result import Explained
from qlab.attribution.subject import Layer
from qlab.engine.path import Path
from qlab.environment import Environment, collect
from qlab.inputs import random_activations, random_weight
from qlab.serial import read_json, write_json

SCHEMA = "qlab.attributed_hardware/1"
SHAPES = ((1, 4096, 4096), (16, 4096, 4096), (64, 4096, 4096), (1, 4096, 1024), (1, 14336, 4096), (48, 4096, 6144))
PAIRS = (
    ("awq_marlin@a100", "awq_marlin@h100"),
    ("awq_marlin@a100:vllm", "awq_marlin@h100:vllm"),
    ("awq@a100", "awq@h100"),
    ("triton.awq_gemm@a100", "triton.awq_gemm@h100"),
    ("triton.awq_gemm.splitk@a100", "triton.awq_gemm.splitk@h100"),
    ("awq@h100", "awq_marlin@h100"),
)
GROUP, ROWS = 128, 64
"""Rows of a group, and of the inputs of a shape: a single row's few differing outputs would say little."""


@dataclass(frozen=True)
class Hardware:
    """Every pair on every shape."""

    schema: str
    environment: Environment
    group_size: int
    found: tuple[Explained, ...]

    @classmethod
    def read(cls, path: File) -> Hardware:
        """Raises QlabError naming the file when it is missing, damaged or of another schema."""
        return read_json(cls, path, SCHEMA)


def run(shapes: tuple[tuple[int, int, int], ...], pairs: tuple[tuple[str, str], ...], device: torch.device) -> Hardware:
    """Explain every pair on every shape."""
    found = []
    for m, k, n in shapes:
        weight = random_weight(k, n, GROUP, seed=1, name=f"{m},{k},{n}").to(device)
        x = random_activations(max(m, ROWS // m * m), k, seed=2).to(device)
        for texts in pairs:
            a, b = map(Path.parse, texts)
            where = f"random layer, M,K,N = {m},{k},{n}, {len(x)} rows in calls of {m}, groups of {GROUP}, asymmetric"
            result = explain(Layer(weight, x, a, b, m=m), a, b, OneWeight(), where=where)
            print(f"{where}: {a} to {b}: {result.seconds} s", flush=True)
            found.append(result)
    return Hardware(SCHEMA, collect(), GROUP, tuple(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=File, required=True)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many shapes")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_json(arguments.json, run(SHAPES[: arguments.shapes], PAIRS, device))


if __name__ == "__main__":
    main()
