"""A path: what computes a model's INT4 linears, on which GPU, and who chose the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qlab import hardware
from qlab.backends import dispatch, registry
from qlab.backends.registry import Problem
from qlab.errors import QlabError, UnsupportedError

DispatchMode = Literal["pinned", "vllm"]
CHUNKS = {"awq": dispatch.AWQ_DEQUANTIZE_TOKENS - 1, "gptq": dispatch.EXLLAMA_TOKENS}
"""Most tokens of a step that keep a label off cuBLAS."""


@dataclass(frozen=True)
class Path:
    """``awq_marlin@h100``: one of vLLM's labels, or one kernel by its name, on one GPU.

    Raises QlabError for an unknown method, GPU or dispatch.
    """

    method: str
    """vLLM's label (``awq``, ``awq_marlin``, ``gptq``, ``gptq_marlin``) or a name of the registry (``vllm.awq_triton``)."""
    gpu: str
    """Key of the GPU table."""
    dispatch: DispatchMode = "pinned"
    """``pinned``: Marlin wherever a label may run Marlin; ``vllm``: vLLM's own choice, which on Hopper is Machete."""

    def __post_init__(self) -> None:
        hardware.gpu(self.gpu)
        if self.dispatch not in get_args(DispatchMode):
            raise QlabError(f"dispatch {self.dispatch!r} is neither {' nor '.join(get_args(DispatchMode))}")
        if self.method not in dispatch.LABELS:
            names = [k.name for k in registry.kernels()]
            if self.method not in names:
                raise QlabError(f"unknown method {self.method!r}; known: {', '.join((*dispatch.LABELS, *names))}")

    def __str__(self) -> str:
        return f"{self.method}@{self.gpu}" + ("" if self.dispatch == "pinned" else f":{self.dispatch}")

    @classmethod
    def parse(cls, text: str) -> Path:
        """Inverse of ``str``. Raises QlabError."""
        method, at, rest = text.partition("@")
        gpu, _, mode = rest.partition(":")
        if not at:
            raise QlabError(f"{text!r} is no method@gpu, for example awq_marlin@h100")
        return cls(method, gpu.lower(), mode or "pinned")  # type: ignore[arg-type]

    @property
    def source(self) -> str:
        """Checkpoint family that it serves: ``awq``, ``gptq``, or empty where it takes either."""
        return self.method.split("_")[0] if self.method in dispatch.LABELS else registry.kernel(self.method).source

    @property
    def chunk(self) -> int:
        """Most tokens of a step that keep the method off cuBLAS; 0 where any number does."""
        return CHUNKS.get(self.method, 0)

    def kernel(self, problem: Problem) -> str:
        """Registry name of the kernel that runs ``problem``. Raises UnsupportedError with the reason where none does."""
        if self.method not in dispatch.LABELS:
            return self.method
        found = dispatch.dispatch(self.method, hardware.gpu(self.gpu), problem, pin_marlin=self.dispatch == "pinned")
        if not found.kernel:
            raise UnsupportedError(f"{self}: no kernel for K={problem.K}, N={problem.N}: {found.reason}")
        return found.kernel
