"""One layer's cells: weights packed once and copied, outputs checked, CUDA graphs over rotating copies timed in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench import layer_gate, timing
from bench.layer_gate import Exact
from bench.layer_kernels import STRONGEST, beyond, dense, dtype_of, matches, overlaps, recipe_of
from bench.layer_results import Ceilings, Cell, Copies, Entry
from bench.model_layers import BLOCK, Layer, random_layer, random_rows
from bench.peers import Swept
from bench.timing import Call, Replay
from bench.warm import NOTHING, Ready
from qlab.backends import failure
from qlab.backends.registry import Kernel, Packed, Problem
from qlab.hardware import Gpu
from qlab.weights import Int4Weight

PASS_SECONDS = 4e-4
"""A pass of a graph lasts so long at the roofline at least, so that its launch is no part of what is measured."""
LONG_PASS = 0.3
"""A pass longer than this is timed LONG_ROUNDS times only."""
LEAST_ROUNDS, LONG_ROUNDS, SWEEP_ROUNDS = 9, 3, 5
NEAR = 1.3
"""Variants slower than this times the fastest in a first pass are not timed further."""


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    kernels: tuple[Kernel, ...]
    """The library product first."""
    device: torch.device
    ceilings: Ceilings
    gpu: Gpu | None = None
    dtype: torch.dtype = torch.float16
    group: int = 128
    symmetric: bool = True
    seconds: float = 0.35
    """Timing of one cell, all kernels together; slow ones take longer."""
    total_bytes: int = timing.L2_PROOF
    ready: Ready = NOTHING
    alive: Callable[[str], None] = lambda what: None
    """Told what is about to run."""
    state: Callable[[], dict[str, str]] = dict
    """The GPU's clocks and power at the time."""


@dataclass
class Held:
    """One layer: its weight in every kernel's storage, inputs and exact outputs."""

    layer: Layer
    settings: Settings
    weights: dict[torch.dtype, Int4Weight] = field(default_factory=dict)
    dense: dict[torch.dtype, Tensor] = field(default_factory=dict)
    packed: dict[str, tuple[Packed, ...] | str] = field(default_factory=dict)
    inputs: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)
    exact: dict[tuple[int, torch.dtype], Exact] = field(default_factory=dict)
    chosen: dict[tuple[str, int], str] = field(default_factory=dict)
    """The fastest variant by (swept kernel, m)."""

    def weight(self, dtype: torch.dtype) -> Int4Weight:
        if dtype not in self.weights:
            s, x = self.settings, self.layer
            first = self.weights.get(s.dtype) or random_layer(x, s.group, s.dtype, s.symmetric, s.device, x.K + x.N)
            self.weights[s.dtype] = first
            self.weights[dtype] = first if dtype == s.dtype else first.with_dtype(dtype)
        return self.weights[dtype]

    def input(self, m: int, dtype: torch.dtype) -> Tensor:
        key = m, dtype
        if key not in self.inputs:
            self.inputs[key] = random_rows(m, self.layer.K, dtype, self.settings.device, m)
        return self.inputs[key]

    def reference(self, m: int, dtype: torch.dtype) -> Exact:
        key = m, dtype
        if key not in self.exact:
            if dtype not in self.dense:
                self.dense[dtype] = self.weight(dtype).dequantize(dtype)
            self.exact[key] = Exact(self.input(m, dtype), self.dense[dtype], seed=m)
        return self.exact[key]

    def copies(self, kernel: Kernel, m: int) -> tuple[Packed, ...] | str:
        """Copies of the weight in the kernel's storage, or why the kernel cannot run m rows of it."""
        s = self.settings
        problem = replace(Problem.of(self.weight(dtype_of(kernel, s.dtype)), m), M=m)
        refused = beyond(kernel, m) or kernel.supports(problem, s.device).reason or s.ready.refusal(kernel, self.layer, m)
        if refused:
            return refused
        if kernel.name not in self.packed:
            try:
                packed = kernel.pack(self.weight(dtype_of(kernel, s.dtype)))
                failure.wait(s.device)
                count = timing.copy_count(timing.weight_bytes(packed), s.total_bytes, 2)
                self.packed[kernel.name] = timing.clone(packed, count)
            except Exception as e:
                self.packed[kernel.name] = failure.reason(e, kernel.name, s.device)
        return self.packed[kernel.name]

    def variant(self, kernel: Kernel, copies: Sequence[Packed], m: int) -> str:
        """The fastest variant of a swept kernel; empty for any other."""
        key = kernel.name, m
        if isinstance(kernel, Swept) and key not in self.chosen:
            dtype = dtype_of(kernel, self.settings.dtype)
            most = layer_gate.bound(kernel.name, self.layer.K, dtype)
            self.chosen[key] = _fastest(kernel, copies, self.input(m, dtype), self.reference(m, dtype), most)
        return self.chosen.get(key, "")

    def listed(self) -> list[Copies]:
        held = ((name, c) for name, c in self.packed.items() if not isinstance(c, str))
        return [Copies(n, self.layer.key, timing.weight_bytes(c[0]), tuple(map(timing.pointer, c))) for n, c in held]

    def bytes(self, kernel: Kernel, m: int) -> int:
        """What one call must move: x, y and the weight as 4-bit codes with its scales and zero points, or as 16-bit numbers."""
        k, n = self.layer.K, self.layer.N
        groups = self.weight(self.settings.dtype).groups
        packed = k * n // 2 + groups * n * 2 + (0 if self.settings.symmetric else groups * n // 2)
        return (2 * k * n if kernel is self.settings.kernels[0] else packed) + 2 * m * (k + n)


