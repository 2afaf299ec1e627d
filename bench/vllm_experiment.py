"""The experiment's tables with vLLM's own engine on this machine's GPU, all engines at once, and a trace of each path.

    python -m bench.vllm_experiment --hw h200 --out results/h200/vllm
    python -m bench.vllm_experiment --hw h200 --out attention --methods awq,awq_marlin --against attention=TRITON_ATTN
    python -m bench.vllm_experiment --hw h200 --out parallel --methods awq_marlin --against gpus=2

Finished runs stay in ``OUT/runs``: the same command goes on where it stopped. ``OUT/result.json`` is what ``python -m
qlab.logprobs experiment --json`` writes; ``OUT/traces`` holds a recording of each path with rows of its linears; ``OUT/logs``
what each engine printed. ``--against`` makes no matrices. It puts a second kind of engine in the place of a second GPU: signal
is two methods on one kind, noise one method on the two kinds, as across hardware. ``attention`` takes another attention kernel
of vLLM, a stand-in for another GPU's attention; ``gpus`` shares the model between so many GPUs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path as File
from typing import Any

import numpy as np
import torch

from bench.ahead import Ahead, compute_ahead
from qlab import environment
from qlab.engine.path import Path
from qlab.engine.schedule import Batching
from qlab.environment import Environment
from qlab.errors import QlabError
from qlab.logprobs import prompts, taps, trace
from qlab.logprobs.cells import Bench, Sequences, Store, attempt, prefill_of
from qlab.logprobs.distance import distances
from qlab.logprobs.experiment import Plan, compute, summarise
from qlab.logprobs.maker import Maker
from qlab.logprobs.record import record
from qlab.logprobs.statistics import Array, mean, ratio
from qlab.logprobs.tables import AcrossRow
from qlab.logprobs.tabulate import label
from qlab.serial import write_json
from qlab.weights import DTYPES

SCHEMA = "qlab.stand-in/1"
METHODS = "awq,awq_marlin,gptq,gptq_marlin,awq_marlin:vllm,gptq_marlin:vllm"
"""By default Marlin is pinned; ``:vllm`` leaves the choice to vLLM."""


@dataclass(frozen=True)
class StandIn:
    """Two kinds of engine on one GPU in the place of two GPUs."""

    schema: str
    environment: Environment
    models: tuple[str, ...]
    prompts: int
    tokens: int
    rows: tuple[AcrossRow, ...]
    """Per pair of methods; ``gpus`` names the two kinds."""
    notes: dict[str, str]
    seconds: float


@dataclass
class Engines(Maker):
    """vLLM's engines of one kind, each path's in a process of its own; or the built-in ones, native or replayed, here."""

    engine: str = "vllm"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the engine, beside its path."""
    logs: File | None = None

    def bench(self, path: Path, flip: Any = None) -> Bench:
        known = super().bench(path, flip)
        if self.options and not known.variant:
            kind = ", ".join(f"{k}={v}" for k, v in sorted(self.options.items()))
            known = replace(known, variant=kind)
            self._made[path, 0.0, 0] = known
        return known

    def _engine(self, path: Path, flip: Any) -> Any:
        if self.engine == "vllm":
            from qlab.engine.vllm import remote

            name = "-".join([str(path).replace(":", "-"), *(f"{v}" for v in self.options.values())])
            log = None if self.logs is None else self.logs / f"{name}.log"
            given = self.directory(path)
            return remote(given, path, self.batching, dtype=DTYPES[self.dtype], log=log, seconds=240, **self.options)
        from qlab.engine.builtin import Builtin

        native = False if self.engine == "replay" else None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return Builtin(self.directory(path), path, device, dtype=DTYPES[self.dtype], native=native)


def parse_paths(methods: str, hw: str) -> list[Path]:
    """``awq,awq_marlin:vllm`` on one GPU. Raises QlabError."""
    named = [m.strip().partition(":") for m in methods.split(",")]
    return [Path(name, hw, mode or "pinned") for name, _, mode in named]


