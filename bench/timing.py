"""Times kernels side by side: weights that no cache holds, one CUDA graph per kernel, rounds that take every kernel in turn.

A kernel is called once per copy of its weight, and the copies together are larger than any L2, so that each call reads its
weight from memory, as a model does that runs one layer after the other. (400 copies of a weight below about 0.15 MB fit in L2
none the less; a result says how many copies there were and of how many bytes.) All of it happens on one stream: a kernel that
keeps locks per stream (Marlin) makes them on the first call, before the graph is captured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qlab.backends.registry import Packed

L2_PROOF = 240_000_000
"""Bytes that the copies of one kernel's weight exceed together on a GPU: four times the largest L2 of a Hopper GPU."""
MIN_COPIES, MAX_COPIES = 8, 400
"""At least 8 calls share one graph's launch; 400 bounds the graph of a small weight, which L2 may then hold."""
MIN_ROUNDS, MAX_ROUNDS, WARM_UP = 5, 100, 3

Call = Callable[[], Tensor]
Stopwatch = Callable[[Sequence[Callable[[], None]]], list[float]]
"""Runs in the order given and returns the seconds of each."""


def weight_bytes(packed: Packed) -> int:
    """Bytes of one packed weight, scales and zero points included."""
    return sum(t.numel() * t.element_size() for t in packed.tensors.values())


def copy_count(size: int, total: int, least: int = MIN_COPIES) -> int:
    """Copies of a weight of ``size`` bytes that exceed ``total`` bytes together, as far as MAX_COPIES of them can."""
    return min(MAX_COPIES, max(least, total // size + 1))


def clone(packed: Packed, count: int) -> tuple[Packed, ...]:
    """``count`` copies that share no memory with one another or with ``packed``; strides stay."""
    return tuple(replace(packed, tensors={name: t.clone() for name, t in packed.tensors.items()}) for _ in range(count))


def pointer(packed: Packed) -> int:
    """Address of a packed weight's largest tensor, its codes."""
    return max(packed.tensors.values(), key=lambda t: t.numel() * t.element_size()).data_ptr()


@dataclass(frozen=True)
class Speed:
    """Seconds per call over the rounds, each a pass over all copies divided by their number."""

    launched: str
    """``CUDA graph``, or ``plain calls`` with the reason on a GPU."""
    rounds: int
    median: float
    p10: float
    p90: float
    bytes: int
    """Weight, x and y: what one call must move at least."""
    of_copy: float
    """``bytes`` per median second as a share of the copy ceiling."""
    speedup: dict[str, float]
    """Median of each peer (cuBLAS, Marlin) over this kernel's: above 1 this kernel is faster."""


class Replay:
    """One call per weight copy, as plain launches; the outputs of the last pass are kept."""

    def __init__(self, calls: Sequence[Call], launched: str = "plain calls") -> None:
        self.calls, self.launched = calls, launched
        self.outputs: list[Tensor] = []

    def __call__(self) -> None:
        self.outputs = [call() for call in self.calls]

    def blank(self) -> None:
        """Overwrite the outputs with NaN: what the next pass does not write cannot pass for a result."""
        for y in self.outputs:
            y.fill_(float("nan"))


class GraphReplay(Replay):
    """The same calls captured in one CUDA graph on the current stream. Raises RuntimeError when one cannot be captured."""

    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__(calls, "CUDA graph")
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Not torch.cuda.graph: it empties the allocator's cache before every capture.
        self.graph.capture_begin()
        try:
            self.outputs = [call() for call in calls]
        finally:
            self.graph.capture_end()

    def __call__(self) -> None:
        self.graph.replay()


def prepare(calls: Sequence[Call], device: torch.device) -> Replay:
    """The calls as a CUDA graph on a GPU, else (or where they cannot be captured) as plain calls; one pass has run.

    The first call must have run before on this stream, so that nothing is compiled or made for the stream while capturing.
    """
    replay = Replay(calls)
    if device.type == "cuda":
        try:
            replay = GraphReplay(calls)
        except Exception as e:
            torch.cuda.synchronize()
            cause = str(e.__context__ or e).strip().splitlines()[0]
            replay = Replay(calls, f"plain calls, for they cannot be captured in a CUDA graph: {cause}")
    replay()
    return replay


def wall_clock(order: Sequence[Callable[[], None]]) -> list[float]:
    """Seconds of each by the CPU's clock."""
    seconds = []
    for run in order:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def cuda_events(order: Sequence[Callable[[], None]]) -> list[float]:
    """Seconds of each between CUDA events on the current stream."""
    order[-1]()  # untimed: the GPU is busy while the CPU queues the rest, so that no launch waits for the CPU
    marks = []
    for run in order:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in marks]


def stopwatch(device: torch.device) -> Stopwatch:
    return cuda_events if device.type == "cuda" else wall_clock


def schedule(rounds: Sequence[int]) -> Iterator[list[int]]:
    """Rounds in which runner i takes part ``rounds[i]`` times, evenly spread; each round starts one runner further on."""
    total = max(rounds, default=0)
    for r in range(total):
        taking_part = [i for i, wanted in enumerate(rounds) if (r + 1) * wanted // total > r * wanted // total]
        start = r % len(taking_part)
        yield taking_part[start:] + taking_part[:start]


def interleaved(runs: Sequence[Callable[[], None]], seconds: float, watch: Stopwatch) -> list[list[float]]:
    """Seconds of every timed pass of each run, in rounds that take all of them in rotated order.

    Each has an equal share of ``seconds``; a run too slow for MIN_ROUNDS passes in its share gets them none the less.
    """
    if not runs:
        return []
    for _ in range(WARM_UP):
        guess = watch(runs)
    share = seconds / len(runs)
    rounds = [min(MAX_ROUNDS, max(MIN_ROUNDS, int(share / max(g, 1e-9)))) for g in guess]
    samples: list[list[float]] = [[] for _ in runs]
    for order in schedule(rounds):
        for i, taken in zip(order, watch([runs[i] for i in order]), strict=True):
            samples[i].append(taken)
    return samples


def summarise(
    replays: dict[str, Replay], samples: Sequence[Sequence[float]], moved: dict[str, int], ceiling: float, dense: str
) -> dict[str, Speed]:
    """Per kernel the median and spread of seconds per call, the share of the copy ceiling and the ratios to its peers."""
    per_call = {name: np.array(taken) / len(replays[name].calls) for name, taken in zip(replays, samples, strict=True)}
    medians = {name: float(np.median(taken)) for name, taken in per_call.items()}
    peers = [name for name in medians if name == dense or name.startswith("vllm.marlin.")]
    return {
        name: Speed(
            launched=replays[name].launched,
            rounds=len(taken),
            median=medians[name],
            p10=float(np.percentile(taken, 10)),
            p90=float(np.percentile(taken, 90)),
            bytes=moved[name],
            of_copy=moved[name] / medians[name] / ceiling,
            speedup={peer: medians[peer] / medians[name] for peer in peers},
        )
        for name, taken in per_call.items()
    }


def copy_ceiling(device: torch.device) -> float:
    """Bytes read and written per second by a large copy within ``device``'s memory: the median of 20."""
    size = 1 << (30 if device.type == "cuda" else 26)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    watch = stopwatch(device)
    watch([copy] * WARM_UP)
    return 2 * size / sorted(watch([copy] * 20))[10]
