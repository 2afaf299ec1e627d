"""Prove the replayed step on this machine's tensor cores: single instructions on chosen bits, every output compared.

    python -m bench.prove_step --json results/h100/step.json [--outputs 10000000] [--seed 0]

For each instruction (fp16 and bf16 inputs, fp32 and fp16 accumulators, m16n8k16 and m16n8k8) and each family of inputs, what
``mma.sync`` computes is compared with the replay of this GPU's step: on the GPU by the CUDA engine's arithmetic in both of its
forms, and on the CPU by the engine that has no GPU code, which takes every output of an fp32 accumulator and a part of the
fp16 ones. ``--speed`` adds the CUDA engine's throughput over whole GEMMs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qlab.environment import Environment, collect
from qlab.errors import QlabError
from qlab.hardware import AMPERE, HOPPER, Step, detect
from qlab.replay import cuda, probe
from qlab.replay.program import Program
from qlab.replay.step import fused_dot_add, half_dot_add
from qlab.serial import write_json

SCHEMA = "qlab.step/1"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
OUTPUTS_PER_TILE = 128
HALF_ON_CPU = 200_000
"""Outputs of fp16 accumulators that numpy checks too, per family."""
EXAMPLES = 3


@dataclass(frozen=True)
class Example:
    """One output that differs, as bits in hexadecimal."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    c: str
    tensor_core: str
    replay: str


@dataclass(frozen=True)
class Row:
    """One instruction on one family of inputs."""

    instruction: str
    dtype: str
    accumulator: str
    family: str
    outputs: int
    mismatches: int
    """Outputs of the tensor core that the replay does not give."""
    mismatches_of_zero: int
    """Those of them where both are zero and only the sign differs."""
    fast: int
    """Fused sums that took the engine's fast form."""
    fast_mismatches: int
    """Outputs in which the engine's two forms differ."""
    checked_on_cpu: int
    cpu_mismatches: int
    """Outputs in which the CPU's engine and the CUDA engine differ."""
    nan: int
    infinite: int
    zero: int
    distinct: int
    """Different results: a family whose outputs are all alike proves little."""
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Speed:
    """The CUDA engine over one chain of K per output."""

    step: str
    dtype: str
    M: int
    K: int
    N: int
    chains: int
    milliseconds: float
    """Median of the runs."""
    macs_per_second: float


@dataclass(frozen=True)
class Proof:
    schema: str
    environment: Environment
    gpu: str
    fraction_bits: int
    terms: int
    rows: tuple[Row, ...]
    speed: tuple[Speed, ...]


@dataclass(frozen=True)
class Shape:
    """The operands of one launch: tiles of a [16, k] and b [k, 8]."""

    tiles: int
    k: int
    dtype: torch.dtype
    half: bool
    generator: torch.Generator

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def bits(self, *size: int, width: int = 16) -> Tensor:
        """Uniform random bits."""
        low = torch.randint(0, 1 << 16, (self.tiles, *size), device=self.device, generator=self.generator)
        if width == 16:
            return low.to(torch.int16)
        high = torch.randint(0, 1 << 16, (self.tiles, *size), device=self.device, generator=self.generator)
        return (high << 16 | low).to(torch.int32)

    def normal(self, *size: int) -> Tensor:
        return torch.randn((self.tiles, *size), device=self.device, generator=self.generator)

    def share(self, p: float, *size: int) -> Tensor:
        return torch.rand((self.tiles, *size), device=self.device, generator=self.generator) < p

    def input(self, values: Tensor) -> Tensor:
        return values.to(self.dtype).view(torch.int16)

    def accumulator(self, values: Tensor) -> Tensor:
        return values.half().view(torch.int16) if self.half else values.float().view(torch.int32)

    def exponents(self, bits: Tensor, low: int, high: int) -> Tensor:
        """16-bit inputs with exponents drawn from low to high."""
        shift, bias = (7, 127) if self.dtype == torch.bfloat16 else (10, 15)
        drawn = torch.randint(low + bias, high + bias + 1, bits.shape, device=self.device, generator=self.generator)
        kept = bits.to(torch.int32) & 0xFFFF & ~((0xFF if shift == 7 else 0x1F) << shift)
        return (kept | drawn.to(torch.int32) << shift).to(torch.int16)


