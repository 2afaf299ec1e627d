"""Prove that replays give the bits of the real kernels: whole outputs of hundreds of problems per family, on this GPU.

    QLAB_VLLM_EXTENSION=/path/_C.so python -m bench.prove_replay --out DIR --processes 8 [--seconds 480]
    python -m bench.prove_replay --merge DIR

QLAB_VLLM_SOURCE=/path/awq_triton.py adds vLLM's Triton kernel where vLLM is not installed. Each process takes every so-many-th
weight of ``bench.proof_plan`` (``--shard i/n`` runs one alone) and writes ``proof.i-of-n.json``; they are merged into
``proof.json``, and go when that is complete. What differs, and what raises, is listed problem by problem. Sums left to atomics
have no bits of their own: samples of them are held against everything that some order of the additions gives.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import proof
from bench.features import features
from bench.problems import Inputs, Trial, call, inputs, not_modelled, possible
from bench.proof import Failure, Family, Proof
from bench.proof_plan import Task, part, plan
from qlab.backends import failure
from qlab.backends.registry import Kernel, Packed, kernels
from qlab.backends.vllm_extension import Missing, extension
from qlab.compare import differing, differing_bits
from qlab.environment import collect
from qlab.errors import QlabError
from qlab.hardware import Gpu, detect
from qlab.recipe import Recipe, Unordered
from qlab.recipes import recipe
from qlab.replay import choose, missing, replay
from qlab.replay.atomics import EXACT_ADDENDS, addends
from qlab.serial import write_json

Call = Callable[[Kernel, Packed, Tensor, Tensor | None], Tensor]
SAMPLES = ((6, 24), (9, 12), (12, 4), (EXACT_ADDENDS, 1))
"""Unordered sums of at most so many addends: so many outputs of a problem are looked at. Enumerating takes 2^addends."""
MOST_PARTS = 48
"""Addends of all of a problem's unordered regions together; each is replayed on its own."""


