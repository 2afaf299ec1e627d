"""How far two outputs lie apart, and which outputs are the same, bit for bit. Plain functions of tensors.

Distances are taken in float64. An ULP is the spacing of the output's dtype at the exact value; errors in ULP are real
numbers, 0.5 at most for a result that is the exact value rounded once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Sums that add up over layers; every figure of an :class:`Error` but the ULP quantiles follows from them."""

    squared_error: float
    squared_exact: float

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.squared_error + other.squared_error, self.squared_exact + other.squared_exact)

    @property
    def relative_l2(self) -> float:
        """||y - exact|| / ||exact||; 0 without an error, whatever the exact norm is."""
        if self.squared_error == 0:
            return 0.0
        if self.squared_exact == 0:
            return math.inf
        return math.sqrt(self.squared_error / self.squared_exact)


@dataclass(frozen=True)
class Error:
    """An output's distance from float64."""

    relative_l2: float
    """||y - exact|| / ||exact||."""
    ulp_median: float
    ulp_max: float
    """Largest error in ULP. Where the exact value nearly cancels this is large for every kernel: read the next figure."""
    backward: float
    """Largest |y - exact| / sum_k |x||w|: the error in units of what went into the sum; blind to cancellation.
    Infinite where y is not finite, as are ULP."""


def moments(y: Tensor, exact: Tensor) -> Moments:
    """Squared error of ``y`` and squared norm of ``exact`` (float64), same shape."""
    d = y.double() - exact
    return Moments(float(d.square().sum()), float(exact.square().sum()))


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of ``dtype`` at each value of ``exact`` (float64): 2^(exponent - mantissa bits), at least the subnormal one.

    Values beyond the dtype's range are spaced as if its exponents went on.
    """
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    _, exponent = torch.frexp(exact)
    # A float64 exponent, since older PyTorch takes 2 to an integer power in float32; frexp gives zero the exponent of 1/2.
    spacing = torch.ldexp(torch.full_like(exact, info.eps), exponent.double() - 1)
    return torch.where(exact == 0, smallest, spacing).clamp(min=smallest)


def ulp_errors(y: Tensor, exact: Tensor) -> Tensor:
    """|y - exact| in ULP of y's dtype, float64; infinite where y is not finite."""
    e = (y.double() - exact).abs() / ulp(exact, y.dtype)
    return e.masked_fill(~torch.isfinite(y), math.inf)


@dataclass(frozen=True)
class Measured:
    """One output against float64, in the parts that add up over several outputs."""

    moments: Moments
    ulps: Tensor
    """:func:`ulp_errors`, float64, of y's shape."""
    backward: float

    def error(self) -> Error:
        return Error(self.moments.relative_l2, float(self.ulps.median()), float(self.ulps.max()), self.backward)


def measure(y: Tensor, exact: Tensor, magnitude: Tensor) -> Measured:
    """``y`` [M, N] against float64 ``exact``, with ``magnitude`` = sum_k |x||w| (float64) beside it."""
    distance = (y.double() - exact).abs()
    backward = torch.where(distance == 0, 0.0, distance / magnitude).masked_fill(~torch.isfinite(y), math.inf)
    return Measured(moments(y, exact), ulp_errors(y, exact), float(backward.max()))


def error(y: Tensor, exact: Tensor, magnitude: Tensor) -> Error:
    """Error of ``y`` [M, N]; arguments as in :func:`measure`."""
    return measure(y, exact, magnitude).error()


def digest(y: Tensor) -> str:
    """sha256 of dtype, shape and bytes of an output; NaN payloads and signs of zero count."""
    raw = y.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{y.dtype}{list(y.shape)}".encode() + raw).hexdigest()


def differing(a: Tensor, b: Tensor) -> int:
    """Number of elements whose bits differ. Raises ValueError when shapes or dtypes do."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"cannot compare {a.dtype} {list(a.shape)} with {b.dtype} {list(b.shape)} bit by bit")
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return int((a.contiguous().view(bits) != b.contiguous().view(bits)).sum())


def differing_bits(a: Tensor, b: Tensor) -> int:
    """Number of bits that differ between two outputs of 16-bit elements. Raises ValueError when shapes or dtypes do."""
    if a.shape != b.shape or a.dtype != b.dtype or a.element_size() != 2:
        raise ValueError(f"cannot compare {a.dtype} {list(a.shape)} with {b.dtype} {list(b.shape)} bit by bit")
    apart = a.contiguous().view(torch.int16).int() ^ b.contiguous().view(torch.int16).int()
    return sum(int(((apart >> i) & 1).sum()) for i in range(16))


def equivalence_classes(digests: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    """Names whose outputs are bitwise equal, grouped; in the order in which each class is first met."""
    classes: dict[str, list[str]] = {}
    for name, d in digests.items():
        classes.setdefault(d, []).append(name)
    return tuple(tuple(names) for names in classes.values())


@dataclass(frozen=True)
class OffDiagonal:
    """Mean, smallest and largest of a matrix's entries off the diagonal; NaN entries (nothing to compare) are left out."""

    mean: float
    low: float
    high: float


def off_diagonal(matrix: Sequence[Sequence[float]]) -> OffDiagonal | None:
    """None when there is nothing off the diagonal."""
    values = [v for i, row in enumerate(matrix) for j, v in enumerate(row) if i != j and not math.isnan(v)]
    return OffDiagonal(sum(values) / len(values), min(values), max(values)) if values else None
