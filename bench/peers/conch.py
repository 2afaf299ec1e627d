"""conch's Triton kernel, which vLLM takes after Marlin: one fixed tile, zero points in bytes."""

from __future__ import annotations

from torch import Tensor

from bench.peers.peer import Peer
from qlab.backends.registry import Packed, Problem
from qlab.backends.vllm_kernel import first, needs
from qlab.packing import nibbles
from qlab.weights import ACTIVATION_DTYPES, Int4Weight


class Conch(Peer):
    name = "conch"
    package = "conch-triton-kernels"
    module = "conch.ops.quantization.gemm"
    note = "mixed_precision_gemm; w = RN((q-z)s), fp32 sums, k ascending"

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        return first(
            needs(problem.dtype in ACTIVATION_DTYPES, "conch takes fp16 and bf16"),
            needs(not problem.act_order, "conch has no group index"),
            needs(problem.group_size in (128, problem.K), f"conch needs groups of 128, not {problem.group_size}"),
            needs(problem.K % 64 == 0 and problem.N % 64 == 0, "conch needs K % 64 and N % 64 to be 0"),
        )

    def pack(self, weight: Int4Weight) -> Packed:
        tensors = {"codes": nibbles.join_rows(weight.codes), "scales": weight.scales.contiguous()}
        if not weight.symmetric:
            tensors["zeros"] = weight.zeros.contiguous()
        return Packed(tensors, Problem.of(weight, 0))

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        from conch.ops.quantization.gemm import mixed_precision_gemm

        t, bias = packed.tensors, 8 if packed.problem.symmetric else 0
        group = packed.problem.group_size
        y: Tensor = mixed_precision_gemm(
            x, t["codes"], t["scales"], t.get("zeros"), weight_size_bits=4, weight_bias=bias, group_size=group
        )
        return y


PEERS = (Conch(),)
