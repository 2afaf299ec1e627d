"""Faults that users met, rebuilt from public reports: each is a kernel, and what its authors found in the end.

* vLLM pull request 26092: GPTQ v1 stores zero points minus one and v2 as they are; read as the other the model answers "!!!!".
* GPTQModel issue 2350: zero point 0 minus 1 wrapped around to 15 in four bits, and was read back as 16.
* auto-round issue 643: a group that straddles two tensor-parallel ranks; each rank's kernel counts groups from its own first
  row.
* vLLM issue 6258: tensor parallel 4 answered badly because partial sums were fp16.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench import planted_weights
from qlab.attribution.fault import Fault
from qlab.attribution.faults import name_faults
from qlab.attribution.planted import Case, judged
from qlab.backends.registry import Problem
from qlab.hardware import HOPPER, gpu
from qlab.inputs import random_weight
from qlab.recipe import Recipe, TensorCore, Tile, Type, chain, join, rounded
from qlab.recipes import recipe
from qlab.replay import prepare
from qlab.weights import Int4Weight

SEED = 26092
M = 8


def real_cases() -> tuple[Case, ...]:
    """Every real case, named."""
    torch.set_num_threads(1)
    return tuple(case() for case in _cases())


def _cases() -> Iterator[Callable[[], Case]]:
    yield lambda: _stored("vLLM PR 26092: GPTQ v1 zero points read as v2", planted_weights.v1_read_as_v2, 1)
    yield lambda: _stored("vLLM PR 26092: GPTQ v2 zero points read as v1", planted_weights.v2_read_as_v1, 0)
    yield lambda: _stored("GPTQModel#2350: zero point 0 minus 1 stored as 15", planted_weights.zero_minus_one_is_15, 0)
    yield lambda: _straddled("auto-round#643: a group straddles 2 tensor-parallel ranks", 640, 2)
    yield lambda: _straddled("auto-round#643: groups straddle 4 tensor-parallel ranks", 768, 4)
    yield lambda: _fp16_ranks("vllm#6258: 4 tensor-parallel ranks joined in fp16", 1024, 4)
    yield _fp16_blocks


def _named(name: str, kernel: Callable[[Tensor], Tensor], said: Recipe, w: Int4Weight, truth: Fault) -> Case:
    start = time.perf_counter()
    answer = name_faults(kernel, said, w, seed=SEED)
    return judged(name, (truth,), (truth,), answer, time.perf_counter() - start, SEED)


def _weight(k: int, n: int, lowest: int = 1) -> Int4Weight:
    w = random_weight(k, n, 128, seed=SEED)
    return replace(w, zeros=torch.where(w.zeros == 15, lowest, w.zeros).to(torch.uint8))


def _stored(name: str, plant: planted_weights.Plant, lowest: int) -> Case:
    """A Triton GPTQ kernel on tensors of another version."""
    w = _weight(512, 128, lowest)
    found = plant(w, torch.Generator().manual_seed(SEED))
    assert found is not None
    said = recipe("triton.gptq_gemm.v2" if lowest == 0 else "triton.gptq_gemm", Problem.of(w, M), gpu("h100"))
    return _named(name, prepare(said, found[0]).run, said, w, found[1])


def ranks_recipe(k: int, n: int, count: int, type: Type, rounding: Type) -> Recipe:
    """``count`` ranks, each with its rows of K in one chain, added from the first to the last."""
    share = k // count
    step = TensorCore.of(HOPPER)
    sums = [rounded(chain(step, range(r * share, (r + 1) * share)), rounding) for r in range(count)]
    return Recipe.of(M, k, n, "fp16", [Tile((0, M), (0, n), join(sums, type))])


def ranks_kernel(parts: list[Int4Weight]) -> Callable[[Tensor], Tensor]:
    """Each rank runs its own kernel on its rows; the fp16 outputs are added in fp16, as an all-reduce does it."""
    runs = [prepare(recipe("triton.gptq_gemm", Problem.of(w, M), gpu("h100")), w).run for w in parts]
    share = parts[0].K

    def kernel(x: Tensor) -> Tensor:
        total, *others = (run(x[:, r * share : (r + 1) * share].contiguous()) for r, run in enumerate(runs))
        for y in others:
            total = total + y
        return total

    return kernel


def _shard(w: Int4Weight, rank: int, share: int, counted: bool) -> Int4Weight:
    """A rank's rows with the parameters of their groups, or, ``counted``, of those it counts from its own first row."""
    size, first = 32, rank * share
    rows = range(first, first + share, size)
    of = [first // w.group_size + (row - first) // w.group_size if counted else row // w.group_size for row in rows]
    of = [min(g, w.groups - 1) for g in of]
    index = (torch.arange(share) // size).to(torch.int32)
    codes = w.codes[first : first + share].contiguous()
    return Int4Weight(codes, w.zeros[of].contiguous(), w.scales[of].contiguous(), index)


def _straddled(name: str, k: int, count: int) -> Case:
    w, share = _weight(k, 128), k // count
    truth = planted_weights.ranks(w, count)
    assert truth is not None
    said = ranks_recipe(k, 128, count, "fp16", "fp16")
    return _named(name, ranks_kernel([_shard(w, r, share, True) for r in range(count)]), said, w, truth[1])


def _fp16_ranks(name: str, k: int, count: int) -> Case:
    """The clean recipe keeps the ranks' sums in fp32."""
    w, share = _weight(k, 128), k // count
    said = ranks_recipe(k, 128, count, "fp32", "fp32")
    kernel = ranks_kernel([_shard(w, r, share, False) for r in range(count)])
    return _named(name, kernel, said, w, Fault("joins: pieces in fp16"))


def _fp16_blocks() -> Case:
    """Marlin without use_fp32_reduce: its blocks hand their sums on in fp16."""
    w = _weight(1024, 128)
    problem = Problem.of(w, M)
    said = recipe("vllm.marlin.awq", problem, gpu("a100"))
    kernel = prepare(recipe("vllm.marlin.awq.fp16", problem, gpu("a100")), w).run
    truth = Fault("partial sums: the running total rounded to fp16")
    return _named("vllm#6258: Marlin's blocks joined through fp16", kernel, said, w, truth)
