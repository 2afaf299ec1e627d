"""Finds the fastest slices of K and tiles of a kernel on this GPU and writes the table that fixes them (qlab/recipes/tuned.py).

    python -m bench.tune --kernel triton.w4a16 [--shapes 'K,N;K,N'] [--rows 1,16,64] [--seconds 300] [--dry]

Run on purpose only: the slices are part of the recipe, and another table gives other bits. Every candidate's output is held
against float64 before it is timed, in CUDA graphs over copies of the weight that no cache holds (bench/timing.py): all of them
briefly, then the best few in turn. A candidate whose kernel fails is left out, and the reason is shown.

What was not tuned now keeps its entries. ``--log`` writes all that was measured, ``--dry`` leaves the table alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from bench import timing
from bench.gemm import error_bound
from bench.tune_candidates import FAMILIES, candidates, compile_all, untried
from qlab import environment, hardware
from qlab.backends.reference import oracle
from qlab.backends.registry import Packed, kernel
from qlab.command import one_sentence, torch_dtype
from qlab.compare import moments
from qlab.environment import Environment
from qlab.errors import QlabError
from qlab.inputs import random_activations, random_weight
from qlab.recipes import tuned
from qlab.recipes.tuned import Choice
from qlab.serial import read_json, write_json

SCHEMA = "qlab.bench.tune/1"
LAYERS = (
    *((4096, 4096), (4096, 6144), (4096, 28672), (14336, 4096)),  # Llama-3-8B
    *((3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)),  # Qwen2.5-7B
    *((8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)),  # Llama-70B
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
FINALISTS = 4
LEAST_TRIED = 4
"""Candidates of a cell that must have been timed for its best one to count."""
NEARLY = 1.15
"""A candidate this many times slower than the best of the first timing is out."""
FIRST_PASSES = 3
FINAL_SECONDS = 0.15
COPIES = 4
"""Of the weight at least; few, since a pass over all copies is what is timed."""


@dataclass(frozen=True)
class Measured:
    """One candidate on one shape."""

    K: int
    N: int
    M: int
    slices: int
    config: dict[str, Any]
    reason: str
    """Why there is no time; empty when there is one."""
    first: float | None
    """Seconds a call in the first timing, the best of FIRST_PASSES."""
    median: float | None
    """In the second, of the finalists."""
    chosen: bool = False


@dataclass(frozen=True)
class Result:
    """One run of the tuner."""

    schema: str
    complete: bool
    environment: Environment
    gpu: str
    kernel: str
    dtype: str
    group_size: int
    symmetric: bool
    copy_ceiling: float
    versions: dict[str, str]
    seconds: float
    cublas: dict[str, float]
    """Seconds of PyTorch's matmul on the decoded weight, by ``K,N,M``."""
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class Settings:
    kernel: str
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    seconds: float
    dtype: torch.dtype = torch.float16
    group: int = 128
    symmetric: bool = False


class Layer:
    """A weight in a kernel's storage, its copies, and what its outputs must be."""

    def __init__(self, s: Settings, k: int, n: int) -> None:
        weight = random_weight(k, n, s.group, dtype=s.dtype, symmetric=s.symmetric, seed=k + n).to("cuda")
        self.weight, self.k, self.n = weight, k, n
        packed = kernel(s.kernel).pack(weight)
        copies = timing.copy_count(timing.weight_bytes(packed), timing.L2_PROOF, COPIES)
        self.copies = (packed, *timing.clone(packed, copies - 1))
        dense = weight.dequantize(s.dtype)
        self.dense = [dense.clone() for _ in range(timing.copy_count(2 * k * n, timing.L2_PROOF, COPIES))]

    def inputs(self, m: int) -> tuple[Tensor, Tensor]:
        x = random_activations(m, self.k, dtype=self.weight.dtype, seed=m).to("cuda")
        return x, oracle(x[:64], self.weight)


