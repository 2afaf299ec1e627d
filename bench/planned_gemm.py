"""The tensor-core engine against the emulation: differing bits over random recipes, then the speed of both.

    python -m bench.planned_gemm [--problems 300] [--seed 0] [--json FILE] [--speed 'M,K,N;...']

Recipes are those of every kernel, on 108 and 132 multiprocessors, with L of 16 and 8 and accumulators of fp32 and fp16, and
hybrids that take each part from one of two kernels; weights are AWQ's and GPTQ's, activations fp16 and bf16. What this GPU's
tensor cores do not compute is counted with its reason. Speed is that of the whole call, in multiply-accumulates per second of
the GPU's time: the weight is decoded before.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bench.gemm import parse_shapes
from qlab import hardware
from qlab.attribution.parts import CANDIDATES, mixed
from qlab.backends.registry import Problem
from qlab.environment import Environment, collect
from qlab.errors import QlabError, UnsupportedError
from qlab.inputs import random_activations, random_weight
from qlab.recipe import Recipe
from qlab.recipes import assemble, builders, scheme_of
from qlab.recipes.scheme import Scheme
from qlab.replay import missing, prepare
from qlab.serial import write_json
from qlab.weights import Int4Weight

SCHEMA = "qlab.bench.planned-gemm/1"
ROWS = (1, 2, 7, 8, 16, 17, 33, 50, 64, 65, 100, 128, 200, 300)
DEPTHS, COLUMNS = (128, 256, 512, 1024, 2048), (64, 128, 256, 384, 512, 1024)
SPEEDS = ((1, 4096, 4096), (16, 4096, 4096), (64, 4096, 4096), (256, 4096, 4096), (1024, 4096, 4096), (4096, 4096, 4096))
TIMED = ("vllm.marlin.gptq", "vllm.machete.gptq", "vllm.awq_gemm", "triton.awq_gemm")
SMS = (108, 132)
T = TypeVar("T")


@dataclass(frozen=True)
class Difference:
    """A problem whose outputs differ."""

    recipe: str
    """How it was made."""
    shape: tuple[int, int, int]
    dtype: str
    differing: int
    outputs: int


@dataclass(frozen=True)
class Speed:
    recipe: str
    sms: int
    terms: int
    shape: tuple[int, int, int]
    engine: str
    seconds: float
    """Median of a call."""
    flops: float
    """Two for each multiply-accumulate, per second."""


@dataclass(frozen=True)
class Result:
    schema: str
    environment: Environment
    problems: int
    hybrids: int
    by_kernel: dict[str, int]
    outputs: int
    differences: tuple[Difference, ...]
    refused: dict[str, int]
    speeds: tuple[Speed, ...]


@dataclass(frozen=True)
class Drawn:
    """A random problem."""

    name: str
    recipe: Recipe
    weight: Int4Weight
    hybrid: bool


class Draws:
    """Random recipes for this GPU's own step."""

    def __init__(self, gpu: hardware.Gpu, seed: int) -> None:
        self.gpu, self.random = gpu, np.random.default_rng(seed)

    def _pick(self, options: Sequence[T]) -> T:
        return options[int(self.random.integers(len(options)))]

    def draw(self) -> Drawn | None:
        """None where the parts that were drawn do not fit together."""
        m, k, n = self._pick(ROWS), self._pick(DEPTHS), self._pick(COLUMNS)
        group = self._pick((32, 64, 128, k))
        dtype = self._pick((torch.float16, torch.bfloat16))
        symmetric, order = bool(self.random.integers(2)), bool(self.random.random() < 0.2)
        if k % group:
            return None
        seed = int(self.random.integers(1 << 30))
        weight = random_weight(k, n, group, dtype=dtype, symmetric=symmetric or order, act_order=order and group < k, seed=seed)
        problem = Problem.of(weight, m)
        gpus = [replace(self.gpu, sms=self._pick(SMS)) for _ in range(2)]
        names = [self._pick(tuple(builders())) for _ in range(2)]
        hybrid = bool(self.random.random() < 0.5)
        try:
            a, b = (scheme_of(name, problem, gpu, check=False) for name, gpu in zip(names, gpus, strict=True))
            scheme = mixed(a, b, [p for p in CANDIDATES if self.random.random() < 0.4]) if hybrid else a
            scheme = self._stepped(scheme)
            made = assemble(scheme, problem)
        except QlabError:
            return None
        if made.opaque:
            return None
        name = f"{names[0]} with parts of {names[1]}" if hybrid else names[0]
        return Drawn(f"{name}, {scheme.sms} SMs, L={scheme.terms}, {scheme.accumulator}", made, weight, hybrid)

    def _stepped(self, scheme: Scheme) -> Scheme:
        """With another L or another accumulator in some draws."""
        terms = 8 if self.random.random() < 0.3 else scheme.terms
        return replace(scheme, terms=terms, accumulator="fp16" if self.random.random() < 0.15 else scheme.accumulator)


