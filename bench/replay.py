"""How fast the replay engines are: multiply-accumulates per second, beside the numpy engine and MMA-Sim on the same tiles.

    python -m bench.replay [--shapes 'M,K,N;...'] [--json FILE] [--seconds 2]

The program is shaped like Marlin's: tiles of 64 x 128 outputs, four chains over a quarter of K each, joined in fp32. The slow
peers compute the same chains for a few columns only; their bits are compared with the compiled engine's first.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bench.gemm import parse_shapes
from qlab import environment
from qlab.command import check_output, one_sentence
from qlab.environment import Environment
from qlab.errors import QlabError
from qlab.hardware import AMPERE, HOPPER, Step
from qlab.replay import cuda, native
from qlab.replay.program import Kind, Op, Program
from qlab.replay.step import Bits16, fused_dot_add
from qlab.serial import write_json

SCHEMA = "qlab.bench.replay/1"
SHAPES = ((64, 4096, 1024), (16, 4096, 1024), (1, 4096, 4096))
STEPS = {"a100": AMPERE, "h100": HOPPER}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
MMASIM = util.find_spec("mmasim") is not None
CHAINS, TILE_ROWS, TILE_COLUMNS = 4, 64, 128
CASES = [(dtype, gpu) for dtype in DTYPES for gpu in STEPS]
MIN_ROUNDS, MAX_ROUNDS = 3, 200
PEER_MACS = 1 << 23
"""Multiply-accumulates that a slow peer is asked for at a time."""

NO_GROUPS, NO_BIAS = np.zeros(0, np.int32), np.zeros(0, np.uint16)


@dataclass(frozen=True)
class Entry:
    """One engine on one problem."""

    M: int
    K: int
    N: int
    """Columns that this engine computed."""
    dtype: str
    step: str
    """The GPU whose step was replayed."""
    engine: str
    """numpy, mmasim, native or cuda."""
    isa: str
    """Of native; empty otherwise."""
    threads: int
    """0 where they are not counted (a GPU)."""
    rounds: int
    seconds: float
    """Median wall time of a call."""
    seconds_least: float
    macs_per_second: float
    """By the median."""
    reason: str
    """Why it did not run; empty where it did."""


@dataclass(frozen=True)
class Result:
    """One run."""

    schema: str
    environment: Environment
    cores: int
    """Processors that this process may use."""
    load: float
    """Load average at the start: other work slows every entry down."""
    mmasim: str
    entries: tuple[Entry, ...]
    seconds: float


@dataclass(frozen=True, eq=False)
class Work:
    """A problem with random operands."""

    m: int
    k: int
    n: int
    dtype: str
    gpu: str
    x: Bits16
    w: Bits16
    program: Program

    @property
    def step(self) -> Step:
        return STEPS[self.gpu]


def work(m: int, k: int, n: int, dtype: str, gpu: str) -> Work:
    """Gaussian activations and INT4 weights with one scale. Raises QlabError where K does not divide into the chains."""
    step = STEPS[gpu]
    if k % (CHAINS * step.terms):
        raise QlabError(f"K={k} does not divide into {CHAINS} chains of steps of {step.terms}")
    random = np.random.default_rng(0)
    x, w = random.standard_normal((m, k), np.float32), (random.integers(0, 16, (k, n)) - 8).astype(np.float32) / 77
    return Work(m, k, n, dtype, gpu, _bits(x, dtype), _bits(w, dtype), _program(m, k, n, step, dtype))


def _bits(values: np.ndarray, dtype: str) -> Bits16:
    return torch.from_numpy(values).to(DTYPES[dtype]).view(torch.int16).numpy().view(np.uint16)


def _program(m: int, k: int, n: int, step: Step, dtype: str) -> Program:
    part = k // CHAINS
    ops: list[tuple[int, int, int, int]] = []
    for i in range(CHAINS):
        ops.append((Op.CHAIN, 0, i * part, (i + 1) * part))
        if i:
            ops.append((Op.ADD, 0, 0, 0))
    ops.append((Op.ROUND, 1 if dtype == "fp16" else 2, 0, 0))
    regions = [
        (i, min(i + TILE_ROWS, m), j, min(j + TILE_COLUMNS, n), 0, len(ops))
        for i in range(0, m, TILE_ROWS)
        for j in range(0, n, TILE_COLUMNS)
    ]
    row = (Kind.TENSOR_CORE, step.fraction_bits, step.terms, step.zero_exponent, 0, step.terms)
    return Program(*(np.array(a, np.int32) for a in (np.arange(k), [row], ops, regions)))


def measure(call: Callable[[], object], seconds: float) -> tuple[int, float, float]:
    """Rounds, and the median and least wall time of a call, the first one left out."""
    call()
    times: list[float] = []
    while len(times) < MIN_ROUNDS or (sum(times) < seconds and len(times) < MAX_ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return len(times), statistics.median(times), min(times)


def run_native(p: Work, isa: native.Isa, threads: int) -> Bits16:
    scales = np.zeros((0, p.n), np.uint16)
    return native.run(p.program, p.x, p.w, scales, NO_GROUPS, NO_BIAS, bf16=p.dtype == "bf16", threads=threads, isa=isa)


Chain = Callable[[Bits16, Bits16], np.ndarray]
"""The chain over operands a, b [R, K]: float32 [R]."""


def numpy_chain(p: Work) -> Chain:
    return lambda a, b: fused_dot_add(a, b, np.zeros(len(a), np.uint32), p.step, DTYPES[p.dtype], "numpy").view(np.float32)


def mmasim_chain(p: Work) -> Chain:
    from mmasim.nv_ptx import MMA  # type: ignore[import-untyped]

    kind = "f16" if p.dtype == "fp16" else "bf16"
    mma = MMA("Ampere" if p.gpu == "a100" else "Hopper", f"m16n8k16.f32.{kind}.{kind}.f32")

    def chain(a: Bits16, b: Bits16) -> np.ndarray:
        x, y = (torch.from_numpy(v.view(np.int16)).view(DTYPES[p.dtype]) for v in (a, b))
        # It takes a whole chain at a time, in steps of its own L.
        return mma.dpa(x, y, torch.zeros(len(x))).numpy()

    return chain


def run_peer(p: Work, columns: int, chain: Chain) -> Bits16:
    """The first columns of the program's output, every chain by a peer."""
    part = p.k // CHAINS
    total: np.ndarray = np.zeros(0, np.float32)
    for i in range(CHAINS):
        stretch = slice(i * part, (i + 1) * part)
        a = np.repeat(p.x[:, stretch], columns, axis=0)
        b = np.tile(p.w[stretch, :columns].T, (p.m, 1))
        sums = chain(a, b)
        total = total + sums if i else sums
    return _bits(total.reshape(p.m, columns), p.dtype)


