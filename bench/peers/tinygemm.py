"""PyTorch's own int4 kernel (tinygemm), which torchao calls: bf16 only, ``w = (q - 8) s + (8 - z) s``."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers.peer import Peer
from qlab.backends.registry import Packed, Problem
from qlab.backends.vllm_kernel import first, needs
from qlab.weights import Int4Weight

INNER_TILES = 8


class Tinygemm(Peer):
    name = "tinygemm"
    dtype = torch.bfloat16
    note = "aten._weight_int4pack_mm; mma.sync, fp32 sums, bf16"

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        p = problem
        return first(
            needs(p.dtype == torch.bfloat16, "tinygemm takes bf16 only"),
            needs(capability >= (8, 0), "tinygemm needs compute capability 8.0"),
            needs(not p.act_order, "tinygemm has no group index"),
            needs(p.group_size in (32, 64, 128, 256), f"tinygemm needs groups of 32 to 256, not {p.group_size}"),
            needs(p.K % (16 * INNER_TILES) == 0 and p.N % 8 == 0, f"tinygemm needs K % {16 * INNER_TILES} and N % 8 to be 0"),
        )

    def pack(self, weight: Int4Weight) -> Packed:
        q = weight.codes.t()
        pairs = ((q[:, ::2] << 4) | q[:, 1::2]).contiguous()
        codes = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES)
        scales = weight.scales.float()
        zeros = (8 - weight.zeros.float()) * scales
        both = torch.stack((scales, zeros), -1).to(torch.bfloat16).contiguous()
        return Packed({"codes": codes, "scales_zeros": both}, Problem.of(weight, 0))

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        t = packed.tensors
        y: Tensor = torch.ops.aten._weight_int4pack_mm(x, t["codes"], packed.problem.group_size, t["scales_zeros"])
        return y


PEERS = (Tinygemm(),)
