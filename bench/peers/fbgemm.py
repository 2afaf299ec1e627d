"""FBGEMM GenAI's preshuffled int4 kernel (CUTLASS, Hopper): bf16 only, ``w = (q - 8) s + (8 - z) s``."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers.peer import Peer
from qlab.backends.registry import Packed, Problem
from qlab.backends.vllm_kernel import first, needs
from qlab.weights import Int4Weight


class Fbgemm(Peer):
    name = "fbgemm"
    package = "fbgemm-gpu-genai"
    module = "fbgemm_gpu.experimental.gen_ai"
    dtype = torch.bfloat16
    note = "bf16i4bf16_shuffled; wgmma, fp32 sums, bf16"

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        return first(
            needs(problem.dtype == torch.bfloat16, "fbgemm's int4 kernel takes bf16 only"),
            needs(capability == (9, 0), "fbgemm's int4 kernel needs a Hopper GPU"),
            needs(not problem.act_order, "fbgemm's int4 kernel has no group index"),
            needs(problem.group_size == 128, f"fbgemm's int4 kernel needs groups of 128, not {problem.group_size}"),
        )

    def pack(self, weight: Int4Weight) -> Packed:
        from fbgemm_gpu.experimental.gen_ai.quantize import pack_int4

        signed = (weight.codes.t().to(torch.int8) - 8).contiguous()
        codes, scales = torch.ops.fbgemm.preshuffle_i4(pack_int4(signed), weight.scales.contiguous())
        zeros = ((8 - weight.zeros.float()) * weight.scales.float()).to(weight.dtype).contiguous()
        return Packed({"codes": codes, "scales": scales, "zeros": zeros}, Problem.of(weight, 0))

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        t = packed.tensors
        y: Tensor = torch.ops.fbgemm.bf16i4bf16_shuffled(x, t["codes"], t["scales"], t["zeros"])
        return y


PEERS = (Fbgemm(),)