def run(shapes: Sequence[tuple[int, int, int]], seconds: float) -> Result:
    start, load = time.monotonic(), os.getloadavg()[0]
    todo = (work(*shape, dtype, gpu) for shape in shapes for dtype, gpu in CASES)
    entries = tuple(e for p in todo for e in problem(p, seconds))
    version = metadata.version("mmasim") if MMASIM else ""
    return Result(SCHEMA, environment.collect(), _cores(), load, version, entries, time.monotonic() - start)


def problem(p: Work, seconds: float) -> Iterator[Entry]:
    """Every engine on one problem. Raises QlabError where two of them differ in a bit."""

    def entry(engine: str, columns: int, isa: str = "", threads: int = 0, timed: tuple[int, float, float] | str = "") -> Entry:
        rounds, median, least = (0, 0.0, 0.0) if isinstance(timed, str) else timed
        rate = p.m * p.k * columns / median if median else 0.0
        reason = timed if isinstance(timed, str) else ""
        return Entry(p.m, p.k, columns, p.dtype, p.gpu, engine, isa, threads, rounds, median, least, rate, reason)

    def check(engine: str, got: np.ndarray, want: np.ndarray) -> None:
        if different := int((got != want[:, : got.shape[1]]).sum()):
            raise QlabError(f"{engine} differs from the numpy engine's bits in {different} outputs of {got.size}")

    columns = max(1, min(p.n, PEER_MACS // (p.m * p.k)))
    want = run_peer(p, columns, numpy_chain(p))
    yield entry("numpy", columns, threads=1, timed=measure(lambda: run_peer(p, columns, numpy_chain(p)), seconds / 2))
    if MMASIM:
        chain = mmasim_chain(p)
        check("mmasim", run_peer(p, columns, chain), want)
        timed = measure(lambda: run_peer(p, columns, chain), seconds / 2)
        yield entry("mmasim", columns, threads=torch.get_num_threads(), timed=timed)
    else:
        yield entry("mmasim", columns, timed="mmasim is not installed; pip install mmasim")
    if missing := native.reason():
        yield entry("native", p.n, timed=missing)
    for isa in native.isas():
        for threads in sorted({1, _cores()}):
            y = run_native(p, isa, threads)  # type: ignore[arg-type]
            check(f"native ({isa})", y[:, :columns], want)
            timed = measure(lambda i=isa, t=threads: run_native(p, i, t), seconds)  # type: ignore[misc]
            yield entry("native", p.n, isa, threads, timed)
    yield entry("cuda", p.n, timed=cuda.reason() or _time_cuda(p, want, check, seconds))


def _time_cuda(
    p: Work, want: np.ndarray, check: Callable[[str, np.ndarray, np.ndarray], None], seconds: float
) -> tuple[int, float, float]:
    def tensor(bits: Bits16) -> torch.Tensor:
        return torch.from_numpy(bits.view(np.int16)).cuda().view(DTYPES[p.dtype])

    x, w = tensor(p.x), tensor(p.w)
    empty = (w[:0], torch.empty(0, dtype=torch.int32, device="cuda"), w[:0, :0].reshape(0))

    def call() -> torch.Tensor:
        y = cuda.run(p.program, x, w, *empty)
        torch.cuda.synchronize()
        return y

    check("cuda", call().view(torch.int16).cpu().numpy().view(np.uint16)[:, : want.shape[1]], want)
    return measure(call, seconds)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tables(r: Result) -> Iterator[Table]:
    """One table for each shape."""
    for shape in dict.fromkeys((e.M, e.K) for e in r.entries):
        title = f"M={shape[0]} K={shape[1]}: GMAC/s"
        t = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        t.add_column("engine", no_wrap=True)
        t.add_column("threads", justify="right")
        for dtype, gpu in CASES:
            t.add_column(f"{dtype}, {gpu}", justify="right", no_wrap=True)
        ran = [e for e in r.entries if shape == (e.M, e.K) and not e.reason]
        for engine in dict.fromkeys((e.engine, e.isa, e.threads) for e in ran):
            cells = {(e.dtype, e.step): f"{e.macs_per_second / 1e9:.3f}" for e in ran if engine == (e.engine, e.isa, e.threads)}
            t.add_row(" ".join(engine[:2]).strip(), str(engine[2] or ""), *(cells.get(c, "") for c in CASES))
        yield t


@one_sentence("bench.replay")
def main(
    shapes: Annotated[str | None, typer.Option(help="M,K,N;M,K,N;...")] = None,
    json: Annotated[Path | None, typer.Option(help="write the whole result here")] = None,
    seconds: Annotated[float, typer.Option(help="timing of one engine on one problem", min=0.0)] = 1.0,
) -> None:
    """Time the replay engines beside the numpy engine and MMA-Sim, after their bits were compared."""
    check_output("--json", json)
    result = run(parse_shapes(shapes, SHAPES), seconds)
    if json:
        write_json(json, result)
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(*tables(result))
    for engine, reason in dict.fromkeys((e.engine, e.reason) for e in result.entries if e.reason):
        console.print(f"{engine} did not run: {reason}")
    cpu = f"{result.environment.cpu}, {result.cores} cores"
    console.print(f"{cpu}, load {result.load:.1f} at the start; {result.seconds:.0f} s")


if __name__ == "__main__":
    typer.run(main)
