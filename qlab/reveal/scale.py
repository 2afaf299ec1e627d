"""Where the group scale is applied: to the weight, rounded once or fused; or later, to a sum.

The probing weight has q - z = 1 at even and 3 at odd k, and in every second group the scale 1 + e, e the last place of 1;
1 elsewhere. RN(3(1 + e)) is 3 + 4e. With the zero point 3, RN(-s z) is -(3 + 4e), so that a fused RN(q s + RN(-s z)) is 1 for
q - z = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlab.recipe import Weights
from qlab.reveal.probe import FORMATS, Prober
from qlab.reveal.target import Target
from qlab.weights import Int4Weight, sequential_groups

APART = 16
"""k that no kernel adds in fp16: an even number of steps of 8."""


@dataclass(frozen=True)
class Scaling:
    """Where a kernel applies the scale."""

    weights: Weights
    after_sum: bool
    """Whether the whole sum, rounded, is multiplied by the scale."""
    each_part: bool
    """Whether each part of a sum is rounded and multiplied, before they are added."""
    text: str


def unit_weight(k: int, n: int, group_size: int, dtype: torch.dtype) -> Int4Weight:
    """w = 1 everywhere: q = 9, z = 8, s = 1, which AWQ and GPTQ both hold."""
    groups = k // group_size
    codes, zeros = torch.full((k, n), 9, dtype=torch.uint8), torch.full((groups, n), 8, dtype=torch.uint8)
    return Int4Weight(codes, zeros, torch.ones((groups, n), dtype=dtype), sequential_groups(k, group_size))


def scaled_weight(k: int, n: int, group_size: int, dtype: torch.dtype, zero: int) -> Int4Weight:
    """The probing weight of this page with zero point ``zero``."""
    groups = k // group_size
    codes = (zero + 1 + 2 * (torch.arange(k) % 2)).to(torch.uint8)[:, None].expand(k, n).contiguous()
    scales = (1 + _last_place(dtype) * (torch.arange(groups) % 2 == 0)).to(dtype)[:, None].expand(groups, n).contiguous()
    return Int4Weight(codes, torch.full((groups, n), zero, dtype=torch.uint8), scales, sequential_groups(k, group_size))


def scaling(target: Target, group_size: int, parts: tuple[int, int] | None = None) -> Scaling:
    """Asks a target of the scaled weight. ``parts`` are even k of two parts that are rounded before they are added."""
    prober, e = Prober(target), _last_place(target.dtype)
    big = 2.0 ** FORMATS[target.dtype].bits
    rows = [{0: -3.0, 1: 1.0}, {1: 1.0}]
    (both, one) = prober.values(rows)
    if both == e and one == 3 + 4 * e:
        return Scaling("rounded", False, False, "w = RN((q-z)*s) before the product")
    if both == 2 * e and one == 3 + 2 * e:
        return Scaling("fused", False, False, "w = RN(q*s + RN(-s*z)) before the product")
    if both != 0:
        return Scaling("rounded", False, False, f"unknown: 1*w(3) - 3*w(1) is {both:g}, w(3) {one:g}, the last place {e:g}")
    if group_size < target.k:
        # Of 3(1 + e) nothing is lost where dot products are multiplied and added in fp32.
        (left,) = prober.values([{0: 3.0, APART: -1.0}])
        how = "in fp32" if left == 2 + 2 * e else f"rounded on the way (3s - s is {left:g}, exactly {2 + 2 * e:g})"
        return Scaling("integer", False, False, f"w = q-z; sums over k of a group are multiplied by its scale, {how}")
    if parts is not None:
        (left,) = prober.values([{parts[0]: 3.0, parts[1]: -2.0}])
        if left == 1 + 2 * e:
            return Scaling("integer", False, True, "w = q-z; each part is rounded and multiplied by the scale, then added")
    # 2^p + 1 is rounded to 2^p before it is multiplied, or multiplied first.
    apart = min(APART, target.k - 2)
    (left,) = prober.values([{0: big, apart: 1.0}])
    after = left == big + big * e
    what = "the rounded sum" if after else "the sum, in fp32,"
    return Scaling("integer", after, False, f"w = q-z; {what} is multiplied by the scale")


def _last_place(dtype: torch.dtype) -> float:
    return 2.0 ** (1 - FORMATS[dtype].bits)