class Prover:
    """Compares kernels with their replays on one device, and counts."""

    def __init__(
        self, gpu: Gpu, device: torch.device, chosen: Iterable[Kernel], engine: str = "auto", run: Call = call
    ) -> None:
        self.gpu, self.device, self.engine, self.call = gpu, device, engine, run
        self.kernels = {k.name: k for k in chosen}
        self.families: dict[str, Family] = {}
        self.failures: list[Failure] = []
        self.builds: dict[str, str] = {}
        self.done = 0

    def run(self, task: Task) -> None:
        """One problem through each of its kernels."""
        self.done += 1
        self.families.setdefault(task.family.name, Family(task.family.name))
        try:
            made = self._inputs(task.trial)
        except Exception as error:
            self._fail(task, "", self._reason(error, "the inputs"))
            return
        replays: dict[str, Tensor] = {}
        exercised: set[str] = set()
        for name in task.kernels:
            kernel = self.kernels.get(name)
            support = kernel.supports(task.trial.problem(made.weight), self.device) if kernel else None
            if kernel is None or support is None or not support.ok:
                self._count(task, skipped={f"{name}: {support.reason if support else 'not registered'}": 1})
                continue
            try:
                said = _recipe(name, task.trial, self.gpu)
                if reason := not_modelled(name, task.trial, said):
                    self._count(task, skipped={f"{name}: {reason}": 1})
                    continue
                y = self.call(kernel, kernel.pack(made.weight), made.x, made.bias)
                failure.wait(self.device)
                compared = self._compare(task, name, y, said, made, replays)
            except Exception as error:
                self._fail(task, name, self._reason(error, name))
                continue
            self.builds.setdefault(name, kernel.version())
            if compared:
                exercised |= features(name, task.trial, said, self.gpu)
                self._count(task, comparisons=1, kernels={name: 1})
        if exercised:
            self._count(task, problems=1, features=dict.fromkeys(exercised, 1))

    def _inputs(self, trial: Trial) -> Inputs:
        made = inputs(trial)
        bias = None if made.bias is None else made.bias.to(self.device)
        return Inputs(made.weight.to(self.device), made.x.to(self.device), bias)

    def _compare(self, task: Task, name: str, y: Tensor, said: Recipe, made: Inputs, replays: dict[str, Tensor]) -> bool:
        """Bit by bit where the order is fixed, by samples where it is not; whether anything was compared."""
        fixed = torch.ones((said.M, said.N), dtype=torch.bool, device=self.device)
        for region in said.regions:
            if isinstance(region.tree, Unordered) and len(region.tree.parts) > 2:
                for columns in region.columns:
                    fixed[slice(*region.rows), slice(*columns)] = False
        compared = int(fixed.sum())
        if compared:
            if said.hash not in replays:
                replays[said.hash] = replay(said, made.x, made.weight, made.bias, engine=self.engine, seed=0)  # type: ignore[arg-type]
            want = replays[said.hash]
            if y.shape != want.shape or y.dtype != want.dtype:
                raise QlabError(f"gave {y.dtype} {list(y.shape)}, not {want.dtype} {list(want.shape)}")
            a, b = (y, want) if compared == y.numel() else (y[fixed], want[fixed])
            apart = differing(a, b)
            self._count(task, outputs=compared)
            if apart:
                self._count(task, differing_outputs=apart, differing_bits=differing_bits(a, b))
                self._fail(task, name, _first(y, want, fixed), compared, apart)
        return self._sample(task, name, y, said, made, fixed) or bool(compared)

    def _sample(self, task: Task, name: str, y: Tensor, said: Recipe, made: Inputs, fixed: Tensor) -> bool:
        """Whether samples of the unordered outputs were held against the orders; each that none gives is counted."""
        loose = [r.tree for r in said.regions if isinstance(r.tree, Unordered) and len(r.tree.parts) > 2]
        if not loose:
            return False
        most = max(len(t.parts) for t in loose)
        outputs = next((n for addends, n in SAMPLES if most <= addends), 0)
        if not outputs or sum(len(t.parts) for t in loose) > MOST_PARTS:
            self._count(task, skipped={f"{name}: atomics of more addends than can be enumerated": 1})
            return False
        places = torch.nonzero(~fixed).cpu()
        chosen = places[np.linspace(0, len(places) - 1, min(outputs, len(places))).astype(int)].tolist()
        bad = []
        for rows, columns, parts in addends(said, made.x, made.weight):
            for m, n in chosen:
                if rows.start <= m < rows.stop and columns.start <= n < columns.stop:
                    self._count(task, sampled=1)
                    if not possible(float(y[m, n]), parts[:, m - rows.start, n - columns.start].cpu()):
                        bad.append(f"({m}, {n}) is {float(y[m, n])}, which no order of {len(parts)} addends gives")
        if bad:
            self._count(task, unreachable=len(bad))
            self._fail(task, name, bad[0], len(chosen), len(bad))
        return True

    def _count(self, task: Task, **counts: object) -> None:
        name = task.family.name
        self.families[name] = self.families[name] + Family(name, **counts)  # type: ignore[arg-type]

    def _fail(self, task: Task, kernel: str, what: str, outputs: int = 0, apart: int = 0) -> None:
        self.failures.append(Failure(task.family.name, kernel, task.trial, what, outputs, apart))

    def _reason(self, error: Exception, name: str) -> str:
        """The error's text. Raises QlabError where the GPU no longer answers."""
        return failure.reason(error, name or "the inputs", self.device)

    def result(self, shard: int, of: int, planned: int, seed: int, seconds: float) -> Proof:
        found = extension()
        built = {"missing": found.reason} if isinstance(found, Missing) else {"sha256": found.sha256, "version": found.version}
        engine = choose(torch.empty(0, device=self.device)) if self.engine == "auto" else self.engine
        families, failures = tuple(self.families.values()), tuple(self.failures)
        shape = ((shard,), of, planned, self.done, seconds)
        environment = _environment()
        return Proof(proof.SCHEMA, self.gpu.key, environment, built, self.builds, engine, seed, *shape, families, failures)


@lru_cache(maxsize=1)
def _environment() -> object:
    return collect(details=False)


@lru_cache(maxsize=4096)
def _recipe(name: str, trial: Trial, gpu: Gpu) -> Recipe:
    return recipe(name, trial.outline(), gpu)


