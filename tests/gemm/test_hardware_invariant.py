"""The hardware-invariant GEMM: one recipe for every GPU and M; engines and device code give the recipe's bits."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qlab.backends.registry import Problem, kernel
from qlab.errors import UnsupportedError
from qlab.gemm import hardware_invariant
from qlab.hardware import GPUS, gpu
from qlab.inputs import one_hot_rows, random_activations, random_weight
from qlab.recipe import Chain, Fma, Recipe, nodes
from qlab.recipes import assemble, recipe, scheme_of
from qlab.recipes.hardware_invariant import slices
from qlab.replay import missing, replay
from qlab.replay.rows import at_rows
from qlab.weights import Int4Weight
from tests.gemm import emulated

NAME = "cuda.hardware_invariant"
H100 = gpu("h100")
F16, BF16 = torch.float16, torch.bfloat16
PROBLEM = Problem(3, 512, 64, 128, F16, False, False, zero_min=0, zero_max=15)
native_reason = missing("native")
needs_native = pytest.mark.skipif(bool(native_reason), reason=f"the native engine cannot run: {native_reason}")
# K, N, group (0: K), symmetric, act-order
FORMS = (
    (512, 64, 128, False, False),
    (32, 8, 0, True, False),
    (96, 72, 32, False, False),
    (416, 40, 32, True, True),
    (448, 136, 64, False, True),
    (2304, 64, 256, True, False),
    (4224, 24, 0, False, False),
    (1120, 16, 0, False, False),
)


def weight_of(form: tuple[int, int, int, bool, bool], dtype: torch.dtype, seed: int = 0) -> Int4Weight:
    k, n, group, symmetric, act_order = form
    return random_weight(k, n, group or k, dtype=dtype, symmetric=symmetric, act_order=act_order, seed=seed)


def recipe_for(weight: Int4Weight, m: int) -> Recipe:
    return recipe(NAME, Problem.of(weight, m), H100)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


# The recipe


@pytest.mark.parametrize("changed", [{}, {"dtype": BF16}, {"act_order": True}, {"M": 300}, {"K": 14336, "group_size": 14336}])
def test_one_recipe_for_every_gpu(changed: dict[str, int | bool]) -> None:
    p = replace(PROBLEM, **changed)  # type: ignore[arg-type]
    able = [g for g in GPUS if not kernel(NAME).refusal(p, g.capability)]
    assert {"a100", "h100", "h200", "b200"} <= {g.key for g in able}
    assert len({recipe(NAME, p, g).hash for g in able}) == 1


def test_m_and_group_do_not_show() -> None:
    trees = {m: recipe(NAME, replace(PROBLEM, M=m, group_size=g), H100).regions[0].tree for m in (1, 9, 300) for g in (32, 512)}
    assert len(set(trees.values())) == 1
    whole = recipe(NAME, replace(PROBLEM, M=300), H100)
    assert at_rows(whole, range(7, 8)).hash == recipe(NAME, replace(PROBLEM, M=1), H100).hash


@pytest.mark.parametrize(
    ("k", "count", "rows"), [(32, 1, 32), (128, 1, 128), (4096, 16, 256), (3584, 14, 256), (18944, 15, 1280)]
)
def test_slices(k: int, count: int, rows: int) -> None:
    found = slices(k)
    assert (len(found), found[0], found[-1][1]) == (count, (0, rows), k)
    assert all(a[1] == b[0] for a, b in pairwise(found))


def test_lanes_of_a_slice() -> None:
    (region,) = recipe(NAME, replace(PROBLEM, K=4096), H100).regions
    chains = [n for n in nodes(region.tree) if isinstance(n, Chain)]
    assert {c.step for c in chains} == {Fma("fp32")}
    walks = {str(c) for c in chains}
    assert len(chains) == len(walks) == 64
    assert {"chain[2:4 +8 x32]", "chain[262:264 +8 x32]"} <= walks


def test_lanes_need_a_unit_that_multiplies_alone() -> None:
    s = replace(scheme_of("vllm.marlin.awq", replace(PROBLEM, zero_min=1), H100), lanes=4)
    with pytest.raises(Exception, match="lanes that each sum k of their own multiply by fma, and here tensor core multiplies"):
        assemble(s, PROBLEM)


# The engines


def nearest_fp32(exact: Fraction) -> Fraction:
    """Round to nearest, even on a tie; subnormals included, no overflow."""
    if exact == 0:
        return exact
    top = abs(exact).numerator.bit_length() - exact.denominator.bit_length()
    top -= abs(exact) < Fraction(2) ** top
    unit = Fraction(2) ** (max(top, -126) - 23)
    return round(exact / unit) * unit


def by_fractions(x: Tensor, weight: Int4Weight) -> Tensor:
    """The order written out: lanes of pairs, slices of 128-row blocks; exact numbers rounded one operation at a time."""
    w = weight.dequantize(weight.dtype).double()
    rows = torch.argsort(weight.group_index, stable=True).tolist()
    per_slice = -(-len(rows) // 2048) * 128
    y = torch.zeros(x.shape[0], weight.N, dtype=torch.float64)
    for m in range(x.shape[0]):
        for n in range(weight.N):
            total = Fraction(0)
            for start in range(0, len(rows), per_slice):
                lane = [Fraction(0)] * 4
                for k in range(start, min(start + per_slice, len(rows))):
                    product = Fraction(float(x[m, rows[k]])) * Fraction(float(w[rows[k], n]))
                    lane[k % 8 // 2] = nearest_fp32(lane[k % 8 // 2] + product)
                part = nearest_fp32(nearest_fp32(lane[0] + lane[1]) + nearest_fp32(lane[2] + lane[3]))
                total = part if start == 0 else nearest_fp32(total + part)
            y[m, n] = float(total)
    return y.to(torch.float32).to(x.dtype)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=("fp16", "bf16"))
@pytest.mark.parametrize("form", [(2176, 8, 32, False, True), (416, 8, 0, True, False)], ids=str)
def test_engines_against_fractions(form: tuple[int, int, int, bool, bool], dtype: torch.dtype) -> None:
    weight, x = weight_of(form, dtype), random_activations(2, form[0], dtype=dtype)
    x[1] *= torch.logspace(-3, 3, form[0]).to(dtype)
    want = by_fractions(x, weight)
    for engine in ("reference", "native"):
        if not missing(engine):
            assert same_bits(replay(recipe_for(weight, 2), x, weight, engine=engine), want)


@needs_native
@pytest.mark.parametrize("dtype", [F16, BF16], ids=("fp16", "bf16"))
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_native_is_the_reference(form: tuple[int, int, int, bool, bool], dtype: torch.dtype) -> None:
    weight, x = weight_of(form, dtype), random_activations(3, form[0], dtype=dtype)
    r = recipe_for(weight, 3)
    assert same_bits(replay(r, x, weight, engine="native"), replay(r, x, weight, engine="reference"))


@needs_native
def test_a_one_hot_row_gives_the_weight() -> None:
    weight = weight_of((416, 40, 32, False, True), F16)
    x = one_hot_rows(0, 416, 416)
    assert same_bits(replay(recipe_for(weight, 416), x, weight, engine="native"), kernel(NAME).decoded(weight))


# The device code on the CPU


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated.build(tmp_path_factory.mktemp("emulated"))


def numbers(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of many magnitudes, one of them with zeros of both signs; rows lie further apart than they are long."""
    x = random_activations(m, k + 8, dtype=dtype, seed=m)
    x *= torch.logspace(-2, 2, m)[:, None].to(dtype)
    x[-1, ::3] = -0.0
    return x[:, :k]


