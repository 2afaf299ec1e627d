"""From what vLLM 0.20.2 reports of a linear layer to the registry's names. Nothing of vLLM is imported."""

from __future__ import annotations

from qlab.backends.dispatch import AWQ_DEQUANTIZE_TOKENS

FAMILY = {"AWQMarlinLinearMethod": "awq", "GPTQMarlinLinearMethod": "gptq"}
"""Linear methods that leave the choice of the kernel to vLLM's list of mixed-precision kernels."""
KERNELS = {"MarlinLinearKernel": "vllm.marlin.", "MacheteLinearKernel": "vllm.machete."}
"""Classes of that list, each the start of a registry name."""


def kernel_name(method: str, kernel: str, tokens: int) -> str:
    """Registry name of what runs ``tokens`` rows, for the class names of a layer's linear method and of its ``kernel``.

    Names as vLLM's defaults make them: no Triton AWQ, no atomics, no batch invariance. An unknown class keeps its own name.
    """
    if method == "AWQLinearMethod":
        return "vllm.awq_dequantize" if tokens >= AWQ_DEQUANTIZE_TOKENS else "vllm.awq_gemm"
    if method == "GPTQLinearMethod":
        return "vllm.gptq_gemm"
    if method in FAMILY:
        if kernel in KERNELS:
            return KERNELS[kernel] + FAMILY[method]
        if kernel == "ExllamaLinearKernel" and FAMILY[method] == "gptq":
            return "vllm.gptq_gemm"
        return kernel or method
    return method