def other_kind(text: str) -> dict[str, Any]:
    """Options of the second kind of engine from ``attention=NAME`` or ``gpus=N``. Raises QlabError."""
    name, _, value = text.partition("=")
    if name == "attention" and value:
        return {"attention_backend": value}
    if name == "gpus" and value.isdecimal():
        return {"tensor_parallel": int(value)}
    raise QlabError(f"--against {text!r} is neither attention=NAME nor gpus=N")


def stand_in(plan: Plan, kinds: tuple[Maker, Maker], names: tuple[str, str], store: Ahead) -> list[AcrossRow]:
    """Signal, noise and their ratio for each pair of the plan's paths, the kinds in the place of GPUs."""
    while True:
        rows = [_across(plan, pair, kinds, names, store) for pair in combinations(plan.paths, 2)]
        if not store.missing:
            return rows
        store.make()


def _across(
    plan: Plan, methods: tuple[Path, Path], kinds: tuple[Maker, Maker], names: tuple[str, str], store: Ahead
) -> AcrossRow:
    benches = {(m, i): kinds[i].bench(m) for m in methods for i in (0, 1)}
    own, asked, reason = {}, {}, ""
    for key, bench in benches.items():
        made = attempt(lambda bench=bench: store.run(bench, plan.request()))
        if isinstance(made, str):
            reason = made
            continue
        wanted = tuple(s.ids[:, : plan.top_k] for s in made)
        asked[key] = replace(prefill_of(made, plan.request()), wanted=wanted)
        own[key] = attempt(lambda bench=bench, key=key: store.run(bench, asked[key]))
    if reason:
        return AcrossRow(_labels(methods), names, None, None, None, reason)
    a, b = methods
    signal = [((x, i), (y, i)) for i in (0, 1) for x, y in ((a, b), (b, a))]
    noise = [((m, i), (m, 1 - i)) for m in methods for i in (0, 1)]
    found: list[Array] = []
    for pairs in (signal, noise):
        apart = []
        for g, r in pairs:
            again = attempt(lambda r=r, g=g: store.run(benches[r], asked[g]))
            before = own[g]
            if isinstance(again, str) or isinstance(before, str):
                reason = again if isinstance(again, str) else str(before)
                continue
            apart.append(_distances(before, again, plan.top_k))
        found.append(np.mean(apart, axis=0) if apart else np.array([]))
    if reason:
        return AcrossRow(_labels(methods), names, None, None, None, reason)
    return AcrossRow(_labels(methods), names, mean(found[0]), mean(found[1]), ratio(*found))


def _distances(a: Sequences, b: Sequences, top_k: int) -> Array:
    return np.asarray(distances(a, b, top_k=top_k))


def _labels(methods: tuple[Path, Path]) -> tuple[str, ...]:
    return tuple(map(label, methods))


