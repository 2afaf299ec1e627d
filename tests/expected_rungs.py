"""What each of vLLM's kernels makes of the ladder, rung by rung, with the reason: what its arithmetic says and GPUs showed.

A rung that a peer fails is a fact about the peer, and one that it passes unexpectedly is news: both must agree with this
table. Where the outcome depends on shape or dtype the entry is a function of them; those hold for :data:`CASES`, shapes that
every peer takes and so small that Marlin spreads each tile over one block per 128 rows of K (on 128 or more SMs).

``random_inputs`` allows twice the error of ``torch.matmul``. In units of the latter's one rounding to 16 bits, n roundings of
partial sums that grow evenly add up to about sqrt(n / 2 + 1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.backends.registry import Kernel, Problem, Support
from qlab.weights import Int4Weight
from tests.ladder import RUNGS, Case, Result, Wrapped

CASES = (
    Case(16, 256, 256, 128),
    Case(8, 2048, 128, 64),
    Case(64, 1024, 1024, 1024),
    Case(33, 256, 384, 64, act_order=True),
)
"""Few terms, many terms, whole column at M > 50, act-order."""


@dataclass(frozen=True)
class Expected:
    """``status`` as in :class:`tests.ladder.Result`, and why."""

    status: str
    reason: str


_RAISED = re.compile(r"\w+: ")
"""How :func:`tests.ladder.climb` begins the detail of a rung that raised; those of wrong numbers begin otherwise."""

Entry = Expected | Callable[[Case, torch.dtype], Expected]

FP16_ONLY = ("vllm.awq_gemm", "vllm.awq_dequantize", "vllm.awq_triton", "vllm.gptq_gemm")
GPTQ = ("vllm.gptq_gemm", "vllm.marlin.gptq", "vllm.marlin.gptq.fp16", "vllm.marlin.gptq.atomic", "vllm.machete.gptq")
"""Kernels with a group index; AWQ's storage has none."""
EXACT_SUMS = ("exact", "poisoned", "ragged_rows", "strided_rows")
"""Rungs that compare with float64 bit for bit: a kernel that rounds a partial sum to 16 bits fails them all."""

CUBLAS_ROWS = 50
"""Above so many rows ``gptq_gemm`` writes the weight to memory and calls cublasHgemm."""
BLOCK_ROWS = 128
"""Rows of K of one thread block, of ``gptq_gemm`` and, on these cases, of Marlin."""


class StoredMinusOne(Wrapped):
    """``gptq_gemm`` on GPTQ v1, zero points 1 to 16: no storage of one weight holds both 0 and 16."""

    def __init__(self, inner: Kernel) -> None:
        super().__init__(inner, inner.name)

    def supports(self, problem: Problem, device: torch.device) -> Support:
        if problem.zero_min < 1:
            return Support(False, "GPTQ v1 cannot hold zero point 0")
        return self.inner.supports(problem, device)

    def decoded(self, weight: Int4Weight) -> Tensor:
        return self.inner.decoded(weight)


def climber(kernel: Kernel) -> Kernel:
    """The kernel as it climbs: itself, or in the storage that holds the ladder's weights."""
    return StoredMinusOne(kernel) if kernel.name == "vllm.gptq_gemm" else kernel


def expected(kernel: str, rung: str, case: Case, dtype: torch.dtype) -> Expected:
    """The outcome of one rung. Raises KeyError for a kernel or rung that the table lacks."""
    entry = EXPECTED[kernel, rung]
    if dtype != torch.float16 and kernel in FP16_ONLY:
        return Expected("refused", "takes fp16 only")
    if case.act_order and kernel not in GPTQ:
        return Expected("refused", "AWQ's storage has no group index")
    return entry if isinstance(entry, Expected) else entry(case, dtype)


def disagreements(results: Iterable[Result], case: Case, dtype: torch.dtype) -> list[str]:
    """One sentence for each result of this case and dtype that the table does not expect.

    An expected failure is a wrong number; a kernel that raised instead is not what the table means.
    """
    out = []
    for r in results:
        want = expected(r.kernel, r.rung, case, dtype)
        if r.status != want.status or (r.status == "failed" and _RAISED.match(r.detail)):
            found = f"{r.status} ({r.detail})" if r.detail else r.status
            out.append(f"{r.kernel} {r.rung} {case} {r.dtype}: {found}, expected {want.status}: {want.reason}")
    return out


