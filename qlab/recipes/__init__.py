"""What each kernel computes, as a recipe: one file per kernel family, each with its names in ``KERNELS``.

A new family is one file in this folder with a ``KERNELS`` mapping from names to what builds their schemes (scheme.py), with
cuts of K and other rules of its own where it has them (rules.py); nothing else needs an edit.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import lru_cache

from qlab.backends import registry
from qlab.backends.registry import Problem
from qlab.errors import UnsupportedError
from qlab.hardware import Gpu
from qlab.recipe import Recipe
from qlab.recipes.build import DEFAULT, Build
from qlab.recipes.scheme import Scheme, assemble

Builder = Callable[[Problem, Gpu, Build], Scheme]


@lru_cache(maxsize=1)
def builders() -> Mapping[str, Builder]:
    """Every kernel that has a recipe, by its name in the registry."""
    found: dict[str, Builder] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        found |= getattr(importlib.import_module(f"{__name__}.{module}"), "KERNELS", {})
    return found


def scheme_of(kernel: str, problem: Problem, gpu: Gpu, build: Build = DEFAULT, *, check: bool = True) -> Scheme:
    """What ``kernel`` (a registry name) computes for ``problem`` on ``gpu``, in named parts.

    Raises UnsupportedError where no recipe is known and, with ``check``, where the kernel does not run the problem on that GPU.
    """
    if kernel not in builders():
        raise UnsupportedError(f"{kernel} has no recipe; kernels that have one: {', '.join(sorted(builders()))}")
    if kernel.startswith("vllm.") and build.vllm != DEFAULT.vllm:
        raise UnsupportedError(f"{kernel}'s recipe was read from vLLM {DEFAULT.vllm}, and the build is {build.vllm}")
    if check and (why := registry.kernel(kernel).refusal(problem, gpu.capability)):
        raise UnsupportedError(f"{kernel} does not run this problem on {gpu.key}: {why}")
    return builders()[kernel](problem, gpu, build)


def recipe(kernel: str, problem: Problem, gpu: Gpu, build: Build = DEFAULT) -> Recipe:
    """What ``kernel`` (a registry name) computes for ``problem`` on ``gpu``.

    Raises UnsupportedError where no recipe is known and where the kernel does not run the problem on that GPU.
    """
    return assemble(scheme_of(kernel, problem, gpu, build), problem)


__all__ = ["DEFAULT", "Build", "Builder", "Scheme", "assemble", "builders", "recipe", "scheme_of"]
