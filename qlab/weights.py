"""``Int4Weight``: the one form that every checkpoint is read into and every kernel's storage is packed from.

Its unit is one linear layer as vLLM runs it: fused qkv, o, fused gate_up, down. N decides a kernel's tiles and with them its
order of summation, so a projection on its own would give other bits than the fused layer it is served in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlab.errors import WeightError

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = {"float16": torch.float16, "fp16": torch.float16, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
"""The same by the names that commands take."""


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """One INT4 linear: ``w[k, n] = (codes[k, n] - zeros[g, n]) * scales[g, n]`` with ``g = group_index[k]``; ``y = x @ w``.

    Raises WeightError when shapes, dtypes or ranges do not fit together.
    """

    codes: Tensor
    """uint8 [K, N], 0 to 15."""
    zeros: Tensor
    """uint8 [G, N], the true zero points, 0 to 16 (16 exists: GPTQ v1 stores it as 15)."""
    scales: Tensor
    """fp16 or bf16 [G, N], finite and positive or negative, never zero."""
    group_index: Tensor
    """int32 [K], the group of each row; ``k // group_size`` unless the rows were ordered by activation (act-order)."""
    input_scale: Tensor | None = None
    """float32 [K] or None: AWQ's s. The layer expects ``x' = RN(x / s)``; checkpoints fold s into the previous operation."""
    name: str = ""
    """Where the layer sits in its model, e.g. ``model.layers.0.self_attn.qkv_proj``."""

    def __post_init__(self) -> None:
        where = f"weight {self.name!r}: " if self.name else ""
        if self.codes.dtype != torch.uint8 or self.codes.ndim != 2:
            raise WeightError(f"{where}codes must be uint8 [K, N], not {_kind(self.codes)}")
        k, n = self.codes.shape
        if self.scales.dtype not in ACTIVATION_DTYPES or self.scales.ndim != 2 or self.scales.shape[1] != n:
            raise WeightError(f"{where}scales must be fp16 or bf16 [G, {n}], not {_kind(self.scales)}")
        if self.zeros.dtype != torch.uint8 or self.zeros.shape != self.scales.shape:
            raise WeightError(f"{where}zeros must be uint8 {list(self.scales.shape)}, not {_kind(self.zeros)}")
        if self.group_index.dtype != torch.int32 or self.group_index.shape != (k,):
            raise WeightError(f"{where}group_index must be int32 [{k}], not {_kind(self.group_index)}")
        if k == 0 or n == 0 or self.groups == 0:
            raise WeightError(f"{where}K={k}, N={n} and its {self.groups} groups must all be positive")
        if k % self.groups:
            raise WeightError(f"{where}K={k} must be a multiple of its {self.groups} groups")
        parts = (self.codes, self.zeros, self.scales, self.group_index, self.input_scale)
        devices = sorted({str(p.device) for p in parts if p is not None})
        if len(devices) > 1:
            raise WeightError(f"{where}all parts must lie on one device, not on {' and '.join(devices)}")
        if self.input_scale is not None:
            s = self.input_scale
            if s.dtype != torch.float32 or s.shape != (k,):
                raise WeightError(f"{where}input_scale must be float32 [{k}], not {_kind(s)}")
            bad = ~(torch.isfinite(s) & (s > 0))
            if bool(bad.any()):
                raise WeightError(f"{where}input_scale must be finite and positive; row {_first(bad)} is not")
        if bool((self.codes > 15).any()):
            raise WeightError(f"{where}codes must be 0 to 15; (k, n) = {_first(self.codes > 15)} is not")
        if bool((self.zeros > 16).any()):
            raise WeightError(f"{where}zero points must be 0 to 16; (group, n) = {_first(self.zeros > 16)} is not")
        bad = ~torch.isfinite(self.scales) | (self.scales == 0)
        if bool(bad.any()):
            raise WeightError(f"{where}scales must be finite and not zero; (group, n) = {_first(bad)} is not")
        bad = (self.group_index < 0) | (self.group_index >= self.groups)
        if bool(bad.any()):
            raise WeightError(f"{where}group_index must be 0 to {self.groups - 1}; row {_first(bad)} is not")
        sizes = torch.bincount(self.group_index.long(), minlength=self.groups)
        if bool((sizes != self.group_size).any()):
            raise WeightError(
                f"{where}every group must have {self.group_size} rows; {_first(sizes != self.group_size)} has not"
            )

    @property
    def K(self) -> int:
        return int(self.codes.shape[0])

    @property
    def N(self) -> int:
        return int(self.codes.shape[1])

    @property
    def groups(self) -> int:
        return int(self.scales.shape[0])

    @property
    def group_size(self) -> int:
        """Rows per group; K for whole-column scales."""
        return self.K // self.groups

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the scales, which is that of the activations the kernels take."""
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def symmetric(self) -> bool:
        """True when every zero point is 8, the only one that GPTQ's symmetric type (uint4b8) has."""
        return bool((self.zeros == 8).all())

    @property
    def act_order(self) -> bool:
        """True when some row is not in group ``k // group_size``."""
        return not torch.equal(self.group_index, sequential_groups(self.K, self.group_size, self.device))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """``RN_dtype((q - z) * s)`` as ``dtype`` [K, N]: the product exact, rounded once to nearest even.

        In float32 and float64 nothing is rounded: |q - z| has 5 bits and s at most 11, 16 bits together.
        """
        g = self.group_index.long()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        difference = self.codes.to(wide) - self.zeros.to(wide)[g]
        return (difference * self.scales.to(wide)[g]).to(dtype)

    def scaled_input(self, x: Tensor) -> Tensor:
        """``RN(x / s)``, the input that an AWQ layer expects: divided in float64, rounded once to x's dtype [M, K]."""
        if self.input_scale is None:
            return x
        return round_once(x.double() / self.input_scale.double(), x.dtype)

    def to(self, device: torch.device | str) -> Int4Weight:
        s = self.input_scale
        return replace(
            self,
            codes=self.codes.to(device),
            zeros=self.zeros.to(device),
            scales=self.scales.to(device),
            group_index=self.group_index.to(device),
            input_scale=None if s is None else s.to(device),
        )

    def with_dtype(self, dtype: torch.dtype) -> Int4Weight:
        """The same codes with scales rounded to nearest to ``dtype``: another weight, for kernels that run in ``dtype``."""
        return replace(self, scales=self.scales.to(dtype))

    def columns(self, start: int, stop: int, name: str = "") -> Int4Weight:
        """Columns ``start:stop`` as a weight of their own: one shard of a fused layer."""
        take = slice(start, stop)
        return replace(
            self,
            codes=self.codes[:, take].contiguous(),
            zeros=self.zeros[:, take].contiguous(),
            scales=self.scales[:, take].contiguous(),
            name=name or self.name,
        )

    def equals(self, other: Int4Weight) -> bool:
        """True when every bit of codes, zero points, scales, group index and input scale agrees (names may differ)."""
        return self.digest() == other.digest()

    def digest(self) -> str:
        """sha256 over shapes, dtypes and bytes of every part but the name."""
        h = hashlib.sha256()
        for part in (self.codes, self.zeros, self.scales, self.group_index, self.input_scale):
            h.update(b"none" if part is None else tensor_bytes(part))
        return h.hexdigest()


