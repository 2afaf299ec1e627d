"""One quantised linear on a path: the kernel that the path runs for each number of tokens, native or replayed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from qlab import hardware
from qlab.backends import registry
from qlab.backends.registry import Kernel, Packed, Problem
from qlab.backends.vllm_marlin import Marlin
from qlab.engine.path import Path
from qlab.errors import UnsupportedError
from qlab.lab.outputs import NATIVE, REPLAY, opaque_reason, recipe_of
from qlab.recipe import Recipe
from qlab.replay import Decoded, Prepared
from qlab.weights import Int4Weight

FOLLOWED = "hybrid"
"""Stands for a kernel's name where a recipe was named instead."""
Choose = Callable[[int], Recipe]
"""The recipe for a number of tokens."""


@dataclass(frozen=True, eq=False)
class Form:
    """What runs for one number of tokens."""

    kernel: str
    """Registry name."""
    origin: str
    """``native`` or ``replay``."""
    recipe: str
    """Hash of the recipe on the path's GPU; empty where there is none."""
    run: Callable[[Tensor, int], Tensor]
    """y [M, N] for x [M, K] and a request's seed."""


class Linear:
    """A fused linear with the weight's dtype for x and y. Kernels are dispatched, packed and decoded once, on first use.

    ``native`` None takes the kernel itself where this machine has it, True insists on it, False replays; only the machine's
    owner can know whether its GPU is the path's. ``bias`` [N], of the weight's dtype, is added as vLLM adds it: inside of
    Marlin, after any other kernel.
    """

    def __init__(
        self, weight: Int4Weight, path: Path, device: torch.device, *, native: bool | None, bias: Tensor | None = None
    ) -> None:
        self.name, self.path, self.device, self.native = weight.name, path, device, native
        self.N, self.K, self.dtype = weight.N, weight.K, weight.dtype
        self._weight = weight
        self._bias = None if bias is None else bias.to(device)
        self._problem = Problem.of(weight, 0)
        self._forms: dict[int, Form] = {}
        self._packed: dict[str, Packed] = {}
        self._decoded: list[Decoded] = []
        self._choose: Choose | None = None
        self._followed: dict[str, Form] = {}

    @property
    def weight(self) -> Int4Weight:
        return self._weight

    @property
    def problem(self) -> Problem:
        """The linear's problem, with M = 0; ``bias`` says whether it has one, wherever it is added."""
        return replace(self._problem, bias=self._bias is not None)

    def follow(self, choose: Choose | None) -> None:
        """Replay the recipe that ``choose`` names for each number of tokens, in place of the path's kernel; None returns to it.

        A recipe without a bias gets the linear's added behind it. Weights and programs are kept for recipes seen before.
        """
        self._choose = choose
        self._forms = {}

    def form(self, m: int) -> Form:
        """How ``m`` tokens are computed.

        Raises UnsupportedError with the reason where they cannot be; ``opaque: cuBLAS ...`` where cuBLAS does the sum on
        another GPU than this machine's.
        """
        if m not in self._forms:
            self._forms[m] = self._find(m)
        return self._forms[m]

    def run(self, x: Tensor, seed: int = 0) -> Tensor:
        """y [M, N] for x [M, K] on the linear's device; ``seed`` chooses the order of replayed atomics, with name and M."""
        return self.form(len(x)).run(x, seed)

    def _find(self, m: int) -> Form:
        problem = replace(self._problem, M=m)
        if self._choose is not None:
            return self._follow(self._choose(m), m)
        name = self.path.kernel(problem)
        kernel = registry.kernel(name)
        inside = self._bias is not None and isinstance(kernel, Marlin)
        made = "" if kernel.portable else _recipe(name, replace(problem, bias=inside), self.path.gpu)
        known = made.hash if isinstance(made, Recipe) else ""
        after = None if inside else self._bias
        if kernel.portable or self.native is not False:
            support = kernel.supports(problem, self.device)
            if support.ok:
                return Form(name, NATIVE, known, _biased(self._call(kernel, inside), after))
            if kernel.portable or self.native:
                raise UnsupportedError(f"{self.name}: {name} does not run natively here: {support.reason}")
        if not isinstance(made, Recipe):
            raise UnsupportedError(f"{self.name}: {name} cannot be replayed: {made}")
        if made.opaque:
            raise UnsupportedError(f"{opaque_reason(made, hardware.gpu(self.path.gpu))} ({self.name}, {m} tokens)")
        return self._replay(name, made, m, inside)

    def _follow(self, made: Recipe, m: int) -> Form:
        if made.hash not in self._followed:
            inside = any(r.output.bias != "none" for r in made.regions)
            self._followed[made.hash] = self._replay(FOLLOWED, made, m, inside)
        return self._followed[made.hash]

    def _replay(self, name: str, made: Recipe, m: int, inside: bool) -> Form:
        prepared = Prepared(made, self._decode(made, self._bias if inside else None))
        after = None if inside else self._bias
        draw = _draw(self.name, m)
        if prepared.ordered:
            return Form(name, REPLAY, made.hash, _biased(lambda x, seed: prepared.run(x), after))
        return Form(name, REPLAY, made.hash, _biased(lambda x, seed: prepared.run(x, draw(seed)), after))

    def _call(self, kernel: Kernel, inside: bool) -> Callable[[Tensor, int], Tensor]:
        if kernel.name not in self._packed:
            self._packed[kernel.name] = kernel.pack(self._weight.to(self.device))
        packed = self._packed[kernel.name]
        if inside and isinstance(kernel, Marlin):
            bias = self._bias  # bound here, so that the linear is in no cycle of references and goes when it is dropped
            return lambda x, seed: kernel.gemm(x, packed, bias)
        return lambda x, seed: kernel.run(x, packed)

    def _decode(self, recipe: Recipe, bias: Tensor | None) -> Decoded:
        for d in self._decoded:
            if d.serves(recipe) and d.bias is bias:
                return d
        self._decoded.append(Decoded(recipe, self._weight.to(self.device), bias))
        return self._decoded[-1]


def _biased(run: Callable[[Tensor, int], Tensor], bias: Tensor | None) -> Callable[[Tensor, int], Tensor]:
    return run if bias is None else lambda x, seed: run(x, seed).add_(bias)


def _draw(name: str, m: int) -> Callable[[int], int]:
    """Seeds of orders: one for each request's seed, linear and number of tokens, for which one program is compiled."""

    @lru_cache(maxsize=1)
    def draw(seed: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{seed} {name} {m}".encode()).digest()[:8], "little")

    return draw


@lru_cache(maxsize=4096)
def _recipe(kernel: str, problem: Problem, gpu: str) -> Recipe | str:
    """Equal linears of a model's layers share it."""
    return recipe_of(registry.kernel(kernel), problem, hardware.gpu(gpu))