def _table(kernel: str, sums: Entry, random: Entry, repeats: Entry) -> dict[tuple[str, str], Entry]:
    """The rungs of one kernel: storage and checks of x are right in all, sums, error and repetition are given."""
    given = {"random_inputs": random, "repeats": repeats, **dict.fromkeys(EXACT_SUMS, sums)}
    given["one_hot"] = Expected("passed", "one product and zeros: no sum to round but the last")
    given["refuses"] = Expected("passed", "the adapter checks x before the operator sees it")
    return {(kernel, rung.__name__): given[rung.__name__] for rung in RUNGS}


def _passed(reason: str) -> Expected:
    return Expected("passed", reason)


def _failed(reason: str) -> Expected:
    return Expected("failed", reason)


def _chains_of_fp16(case: Case, dtype: torch.dtype) -> Expected:
    if case.m > CUBLAS_ROWS:
        return _failed("cublasHgemm accumulates in fp16")
    return _failed("fp16 chains of four products, and every 128 rows a partial sum rounded to fp16")


def _awq_marlin_sums(case: Case, dtype: torch.dtype) -> Expected:
    if case.group == case.k and case.k >= 1024 and dtype == torch.float16:
        return _failed("whole column: the sum is rounded to fp16 before it is scaled, and some sums here exceed 65504")
    return _FP32


def _exllama_order(case: Case, dtype: torch.dtype) -> Expected:
    if case.m > CUBLAS_ROWS:
        return _passed("above 50 rows cublasHgemm, which repeats")
    if case.k <= 2 * BLOCK_ROWS:
        return _passed("K <= 256: at most two blocks add to one output, and a + b = b + a")
    return _failed("K > 256: three or more blocks add by fp16 atomics, in no fixed order")


def _atomic_order(case: Case, dtype: torch.dtype) -> Expected:
    if case.k <= 2 * BLOCK_ROWS:
        return _passed("K <= 256: at most two blocks add to one output, and a + b = b + a")
    return _failed("K > 256: three or more blocks add by atomics, in no fixed order")


def _sixteen_bit_joins(case: Case, dtype: torch.dtype) -> Expected:
    blocks = case.k // BLOCK_ROWS
    if blocks <= 4:
        return _passed(f"{blocks} blocks share a tile: too few roundings to double the error")
    return _failed(f"{blocks} blocks share a tile, each joined with a rounding to 16 bits")


def _half_accumulator(case: Case, dtype: torch.dtype) -> Expected:
    steps = case.k // 128
    if steps <= 2:
        return _passed("K <= 256: one chunk of 32 rows a slice, two roundings of a small sum")
    return _failed(f"fp16 accumulator, rounded {steps} times a slice")


_FIXED = _passed("a fixed order of summation")
_FP32 = _passed("partial sums stay in fp32, joined in fp32")
_NEAR = _passed("fp32 sums; at most the weight and the column's scale are rounded once more")

EXPECTED: dict[tuple[str, str], Entry] = {
    **_table(
        "vllm.awq_gemm",
        _failed("eight partial sums are rounded to fp16 before they are added"),
        _passed("eight roundings of partial sums cost 1.4 times the error"),
        _FIXED,
    ),
    **_table("vllm.awq_dequantize", _passed("cuBLAS adds in fp32"), _passed("it is torch.matmul"), _passed("cuBLAS repeats")),
    **_table("vllm.awq_triton", _failed("the accumulator is fp16"), _half_accumulator, _FIXED),
    **_table(
        "vllm.gptq_gemm",
        _chains_of_fp16,
        _failed("2.3 times the error and more: fp16 chains of four, or cublasHgemm's fp16 accumulator"),
        _exllama_order,
    ),
}
for _kind in ("awq", "gptq"):
    _rounded = _failed("blocks that share a tile hand on partial sums rounded to 16 bits")
    EXPECTED |= _table(f"vllm.marlin.{_kind}", _awq_marlin_sums if _kind == "awq" else _FP32, _NEAR, _FIXED)
    EXPECTED |= _table(f"vllm.marlin.{_kind}.fp16", _rounded, _sixteen_bit_joins, _FIXED)
    EXPECTED |= _table(f"vllm.marlin.{_kind}.atomic", _rounded, _sixteen_bit_joins, _atomic_order)
    EXPECTED |= _table(f"vllm.machete.{_kind}", _FP32, _NEAR, _FIXED)