def fuse(shards: Sequence[Int4Weight], name: str = "") -> Int4Weight:
    """Join projections along N into the layer that vLLM runs (qkv, gate_up).

    Raises WeightError when the shards' group indices, input scales, dtypes or K differ: one kernel call has one of each.
    """
    if not shards:
        raise WeightError(f"weight {name!r}: no shards to fuse")
    first = shards[0]
    for s in shards[1:]:
        if s.K != first.K or s.dtype != first.dtype or s.groups != first.groups:
            raise WeightError(
                f"cannot fuse {s.name!r} (K={s.K}, {s.groups} groups, {s.dtype}) "
                f"with {first.name!r} (K={first.K}, {first.groups} groups, {first.dtype})"
            )
        if not torch.equal(s.group_index, first.group_index):
            row = _first(s.group_index != first.group_index)
            raise WeightError(
                f"cannot fuse {s.name!r} with {first.name!r}: their group indices differ, first at row {row}; "
                "a fused layer has one group index"
            )
        both = (s.input_scale, first.input_scale)
        if (both[0] is None) != (both[1] is None) or (both[0] is not None and not torch.equal(*both)):  # type: ignore[arg-type]
            raise WeightError(f"cannot fuse {s.name!r} with {first.name!r}: their AWQ input scales differ")
    return replace(
        first,
        codes=torch.cat([s.codes for s in shards], 1),
        zeros=torch.cat([s.zeros for s in shards], 1),
        scales=torch.cat([s.scales for s in shards], 1),
        name=name,
    )


def sequential_groups(k: int, group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """The group index without act-order: int32 [k], ``row // group_size``."""
    return torch.arange(k, dtype=torch.int32, device=device) // group_size


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 ``x`` rounded once to nearest even to ``dtype``.

    ``x.to(torch.float16)`` rounds twice, to float32 and then to fp16, and misses the nearest value when the first rounding
    lands on a tie of the second. Rounding to odd on the way to float32 keeps what the tie needs to know.
    """
    if dtype not in ACTIVATION_DTYPES:
        return x.to(dtype)
    narrow = x.to(torch.float32)
    bits = narrow.view(torch.int32)
    toward_zero = torch.where(narrow.double().abs() > x.abs(), bits - 1, bits)
    odd = (toward_zero | 1).view(torch.float32)
    return torch.where(narrow.double() == x, narrow, odd).to(dtype)


def tensor_bytes(t: Tensor) -> bytes:
    """Shape, dtype and little-endian bytes of a tensor, for digests."""
    raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{t.dtype}{list(t.shape)}".encode() + raw


def _kind(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _first(mask: Tensor) -> object:
    """Index of the first True: an int for one dimension, a tuple for more."""
    where = tuple(int(i) for i in mask.nonzero()[0])
    return where[0] if len(where) == 1 else where