@dataclass
class Prepared:
    """A kernel's checked replay in one cell."""

    kernel: Kernel
    replay: Replay
    per_call: int
    """Calls that make one unit: 1, or a block's four."""
    entry: Entry


def cell(held: Held, m: int) -> Cell:
    """Every kernel on one layer with m rows."""
    return _cell([held], m, held.layer.name)


def block(helds: Sequence[Held], m: int) -> Cell:
    """Every kernel on a decoder block's layers, one after another in one graph; each layer's input is its own."""
    return _cell(helds, m, BLOCK)


def _cell(helds: Sequence[Held], m: int, name: str) -> Cell:
    s, first = helds[0].settings, helds[0].layer
    entries: list[Entry] = []
    ready: list[Prepared] = []
    for kernel in s.kernels:
        s.alive(f"{first.model}.{name} M={m}: {kernel.name}")
        try:
            done = _prepare(kernel, helds, m)
        except Exception as e:
            done = Entry(kernel.name, _short(dtype_of(kernel, s.dtype)), failure.reason(e, kernel.name, s.device))
        if isinstance(done, Prepared):
            ready.append(done)
            done = done.entry
        entries.append(done)
    s.alive(f"{first.model}.{name} M={m}: timing")
    before = s.state()
    samples = rounds([p.replay for p in ready], s.seconds, s.device)
    after = s.state()
    timed = {p.kernel.name: _timed(p, taken, helds, m) for p, taken in zip(ready, samples, strict=True)}
    entries = _compared([timed.get(e.kernel, e) for e in entries], dense(s.device))
    whole = name == BLOCK
    return Cell(first.model, name, m, 0 if whole else first.K, 0 if whole else first.N, 0, before, after, tuple(entries))


def _prepare(kernel: Kernel, helds: Sequence[Held], m: int) -> Prepared | Entry:
    """The kernel's replay, when a plain call and every output of the replay are right; else an entry with the reason."""
    s, dtype = helds[0].settings, dtype_of(kernel, helds[0].settings.dtype)
    entry = Entry(kernel.name, _short(dtype), "")
    copies = [h.copies(kernel, m) for h in helds]
    for c in copies:
        if isinstance(c, str):
            return replace(entry, reason=c)
    held = [c for c in copies if not isinstance(c, str)]
    exact, x = [h.reference(m, dtype) for h in helds], [h.input(m, dtype) for h in helds]

    def most(i: int) -> float:
        return layer_gate.bound(kernel.name, helds[i % len(helds)].layer.K, dtype)

    variants = [h.variant(kernel, c, m) for h, c in zip(helds, held, strict=True)]
    runs = [partial(kernel.run_variant, variant=v) if isinstance(kernel, Swept) else kernel.run for v in variants]
    plain = [run(a, c[0]) for run, a, c in zip(runs, x, held, strict=True)]
    relative, worst, wrong = layer_gate.verdict(exact, plain, most)
    if not wrong:
        total = sum(timing.weight_bytes(c[0]) for c in held)
        count = min(*(len(c) for c in held), timing.copy_count(total, s.total_bytes, 2)) if len(held) > 1 else len(held[0])
        turn = [partial(run, a, c[i]) for i in range(count) for run, a, c in zip(runs, x, held, strict=True)]
        calls: list[Call] = turn * _repeat(s, helds, kernel, m, count)
        replay = timing.prepare(calls, s.device)
        replay.blank()
        replay()
        expected = [exact[i % len(exact)] for i in range(len(calls))]
        relative, worst, wrong = layer_gate.verdict(expected, replay.outputs, most)
    entry = replace(
        entry,
        reason=wrong,
        relative_error=relative,
        worst_error=worst,
        bound=most(0),
        variant=", ".join(filter(None, variants)),
    )
    if wrong:
        return entry
    overlap = " with programmatic dependent launch" if overlaps(kernel, s.device) else ""
    launched = replay.launched + (overlap if replay.launched == "CUDA graph" else "")
    entry = replace(entry, launched=launched, copies=count, calls=len(calls))
    return Prepared(kernel, replay, len(helds), entry)


