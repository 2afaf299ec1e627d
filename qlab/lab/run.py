"""Runs every kernel on every layer's input and compares: one layer in memory at a time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlab import compare, hardware
from qlab.backends import dispatch, reference
from qlab.backends.registry import Kernel, Problem
from qlab.environment import Environment
from qlab.errors import QlabError
from qlab.lab import outputs as out
from qlab.lab.against import Comparison
from qlab.lab.faults import Shards
from qlab.lab.probe import probe as run_probe
from qlab.lab.results import SCHEMA, TOTAL, Cell, Column, DispatchRow, Hardware, Input, LabResult, Pairs, ProbeResult
from qlab.weights import Int4Weight

SAME = "same"


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear with the weight and activations that each source gives it: ``same``, or ``awq`` and ``gptq``."""

    name: str
    weights: Mapping[str, Int4Weight]
    inputs: Mapping[str, Tensor]
    """x [M, K] in the weight's dtype; x' where the source is AWQ with an input scale."""
    expected: Mapping[str, Int4Weight] | None = None
    """Trusted weights for the probe, where they are another checkpoint's."""
    shards: Shards = ()
    """Modules that the layer was fused from, for the probe to name."""


@dataclass(frozen=True)
class Plan:
    """What to run: chosen once, the same for every layer."""

    kernels: Sequence[Kernel]
    asked: hardware.Gpu
    device: torch.device
    mode: str
    model: str
    checkpoints: Sequence[str]
    dtype: torch.dtype
    seed: int = 0
    runs: int = 2
    probe: bool = False
    pin_marlin: bool = False
    against: hardware.Gpu | None = None
    """Another GPU to compare the asked one with, by replay."""
    arguments: Mapping[str, str] = field(default_factory=dict)


def resolve_hardware(asked: hardware.Gpu, device: torch.device, cpu: str) -> Hardware:
    """What the asked GPU means on this machine: native, or replayed here."""
    basis = "proved on that GPU" if asked.proved else "a prediction: no whole kernel was compared on that GPU"
    if device.type != "cuda":
        return Hardware(asked.key, cpu, "cpu", False, f"no GPU in this run: kernels are replayed bit for bit, {basis}")
    here = hardware.detect()
    name = torch.cuda.get_device_properties(device).name
    if here is not None and here.same_arithmetic(asked):
        note = f"native: {here.sms} SMs and the same tensor core as {asked.key}; only cuBLAS may choose other algorithms"
        return Hardware(asked.key, name, "cuda", True, "native" if here.key == asked.key else note)
    return Hardware(asked.key, name, "cuda", False, f"another GPU: {asked.key}'s kernels are replayed bit for bit, {basis}")


def columns(plan: Plan, *, native: bool = False) -> list[tuple[Column, Kernel]]:
    """The table's columns: one per kernel in mode ``same``; per kernel and checkpoint it serves in mode ``own``."""
    found = []
    for k in plan.kernels:
        sources = [SAME] if plan.mode == SAME else [k.source] if k.source else ["awq", "gptq"]
        for source in sources:
            key = k.name if source == SAME or k.source else f"{k.name}@{source}"
            found.append((Column(key, k.name, source, k.layout, k.note, out.version(k, native=native)), k))
    return found


@dataclass
class _Tally:
    """What one column adds up over the layers."""

    moments: compare.Moments = field(default_factory=lambda: compare.Moments(0.0, 0.0))
    floor: compare.Moments = field(default_factory=lambda: compare.Moments(0.0, 0.0))
    ulps: list[Tensor] = field(default_factory=list)
    ulp_max: float = 0.0
    backward: float = 0.0
    digests: list[str] = field(default_factory=list)
    recipes: list[str] = field(default_factory=list)
    origin: str = ""
    repeatable: bool = True
    runs: int = 0
    replay_bits: int | None = None
    missing: str = ""


