"""Which kernel vLLM 0.20.2 really runs for a label, on a given GPU and problem.

A label is what ``quantization=`` says (or what vLLM chooses for a checkpoint). It is no kernel's name: on Hopper
``awq_marlin`` and ``gptq_marlin`` are Machete, layers that Marlin cannot hold fall back, and for many tokens ``awq`` and
``gptq`` write the weight to memory and leave the sum to cuBLAS. Read from vLLM's awq.py, awq_marlin.py, gptq.py,
gptq_marlin.py and choose_mp_linear_kernel, with its defaults: no batch invariance, no atomics, no Triton AWQ, no optional
packages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlab.backends import vllm_machete, vllm_marlin
from qlab.backends.registry import Problem, kernel
from qlab.backends.vllm_kernel import VllmKernel
from qlab.errors import QlabError
from qlab.hardware import Gpu

KERNELS = {
    "awq": ("vllm.awq_gemm", "vllm.awq_dequantize"),
    "awq_marlin": ("vllm.marlin.awq", "vllm.machete.awq"),
    "gptq": ("vllm.gptq_gemm",),
    "gptq_marlin": ("vllm.marlin.gptq", "vllm.machete.gptq"),
}
"""vLLM's labels, each with the kernels that it can run."""
LABELS = tuple(KERNELS)
AWQ_DEQUANTIZE_TOKENS = 256
"""From so many tokens on, ``awq`` dequantises and calls cuBLAS."""
EXLLAMA_TOKENS = 50
"""Up to so many tokens ``gptq_gemm`` runs its own kernel."""


@dataclass(frozen=True)
class Dispatch:
    """What a label runs."""

    label: str
    kernel: str
    """Registry name; empty where vLLM refuses to run."""
    reason: str
    """One sentence: the rule that chose it, or why vLLM refuses."""
    opaque: bool = False
    """True where cuBLAS does the sum, so that its order is not known."""


def dispatch(label: str, gpu: Gpu, problem: Problem, *, pin_marlin: bool = False) -> Dispatch:
    """The kernel that vLLM runs under ``label`` for ``problem`` (its M counts the tokens of one call) on ``gpu``.

    ``pin_marlin`` keeps Hopper on Marlin, as VLLM_DISABLED_KERNELS=MacheteLinearKernel does. Raises QlabError for an unknown
    label.
    """
    if label not in LABELS:
        raise QlabError(f"unknown label {label!r}; vLLM's INT4 labels are {', '.join(LABELS)}")
    found = _dispatch(label, gpu, problem, pin_marlin)
    chosen = kernel(found.kernel) if found.kernel else None
    refusal = chosen.refusal(problem, gpu.capability) if isinstance(chosen, VllmKernel) else ""
    return Dispatch(label, "", f"vLLM takes {found.kernel.removeprefix('vllm.')}, which fails: {refusal}") if refusal else found


def _dispatch(label: str, gpu: Gpu, problem: Problem, pin_marlin: bool) -> Dispatch:
    if problem.dtype == torch.bfloat16 and gpu.capability < (8, 0):
        return Dispatch(label, "", f"vLLM runs bf16 from compute capability 8.0 on; {gpu.name} has {_dotted(gpu)}")
    if label.startswith("awq"):
        if problem.act_order:
            return Dispatch(label, "", "AWQ has no group index; an act-order weight is a GPTQ checkpoint")
        return _awq(label, gpu, problem) if label == "awq" else _awq_marlin(label, gpu, problem, pin_marlin)
    return _gptq(label, problem) if label == "gptq" else _gptq_marlin(label, gpu, problem, pin_marlin)


def _awq(label: str, gpu: Gpu, problem: Problem, why: str = "") -> Dispatch:
    if gpu.capability < (7, 5):
        return Dispatch(label, "", f"vLLM's AWQ needs compute capability 7.5; {gpu.name} has {_dotted(gpu)}")
    if problem.dtype != torch.float16:
        return Dispatch(label, "", f"{why}vLLM's awq takes fp16 only")
    if problem.M >= AWQ_DEQUANTIZE_TOKENS:
        rule = f"{problem.M} tokens, {AWQ_DEQUANTIZE_TOKENS} or more: awq_dequantize, then cuBLAS"
        return Dispatch(label, "vllm.awq_dequantize", why + rule, opaque=True)
    return Dispatch(label, "vllm.awq_gemm", f"{why}{problem.M} tokens, fewer than {AWQ_DEQUANTIZE_TOKENS}: awq_gemm")


