"""Rewrites of a recipe's tree that make it wrong in one part: the deliberate errors of mutations.py.

Those that any recipe may have are qlab.attribution.rewrites'; here they meet a recorded kernel, and some ask which one it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from qlab.attribution import cuts, rewrites
from qlab.recipe import Chain, Recipe, nodes
from qlab.recipes import recipe
from tests.golden.truth import Evidence

Rewrite = Callable[[Evidence], Recipe | None]
"""The wrong recipe for what a kernel computed; None where there is nothing to get wrong."""
TORCH_SUM = ("vllm.awq_gemm", "vllm.awq_triton")
"""Kernels whose partial sums PyTorch adds."""


def of(rewrite: rewrites.Rewrite) -> Rewrite:
    """A rewrite of the kernel's recipe."""
    return lambda e: rewrite(e.recipe)


def zero_exponent(by: int, matters: bool) -> Rewrite:
    """e_zero moved, where the inputs and accumulators are such that it can matter, or where they are not."""

    def go(e: Evidence) -> Recipe | None:
        fp32 = all(n.step.accumulator == "fp32" for r in e.recipe.regions for n in nodes(r.tree) if isinstance(n, Chain))
        return rewrites.zero_exponent(by)(e.recipe) if (e.recipe.dtype == "fp16" and fp32) != matters else None

    return go


def scale_after(e: Evidence) -> Recipe | None:
    """Whole-column scales multiplied into the rounded sum rather than into the weights."""
    return rewrites.scale_after(e.recipe) if e.given.weight.groups == 1 else None


def weights(to: str, of: str) -> Rewrite:
    """Another rule of decoding, where zero points differ from 8."""
    return lambda e: rewrites.weights(to, of)(e.recipe) if not e.given.weight.symmetric else None


def fused_symmetric(e: Evidence) -> Recipe | None:
    weight = e.given.weight
    exact = weight.symmetric and bool(torch.isfinite(8 * weight.scales).all())
    return rewrites.weights("fused", "rounded")(e.recipe) if exact else None


def fewer_sms(e: Evidence) -> Recipe | None:
    other = recipe(e.kernel, e.problem, replace(e.gpu, sms=108))
    return None if other.hash == e.recipe.hash else other


def other_reduction(e: Evidence) -> Recipe | None:
    """Marlin's pieces handed on in the activations' dtype for fp32, and back."""
    name = e.kernel.removesuffix(".fp16")
    if not name.startswith("vllm.marlin.") or name.endswith(".atomic"):
        return None
    other = recipe(f"{name}.fp16" if name == e.kernel else name, e.problem, e.gpu)
    return None if other.hash == e.recipe.hash else other


def top_to_bottom(e: Evidence) -> Recipe | None:
    """Pieces of an output joined in the other order: from the first k for Marlin, from the last for Machete."""
    if not e.kernel.startswith(("vllm.marlin.", "vllm.machete.")):
        return None

    return cuts.changed(lambda p: cuts.other_way(p) if len(p.pieces) > 2 else None)(e.recipe)


def sum_in_turn(e: Evidence) -> Recipe | None:
    """Eight partial sums added one after the other, where PyTorch keeps four accumulators."""
    return cuts.changed(cuts.other_way)(e.recipe) if e.kernel in TORCH_SUM else None


def sum_in_pairs(e: Evidence) -> Recipe | None:
    return cuts.changed(cuts.in_pairs)(e.recipe) if e.kernel in TORCH_SUM else None


def rows(e: Evidence) -> Recipe | None:
    """Act-order rows in the checkpoint's order for the sorted one, and back."""
    return rewrites.rows(e.recipe) if e.problem.act_order else None