def run(
    plan: Plan,
    layers: Iterable[Layer],
    environment: Environment,
    advance: Callable[[str], None] = lambda what: None,
) -> LabResult:
    """Run the plan. ``advance`` is called once per layer and column, with what comes next."""
    started = time.perf_counter()
    what_hw = resolve_hardware(plan.asked, plan.device, environment.cpu)
    table = columns(plan, native=what_hw.native)
    compared = Comparison(plan.asked, plan.against, pin_marlin=plan.pin_marlin) if plan.against else None
    tallies = {c.key: _Tally() for c, _ in table}
    inputs: list[Input] = []
    cells: list[Cell] = []
    pairs: list[Pairs] = []
    dispatched: list[DispatchRow] = []
    probes: list[ProbeResult] = []
    total: dict[tuple[str, str], _Apart] = {}
    for layer in layers:
        outputs: dict[str, Tensor] = {}
        exact = _Exact(layer, plan.device)
        replays = {s: out.Replays(exact.weights[s], exact.inputs[s]) for s in layer.weights}
        norms = {source: exact.norm(source) for source in layer.weights}
        inputs += [_describe(layer, source) for source in layer.weights]
        dispatched += _dispatch(layer, plan)
        for column, kernel in table:
            advance(f"{layer.name}  {column.key}")
            cell, y = _one(layer, column, kernel, exact, replays[column.source], what_hw, plan, tallies[column.key])
            cells.append(cell)
            if y is not None:
                outputs[column.key] = y
            if compared is not None:
                compared.kernel(column.key, kernel, layer.name, y, replays[column.source], norms[column.source])
            if plan.probe:
                probes.append(_probe(layer, column, kernel, exact.weights[column.source], what_hw, plan))
        if compared is not None and plan.mode == SAME:
            compared.labels(layer.name, outputs, replays[SAME], norms[SAME])
        apart = _apart(outputs, {c.key: norms[c.source] for c, _ in table})
        for both, sums in apart.items():
            total[both] = total[both] + sums if both in total else sums
        pairs.append(_pairs(layer.name, {k: tallies[k].digests[-1] for k in outputs}, apart))
    if not inputs:
        raise QlabError("nothing to run: there is no layer; choose others with --layers")
    cells += [_total_cell(c.key, tallies[c.key]) for c, _ in table]
    pairs.append(_pairs(TOTAL, {c.key: _joined(t.digests) for c, _ in table if not (t := tallies[c.key]).missing}, total))
    digest = hashlib.sha256("".join(i.weight_digest + i.input_digest for i in inputs).encode()).hexdigest()
    return LabResult(
        schema=SCHEMA,
        arguments=dict(plan.arguments),
        environment=environment,
        hardware=what_hw,
        mode=plan.mode,
        model=plan.model,
        checkpoints=tuple(plan.checkpoints),
        dtype=str(plan.dtype).removeprefix("torch."),
        seed=plan.seed,
        digest=digest,
        inputs=tuple(inputs),
        columns=tuple(c for c, _ in table),
        cells=tuple(cells),
        pairs=tuple(pairs),
        dispatch=tuple(dispatched),
        probes=tuple(probes),
        seconds=round(time.perf_counter() - started, 3),
        against=None if compared is None else compared.result(),
    )


class _Exact:
    """float64 results of one layer, per source, on first use."""

    def __init__(self, layer: Layer, device: torch.device) -> None:
        self.weights = {s: w.to(device) for s, w in layer.weights.items()}
        self.inputs = {s: x.to(device) for s, x in layer.inputs.items()}
        self._made: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, source: str) -> tuple[Tensor, Tensor]:
        """(exact y, sum |x||w|), both float64 [M, N]. Raises QlabError where a GPU has no room for them."""
        if source not in self._made:
            x, w = self.inputs[source], self.weights[source]
            try:
                self._made[source] = reference.oracle(x, w), reference.magnitude(x, w)
            except torch.OutOfMemoryError:
                raise QlabError(
                    f"layer {w.name!r}: K={w.K}, N={w.N} in float64 does not fit into the GPU's memory; use --device cpu or a "
                    "smaller layer"
                ) from None
        return self._made[source]

    def norm(self, source: str) -> float:
        """Squared L2 norm of the exact output."""
        return float(self.of(source)[0].square().sum())


def _one(
    layer: Layer,
    column: Column,
    kernel: Kernel,
    exact: _Exact,
    replays: out.Replays,
    hw: Hardware,
    plan: Plan,
    tally: _Tally,
) -> tuple[Cell, Tensor | None]:
    found = out.output(kernel, replays, plan.asked, native=hw.native, runs=plan.runs, seed=plan.seed)
    tally.recipes.append(found.recipe)
    if found.reason:
        tally.missing, tally.origin = found.reason, found.origin
        return Cell(layer.name, column.key, found.reason, "", None, None, None, 0, found.origin, found.recipe), None
    true, magnitude = exact.of(column.source)
    ys = found.ys
    y, digests = ys[0], [compare.digest(y) for y in ys]
    measured = compare.measure(y, true, magnitude)
    err = measured.error()
    floor = max((_moved(other, y) for other in ys[1:]), key=lambda m: m.squared_error, default=None)
    if floor is None and found.fixed:
        floor = compare.Moments(0.0, measured.moments.squared_exact)
    tally.moments += measured.moments
    tally.ulps.append(measured.ulps.float().flatten().cpu())
    tally.ulp_max = max(tally.ulp_max, err.ulp_max)
    tally.backward = max(tally.backward, err.backward)
    tally.digests.append(digests[0])
    tally.runs, tally.origin = max(tally.runs, len(ys)), found.origin
    if found.replay_bits is not None:
        tally.replay_bits = (tally.replay_bits or 0) + found.replay_bits
    repeatable = None if floor is None else len(set(digests)) == 1
    if floor is not None:
        tally.floor += floor
        tally.repeatable &= bool(repeatable)
    noise = None if floor is None else floor.relative_l2
    cell = Cell(
        layer=layer.name,
        key=column.key,
        reason="",
        digest=digests[0],
        error=err,
        repeatable=repeatable,
        noise_floor=noise,
        runs=len(ys),
        origin=found.origin,
        recipe=found.recipe,
        replay_bits=found.replay_bits,
    )
    return cell, y


