"""The problems on which native kernels are compared with their replays: many shapes, deterministic from one seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle

from bench.problems import Trial


@dataclass(frozen=True)
class Family:
    """Kernels that are accounted for together."""

    name: str
    kernels: tuple[str, ...]


MARLIN = Family("Marlin", tuple(f"vllm.marlin.{kind}{how}" for kind in ("awq", "gptq") for how in ("", ".fp16", ".atomic")))
FAMILIES = (
    MARLIN,
    Family("Machete", ("vllm.machete.awq", "vllm.machete.gptq")),
    Family("awq_gemm", ("vllm.awq_gemm",)),
    Family("ExLlama", ("vllm.gptq_gemm",)),
    Family("vLLM's Triton AWQ", ("vllm.awq_triton",)),
    Family(
        "qlab's Triton kernels",
        (
            *("triton.awq_gemm", "triton.awq_gemm.splitk"),
            *("triton.gptq_gemm", "triton.gptq_gemm.splitk", "triton.gptq_gemm.v2"),
        ),
    ),
)


@dataclass(frozen=True)
class Task:
    """One problem for one family."""

    trial: Trial
    family: Family

    @property
    def kernels(self) -> tuple[str, ...]:
        """A bias and atomics together are not modelled."""
        return tuple(k for k in self.family.kernels if not (self.trial.bias and k.endswith(".atomic")))


GROUPS = (128, 64, 32, -1)
TOKENS = ((1, 8), (9, 16), (17, 50), (51, 128), (129, 300))
"""Each weight of the main block meets one number of tokens from each range."""
LARGE = ((4096, 4096), (4096, 6144), (14336, 4096), (4096, 28672))
MACHETE = (
    *((115, 768, 384), (24, 4096, 12288), (64, 16384, 12288), (128, 8192, 12288), (257, 5824, 2048), (300, 11456, 384)),
    *((531, 11456, 384), (652, 10368, 768), (778, 11840, 2816), (2056, 5824, 2048)),
)
"""(M, K, N) whose stream-K decomposition the main block does not reach: raster along N, several groups, uneven groups."""
MOST = 1 << 22
"""Elements of a weight of the main block."""


def plan(seed: int = 1) -> list[Task]:
    """Every trial for every family; a bias for Marlin alone. Tasks that share a weight follow each other."""
    return [Task(t, f) for t in trials(seed) for f in (FAMILIES if not t.bias else (MARLIN,))]


def part(tasks: Sequence[Task], shard: int, of: int) -> list[Task]:
    """The tasks of every so-many-th weight: a weight is made by one process alone."""
    weights = {seed: i for i, seed in enumerate(dict.fromkeys(t.trial.seed for t in tasks))}
    return [t for t in tasks if weights[t.trial.seed] % of == shard]


def trials(seed: int = 1) -> list[Trial]:
    """Every trial, deterministic."""
    r, seeds = random.Random(seed), count(20_000, 10)
    random_blocks = (_main, _grouped, _exllama, _whole_tiles, _biased)
    blocks = [block(r, seeds) for block in random_blocks] + [_machete(seeds), _large(seeds)]
    return [trial for block in blocks for trial in block]


def _main(r: random.Random, seeds: Iterator[int]) -> Iterator[Trial]:
    """Every kernel: all groups, dtypes, forms and values."""
    groups = cycle(GROUPS)
    for _ in range(250):
        group, seed = next(groups), next(seeds)
        k, n = _shape(r)
        dtype = "fp16" if r.random() < 0.65 else "bf16"
        form = r.choices(("awq", "gptq", "act_order"), (45, 30, 25))[0]
        values = r.choices(("plain", "wide", "wild", "cancel"), (45, 30, 15, 10))[0]
        if form == "act_order" and group in (-1, k):
            form = "gptq"
        for low, high in TOKENS:
            yield Trial(r.randint(low, high), k, n, group, dtype, form, values, seed)


def _shape(r: random.Random) -> tuple[int, int]:
    """K a multiple of 128 up to 14336 and N a multiple of 64 (mostly of 128) up to 28672, both log-uniform."""
    while True:
        k = 128 * round(2 ** r.uniform(0, 6.807))
        n = 128 * round(2 ** r.uniform(0, 7.807)) if r.random() < 0.8 else 64 * round(2 ** r.uniform(0, 8.807))
        if k * n <= MOST:
            return k, n


def _grouped(r: random.Random, seeds: Iterator[int]) -> Iterator[Trial]:
    """fp16 in groups that divide N, which is all that awq_gemm takes."""
    groups = cycle((128, 64, 32))
    for _ in range(80):
        group, seed, (k, n) = next(groups), next(seeds), _shape(r)
        values = r.choices(("plain", "wide", "wild", "cancel"), (40, 40, 10, 10))[0]
        form = r.choice(("awq", "gptq"))
        for m in (r.randint(1, 16), r.randint(17, 50), r.randint(51, 255)):
            yield Trial(m, k, -(-n // 128) * 128, group, "fp16", form, values, seed)


def _exllama(r: random.Random, seeds: Iterator[int]) -> Iterator[Trial]:
    """One block of ExLlama's or two, whose sum atomics cannot change."""
    groups = cycle((128, 64, 32, -1))
    for i in range(80):
        group, seed, k = next(groups), next(seeds), 128 * r.randint(1, 2)
        n = 64 * round(2 ** r.uniform(0, 8.807))
        form = ("gptq", "act_order", "awq")[i % 3]
        if form == "act_order" and group in (-1, k):
            form = "gptq"
        values = r.choices(("plain", "wide", "wild", "cancel"), (40, 30, 20, 10))[0]
        for m in sorted(r.sample(range(1, 51), 5)):
            yield Trial(m, k, n, group, "fp16", form, values, seed)


