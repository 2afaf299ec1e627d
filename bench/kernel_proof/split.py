"""``cuda.split`` and ``triton.w4a16`` against their replays, and ten runs in each of two processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from bench.kernel_proof import saved
from bench.kernel_proof.inputs import Trial, activations, weight
from bench.kernel_proof.place import Place
from bench.kernel_proof.saved import Record, Saved
from bench.kernel_proof.tally import Failure, Tally
from qlab.backends.registry import Problem
from qlab.compare import digest
from qlab.recipes import recipe
from qlab.replay import replay
from qlab.serial import write_json
from qlab.weights import Int4Weight

NAMES = ("cuda.split", "triton.w4a16")
ROWS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 200, 256, 300, 512, 700, 1024)
RUNS, REPEATED = 10, 12
"""Runs of a problem in each process, and problems of a kernel that are run so."""
FIRST_SHARE = 0.7
PRODUCTS = 1 << 34
AGAIN = "ten runs in each of two processes"


def trials(count: int, seed: int = 4) -> Iterator[Trial]:
    """K of whole groups, N of any multiple of 8: few of these layers are whole tiles."""
    random, made = np.random.default_rng(seed), 0
    while made < count:
        group = (128, 32, 64, -1)[made % 4]
        form = ("awq", "gptq", "act_order")[int(random.integers(3))]
        unit = 32 if group == -1 else group
        k = unit * int(random.integers(1, 1 + (512, 2048, 4096)[made % 3] // unit))
        n = 8 * int(random.integers(1, 257 if made % 5 else 1025))
        m = ROWS[int(random.integers(len(ROWS)))]
        if form == "act_order" and group in (-1, k):
            form = "gptq"
        values = ("plain", "cancel", "wide")[int(random.integers(3))]
        trial = Trial(m, k, n, group, ("fp16", "bf16")[made // 4 % 2], form, values, 4000 + made)
        made += 1
        if trial.products <= PRODUCTS:
            yield trial


def prove(
    place: Place,
    tally: Tally,
    folder: Path,
    names: tuple[str, ...] = NAMES,
    check: saved.Check = saved.in_another_process,
) -> None:
    """Files that the second process reads are left in ``folder``."""
    records: dict[str, list[Record]] = {name: [] for name in names}
    todo = list(trials(place.problems))
    for number, trial in enumerate(todo):
        if place.over(FIRST_SHARE):
            tally.skip("no time left", len(todo) - number)
            break
        with tally.guard("the replay", trial):
            w, x = weight(trial, place.device), activations(trial, place.device)
            for name in names:
                with tally.guard(name, trial):
                    _one(place, tally, name, trial, (w, x), records[name])
    for name in names:
        file, part = folder / f"again-{name}.json", folder / f"again-{name}-second.json"
        write_json(file, Saved(saved.SCHEMA, place.gpu.key, tally.kernels.get(name, ""), tuple(records[name])))
        arguments = ["--kernel", name, "--claim", f"{name}, {AGAIN}", "--runs", str(RUNS)]
        left = place.left / (len(names) - names.index(name))
        saved.take_in(tally, part, check(file, part, arguments, left))
    tally.complete = not tally.left_out


def _one(place: Place, tally: Tally, name: str, trial: Trial, made: tuple[Int4Weight, Tensor], records: list[Record]) -> None:
    w, x = made
    kernel = place.kernel(name)
    problem = Problem.of(w, trial.M)
    support = kernel.supports(problem, place.device)
    if not support.ok:
        tally.skip(f"{name}: {support.reason}")
        return
    tally.kernels.setdefault(name, kernel.version())
    packed = kernel.pack(w)
    y = place.run(kernel, x, packed)
    want = replay(recipe(name, problem, place.gpu), x, w, engine=place.engine)
    good = tally.compare(f"{name}, its replay", trial, y, want)
    if good and len(records) < REPEATED:
        first = digest(y)
        others = [digest(place.run(kernel, x, packed)) for _ in range(RUNS - 1)]
        claim = f"{name}, {AGAIN}"
        tally.claim(claim, outputs=(1 + len(others)) * y.numel())
        if set(others) != {first}:
            tally.claim(claim, differing_problems=1)
            tally.fail(Failure(claim, str(trial), f"{len({first, *others})} outputs in {RUNS} runs"))
        records.append(saved.record(trial, x, w, y, bits=True))