def _probe(layer: Layer, column: Column, kernel: Kernel, weight: Int4Weight, hw: Hardware, plan: Plan) -> ProbeResult:
    if hw.device == "cuda" and not hw.native and not kernel.portable:
        reason = f"--hw {hw.asked} is not this GPU ({hw.running}): what it decodes would be another GPU's"
        return ProbeResult(layer.name, column.key, reason, 0, weight.K * weight.N, "", ())
    trusted = layer.expected[column.source].to(plan.device) if layer.expected else None
    return run_probe(kernel, weight, trusted, layer=layer.name, key=column.key, shards=layer.shards)


def _describe(layer: Layer, source: str) -> Input:
    w, x = layer.weights[source], layer.inputs[source]
    return Input(
        layer.name,
        source,
        x.shape[0],
        w.K,
        w.N,
        w.group_size,
        w.symmetric,
        w.act_order,
        w.digest(),
        compare.digest(x),
    )


def _dispatch(layer: Layer, plan: Plan) -> list[DispatchRow]:
    rows = []
    for label in dispatch.LABELS:
        source = SAME if plan.mode == SAME else label.split("_")[0]
        problem = Problem.of(layer.weights[source], layer.inputs[source].shape[0])
        d = dispatch.dispatch(label, plan.asked, problem, pin_marlin=plan.pin_marlin)
        rows.append(DispatchRow(layer.name, label, d.kernel, d.reason))
    return rows


@dataclass(frozen=True)
class _Apart:
    """Two kernels' outputs, in sums that add up over layers."""

    moments: compare.Moments
    """Squared distance, and the mean of both exact squared norms."""
    differing: int
    elements: int

    def __add__(self, other: _Apart) -> _Apart:
        return _Apart(self.moments + other.moments, self.differing + other.differing, self.elements + other.elements)


def _apart(outputs: Mapping[str, Tensor], norms: Mapping[str, float]) -> dict[tuple[str, str], _Apart]:
    """Every pair of outputs, keyed (later, earlier) in the order of ``outputs``; ``norms`` holds exact squared norms."""
    keys = list(outputs)
    found = {}
    for i, a in enumerate(keys):
        for b in keys[:i]:
            m = compare.Moments(_moved(outputs[a], outputs[b]).squared_error, (norms[a] + norms[b]) / 2)
            found[a, b] = _Apart(m, compare.differing(outputs[a], outputs[b]), outputs[a].numel())
    return found


def _pairs(name: str, digests: Mapping[str, str], apart: Mapping[tuple[str, str], _Apart]) -> Pairs:
    keys = tuple(digests)
    distance = [[0.0] * len(keys) for _ in keys]
    share = [[0.0] * len(keys) for _ in keys]
    for i, a in enumerate(keys):
        for j, b in enumerate(keys[:i]):
            both = apart[a, b]
            distance[i][j] = distance[j][i] = both.moments.relative_l2
            share[i][j] = share[j][i] = both.differing / both.elements
    classes = compare.equivalence_classes(digests)
    return Pairs(name, keys, _frozen(distance), _frozen(share), compare.off_diagonal(distance), classes)


def _moved(y: Tensor, first: Tensor) -> compare.Moments:
    """Distance of ``y`` from ``first``; 0 where the bits agree, also those of infinities and NaN."""
    m = compare.moments(y, first.double())
    return m if compare.differing(y, first) else compare.Moments(0.0, m.squared_exact)


def _total_cell(key: str, t: _Tally) -> Cell:
    made = _joined(t.recipes) if any(t.recipes) else ""
    if t.missing:
        return Cell(TOTAL, key, t.missing, "", None, None, None, 0, t.origin, made)
    ulps = torch.cat(t.ulps)
    err = compare.Error(t.moments.relative_l2, float(ulps.median()), t.ulp_max, t.backward)
    known = t.floor.squared_exact > 0 or t.runs > 1
    return Cell(
        layer=TOTAL,
        key=key,
        reason="",
        digest=_joined(t.digests),
        error=err,
        repeatable=t.repeatable if known else None,
        noise_floor=t.floor.relative_l2 if known else None,
        runs=t.runs,
        origin=t.origin,
        recipe=made,
        replay_bits=t.replay_bits,
    )


def _joined(digests: list[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _frozen(matrix: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix)
