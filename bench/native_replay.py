"""Whether this GPU's own kernels give the bits that their replay gives, inside a model: row by row, over all linears.

    python -m bench.native_replay --hw h200 --json results/h200/native-replay.json --traces results/h200/vllm/traces

The built-in engine runs every path twice, by native kernels and replayed, and digests of every row of every linear are
compared, then the log-probabilities. ``--traces`` adds what vLLM's own engine recorded: each tapped row of its linears is
replayed from its input. Where atomics leave the order of a sum open there is no one answer, and rows are not compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path as File

import torch
from torch import Tensor

from bench.vllm_experiment import METHODS, Engines, parse_paths
from qlab import checkpoint, hardware
from qlab.backends import registry
from qlab.backends.registry import Problem
from qlab.checkpoint.llama import fused_weight
from qlab.engine.path import Path
from qlab.engine.run import Row, Run
from qlab.engine.schedule import Batching
from qlab.environment import Environment, collect
from qlab.errors import QlabError
from qlab.lab.outputs import recipe_of
from qlab.logprobs import prompts, trace
from qlab.logprobs.experiment import Plan
from qlab.logprobs.trace import Trace
from qlab.recipe import Recipe
from qlab.replay import replay
from qlab.replay.rows import at_rows
from qlab.serial import write_json
from qlab.weights import Int4Weight

SCHEMA = "qlab.native-replay/1"


@dataclass(frozen=True)
class PathBits:
    """One path of the built-in engine, native against replayed."""

    path: str
    kernels: tuple[str, ...]
    rows: int
    """Rows of linears compared by their digests."""
    differing: int
    first: str
    """Linear, sequence and position of the first row that differs; empty where none does."""
    logprobs: int
    logprobs_differing: int
    reason: str = ""
    """Why there is no comparison."""


@dataclass(frozen=True)
class TraceBits:
    """Tapped rows of one trace against their replay."""

    trace: str
    engine: str
    kernel: str
    M: tuple[int, ...]
    rows: int
    outputs: int
    differing: int
    """Outputs with other bits."""
    reason: str = ""


@dataclass(frozen=True)
class Compared:
    schema: str
    environment: Environment
    paths: tuple[PathBits, ...]
    traces: tuple[TraceBits, ...]


def compare_path(plan: Plan, path: Path, native: Engines, replayed: Engines) -> PathBits:
    """Both runs of one path; a path that cannot run here has its reason."""
    asked = replace(plan.request(), digests=True)
    try:
        a, b = native.bench(path).engine.run(asked), replayed.bench(path).engine.run(asked)
    except QlabError as e:
        return PathBits(str(path), (), 0, 0, "", 0, 0, str(e))
    kernels = tuple(sorted({f"{c.kernel} ({c.origin})" for c in (*a.calls, *b.calls)}))
    reason = "" if {c.origin for c in a.calls} == {"native"} else "the first run was not native"
    if not all(registry.kernel(c.kernel).repeatable for c in a.calls):
        reason = "atomics: no one answer"
    rows, differing, first = _rows(a, b)
    total = sum(s.logprobs.numel() for s in a.sequences)
    off = sum(_differing(x.logprobs, y.logprobs) for x, y in zip(a.sequences, b.sequences, strict=True))
    return PathBits(str(path), kernels, rows, differing, first, total, off, reason)


def _rows(a: Run, b: Run) -> tuple[int, int, str]:
    total = differing = 0
    first = ""
    for i, (x, y) in enumerate(zip(a.sequences, b.sequences, strict=True)):
        assert x.digests is not None
        assert y.digests is not None
        off = (x.digests != y.digests).t()  # [rows, linears]: in the order in which they were computed
        total, differing = total + off.numel(), differing + int(off.sum())
        if bool(off.any()) and not first:
            row, linear = (int(n) for n in off.nonzero()[0])
            first = f"{a.linears[linear]}, sequence {i}, position {row}"
    return total, differing, first


def _differing(a: Tensor, b: Tensor) -> int:
    return a.numel() if a.shape != b.shape else int((a.view(torch.int32) != b.view(torch.int32)).sum())


def compare_trace(made: Trace, name: str, directory: File, device: torch.device) -> Iterator[TraceBits]:
    """Per kernel of the trace."""
    files = checkpoint.read(directory, dtype=getattr(torch, made.manifest.dtype))
    weights: dict[str, Int4Weight] = {}
    by_kernel: dict[str, list[Row]] = {}
    for row in made.run.rows:
        by_kernel.setdefault(row.kernel, []).append(row)
    for kernel, rows in sorted(by_kernel.items()):
        outputs = differing = 0
        reason = ""
        for row in rows:
            linear = row.tap.linear
            if linear not in weights:
                weights[linear] = fused_weight(files, linear).to(device)
            found = _replayed(row, weights[linear], made.manifest.gpu, device)
            if isinstance(found, str):
                reason = found
                break
            outputs += found.numel()
            differing += int((found.view(torch.int16) != row.y.view(torch.int16)).sum())
        sizes = tuple(sorted({row.M for row in rows}))
        yield TraceBits(name, made.manifest.engine, kernel, sizes, len(rows), outputs, differing, reason)


def _replayed(row: Row, weight: Int4Weight, gpu: str, device: torch.device) -> Tensor | str:
    """The row's outputs [N], or why there are none."""
    if row.kernel not in {k.name for k in registry.kernels()}:
        return f"{row.kernel} is not in the registry"
    made = recipe_of(registry.kernel(row.kernel), Problem.of(weight, row.M), hardware.gpu(gpu))
    if not isinstance(made, Recipe):
        return made
    if made.opaque or not made.ordered:
        return f"opaque: {made.opaque}" if made.opaque else "atomics: no one answer"
    return replay(at_rows(made, [row.row]), row.x.to(device)[None], weight)[0].cpu()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hw", default="h100")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--count", type=int, default=4, help="prompts")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--traces", type=File, help="folder of traces whose rows are replayed too")
    parser.add_argument("--json", type=File)
    args = parser.parse_args()
    native, replayed = Engines({}, "builtin", batching=Batching(50)), Engines({}, "replay", batching=Batching(50))
    listed = parse_paths(args.methods, args.hw)
    chosen = prompts.heldout(native.directory(listed[0]), args.count, args.tokens)
    plan = Plan(tuple(listed), chosen, args.new_tokens)
    paths = []
    for path in listed:
        paths.append(compare_path(plan, path, native, replayed))
        print(paths[-1], flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    traces = []
    for folder in sorted(args.traces.iterdir()) if args.traces and args.traces.is_dir() else ():
        made = trace.read(folder)
        traces += compare_trace(made, folder.name, native.directory(made.manifest.path), device)
        print(*traces[-2:], sep="\n", flush=True)
    if args.json:
        write_json(args.json, Compared(SCHEMA, collect(details=False), tuple(paths), tuple(traces)))
    off = sum(p.differing for p in paths if not p.reason) + sum(t.differing for t in traces)
    return int(off > 0)


if __name__ == "__main__":
    raise SystemExit(main())