def compare(drawn: Drawn, device: torch.device, seed: int) -> tuple[int, int]:
    """Differing outputs, and all."""
    made, weight = drawn.recipe, drawn.weight.to(device)
    x = random_activations(made.M, made.K, dtype=weight.dtype, seed=seed).to(device)
    ys = [prepare(made, weight, engine=engine).run(x, seed) for engine in ("cuda", "tensor-cores")]
    a, b = (y.view(torch.int16) for y in ys)
    return int((a != b).sum()), a.numel()


def timed(call: Callable[[], Tensor], seconds: float = 0.3) -> float:
    """Median time of a call on the GPU, after two that are not counted."""
    call(), call()
    times: list[float] = []
    started = time.monotonic()
    while len(times) < 5 or (time.monotonic() - started < seconds and len(times) < 50):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return float(np.median(times))


def speeds(gpu: hardware.Gpu, shapes: tuple[tuple[int, int, int], ...], device: torch.device) -> list[Speed]:
    found = []
    for m, k, n in shapes:
        weight = random_weight(k, n, 128, symmetric=True, seed=1).to(device)
        x = random_activations(m, k, seed=2).to(device)
        for name in TIMED:
            for sms, terms in ((gpu.sms, gpu.step.terms), (108, gpu.step.terms), (gpu.sms, 8)):
                if name != TIMED[0] and sms != gpu.sms:
                    continue
                problem = replace(Problem.of(weight, m), symmetric="awq" not in name)
                scheme = replace(scheme_of(name, problem, replace(gpu, sms=sms), check=False), terms=terms)
                made = assemble(scheme, problem)
                if made.opaque:
                    continue
                for engine in ("tensor-cores", "cuda"):
                    ready = prepare(made, weight, engine=engine)
                    seconds = timed(partial(ready.run, x, 0))
                    found.append(Speed(name, sms, terms, (m, k, n), engine, seconds, 2.0 * m * k * n / seconds))
                own, emulated = found[-2:]
                print(
                    f"{name} {sms} SMs L={terms} {m}x{k}x{n}: {own.seconds * 1e6:.1f} us, {own.flops / 1e12:.1f} TFLOP/s; "
                    f"emulated {emulated.seconds * 1e6:.0f} us; {emulated.seconds / own.seconds:.1f}x",
                    flush=True,
                )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=240, help="at most, for the comparison")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", help="M,K,N;M,K,N;... to time; empty for none")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if why := missing("tensor-cores") or missing("cuda"):
        parser.error(why)
    gpu = hardware.detect()
    assert gpu is not None
    device, draws = torch.device("cuda"), Draws(gpu, options.seed)
    by_kernel, refused = Counter[str](), Counter[str]()
    differences: list[Difference] = []
    ran = hybrids = outputs = 0
    started = time.monotonic()
    while ran < options.problems and time.monotonic() - started < options.seconds:
        if (drawn := draws.draw()) is None:
            continue
        made = drawn.recipe
        try:
            off, total = compare(drawn, device, ran)
        except UnsupportedError as e:
            refused[str(e)] += 1
            continue
        ran, outputs, hybrids = ran + 1, outputs + total, hybrids + drawn.hybrid
        by_kernel[drawn.name.split(",")[0].split(" with")[0]] += 1
        if off:
            differences.append(Difference(drawn.name, (made.M, made.K, made.N), made.dtype, off, total))
            print("DIFFERS", differences[-1], flush=True)
    print(
        f"{ran} problems ({hybrids} hybrids), {outputs} outputs, {len(differences)} problems differ; refused: {dict(refused)}"
    )
    shapes = SPEEDS if options.speed is None else tuple(parse_shapes(options.speed, ())) if options.speed else ()
    found = speeds(gpu, shapes, device)
    if options.json:
        counts = dict(sorted(by_kernel.items()))
        environment = collect(details=False)
        write_json(
            options.json,
            Result(SCHEMA, environment, ran, hybrids, counts, outputs, tuple(differences), dict(refused), tuple(found)),
        )
    return int(bool(differences))


if __name__ == "__main__":
    raise SystemExit(main())