def _first(y: Tensor, want: Tensor, fixed: Tensor) -> str:
    """How many outputs differ, and the first of them bit by bit."""
    apart = (y.view(torch.int16) != want.view(torch.int16)) & fixed
    m, n = (int(i) for i in apart.nonzero()[0])
    got, expected = (int(t[m, n].view(torch.int16)) & 0xFFFF for t in (y, want))
    rows = int(apart.any(1).sum())
    return f"{int(apart.sum())} outputs in {rows} rows differ, first ({m}, {n}): kernel {got:#06x}, replay {expected:#06x}"


def prove(prover: Prover, tasks: Sequence[Task], seconds: float, write: Callable[[float], None]) -> float:
    """Tasks until the time is up; what was found is written every 20 seconds and at the end. The seconds it took."""
    start = written = time.monotonic()
    try:
        for i, task in enumerate(tasks):
            now = time.monotonic()
            if now - start > seconds:
                break
            prover.run(task)
            if now - written > 20:
                write(now - start)
                written = now
                print(f"[{now - start:6.1f} s] {i + 1}/{len(tasks)}, {len(prover.failures)} failures", flush=True)
    finally:  # a GPU that no longer answers costs what comes after it alone
        write(time.monotonic() - start)
    return time.monotonic() - start


def run_shard(out: Path, shard: int, of: int, seconds: float, seed: int, limit: int | None, engine: str) -> None:
    gpu = detect()
    assert gpu is not None
    tasks = part(plan(seed)[:limit], shard, of)
    prover = Prover(gpu, torch.device("cuda"), kernels(), engine)
    path = out / f"proof.{shard}-of-{of}.json"
    prove(prover, tasks, seconds, lambda passed: write_json(path, prover.result(shard, of, len(tasks), seed, passed)))


def run_shards(out: Path, processes: int, arguments: list[str]) -> bool:
    """Every shard as a process of its own; their output goes to ``proof.i-of-n.log``. Whether all ended well."""
    for old in out.glob("proof.*-of-*.json"):
        old.unlink()
    running = []
    for i in range(processes):
        with (out / f"proof.{i}-of-{processes}.log").open("w") as log:
            command = [sys.executable, "-m", "bench.prove_replay", "--out", str(out), "--shard", f"{i}/{processes}", *arguments]
            running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    good = True
    for i, process in enumerate(running):
        if process.wait():
            good = False
            log_text = (out / f"proof.{i}-of-{processes}.log").read_text(errors="replace")
            print(f"shard {i} ended with status {process.returncode}:\n" + "\n".join(log_text.splitlines()[-8:]), flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for proof.json and the shards")
    parser.add_argument("--processes", type=int, default=1, help="that share the GPU")
    parser.add_argument("--shard", help="i/n: run one shard alone")
    parser.add_argument("--merge", type=Path, help="only join the shards in this folder")
    parser.add_argument("--seconds", type=float, default=480, help="start no further problem after so long")
    parser.add_argument("--seed", type=int, default=1, help="of the plan")
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--engine", choices=("auto", "cuda", "native", "tensor-cores"), default="auto", help="that replays")
    options = parser.parse_args()
    folder: Path | None = options.merge or options.out
    if folder is None:
        parser.error("name a folder: --out DIR to run, --merge DIR to join shards")
    good = True
    if not options.merge:
        if detect() is None:
            parser.error("the kernels need a CUDA GPU, and PyTorch finds none here")
        if isinstance(found := extension(), Missing):
            parser.error(f"vLLM's kernels: {found.reason}")
        if options.engine != "auto" and (reason := missing(options.engine)):
            parser.error(f"the {options.engine} engine cannot run: {reason}")
        folder.mkdir(parents=True, exist_ok=True)
        if options.shard:
            shard, of = (int(part) for part in options.shard.split("/"))
            run_shard(folder, shard, of, options.seconds, options.seed, options.limit, options.engine)
            return 0
        passed = ["--seconds", str(options.seconds), "--seed", str(options.seed), "--engine", options.engine]
        limit = ["--limit", str(options.limit)] if options.limit else []
        good = run_shards(folder, options.processes, passed + limit)
    try:
        result = proof.merge_folder(folder)
    except QlabError as error:
        parser.error(str(error))
    proof.show(result)
    if not options.merge and good and result.complete:  # proof.json holds all that the shards do
        for path in (*folder.glob("proof.*-of-*.json"), *folder.glob("proof.*-of-*.log")):
            path.unlink()
    return 0 if good and not result.failures else 1


if __name__ == "__main__":
    sys.exit(main())
