"""Every registered kernel that runs here and cuBLAS on the dequantised weight, as peers: checked first, then timed.

    python -m bench.gemm [--shapes '1,4096,4096;16,4096,4096'] [--kernels 'vllm.*,triton.*'] [--json FILE] [--device cpu]

A kernel whose output is not within the bound of float64 has no speed, only the reason; the outputs of the timed CUDA graph
are checked too, one for every copy of the weight.
"""

from __future__ import annotations

import fnmatch
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from bench import timing
from bench.timing import Replay
from qlab import environment
from qlab.backends import failure
from qlab.backends.reference import oracle
from qlab.backends.registry import YES, Kernel, Packed, Problem, Support, kernels
from qlab.command import check_output, one_sentence, torch_dtype
from qlab.compare import moments
from qlab.environment import Environment
from qlab.errors import QlabError, UnsupportedError
from qlab.inputs import random_activations, random_weight
from qlab.serial import write_json
from qlab.weights import Int4Weight

SCHEMA = "qlab.bench.gemm/1"
GPU_SHAPES = tuple((m, k, n) for k, n in ((4096, 4096), (14336, 4096), (4096, 28672)) for m in (1, 16, 64, 256))
CPU_SHAPES = ((2, 256, 128),)
ROUNDINGS = 16
"""Roundings to the activations' dtype that any kernel is allowed on the way to one output: decoding, parts joined, the last."""
FP16_SUMS = ("vllm.awq_triton", "vllm.gptq_gemm")
"""Kernels whose running sum is fp16 (``gptq_gemm``: by fp16 chains and atomics, above 50 tokens in cublasHgemm)."""


@dataclass(frozen=True)
class Copies:
    """The copies of one weight that a kernel's calls rotate over."""

    kernel: str
    K: int
    N: int
    bytes_each: int
    """Bytes of one packed weight, scales and zero points included."""
    pointers: tuple[int, ...]
    """Address of each copy's codes."""


@dataclass(frozen=True)
class Entry:
    """One kernel on one shape."""

    M: int
    K: int
    N: int
    kernel: str
    reason: str
    """Why there is no speed; empty when there is one."""
    relative_l2: float | None
    """Largest relative L2 distance from float64 among the checked outputs; None when nothing ran."""
    bound: float | None
    """What it must not exceed."""
    speed: timing.Speed | None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.M, self.K, self.N


@dataclass(frozen=True)
class Result:
    """One run; while ``complete`` is False, the shapes so far."""

    schema: str
    complete: bool
    environment: Environment
    """Before the first shape, with the clocks at that time."""
    clocks_after: dict[str, str]
    device: str
    dtype: str
    group_size: int
    symmetric: bool
    seconds_per_shape: float
    l2_bytes: int
    """The GPU's L2; 0 where unknown."""
    copy_ceiling: float
    """Bytes per second, read and written, of a large copy on this device in this run."""
    versions: dict[str, str]
    copies: tuple[Copies, ...]
    entries: tuple[Entry, ...]
    seconds: float


@dataclass(frozen=True)
class Settings:
    """What to run."""

    shapes: tuple[tuple[int, int, int], ...]
    """(M, K, N) each."""
    kernels: tuple[Kernel, ...]
    device: torch.device
    dtype: torch.dtype = torch.float16
    group: int = 128
    """-1 for whole columns."""
    symmetric: bool = True
    seconds: float = 2.0
    """Timing of one shape, all kernels together; slow ones take longer."""
    total_bytes: int = timing.L2_PROOF
    """What the copies of a weight exceed together."""
    min_copies: int = timing.MIN_COPIES


class Dense(Kernel):
    """``x @ w`` on the dequantised weight by PyTorch's matmul: cuBLAS on a GPU, where it has that name."""

    layout = "none"
    note = "matmul on RN((q-z)s), dequantised beforehand: the order of summation is the library's"

    def __init__(self, device: torch.device) -> None:
        self.name = "cublas" if device.type == "cuda" else "matmul"

    def supports(self, problem: Problem, device: torch.device) -> Support:
        return YES

    def pack(self, weight: Int4Weight) -> Packed:
        return Packed({"weight": weight.dequantize(weight.dtype)}, Problem.of(weight, 0))

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        return x @ packed.tensors["weight"]

    def version(self) -> str:
        return f"torch {torch.__version__}"


