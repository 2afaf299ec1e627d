"""GPTQ: round one row after another, and let the rows still to come make up for each error (arXiv 2210.17323).

For inputs X the squared output error of a column is ``d^T H d / 2`` with ``H = 2 X^T X``. With U the upper Cholesky factor of
``H^-1``, rounding row k leaves the error ``e = (w_k - q_k) / U_kk``, and the best answer of the later rows is
``w_j -= U_kj e``. Rows are taken in blocks: inside a block at once, beyond it one matrix product at the block's end; the
result does not depend on the size of the block.

Act-order takes the rows in the order of falling ``H_kk``, so that those which matter most are rounded while there are still
many others to answer. Their groups are then either rows that follow each other in that order (``g_idx``), or, with static
groups, rows that follow each other in the matrix.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.quantize.grid import Grid, bounds, checked, choose, decode, encode, group_rows
from qlab.weights import Int4Weight

BLOCK = 128
"""Rows per block, about; a speed and not a result."""


class Factor(NamedTuple):
    """A Hessian made ready: one factor serves every weight with the same input, so q, k and v share order and groups."""

    upper: Tensor
    """float64 [K, K], ``U^T U = (H + damping)^-1``, rows and columns in ``order``."""
    order: Tensor
    """int64 [K], which row of the weight is rounded first, second, ..."""
    dead: Tensor
    """bool [K], in the weight's own order: inputs that were never anything but zero."""


def prepare(hessian: Tensor, *, act_order: bool = False, damping: float = 0.01) -> Factor:
    """Factorise ``hessian`` [K, K] after adding ``damping`` times its mean diagonal.

    A dead input has a zero row in H; its diagonal becomes the mean of the others, which leaves their rows as they are.
    Raises QlabError when the damped Hessian is not positive definite or not square.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise QlabError(f"a Hessian must be square, not {list(hessian.shape)}")
    if not (damping >= 0):
        raise QlabError(f"damping must be zero or positive, not {damping}")
    h = hessian.double().clone()
    diagonal = h.diagonal()
    dead = diagonal == 0
    order = torch.arange(h.shape[0], device=h.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    diagonal[dead] = 1.0 if bool(dead.all()) else diagonal[~dead].mean()
    diagonal += damping * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(h[order][:, order])
    if not bool(failed):
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if bool(failed) or not bool(torch.isfinite(upper).all()):
        raise QlabError(f"the Hessian with damping {damping} is not positive definite; raise damping or add calibration text")
    return Factor(upper, order, dead)


def quantize(
    w: Tensor,
    factor: Factor,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype = torch.float16,
    *,
    static_groups: bool = False,
    zero_min: int = 1,
    block: int = BLOCK,
    name: str = "",
) -> Int4Weight:
    """``w`` [K, N] of any floating dtype, quantised for the inputs whose Hessian ``factor`` was prepared from.

    A group's grid is fitted when its first row comes up, to the rows as earlier errors have changed them; ``static_groups``
    fits all grids to the original weight, and groups rows as they lie in the matrix even with act-order. Dead rows are set to
    zero. Raises WeightError for a weight that is not finite or not a multiple of the group.
    """
    wide = checked(w, name)
    k, n = wide.shape
    size = group_rows(k, group_size)
    if factor.order.shape != (k,):
        raise QlabError(f"weight {name!r} has K={k}, its Hessian {factor.order.shape[0]}; both must be of one layer")
    wide = wide.masked_fill(factor.dead[:, None], 0.0)
    group = torch.arange(k, device=wide.device) // size
    grid = choose(*bounds(wide.reshape(-1, size, n)), symmetric=symmetric, dtype=dtype, zero_min=zero_min)
    if static_groups:
        group = group[factor.order]
    scales, zeros = grid.scales.clone(), grid.zeros.clone()

    rest = wide[factor.order]
    upper = factor.upper
    codes = torch.empty((k, n), dtype=torch.uint8, device=wide.device)
    # A block ends where a group ends or lies inside one group, so a group's rows are up to date when its grid is fitted.
    step = size * max(1, block // size) if size <= block else gcd(size, block)
    for start in range(0, k, step):
        stop = min(start + step, k)
        errors = torch.empty((stop - start, n), dtype=torch.float64, device=wide.device)
        for row in range(start, stop):
            g = int(group[row])
            if not static_groups and row % size == 0:
                fitted = choose(*bounds(rest[None, row : row + size]), symmetric=symmetric, dtype=dtype, zero_min=zero_min)
                scales[g], zeros[g] = fitted.scales[0], fitted.zeros[0]
            at = Grid(scales[g], zeros[g])
            codes[row] = encode(rest[row], at)
            errors[row - start] = (rest[row] - decode(codes[row], at)) / upper[row, row]
            rest[row + 1 : stop] -= upper[row, row + 1 : stop, None] * errors[row - start]
        rest[stop:] -= upper[start:stop, stop:].T @ errors

    back = torch.argsort(factor.order)
    return Int4Weight(codes[back], zeros, scales, group[back].to(torch.int32), name=name)
