"""vLLM's own Triton kernel for AWQ, which it runs under ``VLLM_USE_TRITON_AWQ=1``; its file is loaded without importing vLLM.

It accumulates in fp16. Storage: that of qlab.packing.awq.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from qlab.backends.registry import Packed, Problem, register
from qlab.backends.vllm_extension import Missing, source
from qlab.backends.vllm_kernel import VllmKernel, awq_range, first, needs
from qlab.errors import UnsupportedError
from qlab.packing import awq
from qlab.weights import Int4Weight

FILE = "model_executor/layers/quantization/awq_triton.py"
SPLIT_K = 8
GROUP_SIZES = (32, 64, 128)
_STAND_IN = "vllm.triton_utils"


class AwqTriton(VllmKernel):
    name = "vllm.awq_triton"
    layout = "awq"
    source = "awq"
    note = "w = RN((q-z)s); 8 interleaved slices of 32-row chunks, accumulated in fp16, summed in fp32 (awq_triton.py)"

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        return first(
            needs(problem.dtype == torch.float16, "vLLM's Triton AWQ takes fp16 only, in which it also accumulates"),
            needs(capability >= (7, 5), "vLLM's Triton AWQ needs compute capability 7.5"),
            awq_range(problem),
            needs(problem.N % 8 == 0, f"vLLM's Triton AWQ needs N to be a multiple of 8, not {problem.N}"),
            needs(problem.K % 32 == 0, f"vLLM's Triton AWQ needs K to be a multiple of 32, not {problem.K}"),
            needs(
                problem.group_size in (*GROUP_SIZES, problem.K),
                f"vLLM's Triton AWQ needs groups of 32, 64, 128 or the whole column, not {problem.group_size}",
            ),
        )

    def missing(self) -> str:
        found = module()
        return found.reason if isinstance(found, Missing) else ""

    def tensors(self, weight: Int4Weight) -> Mapping[str, Tensor]:
        packed = awq.pack(weight)
        return {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}

    def _call(self, x: Tensor, packed: Packed) -> Tensor:
        code = module()
        if isinstance(code, Missing):
            raise UnsupportedError(f"{self.name}: {code.reason}")
        t = packed.tensors
        y: Tensor = code.awq_gemm_triton(x.contiguous(), t["qweight"], t["scales"], t["qzeros"], SPLIT_K)
        return y

    def version(self) -> str:
        import triton

        found = module()
        if isinstance(found, Missing):
            return ""
        sha256 = hashlib.sha256(Path(str(found.__file__)).read_bytes()).hexdigest()
        return f"vLLM's awq_triton.py, sha256 {sha256[:16]}, Triton {triton.__version__}"


@lru_cache(maxsize=1)
def module() -> ModuleType | Missing:
    """vLLM's file as a module, or why it is missing; looked for once in a process."""
    path = source(FILE)
    if isinstance(path, Missing):
        return path
    try:
        return load(path)
    except Exception as error:  # another version of the file may import more than the stand-in has
        return Missing(f"{path} does not load ({type(error).__name__}: {error}); it must be vLLM 0.20.2's awq_triton.py")


def load(path: Path) -> ModuleType:
    """Execute the file with a stand-in for ``vllm.triton_utils``, all it imports of vLLM; a vLLM already imported stays."""
    import triton
    import triton.language

    name = "qlab_vllm_awq_triton"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    loaded = importlib.util.module_from_spec(spec)
    stand_in = ModuleType(_STAND_IN)
    stand_in.triton, stand_in.tl = triton, triton.language  # type: ignore[attr-defined]
    ours = sys.modules.setdefault(_STAND_IN, stand_in) is stand_in
    try:
        spec.loader.exec_module(loaded)
    finally:
        if ours:
            del sys.modules[_STAND_IN]
    sys.modules[name] = loaded  # Triton looks a kernel's globals up through its module
    return loaded


register(AwqTriton())