def run(s: Settings, say: Callable[[str], None]) -> Iterator[Result]:
    """The result after every layer, the last one complete. Shapes that the time does not reach are left out."""
    start, gpu = time.monotonic(), hardware.detect()
    assert gpu is not None
    measured: list[Measured] = []
    cublas: dict[str, float] = {}
    before = environment.collect(details=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        ceiling = timing.copy_ceiling(torch.device("cuda"))
        cells = [(k, n, m) for k, n in s.shapes for m in s.rows]
        for i, (k, n) in enumerate(s.shapes):
            layer = Layer(s, k, n)
            for m in s.rows:
                left = s.seconds - (time.monotonic() - start)
                share = left / max(1, len(cells) - len(cublas))
                found, dense = cell(s, layer, m, gpu, share) if left > 0 else ([], 0.0)
                if found:
                    cublas[f"{k},{n},{m}"] = dense
                    measured += found
                    say(line(found, dense))
            del layer
            torch.cuda.empty_cache()
            versions = {"torch": torch.__version__, s.kernel: kernel(s.kernel).version()}
            yield Result(
                schema=SCHEMA,
                complete=i + 1 == len(s.shapes) and len(cublas) == len(cells),
                environment=before,
                gpu=gpu.key,
                kernel=s.kernel,
                dtype=str(s.dtype).removeprefix("torch."),
                group_size=s.group,
                symmetric=s.symmetric,
                copy_ceiling=ceiling,
                versions=versions,
                seconds=time.monotonic() - start,
                cublas=dict(cublas),
                measured=tuple(measured),
            )


def cell(s: Settings, layer: Layer, m: int, gpu: hardware.Gpu, seconds: float) -> tuple[list[Measured], float]:
    """Every candidate on one shape within about ``seconds``, and cuBLAS's seconds there."""
    begun, (x, exact) = time.monotonic(), layer.inputs(m)
    bound = error_bound(s.kernel, layer.k, s.dtype)
    found: list[tuple[Choice, timing.Replay | None, float, str]] = []
    choices = list(candidates(s.kernel, m, layer.k, layer.n, gpu))
    compile_all(s.kernel, choices, x, layer.copies[0])
    for choice in choices:
        if found and time.monotonic() - begun > seconds:
            break
        call = FAMILIES[s.kernel](choice)
        try:
            reason = _wrong(call(x, layer.copies[0]), exact, bound)
            replay = None if reason else timing.prepare([_call(call, x, p) for p in layer.copies], x.device)
            taken = min(timing.cuda_events([replay] * FIRST_PASSES)) / len(layer.copies) if replay else 0.0
        except Exception as e:  # a tile too large for the GPU, say: the candidate is out
            torch.cuda.synchronize()
            replay, taken, reason = None, 0.0, f"{type(e).__name__}: {str(e).strip().splitlines()[0][:160]}"
        found.append((choice, replay, taken, reason))
    alive = sorted(((taken, i) for i, (_, replay, taken, _) in enumerate(found) if replay))
    last = [i for taken, i in alive[:FINALISTS] if taken <= NEARLY * alive[0][0]]
    dense = timing.Replay([_dense(x, w) for w in layer.dense])
    dense()
    dense = timing.prepare(dense.calls, x.device)
    runs = [dense, *(r for i in last if (r := found[i][1]))]
    samples = timing.interleaved(runs, FINAL_SECONDS, timing.cuda_events)
    medians = [sorted(taken)[len(taken) // 2] / len(r.calls) for taken, r in zip(samples, runs, strict=True)]
    by_index = dict(zip(last, medians[1:], strict=True))
    best = min(by_index, key=lambda i: by_index[i], default=None)
    rows = [
        Measured(layer.k, layer.n, m, c.slices, dict(c.config), why, taken if r else None, by_index.get(i), i == best)
        for i, (c, r, taken, why) in enumerate(found)
    ]
    return rows, medians[0]


def _call(call: Callable[[Tensor, Packed], Tensor], x: Tensor, packed: Packed) -> timing.Call:
    return lambda: call(x, packed)


def _dense(x: Tensor, w: Tensor) -> timing.Call:
    return lambda: x @ w


def _wrong(y: Tensor, exact: Tensor, bound: float) -> str:
    error = moments(y[:64], exact).relative_l2
    return "" if error <= bound and bool(y.isfinite().all()) else f"relative L2 {error:.2e} from float64 exceeds {bound:.2e}"


def line(found: Sequence[Measured], dense: float) -> str:
    """One line for a shape: the best three and cuBLAS."""
    timed = sorted((m for m in found if m.median), key=lambda m: m.median or 0)
    first = found[0]
    parts = [f"{1e6 * (m.median or 0):.1f} ({_short(m)})" for m in timed[:3]]
    failed = [m.reason for m in found if m.reason]
    note = f"; {len(failed)} out: {failed[0]}" if failed else ""
    size = f"K={first.K} N={first.N} M={first.M}"
    return f"{size:24} {len(found):3} tried; us: {', '.join(parts) or 'none'}; matmul {1e6 * dense:.1f}{note}"


def _short(m: Measured) -> str:
    return f"S{m.slices} " + " ".join(str(v) for v in m.config.values())


def entries(result: Result, kept: Sequence[tuned.Entry] = ()) -> tuple[tuned.Entry, ...]:
    """The table: what was chosen, and of ``kept`` what was not tuned now; with one recipe for every M, whole shapes of it.

    A kernel with one recipe for every M takes the slices that cost least at the M where they cost most, and for each M the best
    tile with those. Where fewer than LEAST_TRIED candidates were timed the table has what is usual (untried).
    """
    done = {(m.K, m.N) for m in result.measured if m.chosen}
    one_recipe = result.kernel in tuned.ONE_RECIPE
    rows = [m for m in result.measured if m.first is not None and not (one_recipe and m.config.get("striped"))]
    fresh: list[tuned.Entry] = []
    slices = 0
    for k, n in sorted(done):
        here = [m for m in rows if (k, n) == (m.K, m.N)]
        counts = {m.M: [o for o in here if o.M == m.M] for m in here}
        few = {m for m, some in counts.items() if len(some) < LEAST_TRIED}
        if one_recipe:
            slices = _one_count({m: some for m, some in counts.items() if m not in few} or counts)
            counts = {m: [o for o in some if o.slices == slices] for m, some in counts.items()}
        for m, some in sorted(counts.items()):
            if m in few or not some:
                usual = untried(result.kernel, m, k, n, slices if one_recipe else 0)
                fresh.append(tuned.Entry(k, n, m, usual.slices, dict(usual.config)))
                continue
            best = next((o for o in some if o.chosen), None) or min(some, key=lambda o: o.median or 1.02 * (o.first or 0))
            fresh.append(tuned.Entry(k, n, m, best.slices, best.config))
    new = {(e.k, e.n, e.rows) for e in fresh}
    return (*(e for e in kept if ((e.k, e.n) not in done if one_recipe else (e.k, e.n, e.rows) not in new)), *fresh)


def _one_count(counts: dict[int, list[Measured]]) -> int:
    """The slices whose times, the best tile at each M, are nowhere much longer than other slices'."""
    common = set.intersection(*({o.slices for o in some} for some in counts.values()))
    if not common:
        raise QlabError("no number of slices was timed at every M; give more --seconds")

    def price(slices: int) -> tuple[float, float]:
        each = [
            min(o.first or 0 for o in some if o.slices == slices) / min(o.first or 0 for o in some) for some in counts.values()
        ]
        return max(each), sum(each)

    return min(common, key=price)


def write(result: Result) -> Path:
    """Write the table where the kernel reads it; the old file is replaced when the new one is whole."""
    held = tuned.read(result.kernel, result.gpu)
    table = tuned.Table(
        schema=tuned.SCHEMA,
        gpu=tuned.SHARED.get(result.gpu, result.gpu),
        kernel=result.kernel,
        source=f"bench.tune on {result.environment.gpu}, driver {result.environment.driver}, {_versions(result)}",
        entries=entries(result, held.entries if held else ()),
    )
    return tuned.write(table)


def relabelled(result: Result, kernel: str) -> Result:
    """A log for another kernel that runs the same code: ``cuda.batch_invariant`` takes what was measured of ``cuda.split``."""
    same = {result.kernel, kernel} <= {"cuda.split", "cuda.batch_invariant"}
    if kernel != result.kernel and not same:
        raise QlabError(f"the log is of {result.kernel}, and the table was to be {kernel}'s")
    return replace(result, kernel=kernel)


def _versions(result: Result) -> str:
    return ", ".join(f"{name} {version}" for name, version in result.versions.items() if version)


def numbers(text: str, option: str, each: int) -> tuple[tuple[int, ...], ...]:
    """``a,b;c,d`` as tuples of ``each`` positive numbers."""
    try:
        found = tuple(tuple(int(v) for v in part.split(",")) for part in text.split(";") if part)
    except ValueError:
        found = ((),)
    if not found or any(len(t) != each or min(t) < 1 for t in found):
        raise QlabError(f"{option} {text!r}: positive numbers, {each} between semicolons, are wanted")
    return found


@one_sentence("bench.tune")
def main(
    kernel: Annotated[str, typer.Option(help="what to tune")] = "triton.w4a16",
    shapes: Annotated[str, typer.Option(help="K,N;K,N;... by default the layers of three models")] = "",
    rows: Annotated[str, typer.Option(help="M,M,...")] = ",".join(map(str, ROWS)),
    seconds: Annotated[float, typer.Option(help="for everything, about")] = 300.0,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16")] = "float16",
    group: Annotated[int, typer.Option(help="group size; -1 for whole columns")] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric/--asymmetric")] = False,
    dry: Annotated[bool, typer.Option(help="print only; the table stays as it is")] = False,
    log: Annotated[Path | None, typer.Option(help="write all that was measured here")] = None,
    measured: Annotated[Path | None, typer.Option("--from", help="measure nothing: write the table from such a log")] = None,
) -> None:
    """Tune one kernel on this GPU."""
    if measured:
        print(f"wrote {write(relabelled(read_json(Result, measured, SCHEMA), kernel))}")
        return
    if not torch.cuda.is_available():
        raise QlabError("PyTorch finds no CUDA GPU here, and a table is for the GPU that it was measured on")
    if kernel not in FAMILIES:
        raise QlabError(f"{kernel!r} cannot be tuned; known: {', '.join(FAMILIES)}")
    pairs: Any = numbers(shapes, "--shapes", 2) if shapes else LAYERS
    counts = tuple(sorted({t[0] for t in numbers(rows.replace(",", ";"), "--rows", 1)}))
    console, settings = Console(width=200), Settings(kernel, pairs, counts, seconds, torch_dtype(dtype), group, symmetric)
    result = None
    for result in run(settings, lambda text: console.print(text, markup=False, highlight=False)):
        if log:
            write_json(log, result)
    assert result is not None
    if not dry:
        console.print(f"wrote {write(result)}")
    console.print(f"{result.seconds:.0f} s, copy ceiling {result.copy_ceiling / 1e12:.2f} TB/s, {asdict(result)['complete']=}")


if __name__ == "__main__":
    typer.run(main)
