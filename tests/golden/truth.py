"""Recorded outputs of real kernels, from either kind of recording, in one form that replays are compared with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.problems import Inputs, Trial, inputs, not_modelled, possible
from bench.record_golden import Bits, Golden
from bench.record_silicon import Case, make_activations, make_weight, sample_positions
from qlab.backends.registry import Problem
from qlab.compare import digest
from qlab.hardware import Gpu, gpu
from qlab.recipe import Recipe
from qlab.recipes import builders, recipe
from qlab.replay import replay
from qlab.replay.atomics import addends
from qlab.replay.operands import bits

GOLDEN = Path(__file__).parent
SILICON = GOLDEN.parent.parent / "results"
MOST_ADDENDS = 8
"""Unordered sums of so many parts are looked at; more take long to enumerate."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What one kernel gave for one problem: some outputs bit by bit, all of them by digest."""

    kernel: str
    gpu: Gpu
    problem: Problem
    name: str
    """Of the problem."""
    digest: str
    given: Inputs
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    """Places of the outputs recorded bit by bit [P]."""
    recorded: Bits
    """[P]"""

    @cached_property
    def recipe(self) -> Recipe:
        return recipe(self.kernel, self.problem, self.gpu)

    @property
    def products(self) -> int:
        """What a replay costs."""
        return self.problem.M * self.problem.K * self.problem.N

    def replay(self, said: Recipe) -> torch.Tensor:
        return replay(said, self.given.x, self.given.weight, self.given.bias, engine="native")

    def fault(self, said: Recipe | None = None) -> str:
        """How the replay of a recipe, by default the kernel's, differs from what was recorded; empty when in nothing."""
        y = self.replay(said or self.recipe)
        got = bits(y)[self.rows, self.columns]
        apart = np.flatnonzero(got != self.recorded)
        where = f"{self.kernel} on {self.name} ({self.gpu.key})"
        if len(apart):
            i = apart[0]
            return (
                f"{where}: {len(apart)} of {len(got)} outputs differ, first at ({self.rows[i]}, {self.columns[i]}): "
                f"recorded {self.recorded[i]:#06x}, replayed {got[i]:#06x}"
            )
        return "" if digest(y) == self.digest else f"{where}: the outputs recorded agree, the digest of all of them does not"

    def unreachable(self, most: int = 24) -> str:
        """Which of some recorded outputs no order of the atomics gives; empty when all can be had."""
        chosen = np.linspace(0, len(self.rows) - 1, min(most, len(self.rows))).astype(int)
        for rows, columns, parts in addends(self.recipe, self.given.x, self.given.weight):
            for i in chosen:
                m, n = int(self.rows[i]), int(self.columns[i])
                if not (rows.start <= m < rows.stop and columns.start <= n < columns.stop):
                    continue
                recorded = float(torch.tensor(int(self.recorded[i])).to(torch.int16).view(parts.dtype))
                if not possible(recorded, parts[:, m - rows.start, n - columns.start]):
                    return f"{self.kernel} on {self.name}: ({m}, {n}) is {recorded}, which no order of {len(parts)} gives"
        return ""


def golden(recording: Golden, stored: Bits) -> Iterator[Evidence]:
    """Everything in a golden recording, problem by problem; kernels with equal recipes and outputs follow each other."""
    on = gpu(recording.gpu)
    for problem in recording.problems:
        given = inputs(problem.trial)
        m, n = problem.stored
        rows, columns = np.divmod(np.arange(m * n), n)
        for record in problem.records:
            yield Evidence(
                record.kernel,
                on,
                problem.trial.problem(given.weight),
                str(problem.trial),
                record.digest,
                given,
                rows,
                columns * problem.stride,
                stored[record.offset : record.offset + m * n],
            )


def silicon(folder: Path, most: int) -> Iterator[Evidence]:
    """What ``bench/record_silicon.py`` recorded of weights of at most ``most`` elements, where a recipe makes a claim."""
    result: dict[str, Any] = json.loads((folder / "silicon.json").read_text())
    stored: Bits = np.load(folder / "silicon.npz")["bits"]
    on, at, given = gpu(folder.name), -1, None
    for record in result["records"]:
        entry = result["problems"][record["problem"]]
        plain = result["cases"][entry["case"]]
        if plain["K"] * plain["N"] > most or record["kernel"] not in builders() or "digest" not in record:
            continue
        if given is None or record["problem"] != at:
            case = Case(**{**{f: plain[f] for f in Case.__dataclass_fields__}, "tokens": ()})
            at, weight = record["problem"], make_weight(case)
            given = Inputs(weight, make_activations(case.values, entry["M"], case.K, case.dtype, entry["seed"]), None)
            name = f"M={entry['M']} {case.form} K={case.K} N={case.N} g={case.group_size} {case.dtype} {case.values}"
            trial = Trial(entry["M"], case.K, case.N, case.group_size, case.dtype, case.form, case.values, case.seed)
        positions = sample_positions(entry["M"] * plain["N"])
        rows, columns = np.divmod(positions, plain["N"])
        start, count = record["sample"]
        found = Evidence(
            record["kernel"],
            on,
            Problem.of(given.weight, entry["M"]),
            name,
            record["digest"],
            given,
            rows,
            columns,
            stored[start : start + count],
        )
        if not not_modelled(found.kernel, trial, found.recipe):
            yield found
