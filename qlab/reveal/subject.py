"""Which kernel a name means, and where it can be asked: on this machine's GPU, or in the replay of its recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlab import hardware
from qlab.backends import dispatch, registry
from qlab.backends.registry import Kernel, Problem
from qlab.errors import QlabError, UnsupportedError
from qlab.hardware import Gpu
from qlab.recipe import Recipe, Region
from qlab.recipes import builders, recipe
from qlab.reveal.scale import scaled_weight, unit_weight
from qlab.reveal.target import Called, Model, Replayed, Target
from qlab.weights import Int4Weight

MATMUL = "torch.matmul"
"""Not a kernel of the registry: x @ ones, the sum that cuBLAS or the CPU's library makes of it."""
ASYMMETRIC, SYMMETRIC = 3, 8
"""Zero points of the scaled weight."""


@dataclass(frozen=True)
class Asked:
    """What to reveal, as asked."""

    kernel: str
    m: int
    k: int
    n: int
    group_size: int
    dtype: torch.dtype
    row: int = 0
    column: int = 0
    hw: str | None = None
    replay: bool = False


@dataclass(frozen=True)
class Subject:
    """A kernel that can be asked, one weight at a time."""

    kernel: str
    source: str
    native: bool
    gpu: str
    target: Callable[[Int4Weight], Target]
    weight: Int4Weight
    scaled: Int4Weight | None
    """The weight that shows the place of the scale; None where there is no scale."""
    recipe: Recipe | None
    """None where qlab has none for this kernel."""
    region: Region | None


def subject(a: Asked) -> Subject:
    """Resolves a name and decides between the kernel itself and a replay. Raises QlabError where neither can be had."""
    here = hardware.detect()
    gpu = hardware.gpu(a.hw) if a.hw else here or hardware.gpu("h100")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if a.kernel == MATMUL:
        return _matmul(a, device, here)
    weight = unit_weight(a.k, a.n, a.group_size, a.dtype)
    problem = Problem.of(weight, a.m)
    kernel = registry.kernel(kernel_name(a.kernel, problem, gpu))
    if reason := kernel.refusal(problem, gpu.capability):
        raise UnsupportedError(f"{kernel.name} does not run this on {gpu.name}: {reason}")
    scaled = _scaled(a, kernel, gpu)
    reason = _why_not_here(a, kernel, problem, device, here, gpu)
    known = _recipe(kernel.name, problem, gpu)
    if not reason:
        return _native(a, kernel, device, weight, scaled, known, here)
    if known is None:
        raise UnsupportedError(f"{kernel.name} cannot run here ({reason}), and it has no recipe to replay")
    if known.opaque:
        raise UnsupportedError(f"{kernel.name} cannot run here ({reason}), and its recipe is opaque: {known.opaque}")
    region = region_of(known, a.row, a.column)
    model = Model(region.tree, known.weights, region.output)
    return Subject(
        kernel.name,
        f"a replay of its recipe for {gpu.name} ({reason})",
        False,
        gpu.key,
        lambda w: Replayed(model, w, a.column),
        weight,
        scaled,
        known,
        region,
    )


def kernel_name(text: str, problem: Problem, gpu: Gpu) -> str:
    """A registry name from itself, from one of vLLM's labels, or from a short form such as ``marlin_gptq``."""
    known = [k.name for k in registry.kernels()]
    if text in known:
        return text
    if text in dispatch.LABELS:
        found = dispatch.dispatch(text, gpu, problem)
        if not found.kernel:
            raise UnsupportedError(f"{text} on {gpu.name}: {found.reason}")
        return found.kernel
    short = {name.removeprefix("vllm.").replace(".", "_"): name for name in known}
    if (name := short.get(text.replace(".", "_"))) is None:
        raise QlabError(f"unknown kernel {text!r}; known: {', '.join((MATMUL, *dispatch.LABELS, *sorted(short), *known))}")
    return name


def region_of(recipe: Recipe, row: int, column: int) -> Region:
    """The region of a recipe that an output element lies in."""
    for region in recipe.regions:
        if region.rows[0] <= row < region.rows[1] and any(a <= column < b for a, b in region.columns):
            return region
    raise QlabError(f"element ({row}, {column}) is not one of the {recipe.M} x {recipe.N} output")


def _why_not_here(a: Asked, kernel: Kernel, problem: Problem, device: torch.device, here: Gpu | None, gpu: Gpu) -> str:
    """Why the kernel itself is not asked; empty when it is."""
    if a.replay:
        return "as asked"
    if not kernel.portable:
        if here is None:
            return "no GPU here"
        if not here.same_arithmetic(gpu):
            return f"the GPU here is {here.name}"
    support = kernel.supports(problem, device)
    return "" if support.ok else support.reason


def _native(
    a: Asked,
    kernel: Kernel,
    device: torch.device,
    weight: Int4Weight,
    scaled: Int4Weight | None,
    known: Recipe | None,
    here: Gpu | None,
) -> Subject:
    def target(w: Int4Weight) -> Target:
        packed = kernel.pack(w.to(device))
        return Called(lambda x: kernel.run(x, packed), a.m, a.k, a.dtype, row=a.row, column=a.column, device=device)

    where = here.name if here else "the CPU"
    version = kernel.version()
    source = f"the native kernel on {where}{f' ({version})' if version else ''}"
    region = None if known is None else region_of(known, a.row, a.column)
    return Subject(kernel.name, source, True, here.key if here else "cpu", target, weight, scaled, known, region)


def _recipe(name: str, problem: Problem, gpu: Gpu) -> Recipe | None:
    return recipe(name, problem, gpu) if name in builders() else None


def _scaled(a: Asked, kernel: Kernel, gpu: Gpu) -> Int4Weight | None:
    for zero in (ASYMMETRIC, SYMMETRIC):
        weight = scaled_weight(a.k, a.n, a.group_size, a.dtype, zero)
        if not kernel.refusal(Problem.of(weight, a.m), gpu.capability):
            return weight
    return None


def _matmul(a: Asked, device: torch.device, here: Gpu | None) -> Subject:
    if a.replay:
        raise QlabError(f"{MATMUL} has no recipe to replay; leave --replay out")
    ones = torch.ones((a.k, a.n), dtype=a.dtype, device=device)

    def target(w: Int4Weight) -> Target:
        return Called(multiply, a.m, a.k, a.dtype, row=a.row, column=a.column, device=device)

    def multiply(x: Tensor) -> Tensor:
        return x @ ones

    where = here.name if here else "the CPU"
    weight = unit_weight(a.k, 1, a.k, torch.float16)
    source = f"the native kernel on {where} (torch {torch.__version__})"
    return Subject(MATMUL, source, True, here.key if here else "cpu", target, weight, None, None, None)
