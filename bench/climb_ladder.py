"""Every registered kernel that runs here on the ladder of tests; vLLM's beside what is expected of them.

    python -m bench.climb_ladder --json FILE [--kernels 'vllm.*,triton.*'] [--device cuda]

Each kernel climbs in a process of its own with a time limit: an illegal memory access or a hang costs that kernel only. What
it had recorded by then is kept. Exit status 1 when a kernel of ours fails a rung, a peer does not do what
``tests/expected_rungs.py`` expects of it, or a process does not end well.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from qlab.backends.registry import Kernel, Problem, kernel, kernels
from qlab.environment import Environment, collect
from qlab.errors import QlabError
from qlab.serial import from_plain, to_plain, write_json
from tests.expected_rungs import CASES, climber, disagreements, expected
from tests.ladder import ROOT, RUNGS, Case, Result, climb

SCHEMA = "qlab.ladder/1"
SMALL_CASES = (Case(16, 128, 128, 32),)
"""For the CPU."""
DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Rung:
    """One result, and for a peer what the table expects."""

    result: Result
    expected: str
    """passed, failed or refused; empty for kernels of ours, which must pass or refuse."""
    reason: str
    """Why that is expected."""
    agrees: bool


@dataclass(frozen=True)
class Climb:
    """One kernel's way up."""

    kernel: str
    version: str
    refusal: str
    """Why it cannot run on this machine; empty when it can."""
    fault: str
    """Why it did not start or how it fell; empty when it finished."""
    seconds: float
    rungs: tuple[Rung, ...]

    @property
    def good(self) -> bool:
        return not self.fault and all(r.agrees for r in self.rungs)


@dataclass(frozen=True)
class Ladder:
    schema: str
    environment: Environment
    device: str
    cases: tuple[Case, ...]
    climbs: tuple[Climb, ...]


def refusal(k: Kernel, cases: Iterable[Case], device: torch.device) -> str:
    """Why a kernel can climb none of the cases on this machine; empty when it can climb one."""
    reasons = []
    for case in cases:
        support = k.supports(Problem(case.m, case.k, case.n, case.group, torch.float16, True, case.act_order), device)
        if support.ok:
            return ""
        reasons.append(support.reason)
    return reasons[0]


def judged(result: Result, case: Case, dtype: torch.dtype) -> Rung:
    """A result beside its expectation."""
    if not result.kernel.startswith("vllm."):
        return Rung(result, "", "", result.status in ("passed", "refused"))
    want = expected(result.kernel, result.rung, case, dtype)
    return Rung(result, want.status, want.reason, not disagreements([result], case, dtype))


def climb_here(name: str, cases: Iterable[Case], device: torch.device, lines: Path) -> None:
    """Climb in this process; one line of JSON per rung, flushed, so that a crash keeps those before it."""
    k = climber(kernel(name))
    with lines.open("w") as file:
        for case in cases:
            for dtype in DTYPES:
                for result in climb(k, case, dtype, device):
                    print(json.dumps(to_plain(judged(result, case, dtype))), file=file, flush=True)


def climb_apart(k: Kernel, device: torch.device, folder: Path, limit: float, deadline: float) -> Climb:
    """Climb in a process of its own, at most ``limit`` seconds and not beyond ``deadline`` (``time.monotonic``)."""
    start, lines = time.monotonic(), folder / f"{k.name}.jsonl"
    limit = min(limit, deadline - start)
    if limit <= 0:
        return Climb(k.name, k.version(), "", "not started: the time for all kernels ran out", 0.0, ())
    command = [sys.executable, "-m", "bench.climb_ladder", "--one", k.name, "--json", str(lines), "--device", str(device)]
    try:
        # Several processes that each take every core for tiny tensors wait for each other most of the time.
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        ran = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=limit
        )
        fault = "" if ran.returncode == 0 else f"exit status {ran.returncode}: {_last_line(ran.stderr)}"
    except subprocess.TimeoutExpired:
        fault = f"stopped after {limit:.1f} s"
    rungs = tuple(_read(lines)) if lines.exists() else ()
    return Climb(k.name, k.version(), "", fault, round(time.monotonic() - start, 1), rungs)