@needs_native
@pytest.mark.parametrize("dtype", [F16, BF16], ids=("fp16", "bf16"))
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_device_code_gives_the_recipes_bits(
    library: ctypes.CDLL, form: tuple[int, int, int, bool, bool], dtype: torch.dtype
) -> None:
    weight = weight_of(form, dtype)
    packed = kernel(NAME).pack(weight)
    for at, tile in enumerate(emulated.TILES):
        m = (1, tile[0], tile[0] + 1)[at % 3]
        x = numbers(m, form[0], dtype)
        assert same_bits(emulated.run(library, tile, x, packed), replay(recipe_for(weight, m), x, weight, engine="native")), (
            tile
        )


@needs_native
def test_other_rows_do_not_show(library: ctypes.CDLL) -> None:
    weight = weight_of(FORMS[0], F16)
    packed, x = kernel(NAME).pack(weight), numbers(16, 512, F16).clone()
    alone = emulated.run(library, (1, 16), x[5:6], packed)
    x[:5], x[6:] = float("nan"), float("inf")
    assert same_bits(emulated.run(library, (16, 64), x, packed)[5:6], alone)


MULTIPLY = "__fmaf_rn(four[j], w[i / 2][i % 2 * 4 + j], sum[r][i])"
FAULTS = {
    "lanes joined (c0 + c2) + (c1 + c3)": [
        ("exchange<half>(s, c & 1, 1)", "exchange<half>(s, c & 2, 2)"),
        ("exchange<quarter>(s, c & 2, 2)", "exchange<quarter>(s, c & 1, 1)"),
        ("(c & 1) * half + (c >> 1) * quarter", "(c >> 1) * half + (c & 1) * quarter"),
    ],
    "slices descending": [
        ("parts[i]", "parts[(o.slices - 1) * T::rows * T::columns + i]"),
        ("parts[s *", "parts[(o.slices - 1 - s) *"),
    ],
    "k of eight descending": [(MULTIPLY, "__fmaf_rn(four[3 - j], w[i / 2][i % 2 * 4 + 3 - j], sum[r][i])")],
    "a product rounded to fp16": [(MULTIPLY, "sum[r][i] + static_cast<_Float16>(four[j] * w[i / 2][i % 2 * 4 + j])")],
    "scales of the first rows": [("here ? next >> o.scale_shift : 0", "0")],
    "x a block late": [("fetch_x(chunk + T::x_chunks)", "fetch_x(chunk)")],
    "zero points of the first columns": [
        ("columns[t][1].set_zero(next_zeros[t] >> 8)", "columns[t][1].set_zero(next_zeros[t] & 0xFF)")
    ],
}


