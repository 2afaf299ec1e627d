"""Are planted faults named? Kernels with one or two faults, handed to ``name_faults`` as opaque callables.

    python -m bench.planted_faults --json results/attribution/planted-faults.json [--cases 620] [--seed 0]

Every clean kernel below gets single and double faults (bench/planted_weights.py, bench/planted_schemes.py), in turn and drawn
from the seed, and runs as a replay of what they make of weight and scheme. A fault counts where it changes a bit of some probe,
given the other one; where none does, the right answer is ``equivalent here``. Real cases (bench/planted_real.py) come first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Generator, Tensor

from bench import planted_schemes, planted_weights
from bench.planted_real import real_cases
from bench.planted_schemes import STRIPES, Plan
from qlab.attribution.fault import Fault
from qlab.attribution.faults import name_faults
from qlab.attribution.planted import SCHEMA, Case, Planted, confusion, judged, kind_rows
from qlab.backends.registry import Problem
from qlab.environment import collect
from qlab.hardware import gpu
from qlab.inputs import random_activations, random_weight
from qlab.recipe import Recipe
from qlab.recipes import recipe, scheme_of
from qlab.replay import Engine, prepare
from qlab.report.faults import show
from qlab.serial import write_json
from qlab.weights import DTYPES, Int4Weight

PROCESSES = 2
STRIDE = 7
"""Plants from one case to the next: none is left out, for their number is no multiple of it."""


@dataclass(frozen=True)
class Clean:
    """A kernel on a GPU and the problem that it is given."""

    kernel: str
    gpu: str
    M: int
    K: int
    N: int
    group_size: int
    """-1 for whole columns."""
    dtype: str = "fp16"
    form: str = "zeros 0 to 15"
    """Zero points ``0 to 15``, ``1 to 16``, or 8 everywhere (``symmetric``); ``act-order`` in any."""
    bias: bool = False
    engine: Engine = "native"
    """What the faulty kernel runs on; the tool replays on the native engine."""
    often: str = ""
    """A family of plants that every fourth pair of cases begins with, for it acts on few other problems."""

    def __str__(self) -> str:
        group = "whole columns" if self.group_size == -1 else f"groups of {self.group_size}"
        more = f"{', bias' if self.bias else ''}{f', {self.engine} engine' if self.engine != 'native' else ''}"
        return f"{self.kernel}@{self.gpu} {self.M}x{self.K}x{self.N}, {group}, {self.dtype}, {self.form}{more}"

    def weight(self, seed: int) -> Int4Weight:
        """Every code, distinct scales; zero points over the whole range of the form."""
        symmetric, order = "symmetric" in self.form, "act-order" in self.form
        w = random_weight(
            self.K, self.N, self.group_size, dtype=DTYPES[self.dtype], symmetric=symmetric, act_order=order, seed=seed
        )
        if symmetric:
            return w
        lowest = w.zeros % 15 == 0  # 15, a fifteenth of them
        return replace(w, zeros=torch.where(lowest, 16 if "16" in self.form else 0, w.zeros).to(torch.uint8))


CLEAN = (
    Clean("vllm.awq_gemm", "h100", 16, 512, 128, 128),
    Clean("vllm.awq_gemm", "a100", 8, 1024, 64, 32),
    Clean("vllm.awq_gemm", "h100", 1, 256, 128, 64),
    Clean("vllm.marlin.awq", "h100", 16, 512, 128, 128),
    Clean("vllm.marlin.awq", "a100", 4, 768, 128, 64, "bf16"),
    Clean("vllm.marlin.awq", "h100", 64, 1024, 64, 32),
    Clean("vllm.marlin.awq", "h100", 8, 512, 128, -1, bias=True),
    Clean("vllm.marlin.awq", "a100", 16, 512, 64, -1),
    Clean("vllm.marlin.awq", "h100", 8, 1024, 896, 128, often=STRIPES),
    Clean("vllm.marlin.gptq", "a100", 8, 640, 1536, 128, form="symmetric", often=STRIPES),
    Clean("vllm.marlin.awq.fp16", "h100", 16, 1024, 64, 128),
    Clean("vllm.marlin.gptq", "a100", 16, 768, 128, 64, form="symmetric, act-order"),
    Clean("vllm.marlin.gptq", "h100", 33, 512, 64, 32, "bf16", "symmetric"),
    Clean("vllm.marlin.gptq.fp16", "a100", 48, 768, 192, 64, form="symmetric"),
    Clean("vllm.machete.awq", "h100", 8, 1024, 128, 64),
    Clean("vllm.machete.awq", "h100", 33, 1024, 256, 128, "bf16"),
    Clean("vllm.machete.gptq", "h100", 16, 1024, 128, 128, form="symmetric, act-order"),
    Clean("triton.awq_gemm", "h100", 16, 512, 64, 64, "bf16"),
    Clean("triton.awq_gemm", "a100", 3, 256, 128, 32, engine="reference"),
    Clean("triton.awq_gemm.splitk", "h100", 16, 1024, 64, 64),
    Clean("triton.awq_gemm.splitk", "a100", 1, 768, 128, 128, "bf16"),
    Clean("triton.gptq_gemm", "h100", 8, 512, 64, 32, form="zeros 1 to 16, act-order"),
    Clean("triton.gptq_gemm.splitk", "a100", 16, 512, 128, 128, form="zeros 1 to 16, act-order"),
    Clean("vllm.awq_triton", "h100", 16, 512, 128, 64),
    Clean("vllm.awq_triton", "a100", 8, 1024, 64, 128),
    Clean("vllm.gptq_gemm", "h100", 8, 256, 128, 64, form="zeros 1 to 16"),
    Clean("vllm.gptq_gemm", "a100", 16, 256, 64, 32, form="zeros 0 to 15, act-order"),
)
FEW = (0, 3, 14, 19, 22, 25)
"""Of them, those that a short run takes."""


@dataclass(frozen=True, eq=False)
class Faulty:
    """A plan and a weight, with the faults planted in them so far."""

    plan: Plan
    weight: Int4Weight
    faults: tuple[Fault, ...] = ()

    @property
    def made(self) -> Recipe:
        return self.plan.recipe()


Planting = Callable[[Faulty, Generator], "Faulty | None"]


def plantings() -> tuple[tuple[str, Planting], ...]:
    """Every way to plant a fault, with its family: one plant of each family in turn, then the next of each."""

    def in_weight(plant: planted_weights.Plant) -> Planting:
        def go(f: Faulty, g: Generator) -> Faulty | None:
            found = planted_weights.planted(plant, f.weight, g)
            return None if found is None else replace(f, weight=found[0], faults=(*f.faults, found[1]))

        return go

    def in_scheme(plant: planted_schemes.SchemePlant) -> Planting:
        def go(f: Faulty, g: Generator) -> Faulty | None:
            found = planted_schemes.planted(plant, f.plan)
            return None if found is None else replace(f, plan=found[0], faults=(*f.faults, found[1]))

        return go

    families = {f: tuple(map(in_weight, plants)) for f, plants in planted_weights.FAMILIES.items()}
    families |= {f: tuple(map(in_scheme, plants)) for f, plants in planted_schemes.FAMILIES.items()}
    most = max(map(len, families.values()))
    return tuple((name, plants[i]) for i in range(most) for name, plants in families.items() if i < len(plants))


def plant(clean: Faulty, count: int, turn: int, g: Generator) -> tuple[Faulty, tuple[Planting, ...]] | None:
    """``count`` faults of different families: the first possible one from ``turn`` on, and one drawn.

    Damage of single elements comes last: its place is that in the weight as the kernel decodes it.
    """
    every = plantings()
    picked: list[tuple[str, Planting]] = []
    found = clean
    for attempt in range(2 * len(every) * count):
        name, chosen = every[(_any(g) if picked else turn + attempt) % len(every)]
        if name in (n for n, _ in picked):
            continue
        trial = sorted([*picked, (name, _seeded(chosen, _any(g)))], key=lambda p: p[0] == "damage")
        if (made := _all(clean, [p for _, p in trial])) is not None:
            picked, found = trial, made
        if len(picked) == count:
            return found, tuple(p for _, p in picked)
    return None


def _any(g: Generator) -> int:
    return int(torch.randint(0, 1 << 30, (1,), generator=g))


def _seeded(planting: Planting, seed: int) -> Planting:
    """The same fault each time that it is planted."""
    return lambda f, _: planting(f, Generator().manual_seed(seed))


def _all(clean: Faulty, plantings: Sequence[Planting]) -> Faulty | None:
    found: Faulty | None = clean
    for one in plantings:
        found = None if found is None else one(found, Generator())
    return found


def run(f: Faulty, bias: Tensor | None, engine: Engine) -> Callable[[Tensor], Tensor]:
    """The faulty kernel."""
    return prepare(f.made, f.weight, bias, engine=engine).run


def acting(
    clean: Faulty, faulty: Faulty, done: Sequence[Planting], bias: Tensor | None, probes: Sequence[Tensor]
) -> tuple[Fault, ...]:
    """Those of the planted faults without which some output of the probes would have other bits."""
    outputs = _outputs(faulty, bias, probes)
    found = []
    for number, fault in enumerate(faulty.faults):
        others = _all(clean, [one for at, one in enumerate(done) if at != number])
        if others is None or not torch.equal(_outputs(others, bias, probes), outputs):
            found.append(fault)
    if not found and len(faulty.faults) == 2 and not torch.equal(_outputs(clean, bias, probes), outputs):
        found = [faulty.faults[0]]  # either alone does all that both do
    return tuple(found)


def _outputs(f: Faulty, bias: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
    kernel = run(f, bias, "native")
    return torch.stack([kernel(x).view(torch.int16) for x in inputs])


def one_case(on: Clean, count: int, turn: int, seed: int) -> Case | None:
    """One kernel with ``count`` faults, and what is said of it; None where so many cannot be planted."""
    w = on.weight(seed)
    problem = replace(Problem.of(w, on.M), bias=on.bias)
    bias = random_activations(1, on.N, dtype=w.dtype, seed=seed + 1)[0] if on.bias else None
    scheme = scheme_of(on.kernel, problem, gpu(on.gpu))
    clean = Faulty(Plan(scheme, problem), w)
    said = recipe(on.kernel, problem, gpu(on.gpu))
    made = plant(clean, count, turn, Generator().manual_seed(seed))
    if made is None:
        return None
    faulty, done = made
    kernel = run(faulty, bias, on.engine)
    probes: list[Tensor] = []

    def opaque(x: Tensor) -> Tensor:
        probes.append(x)
        return kernel(x)

    start = time.perf_counter()
    answer = name_faults(opaque, said, w, bias, seed=seed)
    seconds = time.perf_counter() - start
    truth = acting(clean, faulty, done, bias, probes)
    return judged(str(on), faulty.faults, truth, answer, seconds, seed)


def cases_of(on: Clean, at: int, cases: int, seed: int) -> list[Case]:
    """Half of them with one fault, half with two; the plants in turn, from another one on for each kernel."""
    torch.set_num_threads(1)
    found = []
    for i in range(cases):
        turn = _first(on.often) if on.often and i % 8 < 2 else 11 * at + i * STRIDE
        case = one_case(on, 1 + i % 2, turn, 10_000 * seed + 100 * at + i)
        found += [case] if case is not None else []
    return found


def _first(family: str) -> int:
    """The turn in which the first plant of a family comes."""
    return next(i for i, (name, _) in enumerate(plantings()) if name == family)


def suite(cases: int, seed: int = 0, processes: int = PROCESSES, clean: Sequence[Clean] = CLEAN) -> tuple[Case, ...]:
    """The real cases and ``cases`` planted ones, spread over the clean kernels."""
    share = [(cases + i) // len(clean) for i in range(len(clean))]
    jobs = [(on, CLEAN.index(on), n, seed) for on, n in zip(clean, share, strict=True)]
    if processes == 1:
        return (*real_cases(), *(c for job in jobs for c in cases_of(*job)))
    with ProcessPoolExecutor(processes) as pool:
        real = pool.submit(real_cases)
        found = [pool.submit(cases_of, *job) for job in jobs]
        return (*real.result(), *(c for f in found for c in f.result()))


def measure(cases: int, seed: int, command: str) -> Planted:
    """The suite with its tables."""
    start = time.perf_counter()
    found = suite(cases, seed)
    seconds = time.perf_counter() - start
    return Planted(SCHEMA, collect(), command, seed, found, kind_rows(found), confusion(found), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", type=int, default=620)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    to = f" --json {args.json}" if args.json else ""
    command = f"python -m bench.planted_faults{to} --cases {args.cases} --seed {args.seed}"
    result = measure(args.cases, args.seed, command)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, result)
    show(result, Console(width=160))


if __name__ == "__main__":
    main()
