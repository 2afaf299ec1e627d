"""How long a prompt takes to replay: every quantised linear layer of a Llama-3-8B, as another GPU would have computed it.

    python -m bench.replay_prompt --hw a100 --tokens 64 --json results/h200/prompt.json

One block's four fused layers have random weights; its 32 blocks are replayed with them, decoding every weight anew.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from qlab.backends.registry import Problem
from qlab.environment import Environment, collect
from qlab.hardware import gpu
from qlab.inputs import random_activations, random_weight
from qlab.recipes import recipe
from qlab.replay import choose, replay
from qlab.serial import write_json

SCHEMA = "qlab.prompt/1"
BLOCKS = 32
LAYERS = {"qkv_proj": (4096, 6144), "o_proj": (4096, 4096), "gate_up_proj": (4096, 28672), "down_proj": (14336, 4096)}
"""(K, N) of the fused layers."""


@dataclass(frozen=True)
class Prompt:
    schema: str
    environment: Environment
    kernel: str
    replayed: str
    """The GPU whose arithmetic was replayed."""
    engine: str
    tokens: int
    blocks: int
    products: int
    """Multiply-accumulates."""
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hw", default="a100", help="GPU to replay")
    parser.add_argument("--kernel", default="vllm.marlin.awq")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    block = []
    for seed, (k, n) in enumerate(LAYERS.values()):
        weight, x = random_weight(k, n, 128, seed=seed), random_activations(args.tokens, k, seed=seed)
        made = recipe(args.kernel, Problem.of(weight, args.tokens), gpu(args.hw))
        block.append((made, x.to(device), weight.to(device)))
    for layer in block:  # compile and cache the programs
        replay(*layer)
    _wait(device)
    started = time.perf_counter()
    for _ in range(BLOCKS):
        for layer in block:
            replay(*layer)
    _wait(device)
    seconds, engine = time.perf_counter() - started, choose(block[0][1])
    products = BLOCKS * sum(args.tokens * k * n for k, n in LAYERS.values())
    print(f"{args.kernel} of {args.hw} by {engine}: {products / 1e9:.0f} G products in {seconds:.2f} s")
    if args.json:
        write_json(
            args.json,
            Prompt(SCHEMA, collect(), args.kernel, args.hw, engine, args.tokens, BLOCKS, products, round(seconds, 3)),
        )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