def _gptq(label: str, problem: Problem, why: str = "") -> Dispatch:
    if problem.dtype != torch.float16:
        return Dispatch(label, "", f"{why}vLLM's gptq takes fp16 only")
    if problem.M > EXLLAMA_TOKENS:
        rule = f"{problem.M} tokens, more than {EXLLAMA_TOKENS}: gptq_gemm writes the weight and calls cublasHgemm"
        return Dispatch(label, "vllm.gptq_gemm", why + rule, opaque=True)
    return Dispatch(label, "vllm.gptq_gemm", f"{why}{problem.M} tokens, up to {EXLLAMA_TOKENS}: ExLlama")


def _awq_marlin(label: str, gpu: Gpu, problem: Problem, pin_marlin: bool) -> Dispatch:
    if gpu.capability < (7, 5):
        return Dispatch(label, "", f"vLLM's awq_marlin needs compute capability 7.5; {gpu.name} has {_dotted(gpu)}")
    refusal = vllm_marlin.shape_refusal(problem)
    if problem.group_size not in (*vllm_marlin.GROUP_SIZES, problem.K):  # AWQMarlinConfig's own check, before any layer
        return _awq(label, gpu, problem, f"{refusal}; vLLM refuses the label by name and, left to choose, takes awq: ")
    if refusal:  # asked of Marlin before Machete is thought of
        return _awq(label, gpu, problem, f"{refusal}, so vLLM falls back to awq: ")
    return _marlin_or_machete(label, "awq", gpu, problem, pin_marlin)


def _gptq_marlin(label: str, gpu: Gpu, problem: Problem, pin_marlin: bool) -> Dispatch:
    if gpu.capability < (7, 5):
        return _gptq(
            label, problem, f"Marlin needs compute capability 7.5, {gpu.name} has {_dotted(gpu)}, so vLLM takes gptq: "
        )
    if not problem.symmetric:
        return _gptq(label, problem, "gptq_marlin has no asymmetric type, so vLLM takes gptq: ")
    if problem.group_size not in (*vllm_marlin.GROUP_SIZES, problem.K):
        return _gptq(label, problem, f"{vllm_marlin.shape_refusal(problem)}, so vLLM takes gptq: ")
    found = _marlin_or_machete(label, "gptq", gpu, problem, pin_marlin)
    if found.kernel:
        return found
    whole_column = problem.group_size == problem.K and problem.K not in vllm_marlin.GROUP_SIZES
    if whole_column:  # the checkpoint says group size -1, which vLLM's ExllamaLinearKernel refuses
        return Dispatch(label, "", f"{found.reason}, and vLLM's ExLlama takes no whole-column scales")
    return _gptq(label, problem, f"{found.reason}, so vLLM takes ExLlama: ")


def _marlin_or_machete(label: str, source: str, gpu: Gpu, problem: Problem, pin_marlin: bool) -> Dispatch:
    """vLLM's list of kernels: Machete on Hopper alone, then Marlin; no kernel when neither holds the shape."""
    if gpu.capability != (9, 0):
        why = f"Machete runs on Hopper only and {gpu.name} is compute capability {_dotted(gpu)}"
    elif pin_marlin:
        why = "Machete is disabled"
    else:
        why = vllm_machete.shape_refusal(problem)
        if not why:
            return Dispatch(label, f"vllm.machete.{source}", "on Hopper vLLM prefers Machete to Marlin")
    refusal = vllm_marlin.shape_refusal(problem)
    if refusal:
        return Dispatch(label, "", refusal)
    note = "; on Turing fp16 Marlin accumulates in fp16" if gpu.capability < (8, 0) else ""
    return Dispatch(label, f"vllm.marlin.{source}", f"{why}: Marlin{note}")


def _dotted(gpu: Gpu) -> str:
    return f"{gpu.capability[0]}.{gpu.capability[1]}"
