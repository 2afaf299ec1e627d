"""Layers of three models under every INT4 kernel and its peers: checked first, then timed in CUDA graphs, side by side.

    python -m bench.layers --json results/GPU/layers.json [--layers llama-3-8b,llama-70b.down] [--rows 1,16] [--resume]

Weights are packed once per layer and copied, more than 240 MB of distinct copies per kernel; a graph calls them in turn. The
file is written after every layer; ``--resume`` measures what it lacks. Tables are made of the file by ``bench.layer_summary``.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bench import ceilings, gpu_state, layer_kernels, layer_measure, layer_summary, timing, warm
from bench.layer_measure import Held, Settings
from bench.layer_results import SCHEMA, Cell, Copies, Result, Run
from bench.model_layers import BLOCK, MODELS, ROWS, Layer, choose
from qlab import environment, hardware
from qlab.backends.registry import Kernel
from qlab.command import check_output, one_sentence, recorded, torch_device, torch_dtype
from qlab.errors import QlabError


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    layers: tuple[Layer, ...]
    rows: tuple[int, ...]
    blocks: bool = True
    seconds: float = float("inf")
    """Time after which no further cell is begun."""


class Watchdog:
    """Ends the process when one step lasts too long: a kernel that hangs on the GPU cannot be stopped otherwise."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.what, self.since = seconds, "", time.monotonic()
        if seconds > 0:
            threading.Thread(target=self._watch, daemon=True).start()

    def __call__(self, what: str) -> None:
        self.what, self.since = what, time.monotonic()

    def _watch(self) -> None:
        while time.monotonic() - self.since < self.seconds or not self.what:
            time.sleep(0.5)
        print(f"bench.layers: {self.what} has not ended after {self.seconds:.0f} s; resume --without it", file=sys.stderr)
        sys.stderr.flush()
        os._exit(3)


def run(s: Settings, plan: Plan, start: Result, command: dict[str, str]) -> Iterator[Result]:
    """``start`` with what it lacks, after every layer and every block. On a GPU everything runs on one stream of its own."""
    began, on_gpu, number = time.monotonic(), s.device.type == "cuda", len(start.runs)
    properties = torch.cuda.get_device_properties(s.device) if on_gpu else None
    this = Run(
        command=command,
        environment=environment.collect(details=on_gpu),
        device=s.device.type,
        l2_bytes=getattr(properties, "L2_cache_size", 0),
        ceilings=s.ceilings,
        versions={},
        copies=(),
        left_out=(),
        seconds=0.0,
    )
    result, copies, left = start, [], []
    names = [k.name for k in s.kernels]
    for model in dict.fromkeys(x.model for x in plan.layers):
        helds = [Held(x, s) for x in plan.layers if x.model == model]
        whole = plan.blocks and tuple(h.layer for h in helds) == MODELS.get(model)
        units: list[tuple[str, Callable[[int], Cell]]] = [
            (h.layer.name, lambda m, h=h: layer_measure.cell(h, m))
            for h in helds  # type: ignore[misc]
        ]
        if whole:
            units.append((BLOCK, lambda m, helds=helds: layer_measure.block(helds, m)))  # type: ignore[misc]
        for name, measure in units:
            cells: list[Cell] = []
            for m in plan.rows:
                if result.has((model, name, m), names):
                    continue
                if time.monotonic() - began > plan.seconds:
                    left.append(f"{model}.{name} M={m}: no time left")
                    continue
                cells.append(measure(m))
                _trim(s.device)
            copies = _joined(copies, helds)
            this = replace(
                this,
                versions=_versions(s.kernels, [*(c for c in result.cells if c.run == number), *cells]),
                copies=tuple(copies),
                left_out=tuple(left),
                seconds=time.monotonic() - began,
            )
            result = result.with_run(this, number).with_cells(number, cells)
            yield result


def _joined(copies: list[Copies], helds: Sequence[Held]) -> list[Copies]:
    found = {(c.layer, c.kernel): c for c in copies}
    found |= {(c.layer, c.kernel): c for h in helds for c in h.listed()}
    return list(found.values())


def _versions(kernels: Sequence[Kernel], cells: Sequence[Cell]) -> dict[str, str]:
    ran = {e.kernel for c in cells for e in c.entries if e.median > 0}
    return {k.name: k.version() for k in kernels if k.name in ran}


