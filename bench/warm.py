"""Compiles ahead of the timing what the timed process would wait for, in processes of their own and within a time limit.

    python -m bench.warm KERNEL K N DTYPE GROUP SYMMETRIC M,M,...

runs one kernel on one layer and prints ``ready M`` after each number of rows; ``bench.layers`` starts many of these at once.
Compilers leave their results in caches on disk (Triton's, the driver's, humming's), where the timed process finds them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.layer_kernels import choose, dtype_of, matches
from bench.model_layers import Layer, random_layer, random_rows
from bench.peers import Peer
from bench.peers.gemlite import Gemlite
from qlab.backends import failure
from qlab.backends.registry import Kernel, Problem
from qlab.errors import QlabError

COMPILED, COMPILED_ONCE = ("triton.w4a16*",), ("triton.awq*", "triton.gptq*", "vllm.awq_triton", "conch")
"""Triton kernels that would be compiled within the timed process: for every layer, and the same for all layers."""


@dataclass(frozen=True)
class Task:
    kernel: Kernel
    layer: Layer


@dataclass(frozen=True)
class Ready:
    """What became ready in time."""

    seconds: float
    """The limit."""
    rows: dict[tuple[str, int, int], frozenset[int]]
    """Numbers of rows by (kernel, K, N)."""
    reasons: dict[tuple[str, int, int], str]
    """Last line of a process that failed."""

    def refusal(self, kernel: Kernel, layer: Layer, m: int) -> str:
        """Why a kernel that starts slowly is not timed on a layer; empty for every other kernel and where it is ready."""
        if not (isinstance(kernel, Peer) and kernel.slow_start):
            return ""
        key = kernel.name, layer.K, layer.N
        if m in self.rows.get(key, frozenset()):
            return ""
        return self.reasons.get(key) or f"not compiled or tuned within {self.seconds:.0f} s"


NOTHING = Ready(0.0, {}, {})


def tasks(kernels: Sequence[Kernel], layers: Sequence[Layer]) -> list[Task]:
    """What to prepare: peers that start slowly on every layer, the largest layers first, then what compiles for a while."""
    shapes = sorted({(x.K, x.N): x for x in layers}.values(), key=lambda x: -x.K * x.N)
    slow = [Task(k, x) for x in shapes for k in kernels if isinstance(k, Peer) and k.slow_start and not k.missing()]
    each = [Task(k, x) for x in shapes for k in kernels if matches(k.name, COMPILED)]
    return slow + each + [Task(k, shapes[-1]) for k in kernels if matches(k.name, COMPILED_ONCE)]


def warm(
    todo: Sequence[Task],
    rows: Sequence[int],
    dtype: torch.dtype,
    group: int,
    symmetric: bool,
    seconds: float,
    workers: int = 0,
    advance: Callable[[str], None] = lambda what: None,
    command: Sequence[str] = (sys.executable, "-m", "bench.warm"),
) -> Ready:
    """Run the tasks, ``workers`` at a time (as many as cores, 16 at most), until all are done or ``seconds`` are over."""
    workers = workers or max(1, min(16, len(os.sched_getaffinity(0))))
    end, waiting = time.monotonic() + seconds, list(todo)
    running: list[tuple[Task, subprocess.Popen[bytes], Path]] = []
    ready: dict[tuple[str, int, int], frozenset[int]] = {}
    reasons: dict[tuple[str, int, int], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < workers:
                t = waiting.pop(0)
                kind = str(dtype_of(t.kernel, dtype)).removeprefix("torch.")
                options = (
                    t.kernel.name,
                    *map(str, (t.layer.K, t.layer.N, kind, group, int(symmetric))),
                    ",".join(map(str, rows)),
                )
                log = Path(folder) / f"{len(waiting)}.log"
                with log.open("wb") as out:
                    process = subprocess.Popen([*command, *options], stdout=out, stderr=subprocess.STDOUT)
                running.append((t, process, log))
                advance(f"{t.kernel.name} on {t.layer.key}")
            for item in list(running):
                if item[1].poll() is not None:
                    running.remove(item)
                    _note(*item, ready, reasons)
            time.sleep(0.05)
        for t, process, log in running:
            process.kill()
            process.wait()
            _note(t, process, log, ready, {})
    return Ready(seconds, ready, reasons)


def _note(
    task: Task,
    process: subprocess.Popen[bytes],
    log: Path,
    ready: dict[tuple[str, int, int], frozenset[int]],
    reasons: dict[tuple[str, int, int], str],
) -> None:
    lines = log.read_text(errors="replace").strip().splitlines()
    key = task.kernel.name, task.layer.K, task.layer.N
    ready[key] = frozenset(int(x.split()[1]) for x in lines if x.startswith("ready ") and x.split()[1].isdigit())
    said = [x for x in lines if x.startswith("reason ")]
    if said:
        reasons[key] = said[-1].removeprefix("reason ")
    elif process.returncode:
        reasons[key] = f"preparing it failed: {lines[-1] if lines else f'status {process.returncode}'}"


def prepare(name: str, k: int, n: int, dtype: torch.dtype, group: int, symmetric: bool, rows: Sequence[int]) -> None:
    """One task, in this process; raises nothing, prints what is ready and why the rest is not."""
    device = torch.device("cuda")
    kernel = next(x for x in choose(name, device) if x.name == name)
    layer = Layer("shape", f"{k}x{n}", k, n)
    try:
        weight = random_layer(layer, group, dtype, symmetric, device, 0)
        refusal = kernel.supports(Problem.of(weight, rows[0]), device).reason
        if refusal:
            raise QlabError(refusal)
        packed = kernel.pack(weight)
        for m in rows:
            if isinstance(kernel, Gemlite) and kernel.untuned(Problem.of(weight, 0), m):
                print("reason gemlite's table for the H100 has no tuned configuration for this layer", flush=True)
                continue
            kernel.run(random_rows(m, k, dtype, device, m), packed)
            failure.wait(device)
            print(f"ready {m}", flush=True)
    except Exception as e:
        print(f"reason {failure.reason(e, name, device)}", flush=True)


if __name__ == "__main__":
    name, k, n, dtype, group, symmetric, rows = sys.argv[1:]
    wanted = [int(m) for m in rows.split(",")]
    prepare(name, int(k), int(n), getattr(torch, dtype), int(group), symmetric == "1", wanted)