def error_bound(kernel: str, k: int, dtype: torch.dtype) -> float:
    """Relative L2 error that a sound kernel stays within: ``u * sqrt(roundings)``, u the unit roundoff of ``dtype``.

    A rounding moves a sum by u of itself at most, and independent ones add up as a random walk. Kernels with fp32 sums round
    ROUNDINGS times at most; where the running sum is fp16 it is rounded once for every 8 products. In fp16 one wrong row or
    column of the default shapes exceeds the first bound, a wrong group of the weight also the second.
    """
    roundings = max(ROUNDINGS, k // 8) if kernel in FP16_SUMS else ROUNDINGS
    return torch.finfo(dtype).eps / 2 * math.sqrt(roundings)


def run(s: Settings, advance: Callable[[str], None] = lambda what: None) -> Iterator[Result]:
    """The result after every weight (K, N), the last one complete. On a GPU everything runs on one stream of its own."""
    start, peers = time.monotonic(), (Dense(s.device), *s.kernels)
    on_gpu = s.device.type == "cuda"
    l2 = getattr(torch.cuda.get_device_properties(s.device), "L2_cache_size", 0) if on_gpu else 0
    layers = dict.fromkeys((k, n) for _, k, n in s.shapes)
    stream = torch.cuda.Stream(s.device) if on_gpu else None
    before = environment.collect(details=on_gpu)
    with torch.cuda.stream(stream):
        ceiling = timing.copy_ceiling(s.device)
        copies: list[Copies] = []
        entries: list[Entry] = []
        for i, (k, n) in enumerate(layers):
            copied, timed = layer(s, peers, k, n, ceiling, advance)
            copies += copied
            entries += timed
            if on_gpu:
                torch.cuda.empty_cache()
            ran = {e.kernel for e in entries if e.speed}
            yield Result(
                schema=SCHEMA,
                complete=i + 1 == len(layers),
                environment=before,
                clocks_after=environment.collect(details=False).clocks,
                device=s.device.type,
                dtype=str(s.dtype).removeprefix("torch."),
                group_size=s.group,
                symmetric=s.symmetric,
                seconds_per_shape=s.seconds,
                l2_bytes=l2,
                copy_ceiling=ceiling,
                versions={p.name: p.version() for p in peers if p.name in ran},
                copies=tuple(copies),
                entries=tuple(entries),
                seconds=time.monotonic() - start,
            )


def layer(
    s: Settings, peers: Sequence[Kernel], k: int, n: int, ceiling: float, advance: Callable[[str], None]
) -> tuple[list[Copies], list[Entry]]:
    """Every kernel on one weight: packed once and copied, then each M that was asked for."""
    weight = random_weight(k, n, s.group, dtype=s.dtype, symmetric=s.symmetric).to(s.device)
    problem = Problem.of(weight, 0)
    held: dict[str, tuple[Packed, ...] | str] = {}
    entries: list[Entry] = []
    for m in (m for m, *kn in s.shapes if kn == [k, n]):
        x = random_activations(m, k, dtype=s.dtype, seed=m).to(s.device)
        exact = oracle(x, weight)
        checked: list[Entry] = []
        replays: dict[str, Replay] = {}
        moved: dict[str, int] = {}
        for kernel in peers:
            advance(f"M={m} K={k} N={n}: {kernel.name}")
            reason = kernel.supports(replace(problem, M=m), s.device).reason
            if not reason and kernel.name not in held:
                held[kernel.name] = hold(kernel, weight, s)
            copies = reason or held[kernel.name]
            if isinstance(copies, str):
                checked.append(Entry(m, k, n, kernel.name, copies, None, None, None))
                continue
            entry, replay = check(kernel, copies, x, exact)
            checked.append(entry)
            if replay:
                replays[kernel.name] = replay
                moved[kernel.name] = timing.weight_bytes(copies[0]) + _bytes(x) + _bytes(replay.outputs[0])
        samples = timing.interleaved(list(replays.values()), s.seconds, timing.stopwatch(s.device))
        speeds = timing.summarise(replays, samples, moved, ceiling, peers[0].name)
        entries += [replace(e, speed=speeds.get(e.kernel)) for e in checked]
    copied = [
        Copies(name, k, n, timing.weight_bytes(c[0]), tuple(map(timing.pointer, c)))
        for name, c in held.items()
        if not isinstance(c, str)
    ]
    return copied, entries


def hold(kernel: Kernel, weight: Int4Weight, s: Settings) -> tuple[Packed, ...] | str:
    """Copies of the weight in the kernel's storage, or why there are none."""
    try:
        packed = kernel.pack(weight)
        return timing.clone(packed, timing.copy_count(timing.weight_bytes(packed), s.total_bytes, s.min_copies))
    except Exception as e:
        return failure.reason(e, kernel.name, s.device)


def check(kernel: Kernel, copies: Sequence[Packed], x: Tensor, exact: Tensor) -> tuple[Entry, Replay | None]:
    """The kernel's outputs against ``exact`` (float64 [M, N]): first of a plain call, then of the replay, for every copy.

    The replay is there when all of them are within the bound.
    """
    (m, k), n = x.shape, exact.shape[1]
    bound, errors = error_bound(kernel.name, k, x.dtype), [math.nan]
    calls = [partial(kernel.run, x, c) for c in copies]
    replay = None
    try:
        errors = [_error(calls[0](), exact, x.dtype)]
        reason = _wrong(errors, bound, "of a plain call")
        if not reason:
            replay = timing.prepare(calls, x.device)
            replay.blank()
            replay()
            errors += [_error(y, exact, x.dtype) for y in replay.outputs]
            reason = _wrong(errors, bound, f"of one copy among {len(copies)} ({replay.launched})")
    except Exception as e:
        return Entry(m, k, n, kernel.name, failure.reason(e, kernel.name, x.device), None, None, None), None
    worst = math.nan if any(map(math.isnan, errors)) else max(errors)
    return Entry(m, k, n, kernel.name, reason, worst, bound, None), None if reason else replay


def _error(y: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    if y.shape != exact.shape or y.dtype != dtype:
        raise UnsupportedError(f"output is {y.dtype} {list(y.shape)}, not {dtype} {list(exact.shape)}")
    return moments(y, exact).relative_l2


def _wrong(errors: Sequence[float], bound: float, what: str) -> str:
    bad = [e for e in errors if not e <= bound]  # a NaN is not within any bound
    return f"wrong: relative L2 {bad[0]:.2e} from float64 {what} exceeds {bound:.2e}" if bad else ""


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def tables(r: Result) -> Iterator[Table]:
    """One table per shape, fastest kernel first, then the kernels without a speed, by reason."""
    for m, k, n in dict.fromkeys(e.shape for e in r.entries):
        mine = [e for e in r.entries if e.shape == (m, k, n)]
        timed = sorted(((e, e.speed) for e in mine if e.speed), key=lambda pair: pair[1].median)
        t = Table(title=f"M={m} K={k} N={n}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        t.add_column("kernel", no_wrap=True)
        peers = [p for p in ("cublas", "matmul", "vllm.marlin.awq", "vllm.marlin.gptq") if any(e.kernel == p for e, _ in timed)]
        headings = ("µs", "10-90%", "rounds", "rel. L2", "of copy", *(f"×{p.removeprefix('vllm.')}" for p in peers))
        for heading in headings:
            t.add_column(heading, justify="right", no_wrap=True)
        for e, s in timed:
            spread = f"{1e6 * s.p10:.1f}-{1e6 * s.p90:.1f}"
            ratios = (f"{s.speedup[p]:.2f}" for p in peers)
            name = e.kernel if s.launched in ("CUDA graph", "plain calls") else f"{e.kernel} (plain calls)"
            t.add_row(name, f"{1e6 * s.median:.1f}", spread, str(s.rounds), f"{e.relative_l2:.1e}", f"{s.of_copy:.0%}", *ratios)
        yield t
    reasons: dict[str, dict[str, int]] = {}
    for e in (e for e in r.entries if e.reason):
        shapes = reasons.setdefault(e.reason, {})
        shapes[e.kernel] = shapes.get(e.kernel, 0) + 1
    if reasons:
        t = Table("why", "kernels (shapes)", title="No speed", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for reason, names in reasons.items():
            t.add_row(reason, ", ".join(f"{name} ({count})" for name, count in names.items()))
        yield t


def parse_shapes(text: str | None, default: Sequence[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
    """``M,K,N;M,K,N`` as triples, each once. Raises QlabError naming the option."""
    shapes = []
    for part in text.split(";") if text is not None else ():
        try:
            m, k, n = (int(number) for number in part.split(","))
        except ValueError:
            raise QlabError(f"--shapes {part!r} is not M,K,N, for example '16,4096,4096;64,4096,4096'") from None
        if min(m, k, n) < 1:
            raise QlabError(f"--shapes {part}: M, K and N must be positive")
        shapes.append((m, k, n))
    return tuple(dict.fromkeys(shapes)) or tuple(default)


def choose(globs: str) -> tuple[Kernel, ...]:
    """Registered kernels whose name matches one of the comma-separated globs. Raises QlabError for one that matches none."""
    chosen: dict[str, Kernel] = {}
    for glob in (g.strip() for g in globs.split(",")):
        found = {k.name: k for k in kernels() if fnmatch.fnmatchcase(k.name, glob)}
        if not found:
            raise QlabError(f"--kernels {glob!r} matches nothing; known: {', '.join(k.name for k in kernels())}")
        chosen |= found
    return tuple(chosen.values())


@one_sentence("bench.gemm")
def main(
    shapes: Annotated[str | None, typer.Option(help="M,K,N;M,K,N;...")] = None,
    kernels: Annotated[str, typer.Option(help="comma-separated globs over kernel names; cuBLAS always runs")] = "*",
    group: Annotated[int, typer.Option(help="group size; -1 for whole columns")] = 128,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16")] = "float16",
    symmetric: Annotated[bool, typer.Option("--symmetric/--asymmetric", help="zero point 8, which every kernel takes")] = True,
    json: Annotated[Path | None, typer.Option(help="write the whole result here, after every weight")] = None,
    seconds_per_shape: Annotated[float, typer.Option(help="timing of one shape, all kernels together", min=0.0)] = 2.0,
    device: Annotated[str, typer.Option(help="cuda; cpu times what runs there by the wall clock")] = "cuda",
) -> None:
    """Time every INT4 kernel that runs here beside cuBLAS, after its output passed a check against float64."""
    result = _run(shapes, kernels, group, dtype, symmetric, json, seconds_per_shape, device)
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(*tables(result))
    gpu, clocks = result.environment.gpu or result.environment.cpu, result.environment.clocks
    console.print(f"{gpu}; copy ceiling {result.copy_ceiling / 1e12:.3f} TB/s; {result.seconds:.0f} s")
    if clocks:
        console.print(f"clocks before: {clocks}\nclocks after:  {result.clocks_after}")


def _run(
    shapes: str | None, globs: str, group: int, dtype: str, symmetric: bool, json: Path | None, seconds: float, device: str
) -> Result:
    if device not in ("cuda", "cpu"):
        raise QlabError(f"--device {device!r} is neither cuda nor cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise QlabError("PyTorch finds no CUDA GPU here; --device cpu times the kernels that run on a CPU")
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a Triton kernel is defined, which is on its first use
    kind = torch_dtype(dtype)
    check_output("--json", json)
    settings: dict[str, Any] = {"group": group, "dtype": kind, "symmetric": symmetric, "seconds": seconds}
    if device == "cpu":
        settings |= {"total_bytes": 0, "min_copies": 2}  # no claim about memory there, and the interpreter is slow
    todo = Settings(
        shapes=parse_shapes(shapes, GPU_SHAPES if device == "cuda" else CPU_SHAPES),
        kernels=choose(globs),
        device=torch.device(device),
        **settings,
    )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(todo.shapes) * (1 + len(todo.kernels)))
        for result in run(todo, lambda what: progress.update(task, advance=1, description=what)):
            if json:
                write_json(json, result)
    return result


if __name__ == "__main__":
    typer.run(main)