def _trim(device: torch.device) -> None:
    """Hand back what the graphs of the last cell held when much of the memory is reserved."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if free < 0.6 * total:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def begin(path: Path | None, resume: bool, dtype: torch.dtype, group: int, symmetric: bool) -> Result:
    """The file to go on with, or an empty result. Raises QlabError when the file is of other weights."""
    name = str(dtype).removeprefix("torch.")
    empty = Result(SCHEMA, name, group, symmetric, (), ())
    if not resume:
        return empty
    if path is None:
        raise QlabError("--resume needs --json, the file to go on with")
    if not path.exists():
        return empty
    found = Result.read(path)
    if (found.dtype, found.group_size, found.symmetric) != (name, group, symmetric):
        raise QlabError(f"--resume: {path} holds another dtype, group size or kind of zero point")
    return found


def parse_rows(text: str | None) -> tuple[int, ...]:
    """Numbers of rows. Raises QlabError naming the option."""
    if text is None:
        return ROWS
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdigit() and int(p) > 0 for p in parts):
        raise QlabError(f"--rows {text!r} are no positive numbers, as 1,16,256")
    return tuple(dict.fromkeys(int(p) for p in parts))


@one_sentence("bench.layers")
def main(
    json: Annotated[Path | None, typer.Option(help="write the result here, after every layer")] = None,
    layers: Annotated[str, typer.Option(help="models, MODEL.LAYER or KxN, comma-separated")] = ",".join(MODELS),
    rows: Annotated[str | None, typer.Option(help="numbers of rows M; 1 to 4096 by default")] = None,
    kernels: Annotated[str | None, typer.Option(help="globs over names; 'peers' stands for the other libraries")] = None,
    without: Annotated[str, typer.Option(help="globs over kernels to leave out")] = "",
    group: Annotated[int, typer.Option(help="group size; -1 for whole columns")] = 128,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16")] = "float16",
    symmetric: Annotated[bool, typer.Option("--symmetric/--asymmetric", help="zero point 8, which every kernel takes")] = True,
    blocks: Annotated[bool, typer.Option(help="also the four layers of a block in one graph")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="keep the cells of --json that hold all kernels")] = False,
    seconds: Annotated[float, typer.Option(help="time budget in all; what is left out is reported")] = 540.0,
    seconds_per_cell: Annotated[float, typer.Option(help="timing of one cell, all kernels together", min=0.0)] = 0.35,
    warm_seconds: Annotated[float, typer.Option(help="budget for compiling ahead; 0 for none", min=0.0)] = 90.0,
    hang_seconds: Annotated[float, typer.Option(help="end the process when a step lasts longer; 0 for never")] = 120.0,
    device: Annotated[str, typer.Option(help="cuda; cpu times what runs there by the wall clock")] = "cuda",
) -> None:
    """Time every INT4 kernel and peer on models' layers, after its output passed a check against float64."""
    began = time.monotonic()
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a Triton kernel is defined, which is on its first use
    options = {k: v for k, v in locals().items() if k not in ("began", "json")}
    where, kind, plan_rows = torch_device(device), torch_dtype(dtype), parse_rows(rows)
    check_output("--json", json)
    start = begin(json, resume, kind, group, symmetric)
    chosen, found = layer_kernels.choose(kernels, where, without), choose(layers)
    for layer in found:
        if group != -1 and (group < 1 or layer.K % group):
            raise QlabError(f"--group {group} does not divide K={layer.K} of {layer.key}")
    log, console = Console(stderr=True, width=120), Console()
    ready = warm.NOTHING
    if where.type == "cuda" and warm_seconds > 0:
        todo = warm.tasks(chosen, found)
        log.print(f"compiling ahead: {len(todo)} kernels and layers, {warm_seconds:.0f} s at most")
        ready = warm.warm(todo, plan_rows, kind, group, symmetric, warm_seconds)
        log.print(f"{time.monotonic() - began:.0f} s; ready: {sum(map(len, ready.rows.values()))} cells")
    alive, monitor = Watchdog(hang_seconds), gpu_state.Monitor(where)
    stream = torch.cuda.Stream(where) if where.type == "cuda" else None
    with torch.cuda.stream(stream):
        s = Settings(
            kernels=chosen,
            device=where,
            ceilings=ceilings.measure(where, kind),
            gpu=hardware.detect(),
            dtype=kind,
            group=group,
            symmetric=symmetric,
            seconds=seconds_per_cell,
            total_bytes=timing.L2_PROOF if where.type == "cuda" else 0,
            ready=ready,
            alive=alive,
            state=monitor,
        )
        plan = Plan(found, plan_rows, blocks, seconds - (time.monotonic() - began))
        result = start
        for result in run(s, plan, start, recorded(options)):
            if json:
                result.write(json)
            last = result.cells[-1] if result.cells else None
            log.print(f"{time.monotonic() - began:.0f} s: {f'{last.model}.{last.layer}' if last else 'nothing'} done")
    alive("")
    monitor.close()
    layer_summary.show(result, console)


if __name__ == "__main__":
    typer.run(main)
