"""``cuda.hardware_invariant`` against the compiled CPU engine and the numpy reference."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bench.kernel_proof.inputs import Trial, activations, weight
from bench.kernel_proof.place import Place
from bench.kernel_proof.tally import Failure, Tally
from qlab.backends.registry import Problem
from qlab.hardware import gpu
from qlab.recipes import recipe
from qlab.replay import replay

NAME = "cuda.hardware_invariant"
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 128, 130, 200, 257)
PRODUCTS, INTERPRETED = 1 << 29, 1 << 18
"""Of a problem for the compiled engine, and for the interpreted one."""
GPUS = ("a100", "h100", "h200", "b200")


def trials(count: int, seed: int = 3) -> Iterator[Trial]:
    """Every third is small enough for the interpreted engine."""
    random, made = np.random.default_rng(seed), 0
    while made < count:
        small = made % 3 == 0
        group = (128, 32, 64, -1, 256)[int(random.integers(5))]
        form = ("awq", "gptq", "act_order")[int(random.integers(3))]
        unit = 32 if group == -1 else group
        k = unit * int(random.integers(1, max(2, (512 if small else 6144) // unit)))
        n = 8 * int(random.integers(1, 9 if small else 257))
        m = int(random.choice(ROWS[:6] if small else ROWS))
        if form == "act_order" and group in (-1, k):
            form = "gptq"
        dtype, values = ("fp16", "bf16")[int(random.integers(2))], ("plain", "cancel", "wide")[int(random.integers(3))]
        trial = Trial(m, k, n, group, dtype, form, values, 2000 + made)
        if trial.products <= (INTERPRETED if small else PRODUCTS):
            made += 1
            yield trial


def prove(place: Place, tally: Tally) -> None:
    kernel = place.kernel(NAME)
    tally.kernels[NAME] = kernel.version()
    for number, trial in enumerate(trials(place.problems)):
        if place.over():
            tally.skip("no time left", place.problems - number)
            return
        with tally.guard("the C++ engine", trial):
            w, x = weight(trial, place.device), activations(trial, place.device)
            y = place.run(kernel, x, kernel.pack(w)).cpu()
            w, x = w.to("cpu"), x.cpu()
            problem = Problem.of(w, trial.M)
            said = {recipe(NAME, problem, gpu(key)).hash: recipe(NAME, problem, gpu(key)) for key in GPUS}
            tally.claim(f"one recipe for {', '.join(GPUS)}", problems=1)
            if len(said) > 1:
                tally.fail(Failure("one recipe", str(trial), f"{len(said)} recipes"))
            one = next(iter(said.values()))
            tally.compare("the C++ engine", trial, y, replay(one, x, w, engine="native"))
            if trial.products <= INTERPRETED:
                tally.compare("the numpy reference", trial, y, replay(one, x, w, engine="reference"))
    tally.complete = True
