"""Executes recipes bit for bit: one function, four engines that give the same bits.

``reference`` interprets the tree in numpy and is there to be read; ``native`` is the compiled CPU engine; ``cuda`` replays any
GPU's arithmetic on a GPU, in integers. None of them uses the arithmetic of a tensor core. ``tensor-cores`` does: it runs at a
kernel's own speed what this GPU's tensor cores compute, and refuses other GPUs' steps.
"""

from __future__ import annotations

from torch import Tensor

from qlab.recipe import Recipe
from qlab.replay.operands import check
from qlab.replay.prepared import PANEL, Decoded, Engine, Prepared, check_seed, choose, missing, prepare
from qlab.weights import Int4Weight


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

    ``seed`` chooses one order of atomics. ``auto`` takes ``cuda`` for tensors on a GPU, else ``native``, else ``reference``;
    ``tensor-cores`` is taken where it is named.
    The weight is decoded panel by panel, so that beside the operands no more than :data:`PANEL` elements are held; for many x
    on one weight see :func:`prepare`.
    Raises UnsupportedError for opaque sums, for atomics without a seed and for an engine that is missing here, QlabError for
    operands that are not the recipe's.
    """
    check(recipe, x.shape, x.dtype, weight, bias)
    check_seed(seed)
    return Prepared(recipe, Decoded(recipe, weight, bias, engine=engine, device=x.device, hold=False)).run(x, seed)


__all__ = ["PANEL", "Decoded", "Engine", "Prepared", "choose", "missing", "prepare", "replay"]