@needs_native
@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_planted_faults_show(fault: str, tmp_path: Path) -> None:
    """On sums that cancel, so that what is left is rounding: the second half of K is the first one with the other sign."""
    source = (emulated.CSRC / "hardware_invariant.cuh").read_text()
    for right, wrong in FAULTS.get(fault, ()):
        assert source.count(right) == 1
        source = source.replace(right, wrong)
    (tmp_path / "hardware_invariant.cuh").write_text(source)
    library = emulated.build(tmp_path, tmp_path, "-DQLAB_ONE_TILE")
    half = random_weight(2176, 64, 32)
    codes, zeros, scales = (torch.cat([t, t]) for t in (half.codes, half.zeros, half.scales))
    weight = Int4Weight(codes, zeros, scales, torch.cat([half.group_index, half.group_index + half.groups]))
    x = numbers(3, 2176, F16)
    x = torch.cat([x, -x], 1)
    y = emulated.run(library, (4, 16), x, kernel(NAME).pack(weight))
    assert same_bits(y, replay(recipe_for(weight, 3), x, weight, engine="native")) == (not fault)


# The launcher


def test_tiles_for_few_and_many_rows() -> None:
    among = emulated.TILES
    chosen = {m: among[hardware_invariant.choose(m, 4096, 132, among)] for m in (1, 2, 16, 64, 4096)}
    assert [chosen[m][0] for m in (1, 2, 16, 64, 4096)] == [1, 2, 8, 16, 16]
    assert chosen[4096] == (16, 64)


def test_a_missing_kernel_is_a_reason() -> None:
    if not hardware_invariant.reason():
        pytest.skip("the kernel is here")
    weight = weight_of(FORMS[0], F16)
    with pytest.raises(UnsupportedError, match=r"cuda\.hardware_invariant cannot run: "):
        kernel(NAME).run(random_activations(1, 512), kernel(NAME).pack(weight))
    assert kernel(NAME).supports(PROBLEM, torch.device("cpu")).reason.startswith("needs a CUDA GPU")


@pytest.mark.gpu
@needs_native
@pytest.mark.parametrize("dtype", [F16, BF16], ids=("fp16", "bf16"))
@pytest.mark.parametrize("form", [*FORMS, (4096, 4096, 128, False, False)], ids=str)
def test_gpu_gives_the_bits_of_the_cpu(form: tuple[int, int, int, bool, bool], dtype: torch.dtype) -> None:
    if why := hardware_invariant.reason():
        pytest.skip(why)
    weight = weight_of(form, dtype)
    packed = kernel(NAME).pack(weight.to("cuda"))
    for m in (1, 2, 3, 5, 8, 16, 33, 100):
        x = numbers(m, form[0], dtype)
        want = replay(recipe_for(weight, m), x, weight, engine="native")
        for tile in range(len(hardware_invariant.tiles())):
            y = hardware_invariant.run(x.cuda(), packed.tensors, packed.problem, tile=tile).cpu()
            assert int((y.view(torch.int16) != want.view(torch.int16)).sum()) == 0, (m, hardware_invariant.tiles()[tile])


def test_nearest_fp32() -> None:
    assert nearest_fp32(Fraction(2**24 + 1)) == 2**24
    assert nearest_fp32(Fraction(2**24 + 3)) == 2**24 + 4
    assert nearest_fp32(Fraction(1, 3)) == Fraction(float(np.float32(1 / 3)))
    assert nearest_fp32(Fraction(3, 2**150)) == Fraction(2, 2**149)