Operands = tuple[Tensor, Tensor, Tensor]


def normal(s: Shape) -> Operands:
    return s.input(s.normal(16, s.k)), s.input(s.normal(s.k, 8)), s.accumulator(s.normal(16, 8) * 4)


def any_bits(s: Shape) -> Operands:
    """Every pattern, NaN and infinities among them, but rarer, so that not every sum is one of them."""
    a, b, c = s.bits(16, s.k), s.bits(s.k, 8), s.bits(16, 8, width=16 if s.half else 32)
    field = 0x7F80 if s.dtype == torch.bfloat16 else 0x7C00
    if s.half or s.dtype == torch.bfloat16:  # large products overflow in most sums: one operand is below 2 in most of them
        b[s.share(0.97, s.k, 8)] &= ~0x4000
        a[s.share(0.8 if s.half else 0, 16, s.k)] &= ~0x4000
    for x, size in ((a, (16, s.k)), (b, (s.k, 8))):
        special = (x & field) == field
        x[special & s.share(0.95, *size)] &= ~0x4000
    return a, b, c


def finite_bits(s: Shape) -> Operands:
    """Every finite pattern, a tenth of the operands subnormal and a tenth zero."""
    a, b, c = any_bits(s)
    field = 0x7F80 if s.dtype == torch.bfloat16 else 0x7C00
    for x, size in ((a, (16, s.k)), (b, (s.k, 8))):
        x[(x & field) == field] &= ~0x4000
        x[s.share(0.1, *size)] &= ~field
        x[s.share(0.1, *size)] &= ~0x7FFF
    high = 0x7C00 if s.half else 0x7F800000
    c[(c & high) == high] &= ~(0x4000 if s.half else 0x40000000)
    return a, b, c


def wide(s: Shape) -> Operands:
    """Exponents that meet: products over 40 binades, the accumulator anywhere among them."""
    span = 7 if s.half else 10
    a, b = s.exponents(s.bits(16, s.k), -span, span), s.exponents(s.bits(s.k, 8), -span, span)
    scale = torch.randint(
        -14 if s.half else -30, 14 if s.half else 31, (s.tiles, 16, 8), device=s.device, generator=s.generator
    )
    return a, b, s.accumulator(s.normal(16, 8) * torch.exp2(scale.float()))