def record_all(plan: Plan, maker: Maker, out: File, count: int, digests: bool) -> list[str]:
    """A trace of each path with ``count`` tapped rows a sequence; those that exist stay. What could not be had, in words."""

    def one(path: Path) -> str:
        target = out / str(path).replace("@", "-").replace(":", "-")
        if target.exists():
            return ""
        names = taps.linear_names(maker.directory(path))
        fed = [len(p) + plan.new_tokens - 1 for p in plan.prompts]
        chosen = taps.choose(str(count), names, fed, plan.seed) if count else frozenset()
        request = replace(plan.request(), taps=chosen, digests=digests)
        try:
            trace.write(record(maker.bench(path).engine, request, model=maker.model(path)), target)
        except QlabError as e:
            return f"{path}: {e}"
        return ""

    with ThreadPoolExecutor(len(plan.paths) if maker.engine == "vllm" else 1) as pool:
        return [said for said in pool.map(one, plan.paths) if said]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=File, required=True, help="folder for results, runs, traces and logs")
    parser.add_argument("--hw", default="h100", help="key of this GPU in qlab's table")
    parser.add_argument("--methods", default=METHODS, help="comma-separated; :vllm leaves the kernel to vLLM")
    parser.add_argument("--engine", default="vllm", choices=("vllm", "builtin", "replay"))
    parser.add_argument("--against", help="attention=NAME or gpus=N: a second kind of engine in the place of a second GPU")
    parser.add_argument("--awq", type=File, help="AWQ checkpoint; the shipped one by default")
    parser.add_argument("--gptq", type=File, help="GPTQ checkpoint; the shipped one by default")
    parser.add_argument("--prompts", type=File, help="as for the command; cut from a held-out text if absent")
    parser.add_argument("--count", type=int, default=prompts.COUNT, help="prompts")
    parser.add_argument("--tokens", type=int, default=prompts.LENGTH, help="of each prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=50, help="tokens of a step at most")
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16, help="rows kept of each sequence in the traces; 0 for none")
    parser.add_argument("--digests", action="store_true", help="traces hold a digest of every row of every linear")
    parser.add_argument("--no-traces", action="store_true")
    args = parser.parse_args()
    try:
        return run(args)
    except QlabError as e:
        parser.error(str(e))


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    for part in ("runs", "traces"):
        (args.out / part).mkdir(parents=True, exist_ok=True)
    paths = parse_paths(args.methods, args.hw)
    given = {"awq": args.awq, "gptq": args.gptq}
    common = {"engine": args.engine, "batching": Batching(args.chunk), "logs": args.out / "logs"}
    with Engines(given, **common) as maker, Engines(given, **common) as second:
        if args.prompts:
            chosen = prompts.from_file(args.prompts, maker.directory(paths[0]), args.tokens)[: args.count]
        else:
            chosen = prompts.heldout(maker.directory(paths[0]), args.count, args.tokens)
        plan = Plan(tuple(paths), chosen, args.new_tokens, args.top_k, Batching(args.chunk))
        store: Store = Ahead(args.out / "runs")
        for path in paths:  # every process starts now
            maker.bench(path)
        if args.against:
            second.options = other_kind(args.against)
            for path in paths:
                second.bench(path)
            rows = stand_in(plan, (maker, second), ("as is", args.against), store)
            models = tuple(f"{m.name} ({m.method}, {m.digest[:16]})" for m in maker.models.values())
            fed = sum(len(p) + plan.new_tokens - 1 for p in plan.prompts)
            notes = {"as is": "vLLM's own choice of attention on one GPU"}
            seconds = round(time.perf_counter() - started, 1)
            made = StandIn(SCHEMA, environment.collect(False), models, len(chosen), fed, tuple(rows), notes, seconds)
            write_json(args.out / "stand-in.json", made)
            for row in rows:
                print(json.dumps({"methods": row.methods, "reason": row.reason, **_values(row)}))
            return int(any(row.reason for row in rows))
        if args.engine == "vllm":
            cells = compute_ahead(plan, maker.bench, store)
        else:  # in this process: one after another
            kept = Store(args.out / "runs")
            cells, store = compute(plan, maker.bench, kept), kept
        typed = {k: str(v) for k, v in vars(args).items() if v is not None and not isinstance(v, File)}
        result = summarise(plan, cells, store, maker, typed, time.perf_counter() - started)
        write_json(args.out / "result.json", result)
        from rich.console import Console

        from qlab.report import logprobs as report

        report.show(result, Console(width=180))
        said = [] if args.no_traces else record_all(plan, maker, args.out / "traces", args.rows, args.digests)
        said += [f"{d.path}: {d.reason}" for d in result.dispatched if d.reason]
        for line in dict.fromkeys(said):
            print(line)
        return int(bool(said))


def _values(row: AcrossRow) -> dict[str, float | None]:
    figures = {"signal": row.signal, "noise": row.noise, "snr": row.snr}
    return {name: None if f is None else f.value for name, f in figures.items()}


if __name__ == "__main__":
    raise SystemExit(main())
