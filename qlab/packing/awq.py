"""AWQ checkpoints (gemm order), as AutoAWQ writes them and vLLM's ``awq_gemm`` reads them.

Column n lies in int32 n // 8, and nibble i of an int32 holds column [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight. Codes and zero
points share this order; zero points are stored as they are. Rows are in order: there is no group index.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qlab.packing import checks, nibbles
from qlab.weights import Int4Weight

LAYOUT = "awq"


@dataclass(frozen=True, eq=False)
class AwqTensors:
    """One layer; group g holds rows gK/G to (g+1)K/G - 1."""

    qweight: Tensor
    """int32 [K, N/8]."""
    qzeros: Tensor
    """int32 [G, N/8]."""
    scales: Tensor
    """fp16 or bf16 [G, N]."""


def pack(weight: Int4Weight) -> AwqTensors:
    """``weight`` as AWQ stores it. Raises PackingError for act-order, zero point 16, or N not a multiple of 8."""
    checks.multiples(weight, LAYOUT, n=8)
    checks.zero_points(weight, LAYOUT, 0, 15, "pack it as gptq version 1, which stores 16 as 15")
    if weight.act_order:
        row, group = _first_out_of_order(weight)
        checks.refuse(
            weight,
            LAYOUT,
            f"it is in act-order (row {row} is in group {group}) and the layout has no group index; pack it as gptq",
        )
    return AwqTensors(_join(weight.codes), _join(weight.zeros), checks.copied(weight.scales))


def unpack(tensors: AwqTensors, *, name: str = "", input_scale: Tensor | None = None) -> Int4Weight:
    """The weight that ``tensors`` hold, the inverse of :func:`pack`. Raises PackingError naming the tensor that is wrong."""
    check = checks.Tensors(LAYOUT, name, tensors.qweight)
    check.codes("qweight", tensors.qweight)
    k, packed_n = tensors.qweight.shape
    check.scales("scales", tensors.scales, columns=8 * packed_n)
    groups = tensors.scales.shape[0]
    check.codes("qzeros", tensors.qzeros, groups, packed_n)
    check.group_size("scales", k, groups)
    return check.weight(_split(tensors.qweight), _split(tensors.qzeros), tensors.scales, None, name, input_scale)


def _join(values: Tensor) -> Tensor:
    return nibbles.join(nibbles.even_then_odd(values))


def _split(packed: Tensor) -> Tensor:
    return nibbles.undo_even_then_odd(nibbles.split(packed))


def _first_out_of_order(weight: Int4Weight) -> tuple[int, int]:
    expected = checks.sequential_groups(weight.K, weight.group_size, weight.device)
    row = int((weight.group_index != expected).nonzero()[0])
    return row, int(weight.group_index[row])
