"""One row of an M-row problem: the bits of the whole problem's row, for every kernel, and what atomics cannot give."""

from __future__ import annotations

import pytest
import torch

from qlab.backends.registry import Problem
from qlab.errors import QlabError
from qlab.hardware import gpu
from qlab.inputs import random_activations, random_weight
from qlab.recipe import Recipe, TensorCore, Tile, chain
from qlab.recipes import recipe
from qlab.replay import Decoded, prepare, replay
from qlab.replay.rows import at_rows, outside

F16, BF16 = torch.float16, torch.bfloat16
ROWS = {1: [0], 9: [0, 8, 3], 70: [0, 63, 64, 69, 7], 130: [129, 0, 127, 128, 64]}


def problem(kernel: str, m: int, dtype: torch.dtype, hw: str, group: int = 128, n: int = 256, k: int = 512):
    weight = random_weight(k, n, group, dtype=dtype, symmetric="gptq" in kernel, seed=3)
    return weight, recipe(kernel, Problem.of(weight, m), gpu(hw))


CASES = [
    ("vllm.marlin.awq", F16, 128),
    ("vllm.marlin.awq", BF16, 128),
    ("vllm.marlin.gptq", F16, -1),
    ("vllm.marlin.gptq.fp16", BF16, 128),
    ("vllm.machete.awq", F16, 128),
    ("vllm.machete.gptq", BF16, 128),
    ("vllm.awq_gemm", F16, 128),
    ("vllm.awq_triton", F16, 128),
    ("triton.awq_gemm", BF16, 128),
    ("triton.gptq_gemm.splitk", F16, 128),
]


@pytest.mark.parametrize(("kernel", "dtype", "group"), CASES)
@pytest.mark.parametrize("m", ROWS)
def test_rows_have_the_bits_of_the_whole_problem(kernel: str, dtype: torch.dtype, group: int, m: int) -> None:
    for hw in ("h100",) if "machete" in kernel else ("a100", "h100"):
        weight, made = problem(kernel, m, dtype, hw, group)
        x = random_activations(m, weight.K, dtype=dtype, seed=m)
        whole, decoded = replay(made, x, weight), Decoded(made, weight)
        assert torch.equal(prepare(at_rows(made, ROWS[m]), decoded).run(x[ROWS[m]]), whole[ROWS[m]])
        for r in ROWS[m][:2]:
            alone = at_rows(made, [r])
            assert (alone.M, alone.K, alone.N) == (1, weight.K, weight.N)
            assert torch.equal(prepare(alone, decoded).run(x[r : r + 1])[0], whole[r])


def test_a_bias_and_its_place() -> None:
    """Marlin fuses a bias in all but some rows and columns, so that the place decides a row's bits."""
    weight = random_weight(512, 256, -1, symmetric=True, seed=1)
    from dataclasses import replace

    made = recipe("vllm.marlin.gptq", replace(Problem.of(weight, 40), bias=True), gpu("h100"))
    x, bias = random_activations(40, 512, seed=2), random_activations(1, 256, seed=3)[0]
    whole = replay(made, x, weight, bias)
    rows = [0, 7, 8, 31, 39]
    assert torch.equal(replay(at_rows(made, rows), x[rows], weight, bias), whole[rows])
    assert at_rows(made, [7]).hash != at_rows(made, [8]).hash
    assert not torch.equal(replay(at_rows(made, [7] * 40), x, weight, bias), replay(at_rows(made, [8] * 40), x, weight, bias))


def test_the_wrong_place_shows_where_the_trees_differ() -> None:
    """Rows 0 to 63 of 70 are one launch of Marlin, the rest another, with other tiles."""
    weight, made = problem("vllm.marlin.awq", 70, F16, "a100", n=4096, k=1024)
    x = random_activations(8, weight.K, seed=5)
    assert at_rows(made, [3]).hash == at_rows(made, [63]).hash
    assert at_rows(made, [3]).hash != at_rows(made, [64]).hash
    decoded = Decoded(made, weight)
    first, second = (prepare(at_rows(made, [r] * 8), decoded).run(x) for r in (3, 64))
    assert not torch.equal(first, second)


def test_refusals() -> None:
    _, made = problem("vllm.awq_gemm", 9, F16, "a100")
    for rows, message in (([9], "row 9 is not among the 9 rows"), ([-1], "row -1"), ([], "no row")):
        with pytest.raises(QlabError, match=message):
            at_rows(made, rows)


def test_atomics_reach_what_every_order_gives() -> None:
    """ExLlama with 4 and 12 blocks, Marlin with atomics: no order is ever excluded; other kernels and one far bit are."""
    excluded = 0
    for kernel, k in (("vllm.gptq_gemm", 512), ("vllm.gptq_gemm", 1536), ("vllm.marlin.gptq.atomic", 4096)):
        weight, made = problem(kernel, 12, F16, "h100", n=64, k=k)
        assert not made.ordered
        x = random_activations(12, k, seed=k)
        part = at_rows(made, [0, 5, 11])
        rows = x[[0, 5, 11]]
        for seed in (100, 101):
            y = replay(made, x, weight, seed=seed)[[0, 5, 11]]
            assert outside(part, rows, weight, y) == {}
        moved = y.clone()
        moved[1, 7] += 1
        found = outside(part, rows, weight, moved)
        assert list(found) == [1]
        assert (found[1].row, found[1].column) == (1, 7)
        assert found[1].high < float(moved[1, 7])
        moved[1, 7] = -0.0
        assert list(outside(part, rows, weight, moved)) == [1]
        _, other = problem("vllm.marlin.gptq", 12, F16, "h100", n=64, k=k)
        excluded += len(outside(part, rows, weight, replay(other, x, weight)[[0, 5, 11]]))
    assert excluded >= 4


def test_two_blocks_have_one_order() -> None:
    """Sums of two parts are determined, and any other bit is outside."""
    weight, made = problem("vllm.gptq_gemm", 3, F16, "a100", k=256)
    assert made.ordered
    x = random_activations(3, 256, seed=1)
    y = replay(made, x, weight)
    assert outside(made, x, weight, y) == {}
    y.view(torch.int16)[2, 9] ^= 1
    assert list(outside(made, x, weight, y)) == [2]


def test_rows_of_a_made_up_recipe() -> None:
    """Trees that differ by row and column, so that a row or a column taken from elsewhere shows."""
    step = TensorCore(24, 8, -132)
    orders = [list(range(16)), [*range(8, 16), *range(8)]]
    trees = [chain(step, o) for o in orders]
    tiles = [Tile((i, i + 1), (j, j + 1), trees[(i + j) % 2]) for i in range(4) for j in range(4)]
    made = Recipe.of(4, 16, 4, "fp16", tiles)
    assert at_rows(made, [0, 1, 2, 3]) == made
    assert at_rows(made, [1, 0]) != at_rows(made, [0, 1])
    assert [r.columns for r in at_rows(made, [1]).regions] == [((0, 1), (2, 3)), ((1, 2), (3, 4))]
