"""Inputs that any machine can make again, bit for bit, from a seed.

Only integers are drawn at random (PyTorch's CPU generator); everything else is exact arithmetic on them. Normal variates
would not do: their logarithms and cosines differ in the last bit between builds of PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlab.errors import WeightError
from qlab.weights import Int4Weight, sequential_groups


def random_weight(
    k: int,
    n: int,
    group_size: int = 128,
    *,
    dtype: torch.dtype = torch.float16,
    symmetric: bool = False,
    act_order: bool = False,
    seed: int = 0,
    name: str = "",
) -> Int4Weight:
    """A weight re-creatable from its seed on any machine: every code, scales distinct per group and column.

    ``group_size`` K or -1 gives one group. Asymmetric zero points are 1 to 15, which every asymmetric layout can hold.
    Scales are distinct over groups x columns while fp16 or bf16 has enough values between 2^-8 and 2^-6.
    """
    group_size = k if group_size in (-1, k) else group_size
    if group_size <= 0 or k % group_size:
        raise WeightError(f"K={k} must be a multiple of the group size {group_size}")
    g = torch.Generator().manual_seed(seed)
    groups = k // group_size
    codes = torch.randint(0, 16, (k, n), generator=g, dtype=torch.uint8)
    zeros = torch.full((groups, n), 8, dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(1, 16, (groups, n), generator=g, dtype=torch.uint8)
    # Successive representable values from 2^-8 on, shuffled: distinct while they last, then repeated.
    start = int(torch.tensor(2.0**-8, dtype=dtype).view(torch.int16))
    span = int(torch.tensor(2.0**-6, dtype=dtype).view(torch.int16)) - start
    order = torch.randperm(groups * n, generator=g) % span
    scales = (order + start).to(torch.int16).view(dtype).reshape(groups, n)
    index = sequential_groups(k, group_size)
    if act_order:
        index = index[torch.randperm(k, generator=g)].contiguous()
    return Int4Weight(codes, zeros, scales, index, name=name)


def random_activations(m: int, k: int, *, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    """x [m, k] in ``dtype``, near N(0, 1): the sum of twelve 16-bit uniforms less its mean, an exact integer, rounded once."""
    g = torch.Generator().manual_seed(seed)
    total = torch.zeros((m, k), dtype=torch.int64)
    for _ in range(12):
        total += torch.randint(0, 65536, (m, k), generator=g)
    return ((total - 6 * 65535).double() / 65536).to(dtype)


def exact_activations(m: int, k: int, *, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    """x [m, k] of -1, 0 and 1: with :func:`exact_weight` every sum below is exact in fp32, so every order gives float64's."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 3, (m, k), generator=g) - 1).to(dtype)


def exact_weight(k: int, n: int, group_size: int = 128, *, dtype: torch.dtype = torch.float16, seed: int = 0) -> Int4Weight:
    """A weight whose dequantised values are integers times 2^-4, 2^-5 or 2^-6: products and sums are exact in fp32."""
    w = random_weight(k, n, group_size, dtype=dtype, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    power = torch.randint(4, 7, tuple(w.scales.shape), generator=g)
    scales = torch.pow(2.0, -power.double()).to(dtype)
    return Int4Weight(w.codes, w.zeros, scales, w.group_index, name=w.name)


def one_hot_rows(start: int, stop: int, k: int, *, dtype: torch.dtype = torch.float16) -> Tensor:
    """Rows ``start:stop`` of the k x k identity, as x [stop - start, k]: the output must be the decoded weight's rows."""
    x = torch.zeros((stop - start, k), dtype=dtype)
    x[torch.arange(stop - start), torch.arange(start, stop)] = 1
    return x