def _repeat(s: Settings, helds: Sequence[Held], kernel: Kernel, m: int, count: int) -> int:
    """How often a pass takes every copy: until it lasts PASS_SECONDS at the roofline. Once where nothing is claimed (CPU)."""
    if s.device.type != "cuda":
        return 1
    flops = sum(2 * m * h.layer.K * h.layer.N for h in helds)
    least = max(sum(h.bytes(kernel, m) for h in helds) / s.ceilings.copy, flops / s.ceilings.matmul)
    return max(1, math.ceil(PASS_SECONDS / (count * least)))


def _fastest(kernel: Swept, copies: Sequence[Packed], x: Tensor, exact: Exact, most: float) -> str:
    """The variant with the smallest median among those whose plain call is right. Raises the last reason where none is."""
    runs: dict[str, Replay] = {}
    last: Exception = RuntimeError("it has no variants")
    for variant in kernel.variants(copies[0]):
        call = partial(kernel.run_variant, x, variant=variant)
        try:
            _, _, wrong = layer_gate.verdict([exact], [call(copies[0])], lambda i: most)
            if wrong:
                raise RuntimeError(f"{variant}: {wrong}")
            runs[variant] = timing.prepare([partial(kernel.run_variant, x, c, variant=variant) for c in copies], x.device)
        except Exception as e:
            failure.reason(e, kernel.name, x.device)  # raises where the GPU no longer answers
            last = e
    if not runs:
        raise last
    watch, names = timing.stopwatch(x.device), list(runs)
    first = np.minimum(watch(list(runs.values())), watch(list(runs.values())))
    near = [runs[name] for name, taken in zip(names, first, strict=True) if taken <= NEAR * first.min()]
    samples = rounds(near, 0.0, x.device, SWEEP_ROUNDS)
    best = near[int(np.argmin([np.median(taken) for taken in samples]))]
    return next(name for name, replay in runs.items() if replay is best)


def rounds(replays: Sequence[Replay], seconds: float, device: torch.device, fewest: int = LEAST_ROUNDS) -> list[list[float]]:
    """Seconds of every timed pass of each replay, in rounds that take all of them in rotated order."""
    if not replays:
        return []
    watch = timing.stopwatch(device)
    guess = np.minimum(watch(replays), watch(replays))
    share = seconds / len(replays)
    least = [LONG_ROUNDS if g > LONG_PASS else fewest for g in guess]
    wanted = [min(timing.MAX_ROUNDS, max(n, int(share / max(g, 1e-9)))) for n, g in zip(least, guess, strict=True)]
    samples: list[list[float]] = [[] for _ in replays]
    for order in timing.schedule(wanted):
        for i, taken in zip(order, watch([replays[i] for i in order]), strict=True):
            samples[i].append(taken)
    return samples


def _timed(p: Prepared, taken: Sequence[float], helds: Sequence[Held], m: int) -> Entry:
    s = helds[0].settings
    per_call = np.array(taken) * p.per_call / p.entry.calls
    median, moved = float(np.median(per_call)), sum(h.bytes(p.kernel, m) for h in helds)
    flops = sum(2 * m * h.layer.K * h.layer.N for h in helds)
    weight = helds[0].weight(dtype_of(p.kernel, s.dtype))
    return replace(
        p.entry,
        rounds=len(taken),
        median=median,
        p10=float(np.percentile(per_call, 10)),
        p90=float(np.percentile(per_call, 90)),
        bytes=moved,
        of_memory=moved / median / s.ceilings.copy,
        of_compute=flops / median / s.ceilings.matmul,
        recipe=recipe_of(p.kernel, replace(Problem.of(weight, m), M=m), s.gpu) if len(helds) == 1 else "",
    )


def _compared(entries: Sequence[Entry], library: str) -> list[Entry]:
    """Entries with their ratios to the library product and to the best of Marlin, Machete and ExLlama."""
    medians = {e.kernel: e.median for e in entries if e.median > 0}
    strongest = [t for name, t in medians.items() if matches(name, STRONGEST)]
    best, cublas = min(strongest, default=None), medians.get(library)
    return [
        replace(e, to_cublas=cublas and cublas / e.median, to_best=best and best / e.median) if e.median > 0 else e
        for e in entries
    ]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
