"""ExLlama's layout: GPTQ's, as vLLM's ``gptq_shuffle`` leaves it for ``gptq_gemm``.

Rows are sorted by group first if the layer has act-order, then packed as GPTQ does, then the eight nibbles of every int32 are
put in the order 0, 2, 4, 6, 1, 3, 5, 7. Zero points and scales stay as GPTQ stores them, in group order: sorted row k is in
group ``k // group_size``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qlab.packing import act_order, checks, gptq, nibbles
from qlab.weights import Int4Weight

LAYOUT = "exllama"


@dataclass(frozen=True, eq=False)
class ExllamaTensors:
    """One layer, ready for ``gptq_gemm`` with ``use_exllama``."""

    qweight: Tensor
    """int32 [K/8, N], shuffled."""
    qzeros: Tensor
    """int32 [G, N/8], as GPTQ's."""
    scales: Tensor
    """fp16 or bf16 [G, N]; vLLM's kernel takes fp16 only."""
    q_perm: Tensor
    """int32 [K], the original row of each sorted row, or [0] without act-order. The kernel's argument ``b_g_idx``."""
    version: gptq.Version = 1
    """How ``qzeros`` stores a zero point: less one (1) or as it is (2)."""


def pack(weight: Int4Weight, version: gptq.Version = 1, *, perm: Tensor | None = None) -> ExllamaTensors:
    """``weight`` as ExLlama's kernel reads it.

    ``perm`` int32 [K] sorts the rows by group; by default the stable sort of an act-order weight's group index. Raises
    PackingError when K or N is not a multiple of 8, for a zero point that the version cannot hold (0 in version 1, 16 in
    version 2), or for a ``perm`` that does not sort.
    """
    checks.multiples(weight, LAYOUT, k=8, n=8)
    qzeros = gptq.pack_zeros(weight, version, LAYOUT)
    q_perm = act_order.order(weight, perm, LAYOUT)
    columns = act_order.sort(weight.codes, q_perm).t()
    qweight = nibbles.join(nibbles.even_then_odd(columns)).t().contiguous()
    return ExllamaTensors(qweight, qzeros, checks.copied(weight.scales), q_perm, version)


def unpack(tensors: ExllamaTensors, *, name: str = "", input_scale: Tensor | None = None) -> Int4Weight:
    """The weight that ``tensors`` hold, the inverse of :func:`pack`. Raises PackingError naming the tensor that is wrong."""
    check = checks.Tensors(LAYOUT, name, tensors.qweight)
    check.codes("qweight", tensors.qweight)
    packed_k, n = tensors.qweight.shape
    check.scales("scales", tensors.scales, columns=n)
    groups = tensors.scales.shape[0]
    zeros = gptq.unpack_zeros(check, tensors.qzeros, tensors.version, groups, n)
    check.group_size("scales", 8 * packed_k, groups)
    if tensors.q_perm.numel():
        check.permutation("q_perm", tensors.q_perm, 8 * packed_k)
    rows = nibbles.undo_even_then_odd(nibbles.split(tensors.qweight.t())).t()
    codes = act_order.unsort(rows, tensors.q_perm)
    index = act_order.group_index(tensors.q_perm, 8 * packed_k, groups)
    return check.weight(codes, zeros, tensors.scales, index, name, input_scale)
