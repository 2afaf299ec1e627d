"""Random programs of every step and operation, with operands that make each of them matter."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from qlab.replay.program import Op, Program
from qlab.replay.step import Bits16

STEPS: dict[str, tuple[int, ...]] = {
    "volta": (0, 23, 4, -131, 0, 4),
    "ampere": (0, 24, 8, -132, 0, 8),
    "hopper": (0, 25, 16, -133, 0, 16),
    "hopper as two": (0, 25, 8, -133, 0, 8),
    "ampere, fp16 accumulator": (0, 24, 8, -20, 1, 8),
    "hopper, fp16 accumulator": (0, 25, 16, -21, 1, 16),
    "no fast form": (0, 26, 12, -133, 0, 12),
    "wide": (0, 40, 32, -140, 0, 32),
    "fma": (1, 0, 1, 0, 0, 1),
    "fma, fp16": (1, 0, 1, 0, 1, 1),
    "half dot": (2, 0, 8, 0, 0, 8),
}
FP16_ONLY = {"ampere, fp16 accumulator", "hopper, fp16 accumulator", "fma, fp16", "half dot"}
KINDS = ("normal", "wide", "rare specials", "any bits")
ROWS, COLUMNS, DEPTHS = (1, 2, 3, 5, 7, 9, 16, 17, 31, 33, 40, 70), (1, 5, 64, 100, 128, 130, 200, 257), (64, 96, 160)


@dataclass(frozen=True, eq=False)
class Case:
    program: Program
    x: Bits16
    w: Bits16
    scales: Bits16
    group: NDArray[np.int32]
    bias: Bits16
    bf16: bool

    @property
    def operands(self) -> tuple[Bits16, Bits16, Bits16, NDArray[np.int32], Bits16]:
        return self.x, self.w, self.scales, self.group, self.bias


def random_bits(shape: tuple[int, ...], bf16: bool, kind: str, rng: np.random.Generator) -> Bits16:
    if kind in ("normal", "rare specials"):
        values = torch.from_numpy(rng.standard_normal(shape)).to(torch.bfloat16 if bf16 else torch.float16)
        bits = values.view(torch.int16).numpy().view(np.uint16).copy()
    else:
        bits = rng.integers(0, 1 << 16, shape).astype(np.uint16)
    field = np.uint16(0x7F80 if bf16 else 0x7C00)
    if kind == "wide":
        low, high, shift = (97, 147, 7) if bf16 else (1, 23, 10)
        bits = (bits & ~field) | (rng.integers(low, high, shape).astype(np.uint16) << shift)
        bits[rng.random(shape) < 0.1] &= 0x8000
    if kind == "rare specials":
        bits[rng.random(shape) < 0.0005] = field
        bits[rng.random(shape) < 0.0003] = field | 1
        bits[rng.random(shape) < 0.01] &= ~field
    return bits


def random_case(seed: int, raw: bool = False) -> Case:
    """A program whose regions split the output in up to four, each with up to five chains over slices of shuffled k.

    ``raw``: sums are joined in fp32 and left so, which shows every bit of the chains.
    """
    rng = np.random.default_rng(seed)
    bf16, kind = bool(rng.integers(2)), KINDS[rng.integers(len(KINDS))]
    m, n, k = (int(rng.choice(sizes)) for sizes in (ROWS, COLUMNS, DEPTHS))
    names = [name for name in rng.choice(list(STEPS), 3) if not (bf16 and name in FP16_ONLY)] or ["hopper"]
    steps = [STEPS[name] for name in names]
    rows, columns = sorted({0, m, int(rng.integers(0, m + 1))}), sorted({0, n, int(rng.integers(0, n + 1))})
    ops: list[tuple[int, int, int, int]] = []
    regions: list[tuple[int, ...]] = []
    for m0, m1 in pairwise(rows):
        for n0, n1 in pairwise(columns):
            start = len(ops)
            ops += _region(steps, 3 * k, (2 if bf16 else 1) * (not raw), rng)
            regions.append((m0, m1, n0, n1, start, len(ops)))
    program = Program(
        np.concatenate([rng.permutation(k) for _ in range(3)]).astype(np.int32),
        np.array(steps, np.int32),
        np.array(ops, np.int32),
        np.array(regions, np.int32),
    )
    x, w = random_bits((m, k), bf16, kind, rng), random_bits((k, n), bf16, "normal" if "rare" in kind else kind, rng)
    scales, bias = random_bits((4, n), bf16, "normal", rng), random_bits((n,), bf16, "normal", rng)
    return Case(program, x, w, scales, rng.integers(0, 4, k).astype(np.int32), bias, bf16)


def _region(steps: list[tuple[int, ...]], length: int, own: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    ops: list[tuple[int, int, int, int]] = []
    depth = 0

    def add() -> tuple[int, int, int, int]:
        return int(Op.ADD), int(rng.choice([0, 0, own])), 0, 0

    for _ in range(rng.integers(1, 6)):
        if depth > 1 and rng.random() < 0.5:
            ops.append(add())
            depth -= 1
        step = int(rng.integers(len(steps)))
        terms = steps[step][5]
        most = length // terms if rng.random() < 0.3 else min(5, length // terms)
        taken = int(rng.integers(0, most + 1)) * terms
        start = int(rng.integers(0, length - taken + 1))
        ops.append((int(Op.CHAIN), step, start, start + taken))
        depth += 1
    ops += [add() for _ in range(depth - 1)]
    if own == 0:
        return ops
    ops.append((int(Op.ROUND), own, 0, 0))
    last = int(rng.integers(4))
    return [*ops, *([(int(Op.ROUND) + last, own, 0, 0)] if last else [])]
