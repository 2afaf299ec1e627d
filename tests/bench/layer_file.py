"""A file of the layers' benchmark with made-up speeds, for the tests of what reads it."""

from __future__ import annotations

from bench.layer_measure import _compared
from bench.layer_results import SCHEMA, Ceilings, Cell, Copies, Entry, Result, Run
from bench.model_layers import BLOCK, MODELS, Layer
from qlab.environment import Environment

CEILINGS = Ceilings(copy=4.3e12, read=4.4e12, matmul=790e12)
SHARES = {
    "cublas": 1.0,
    "vllm.marlin.gptq": 0.5,
    "vllm.marlin.awq": 0.45,
    "vllm.machete.gptq": 0.6,
    "vllm.machete.gptq.best": 0.625,
    "vllm.gptq_gemm": 0.3,
    "vllm.awq_gemm": 0.2,
    "cuda.split": 0.85,
    "triton.w4a16": 0.75,
}
"""Share of its own roofline that each kernel has on every layer; cuBLAS reads 16 bits."""


def environment() -> Environment:
    texts = dict.fromkeys(("qlab", "python", "platform", "cpu", "cuda", "details"), "")
    return Environment(**texts, torch="2.11", triton="3.6", gpu="NVIDIA H200", sms=132, driver="580", clocks={}, packages={})


def seconds(k: int, n: int, m: int, kernel: str) -> float:
    weight = 2 * k * n if kernel == "cublas" else k * n * (0.5 + 2 / 128)
    return max((weight + 2 * m * (k + n)) / CEILINGS.copy, 2 * m * k * n / CEILINGS.matmul) / SHARES[kernel]


def cell(layer: Layer, m: int, kernels: tuple[str, ...] = tuple(SHARES), run: int = 0) -> Cell:
    entries = [Entry("humming", "float16", "not compiled or tuned within 90 s")]
    for name in kernels:
        t = seconds(layer.K, layer.N, m, name)
        moved = int(layer.K * layer.N * (0.5 + 2 / 128)) + 2 * m * (layer.K + layer.N)
        flops = 2 * m * layer.K * layer.N
        entries.append(
            Entry(
                *(name, "float16", "", 3e-4, 1e-3, 2e-3, "", "CUDA graph", 5, 30, 20, t, 0.99 * t, 1.02 * t, moved),
                of_memory=moved / t / CEILINGS.copy,
                of_compute=flops / t / CEILINGS.matmul,
            )
        )
    return Cell(layer.model, layer.name, m, layer.K, layer.N, run, {}, {}, tuple(_compared(entries, "cublas")))


def block(model: str, m: int) -> Cell:
    parts = [cell(x, m) for x in MODELS[model]]
    entries = []
    for name in SHARES:
        t = sum(c.median(name) or 0.0 for c in parts)
        entries.append(Entry(name, "float16", "", 3e-4, 1e-3, 2e-3, "", "CUDA graph", 2, 40, 20, t, t, t, 1))
    return Cell(model, BLOCK, m, 0, 0, 0, {}, {}, tuple(_compared(entries, "cublas")))


def result(rows: tuple[int, ...] = (1, 16, 64, 256, 1024, 4096)) -> Result:
    copies = Copies("cuda.split", "llama-3-8b.o", 8_650_752, (1, 2))
    run = Run({}, environment(), "cuda", 60_000_000, CEILINGS, {}, (copies,), ("llama-70b.o M=2: no time left",), 12.0)
    cells = [cell(x, m) for model in MODELS.values() for x in model for m in rows]
    cells += [block(model, m) for model in MODELS for m in rows]
    return Result(SCHEMA, "float16", 128, True, (run,), tuple(cells))
