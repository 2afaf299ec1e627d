"""Executes recipes bit for bit: one function, three engines that give the same bits.

``reference`` interprets the tree in numpy and is there to be read; ``native`` is the compiled CPU engine; ``cuda`` replays any
GPU's arithmetic on a GPU, in integers. None of them uses the arithmetic of a tensor core.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from qlab.errors import QlabError, UnsupportedError
from qlab.recipe import Recipe
from qlab.replay import cuda, native, reference
from qlab.replay.operands import Operands, bits, check, operands, row_order, values
from qlab.replay.program import Program, compile_recipe
from qlab.weights import Int4Weight

Engine = Literal["auto", "reference", "native", "cuda"]
PANEL = 1 << 24
"""Elements of the decoded weight held at once: bounds the memory beside the operands."""


def replay(
    recipe: Recipe,
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    engine: Engine = "auto",
    seed: int | None = None,
) -> Tensor:
    """y [M, N] in x's dtype, on x's device: the bits that the recipe's kernel gives for x [M, K].

    ``seed`` chooses one order of atomics. ``auto`` takes ``cuda`` for tensors on a GPU, else ``native``, else ``reference``.
    Raises UnsupportedError for opaque sums, for atomics without a seed and for an engine that is missing here, QlabError for
    operands that are not the recipe's.
    """
    check(recipe, x, weight, bias)
    if seed is not None and seed < 0:
        raise QlabError(f"the seed of an order of atomics must be 0 or more, not {seed}")
    name = choose(x) if engine == "auto" else engine
    order = row_order(recipe, weight)
    if order is not None:
        x = x[:, order.to(x.device)]
    if name == "reference":
        if not recipe.ordered:
            raise UnsupportedError("the reference engine replays no order of atomics: take native or cuda with a seed")
        o = operands(recipe, weight, order=order, bias=bias)
        return values(reference.run(recipe, bits(x), o), x.dtype).to(x.device)
    if name == "cuda" and not x.is_cuda:
        raise UnsupportedError("the cuda engine needs x on a GPU: x.cuda()")
    if reason := missing(name):
        raise UnsupportedError(f"the {name} engine cannot run: {reason}")
    program, y = _program(recipe, seed), torch.empty((recipe.M, recipe.N), dtype=x.dtype, device=x.device)
    width = max(64, PANEL // recipe.K // 64 * 64)
    for start in range(0, recipe.N, width):
        stop = min(start + width, recipe.N)
        o = operands(recipe, weight, slice(start, stop), order, bias)
        y[:, start:stop] = _panel(name, program.columns(start, stop), x, o)
    return y


def choose(x: Tensor) -> Engine:
    """The fastest engine for x."""
    if x.is_cuda and not cuda.reason():
        return "cuda"
    return "reference" if native.reason() else "native"


def missing(engine: Engine) -> str:
    """Why an engine cannot run here; empty when it can."""
    reasons: dict[str, Callable[[], str]] = {"cuda": cuda.reason, "native": native.reason, "reference": str}
    if engine not in reasons:
        raise QlabError(f"unknown engine {engine!r}; known: auto, {', '.join(reasons)}")
    return reasons[engine]()


def _panel(engine: Engine, program: Program, x: Tensor, o: Operands) -> Tensor:
    if engine == "cuda":
        return cuda.run(program, x, *(t.to(x.device) for t in (o.w, o.scales, o.group, o.bias)))
    half = (bits(x), bits(o.w), bits(o.scales))
    y = native.run(program, *half, o.group.cpu().numpy(), bits(o.bias), bf16=x.dtype == torch.bfloat16)
    return values(y, x.dtype)


@lru_cache(maxsize=64)
def _programs(recipe: _ByHash, seed: int | None) -> Program:
    return compile_recipe(recipe.recipe, seed)


class _ByHash:
    """A recipe that is equal to another where their hashes are."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __hash__(self) -> int:
        return hash(self.recipe.hash)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByHash) and self.recipe.hash == other.recipe.hash


def _program(recipe: Recipe, seed: int | None) -> Program:
    return _programs(_ByHash(recipe), seed)