def cancelling(s: Shape) -> Operands:
    """Pairs of products that take each other away, but for a last place now and then, and an accumulator of any size."""
    a, b, c = wide(s)
    flips = s.share(0.5, 16, s.k // 2).to(torch.int16)
    a[:, :, 1::2] = a[:, :, ::2] ^ -0x8000 ^ flips
    b[:, 1::2] = b[:, ::2]
    c[s.share(0.3, 16, 8)] = 0
    return a, b, c


def accumulators(s: Shape) -> Operands:
    """Zero, huge, tiny, infinite and NaN accumulators, and sums that the products take away again."""
    a, b, _ = normal(s)
    c = s.bits(16, 8, width=16 if s.half else 32)
    c[s.share(0.2, 16, 8)] &= -0x8000 if s.half else -0x80000000
    product = a.view(s.dtype).float() @ b.view(s.dtype).float()
    away = s.share(0.4, 16, 8)
    c[away] = s.accumulator(-product)[away]
    return a, b, c


def tiny(s: Shape) -> Operands:
    """Products at the lower end of the inputs' range, where zero terms and subnormals decide."""
    low, high = (-75, -60) if s.dtype == torch.bfloat16 else (-14, -9)
    a, b = s.exponents(s.bits(16, s.k), low, high), s.exponents(s.bits(s.k, 8), low, high)
    for x, size in ((a, (16, s.k)), (b, (s.k, 8))):
        x[s.share(0.3, *size)] &= ~0x7FFF
    c = s.bits(16, 8, width=16 if s.half else 32) & (~0x7C00 if s.half else ~0x7C000000)
    c[s.share(0.5, 16, 8)] = 0
    return a, b, c


def ties(s: Shape) -> Operands:
    """One product at a tie of the result's smallest places, and others so small that where truncation ends decides it."""
    if s.dtype == torch.bfloat16:  # results in units of 2^-149 from products down to 2^-170
        a, b = s.exponents(s.bits(16, s.k), -78, -70), s.exponents(s.bits(s.k, 8), -78, -70)
        a[s.share(0.3, 16, s.k)] = 0
        c = s.bits(16, 8, width=32) & (-0x80000000 | 0x7)
        c[s.share(0.5, 16, 8)] = 0
        return a, b, c
    a, b = s.bits(16, s.k) & (-0x8000 | 0xF), s.bits(s.k, 8) & (-0x8000 | 0xF)  # subnormals: products from 2^-48 to 2^-40
    a[:, :, 0] = s.input(torch.tensor(2.0**-12, device=s.device))
    b[:, 0] = s.input(torch.tensor(2.0**-13, device=s.device))  # 2^-25, half of fp16's smallest
    c = s.bits(16, 8, width=16 if s.half else 32) & (0x3 if s.half else 0x2)
    return a, b, c


FAMILIES: dict[str, Callable[[Shape], Operands]] = {
    f.__name__: f for f in (normal, any_bits, finite_bits, wide, cancelling, accumulators, tiny, ties)
}


def prove(
    instruction: probe.Shape, dtype: str, half: bool, family: str, step: Step, tiles: int, seed: int, device: str = "cuda"
) -> Row:
    """One row: ``tiles`` instructions, each 128 outputs."""
    k, kind = probe.DEPTHS[instruction], DTYPES[dtype]
    accumulator: probe.Accumulator = "fp16" if half else "fp32"
    step = replace(step, terms=min(step.terms, k))
    shape = Shape(tiles, k, kind, half, torch.Generator(device).manual_seed(seed))
    a, b, c = FAMILIES[family](shape)
    d = probe.mma(a, b, c, instruction, accumulator, kind)
    replay, _ = probe.replayed(a, b, c, step, instruction, accumulator, kind, fast=False)
    fast, took = probe.replayed(a, b, c, step, instruction, accumulator, kind)
    wrong = d != replay
    checked, cpu_wrong = on_cpu(a, b, c, replay, step, kind, half)
    values = d.view(torch.float16 if half else torch.float32).float()
    zeros = wrong & (values == 0) & (replay.view(torch.float16 if half else torch.float32).float() == 0)
    return Row(
        instruction,
        dtype,
        accumulator,
        family,
        d.numel(),
        int(wrong.sum()),
        int(zeros.sum()),
        took,
        int((fast != replay).sum()),
        checked,
        cpu_wrong,
        int(values.isnan().sum()),
        int(values.isinf().sum()),
        int((values == 0).sum()),
        int(d.unique().numel()),
        tuple(example(a, b, c, d, replay, where) for where in wrong.nonzero()[:EXAMPLES].tolist()),
    )


def on_cpu(a: Tensor, b: Tensor, c: Tensor, replay: Tensor, step: Step, dtype: torch.dtype, half: bool) -> tuple[int, int]:
    """How many outputs the CPU's engine computed and how many of them differ from the CUDA engine's."""
    tiles = min(len(a), HALF_ON_CPU // OUTPUTS_PER_TILE) if half else len(a)
    arrays = [t[:tiles].cpu().numpy() for t in (a, b, c, replay)]

    def block(first: int) -> int:
        own_a, own_b, own_c, want = (t[first : first + 256] for t in arrays)
        count, k = len(own_a), own_a.shape[2]
        rows_a = np.broadcast_to(own_a[:, :, None, :], (count, 16, 8, k)).reshape(-1, k).view(np.uint16)
        rows_b = np.broadcast_to(own_b.transpose(0, 2, 1)[:, None], (count, 16, 8, k)).reshape(-1, k).view(np.uint16)
        start = own_c.ravel().view(np.uint16 if half else np.uint32)
        got = half_dot_add(rows_a, rows_b, start, step) if half else fused_dot_add(rows_a, rows_b, start, step, dtype)
        return int((got != want.ravel().view(got.dtype)).sum())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tiles * OUTPUTS_PER_TILE, sum(pool.map(block, range(0, tiles, 256)))


def example(a: Tensor, b: Tensor, c: Tensor, d: Tensor, replay: Tensor, where: list[int]) -> Example:
    tile, m, n = where

    def text(t: Tensor) -> str:
        return f"{int(t) & ((1 << 8 * t.element_size()) - 1):0{2 * t.element_size()}x}"

    row, column = tuple(text(v) for v in a[tile, m]), tuple(text(v) for v in b[tile, :, n])
    return Example(row, column, text(c[tile, m, n]), text(d[tile, m, n]), text(replay[tile, m, n]))


SPEEDS = (
    *((4096, 4096, 4096, 1), (2048, 4096, 4096, 1), (256, 4096, 4096, 1), (64, 4096, 4096, 4), (16, 4096, 4096, 8)),
    *((1, 4096, 4096, 1), (1, 4096, 4096, 8)),
)
"""M, K, N and chains of the timed GEMMs."""
RUNS, CALLS = 7, 4


def gemm(step: Step, dtype: str, m: int, k: int, n: int, chains: int) -> Program:
    """One region of ``chains`` chains over K / chains each, joined in fp32."""
    length = k // chains
    ops = [(0, 0, i * length, (i + 1) * length) for i in range(chains)]
    joined = [ops[0], *(op for chain in ops[1:] for op in (chain, (1, 0, 0, 0))), (2, 1 if dtype == "fp16" else 2, 0, 0)]
    return Program(
        np.arange(k, dtype=np.int32),
        np.array([(0, step.fraction_bits, step.terms, step.zero_exponent, 0, step.terms)], np.int32),
        np.array(joined, np.int32),
        np.array([(0, m, 0, n, 0, len(joined))], np.int32),
    )


def speed(step: Step, name: str, dtype: str, m: int, k: int, n: int, chains: int) -> Speed:
    """A whole GEMM, timed with events."""
    program = gemm(step, dtype, m, k, n, chains)
    x, w = (torch.randn(size, device="cuda").to(DTYPES[dtype]) for size in ((m, k), (k, n)))
    empty, group = x.new_empty(0), torch.empty(0, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(RUNS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(CALLS):
            cuda.run(program, x, w, empty, group, empty)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / CALLS)
    median = float(np.median(times[1:]))
    return Speed(name, dtype, m, k, n, chains, round(median, 4), m * k * n / median * 1e3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--outputs", type=int, default=10_000_000, help="per instruction, over all families")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", action="store_true", help="time the CUDA engine, too")
    args = parser.parse_args()
    here = detect()
    if missing := cuda.reason():
        parser.error(f"the proof needs the CUDA engine: {missing}")
    assert here is not None
    tiles = -(-args.outputs // (len(FAMILIES) * OUTPUTS_PER_TILE))
    rows: list[Row] = []
    for dtype, half in (("fp16", False), ("bf16", False), ("fp16", True)):
        for instruction in probe.DEPTHS:
            for family in FAMILIES:
                rows.append(prove(instruction, dtype, half, family, here.step, tiles, args.seed))
                print(show(rows[-1]), flush=True)
    speeds: list[Speed] = []
    for name, step in (("Ampere", AMPERE), ("Hopper", HOPPER)) if args.speed else ():
        for dtype in DTYPES:
            for size in SPEEDS:
                speeds.append(speed(step, name, dtype, *size))
                print(show_speed(speeds[-1]), flush=True)
    proof = Proof(SCHEMA, collect(), here.key, here.step.fraction_bits, here.step.terms, tuple(rows), tuple(speeds))
    try:
        write_json(args.json, proof)
    except QlabError as e:
        parser.error(str(e))
    bad = sum(r.mismatches + r.fast_mismatches + r.cpu_mismatches for r in rows)
    print(f"{sum(r.outputs for r in rows)} outputs, {bad} mismatches")
    return 1 if bad else 0


def show(r: Row) -> str:
    return (
        f"{r.instruction:9} {r.dtype} {r.accumulator} {r.family:12} {r.outputs:9} outputs, {r.mismatches} mismatches "
        f"({r.mismatches_of_zero} signs of zero), {r.fast_mismatches} between forms, {r.cpu_mismatches} of {r.checked_on_cpu} "
        f"on the CPU; {r.distinct} values, {r.nan} NaN, {r.infinite} infinite, {r.zero} zero"
    )


def show_speed(s: Speed) -> str:
    size = f"{s.M}x{s.K}x{s.N}"
    return f"{s.step:7} {s.dtype} {size:16} {s.chains} chains {s.milliseconds:9.3f} ms {s.macs_per_second:.3e} MAC/s"


if __name__ == "__main__":
    sys.exit(main())