def _read(lines: Path) -> Iterator[Rung]:
    for line in lines.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # a killed process may leave half a line
            yield from_plain(Rung, json.loads(line), lines.name)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def table(climbs: Iterable[Climb]) -> Table:
    """Kernel x rung: how many of the results that were not refused passed; red where one was not expected."""
    out = Table("kernel", box=box.SIMPLE_HEAD)
    for rung in RUNGS:
        out.add_column(rung.__name__.replace("_", "\n"), justify="right")
    for c in climbs:
        out.add_row(c.kernel, *(_cell([r for r in c.rungs if r.result.rung == rung.__name__]) for rung in RUNGS))
    return out


def _cell(rungs: list[Rung]) -> str:
    ran = [r for r in rungs if r.result.status != "refused"]
    if not ran:
        return "refused" if rungs else "-"
    passed = sum(r.result.status == "passed" for r in ran)
    text = "passed" if passed == len(ran) else "failed" if not passed else f"{passed} of {len(ran)}"
    return text if all(r.agrees for r in rungs) else f"[red]{text} ![/red]"


def show(climbs: Iterable[Climb], console: Console) -> None:
    """The table, then a line for each kernel that did not finish and each result that was not expected."""
    climbs = list(climbs)
    console.print(table(c for c in climbs if c.rungs))
    for c in climbs:
        if c.refusal or c.fault:
            console.print(f"{c.kernel}: {c.refusal or c.fault}", markup=False)
        for r in c.rungs:
            if not r.agrees:
                want = f"expected {r.expected}: {r.reason}" if r.expected else "ours must pass"
                found = f"{r.result.status} {r.result.detail}".strip()
                console.print(f"{c.kernel} {r.result.rung} {r.result.case} {r.result.dtype}: {found}; {want}", markup=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--kernels", default="*", help="comma-separated names or patterns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=90, help="seconds for one kernel")
    parser.add_argument("--seconds", type=float, default=140, help="seconds for all")
    parser.add_argument("--jobs", type=int, default=4 if torch.cuda.is_available() else 1, help="kernels at a time")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the process that climbs
    args = parser.parse_args()
    if args.device not in ("cuda", "cpu"):
        parser.error(f"--device {args.device} is neither cuda nor cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA GPU here; leave the option out to climb on the CPU")
    device, deadline = torch.device(args.device), time.monotonic() + args.seconds
    cases = CASES if device.type == "cuda" else SMALL_CASES
    if args.one:
        climb_here(args.one, cases, device, args.json)
        return 0
    patterns = args.kernels.split(",")
    chosen = [k for k in kernels() if any(fnmatch.fnmatch(k.name, p) for p in patterns)]
    if not chosen:
        parser.error(f"--kernels {args.kernels} matches none of: {', '.join(k.name for k in kernels())}")
    environment, climbs = collect(), {}
    for k in chosen:
        if reason := refusal(k, cases, device):
            climbs[k.name] = Climb(k.name, k.version(), reason, "", 0.0, ())
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        todo = [k for k in chosen if k.name not in climbs]
        futures = [pool.submit(climb_apart, k, device, Path(folder), args.limit, deadline) for k in todo]
        for future in as_completed(futures):
            done = future.result()
            climbs[done.kernel] = done
            print(f"{done.kernel:28} {len(done.rungs):3} rungs {done.seconds:6.1f} s  {done.fault}", flush=True)
            write_json(args.json, Ladder(SCHEMA, environment, str(device), cases, tuple(climbs[n] for n in sorted(climbs))))
    ordered = [climbs[name] for name in sorted(climbs)]
    write_json(args.json, Ladder(SCHEMA, environment, str(device), cases, tuple(ordered)))
    show(ordered, Console(width=140))
    return 0 if all(c.good for c in ordered) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except QlabError as e:
        sys.exit(str(e))