def _whole_tiles(r: random.Random, seeds: Iterator[int]) -> Iterator[Trial]:
    """More output tiles than an H100 has SMs, so that Marlin sums whole ones before the stripes."""
    groups = cycle(GROUPS)
    for i in range(20):
        group, seed = next(groups), next(seeds)
        n, k = 128 * r.randint(136, 224), 128 * r.randint(1, 3)
        dtype, form = ("fp16", "bf16")[i % 2], ("awq", "gptq", "act_order")[i % 3]
        if form == "act_order" and group in (-1, k):
            form = "gptq"
        for m in (r.randint(1, 8), r.randint(9, 16), 128, r.randint(129, 300)):
            yield Trial(m, k, n, group, dtype, form, ("plain", "wide")[i % 2], seed)


def _biased(r: random.Random, seeds: Iterator[int]) -> Iterator[Trial]:
    """Marlin with a bias, grouped and whole column."""
    groups = cycle((-1, 128, -1, 64, -1, 32))
    for i in range(30):
        group, seed = next(groups), next(seeds)
        k, n = 128 * r.randint(1, 16), 64 * r.randint(1, 32)
        for m in (r.randint(1, 8), r.randint(9, 64), r.randint(65, 300)):
            values = ("plain", "wide", "cancel")[i % 3]
            yield Trial(m, k, n, group, ("fp16", "bf16")[i // 2 % 2], ("awq", "gptq")[i // 4 % 2], values, seed, bias=True)


def _machete(seeds: Iterator[int]) -> Iterator[Trial]:
    for i, (m, k, n) in enumerate(MACHETE):
        dtype, form = ("fp16", "bf16")[i % 2], ("awq", "gptq")[i // 2 % 2]
        yield Trial(m, k, n, 64, dtype, form, "cancel" if i % 3 == 0 else "plain", next(seeds))


def _large(seeds: Iterator[int]) -> Iterator[Trial]:
    for k, n in LARGE:
        for dtype, form in (("fp16", "awq"), ("bf16", "gptq")):
            seed = next(seeds)
            for m in (1, 16, 64, 256):
                yield Trial(m, k, n, 128, dtype, form, "plain", seed)
