"""Real kernels on this machine's GPU, handed to ``name_faults`` as callables that it cannot look into.

    python -m bench.planted_native --json results/NAME/planted-native.json

Each kernel is asked as it is, against its recipe for this GPU; against the recipe of another GPU; and with a weight that was
packed wrongly. vLLM's Marlin with fp16 reduction stands for Marlin whose partial sums are rounded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from qlab import hardware
from qlab.attribution.faults import EQUAL, NAMED, name_faults
from qlab.backends import registry
from qlab.backends.registry import Problem
from qlab.environment import Environment, collect
from qlab.errors import UnsupportedError
from qlab.inputs import random_weight
from qlab.lab.faults import hypotheses
from qlab.recipes import recipe
from qlab.serial import write_json
from qlab.weights import Int4Weight

SCHEMA = "qlab.planted_native/1"
M, K, N, GROUP = 16, 1024, 256, 128
KERNELS = ("vllm.awq_gemm", "vllm.marlin.awq", "vllm.machete.awq", "triton.awq_gemm", "triton.awq_gemm.splitk")
STORED = (
    "codes: AWQ's nibble order where natural order is stored, along columns",
    "zero points: one too low (stored minus one as in GPTQ v1, read as v2)",
    "scales: Marlin's 64-column permutation applied once too often or not at all",
    "group index: every row takes the next group",
)
"""Wrong packings, by their names in qlab.lab.faults."""


@dataclass(frozen=True)
class Asked:
    """One kernel, and what was said of it."""

    kernel: str
    planted: str
    """What is wrong with it, against the clean recipe and weight; empty for nothing."""
    verdict: str
    said: str
    right: bool
    calls: int
    seconds: float


@dataclass(frozen=True)
class Native:
    """Every kernel that runs here."""

    schema: str
    environment: Environment
    shape: tuple[int, ...]
    """M, K, N and the group size."""
    asked: tuple[Asked, ...]
    skipped: tuple[str, ...]


def ask(
    name: str, clean: str, planted: str, stored: Int4Weight, weight: Int4Weight, gpu: hardware.Gpu, right: Callable[[str], bool]
) -> Asked:
    """Hand ``name`` with the weight ``stored`` to the tool, which is told ``clean``'s recipe on ``gpu`` and ``weight``."""
    kernel = registry.kernel(name)
    support = kernel.supports(Problem.of(stored, M), stored.device)
    if not support.ok:
        raise UnsupportedError(f"{name}: {support.reason}")
    packed = kernel.pack(stored)

    def opaque(x: Tensor) -> Tensor:
        return kernel.run(x, packed)

    started = time.perf_counter()
    found = name_faults(opaque, recipe(clean, Problem.of(weight, M), gpu), weight)
    seconds = round(time.perf_counter() - started, 2)
    ok = found.verdict == (NAMED if planted else EQUAL) and right(str(found))
    return Asked(name, planted, found.verdict, str(found), ok, found.calls, seconds)


def questions(weight: Int4Weight, here: hardware.Gpu) -> Iterator[Callable[[], Asked]]:
    """Clean, another GPU's recipe, wrong packings, another reduction."""
    other = hardware.gpu("a100" if here.step != hardware.AMPERE else "h100")
    faults = {name: fault for name, fault in hypotheses(weight) if name in STORED}
    for name in KERNELS:
        yield lambda name=name: ask(name, name, "", weight, weight, here, lambda said: True)
        if "machete" not in name:
            what = f"the recipe is {other.key}'s"
            yield lambda name=name, what=what: ask(
                name, name, what, weight, weight, other, lambda said: "tensor core" in said or here.key in said
            )
        for fault, make in faults.items():
            yield lambda name=name, fault=fault, make=make: ask(
                name, name, fault, make(weight), weight, here, lambda said: fault.split(" (")[0] in said
            )
    rounded = "partial sums: the running total rounded to fp16"
    yield lambda: ask("vllm.marlin.awq.fp16", "vllm.marlin.awq", rounded, weight, weight, here, lambda said: rounded in said)


def run() -> Native:
    """Ask every question. Raises UnsupportedError without a GPU."""
    here = hardware.detect()
    if here is None:
        raise UnsupportedError("native kernels need a GPU with tensor cores, and there is none here")
    weight = replace(random_weight(K, N, GROUP, seed=5).to("cuda"), name="w")
    asked, skipped = [], []
    for question in questions(weight, here):
        try:
            asked.append(question())
            print(*(("right:" if asked[-1].right else "WRONG:"), asked[-1].kernel, "|", asked[-1].said), flush=True)
        except UnsupportedError as e:
            skipped.append(str(e))
    return Native(SCHEMA, collect(), (M, K, N, GROUP), tuple(asked), tuple(skipped))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    found = run()
    write_json(arguments.json, found)
    print(f"{sum(a.right for a in found.asked)} of {len(found.asked)} right; skipped: {'; '.join(found.skipped) or 'nothing'}")


if __name__ == "__main__":
    main()
