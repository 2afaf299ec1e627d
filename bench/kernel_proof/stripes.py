"""Recipes of other machines on this GPU's tensor cores: another SM count's stripes, L = 8, hybrids; against the emulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.kernel_proof import marlin
from bench.kernel_proof.inputs import activations, weight
from bench.kernel_proof.place import Place, poisoned
from bench.kernel_proof.tally import Tally
from bench.planned_gemm import Draws
from qlab.backends.registry import Packed, Problem
from qlab.errors import UnsupportedError
from qlab.gemm import launch
from qlab.gemm.plan import Plan, make_plan
from qlab.gemm.tiles import Variant
from qlab.hardware import Gpu, gpu
from qlab.inputs import random_activations
from qlab.recipes import DEFAULT, assemble
from qlab.recipes import marlin as marlin_recipe
from qlab.recipes.scheme import Scheme
from qlab.replay import prepare, replay

ELSEWHERE = ("a100", "a100", "a100", "h100-pcie", "a10")
"""GPUs whose stripes are executed, in turn."""
PRODUCTS = 1 << 35
OWN_SHARE = 0.6
"""Of the time, for stripes; the rest is for drawn recipes."""


def striped(problem: Problem, there: Gpu, here: Gpu) -> Scheme:
    """Marlin's scheme as ``there`` cuts it, multiplied by the tensor cores of ``here``."""
    scheme, own = marlin_recipe.scheme(problem, there, DEFAULT), marlin_recipe.scheme(problem, here, DEFAULT)
    return replace(
        scheme, fraction_bits=own.fraction_bits, zero_exponents=own.zero_exponents, terms=own.terms, accumulator=own.accumulator
    )


@dataclass(frozen=True)
class Elsewhere:
    """Plans another GPU's Marlin for this one."""

    key: str

    def __call__(self, problem: Problem, here: Gpu, variants: tuple[Variant, ...]) -> Plan:
        return make_plan(striped(problem, gpu(self.key), here), problem, here, variants)


Run = Callable[[Tensor, Packed, Elsewhere], Tensor]


def launched(x: Tensor, packed: Packed, planner: Elsewhere) -> Tensor:
    return launch.run(x, packed.tensors, packed.problem, planner)


def prove(place: Place, tally: Tally, run: Run = launched, planned: str = "tensor-cores") -> None:
    """``planned``: the engine of the planned GEMM."""
    kernel = place.kernel(marlin.OURS)
    tally.kernels[marlin.OURS] = kernel.version()
    todo = [t for t in marlin.trials(place.problems) if t.products <= PRODUCTS]
    ours, engine = "other SM counts' stripes, INT4 kernels", "other SM counts' stripes, planned GEMM"
    for number, trial in enumerate(todo):
        if place.over(OWN_SHARE):
            tally.skip("stripes: no time left", len(todo) - number)
            break
        there = gpu(ELSEWHERE[number % len(ELSEWHERE)])
        problem_text = f"{there.key}: {trial}"
        with tally.guard(ours, problem_text):
            w, x = weight(trial, place.device), activations(trial, place.device)
            problem = Problem.of(w, trial.M)
            said = assemble(striped(problem, there, place.gpu), problem)
            own = assemble(marlin_recipe.scheme(problem, place.gpu, DEFAULT), problem)
            tally.fact(f"problems with {'other' if said.hash != own.hash else 'the same'} sums than on this GPU's own SM count")
            want = replay(said, x, w, engine=place.engine)
            with poisoned():
                y = run(x, kernel.pack(w), Elsewhere(there.key))
            tally.compare(ours, problem_text, y, want)
            with tally.guard(engine, problem_text):
                tally.compare(engine, problem_text, replay(said, x, w, engine=planned), want)  # type: ignore[arg-type]
    drawn(place, tally, planned)
    tally.complete = not any("no time" in reason for reason in tally.left_out)


def drawn(place: Place, tally: Tally, planned: str) -> None:
    """Random recipes of every kernel, with L = 8 and fp16 accumulators among them, and hybrids of two."""
    draws, done = Draws(place.gpu, 5), 0
    while done < place.problems:
        if place.over():
            tally.skip("drawn recipes: no time left", place.problems - done)
            return
        if (found := draws.draw()) is None:
            continue
        done += 1
        made = found.recipe
        kind = "L = 8" if "L=8" in found.name else "hybrids" if found.hybrid else "kernels' own recipes"
        problem = f"{found.name}: M={made.M} K={made.K} N={made.N} {made.dtype}, draw {done} of seed 5"
        claim = f"{kind}, planned GEMM"
        with tally.guard(claim, problem):
            w = found.weight.to(place.device)
            x = random_activations(made.M, made.K, dtype=w.dtype, seed=done).to(place.device)
            try:
                y = prepare(made, w, engine=planned).run(x, done)  # type: ignore[arg-type]
            except UnsupportedError as error:
                tally.skip(f"drawn recipes: {error}")
                continue
            tally.compare(claim, problem, y, prepare(made, w, engine=place.engine).run(x, done))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
