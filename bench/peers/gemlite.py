"""gemlite's Triton kernels, by the configurations that its author tuned on an H100 (autotune "max"), or tuned here.

Its table is chosen by the GPU's name, in which an H200 finds nothing; the processors are the same, so the H100's is loaded.
The table knows the kernel with split K for 2 to 64 rows where the library's own rule takes another, which then would be tuned
at run time: the kernel that has a tuned configuration is called by its name.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from bench.peers.peer import Peer
from qlab.backends.registry import Packed, Problem
from qlab.backends.vllm_kernel import first, needs
from qlab.weights import ACTIVATION_DTYPES, Int4Weight

TABLE = "QLAB_GEMLITE_TABLE"
"""Environment variable: a table of gemlite's own form, in the place of the H100's."""


class Gemlite(Peer):
    name = "gemlite"
    package = "gemlite"
    module = "gemlite"
    slow_start = True
    note = "w = q s - z s in one fused multiply-add; GEMV for one row, split K by fp16 atomics to 64, one tile in turn above"

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[Problem, list[int]] = {}
        self.loaded = False

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        return first(
            needs(problem.dtype in ACTIVATION_DTYPES, "gemlite takes fp16 and bf16"),
            needs(not problem.act_order, "gemlite has no group index"),
            needs(problem.K % 32 == 0 and problem.N % 32 == 0, "gemlite needs K % 32 and N % 32 to be 0"),
        )

    def pack(self, weight: Int4Weight) -> Packed:
        from gemlite.helper import A16W4_HQQ_INT

        self._load()
        scales = weight.scales.t().contiguous().view(-1, 1)
        zeros = weight.zeros.t().contiguous().to(weight.dtype).view(-1, 1)
        make = A16W4_HQQ_INT(device=str(weight.device), dtype=weight.dtype)
        layer = make.from_weights(weight.codes.t().contiguous(), scales, zeros)
        w, s, z, meta = (t.detach() for t in layer.get_tensor_args())
        problem = Problem.of(weight, 0)
        self.arguments[problem] = layer.get_meta_args()
        return Packed({"codes": w, "scales": s, "zeros": z, "meta": meta}, problem)

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        from gemlite.core import GEMLITE_MATMUL_TYPES_MAPPING, forward_functional

        t = packed.tensors
        kind = GEMLITE_MATMUL_TYPES_MAPPING[matmul_type(len(x))]
        tensors = [t["codes"], t["scales"], t["zeros"], t["meta"]]
        y: Tensor = forward_functional(x, None, tensors, self.arguments[packed.problem], kind)
        return y

    def untuned(self, problem: Problem, m: int) -> bool:
        """Whether the table has no configuration for m rows."""
        from gemlite import core
        from gemlite.triton_kernels import utils

        self._load()
        # In its keys bf16 goes by fp16's number, and 4 stands for the bits: core.forward_functional.
        kind = core.DType.FP16.value * 100 + 4
        key = str((utils.get_closest_m(m), problem.N, problem.K, problem.group_size, 8, kind))
        return key not in core.GEMLITE_TRITON_CONFIG_CACHE.get(matmul_type(m), {})

    def _load(self) -> None:
        if self.loaded:
            return
        import gemlite

        named = os.environ.get(TABLE)
        table = Path(named) if named else Path(gemlite.__file__).parent / "configs" / "h100.json"
        gemlite.load_config(str(table), print_error=True)
        self.loaded = True


def matmul_type(m: int) -> str:
    """The kernel that the table has for m rows."""
    return "GEMV_REVSPLITK" if m == 1 else "GEMM_SPLITK" if m <= 64 else "GEMM"


PEERS = (Gemlite(),)
