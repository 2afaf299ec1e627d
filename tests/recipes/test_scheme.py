"""Schemes: what a recipe is made of, that every kernel's sums are still the recorded ones, and hybrids of two kernels."""

from __future__ import annotations

import hashlib
import random
from dataclasses import fields, replace
from itertools import product

import numpy as np
import pytest
import torch

from qlab.backends.registry import Problem
from qlab.errors import QlabError, UnsupportedError
from qlab.hardware import gpu
from qlab.recipe import (
    Chain,
    Fma,
    HalfDot,
    Join,
    Node,
    Recipe,
    Round,
    Run,
    TensorCore,
    Unordered,
    chain,
    fold,
    join,
    nodes,
    rounded,
    unfold,
    unordered,
    zero,
)
from qlab.recipes import Scheme, assemble, builders, recipe, scheme_of
from qlab.recipes.awq_gemm import Interleaved
from qlab.recipes.machete import StreamK
from qlab.recipes.marlin import FusedBias, Stripes, WarpRows
from qlab.recipes.rules import CHUNK, Cut, OneChain, PlainBias, Ranges, dot_order, span
from qlab.recipes.scheme import Partial, misfit, piece_sum, torch_sum

A100, H100, T4 = gpu("a100"), gpu("h100"), gpu("t4")
F16, BF16 = torch.float16, torch.bfloat16
PROBLEM = Problem(M=16, K=1024, N=256, group_size=128, dtype=F16, symmetric=True, act_order=False)


def scheme(kernel: str, problem: Problem = PROBLEM, key: str = "h100") -> Scheme:
    return scheme_of(f"vllm.{kernel}", problem, gpu(key), check=False)


# Every kernel

SHAPES = ((1, 512, 1024), (17, 384, 64), (50, 1024, 512), (72, 544, 256), (200, 4096, 1024))
FORMS = (  # group size (0: K), dtype, symmetric, act-order, bias
    (128, F16, False, False, False),
    (32, F16, True, False, False),
    (64, BF16, True, False, False),
    (128, F16, True, True, False),
    (0, F16, True, False, False),
    (0, F16, True, False, True),
    (0, BF16, True, False, True),
)
RECORDED = {
    "triton.awq_dequantize": "d0533f2ca0846b65",
    "triton.awq_gemm": "fb5254cbc66c49dc",
    "triton.awq_gemm.splitk": "10363b5eccc5f591",
    "triton.gptq_gemm": "4c490d3d732f7c0c",
    "triton.gptq_gemm.splitk": "96f8355a0d5856f7",
    "triton.gptq_gemm.v2": "4c490d3d732f7c0c",
    "vllm.awq_dequantize": "0ee8369f9dec9697",
    "vllm.awq_gemm": "3a4bcec7e0c1f965",
    "vllm.awq_triton": "ad544680cd8311f3",
    "vllm.gptq_gemm": "140e830dbcb498a0",
    "vllm.machete.awq": "0f5e5fd0dca68798",
    "vllm.machete.gptq": "5ef546285abfbfb9",
    "vllm.marlin.awq": "b87c4880c3c0e566",
    "vllm.marlin.awq.atomic": "7c81aa484fd6d658",
    "vllm.marlin.awq.fp16": "ba2566c6dd2bdfb1",
    "vllm.marlin.gptq": "ae717134fd7fa4b1",
    "vllm.marlin.gptq.atomic": "6f76ba7fbb40bd29",
    "vllm.marlin.gptq.fp16": "3c063f94c99b3b8f",
}
"""sha256 over the hashes of the recipes of SHAPES x FORMS on three GPUs, from before recipes were assembled from schemes."""


@pytest.mark.parametrize("name", RECORDED)
def test_recipes_are_the_recorded_ones(name: str) -> None:
    lines = []
    for (m, k, n), (group, dtype, symmetric, act_order, bias), g in product(SHAPES, FORMS, (T4, A100, H100)):
        p = Problem(m, k, n, group or k, dtype, symmetric, act_order, bias=bias)
        try:
            lines.append(recipe(name, p, g).hash)
        except QlabError:
            lines.append("")
    assert any(lines)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == RECORDED[name]


def test_every_kernel_is_recorded() -> None:
    assert set(builders()) >= set(RECORDED)


def test_schemes_without_the_registrys_refusal() -> None:
    with pytest.raises(UnsupportedError, match="Machete needs a Hopper GPU"):
        scheme_of("vllm.machete.awq", PROBLEM, A100)
    here, there = scheme("machete.awq", key="a100"), scheme("machete.awq")
    assert replace(there, sms=108, fraction_bits=24, zero_exponents=(-132, -20), terms=8) == here
    with pytest.raises(UnsupportedError, match=r"reference\.float32 has no recipe; kernels that have one: cuda"):
        scheme_of("reference.float32", PROBLEM, H100, check=False)


def test_schemes_are_values() -> None:
    """Two kernels with one part of a kind have equal fields there, and a scheme can be a key."""
    one, other = scheme("marlin.gptq"), scheme("marlin.awq")
    assert one == other
    assert len({one, other, scheme("machete.gptq")}) == 2
    assert scheme("awq_gemm", key="a100") == replace(
        scheme("awq_gemm"), sms=108, fraction_bits=24, zero_exponents=(-132, -20), terms=8
    )
    differing = {f.name for f in fields(Scheme) if getattr(one, f.name) != getattr(scheme("machete.gptq"), f.name)}
    assert differing == {"cut", "warps", "order"}


# Cuts


def random_cut(rng: random.Random) -> tuple[Cut, int, int, int]:
    m, k, n = rng.choice([1, 16, 33, 300]), 128 * rng.randint(1, 40), 128 * rng.randint(1, 20)
    blocks = tuple((a, min(a + 128, k)) for a in range(0, k, 128))
    cuts = [Ranges.whole(m, k, n), Ranges(m, n, blocks), Interleaved(m, k, n), StreamK(m, k, n)]
    return rng.choice([*cuts, Stripes(m, k, n, rng.choice([0, 32, 128]))]), m, k, n


def test_cuts_cover_every_product_once() -> None:
    """Every output in one area, every k in one piece, pieces of whole chunks."""
    rng = random.Random(5)
    kinds = set()
    for _ in range(80):
        cut, m, k, n = random_cut(rng)
        kinds.add(type(cut))
        sms = rng.choice([40, 108, 114, 132])
        covered = np.zeros((m, n // 64), np.int8)
        seen = set()
        for area in cut.areas(sms):
            covered[slice(*area.rows), area.columns[0] // 64 : area.columns[1] // 64] += 1
            if area.pieces not in seen:
                seen.add(area.pieces)
                walks = [unfold(w) for w in area.pieces]
                assert np.array_equal(np.sort(np.concatenate(walks)), np.arange(k))
                assert all(len(w) % CHUNK == 0 for w in walks)
        assert (covered == 1).all()
        assert cut.uses_sms == (type(cut) in (StreamK, Stripes))
    assert len(kinds) == 4


def test_the_end_of_k_is_not_lost() -> None:
    for k in (40, 1000, 1048):
        walks = [unfold(w) for w in next(iter(Interleaved(1, k, 8).areas(0))).pieces]
        assert np.array_equal(np.sort(np.concatenate(walks)), np.arange(k))


def test_what_rules_are_called() -> None:
    assert scheme("awq_gemm").cut.text(132) == "8 interleaved slices"
    assert scheme("gptq_gemm").cut.text(132) == "8 blocks of 128"
    assert Ranges.whole(1, 8, 8).text(132) == "K in one piece"
    stripes = scheme("marlin.awq", replace(PROBLEM, M=1, K=4096, N=4096))
    assert [stripes.cut.text(sms) for sms in (108, 132)] == ["stripes over 108 SMs: 4 pieces", "stripes over 132 SMs: 2 pieces"]
    wide = scheme("marlin.awq", replace(PROBLEM, M=1, K=4096, N=28672))
    assert wide.cut.text(108) == "stripes over 108 SMs: 1 to 2 pieces"
    assert scheme("machete.awq").cut.text(132).startswith("stream-K over 132 SMs: ")
    assert (stripes.warps.text(132), OneChain().text(132)) == ("4 warp rows", "one accumulator")
    assert [str(scheme(x).partial) for x in ("awq_gemm", "marlin.awq.fp16", "marlin.awq")] == [
        "each piece rounded to fp16",
        "the running total rounded to fp16",
        "not rounded",
    ]


# Sums


def naive_deal(order: list[int], warps: int) -> list[list[int]]:
    dealt: list[list[int]] = [[] for _ in range(warps)]
    for position, k in enumerate(order):
        dealt[position // 32 % warps].append(k)
    return dealt


@pytest.mark.parametrize("length", [32, 96, 128, 160, 320, 336])
@pytest.mark.parametrize("warps", [1, 2, 4])
def test_positions_of_a_piece_are_dealt_to_warps(length: int, warps: int) -> None:
    """Not its k: a piece that another kernel cut is dealt in the order in which it is walked."""
    step = TensorCore.of(H100.step)
    order = np.random.default_rng(length).permutation(64)[:, None] * 16 + np.arange(16)
    walk = order.ravel()[:length]
    total: Node | None = None
    for mine in reversed(naive_deal(walk.tolist(), warps)):
        part = chain(step, mine)
        total = part if total is None else join([part, total])
    assert piece_sum(step, fold(walk), warps) == total


def test_a_piece_in_one_chain_is_in_normal_form() -> None:
    """Also where the walk is not: two stretches that touch, a stretch that ends inside a step, a permuted one."""
    for step in (TensorCore.of(H100.step), Fma(), HalfDot()):
        for walk in (span(32, 96), Interleaved(1, 1024, 8), fold([*range(8, 16), *range(8), *range(16, 32)])):
            walks = next(iter(walk.areas(0))).pieces if isinstance(walk, Cut) else (walk,)
            assert all(piece_sum(step, w) == chain(step, unfold(w)) for w in walks)
    odd = (*span(0, 8), *span(8, 32))
    assert piece_sum(Fma(), odd) == chain(Fma(), range(32))
    assert piece_sum(Fma(), (Run(0, 16, 2, 16),)) == chain(Fma(), range(32))
    tensor_core = TensorCore.of(H100.step)
    assert piece_sum(tensor_core, (Run(24, 8, 2, -24),)) == chain(tensor_core, [*range(8), *range(24, 32)])
    with pytest.raises(QlabError, match="a chain over 24 k does not divide into steps of 16"):
        piece_sum(tensor_core, span(0, 24))


def test_k_width_orders_every_dot_of_a_warp() -> None:
    step = Fma()
    for warps in (1, 2):
        dealt = naive_deal(list(range(256)), warps)
        parts = [chain(step, [m[i + j] for i in range(0, len(m), 32) for j in dot_order(32, 4)]) for m in dealt]
        assert piece_sum(step, span(0, 256), warps, 4) == join(parts[::-1])


def test_lanes_take_pairs_in_turn_and_join_pairwise() -> None:
    """Of each warp's k, and of an end of K that fills no eight."""
    step = Fma()
    for warps, length in ((1, 64), (2, 128), (1, 42)):
        sums = []
        for own in naive_deal(list(range(100, 100 + length)), warps):
            a, b, c, d = (chain(step, [k for i, k in enumerate(own) if i % 8 // 2 == lane]) for lane in range(4))
            sums.append(join([join([a, b]), join([c, d])]))
        assert piece_sum(step, span(100, 100 + length), warps, lanes=4) == join(sums[::-1])


def test_torch_sum_in_other_types() -> None:
    parts = [rounded(chain(Fma(), [k]), "fp16") for k in range(6)]
    lanes = [join([parts[i], parts[i + 4]], "fp16") if i < 2 else parts[i] for i in range(4)]
    assert torch_sum(parts, "fp16") == join([*lanes, rounded(zero(parts[0]), "fp16")], "fp16")
    wide = [chain(Fma(), [k]) for k in range(6)]
    handed = [rounded(join([rounded(wide[i], "fp16"), wide[i + 4]]) if i < 2 else wide[i], "fp16") for i in range(4)]
    total = handed[0]
    for lane in handed[1:]:
        total = join([rounded(total, "fp16"), lane])
    assert torch_sum(wide, "fp32", "fp16") == join([total, zero(wide[0])])


# Hybrids


def tree(r: Recipe) -> Node:
    (region,) = r.regions
    return region.tree


def test_awq_gemms_slices_joined_as_marlin_joins() -> None:
    """From the last slice to the first; dealt to four warp rows; the sums stay awq_gemm's otherwise."""
    awq, marlin = scheme("awq_gemm"), scheme("marlin.awq")
    slices = [np.concatenate([np.arange(c, c + 32) for c in range(32 * i, 1024, 256)]) for i in range(8)]
    step = TensorCore.of(H100.step)
    parts = [rounded(chain(step, s), "fp16") for s in slices]
    assert tree(assemble(replace(awq, order=marlin.order), PROBLEM)) == join(parts[::-1])
    unrounded = replace(awq, order=marlin.order, partial=marlin.partial)
    assert tree(assemble(unrounded, PROBLEM)) == join([chain(step, s) for s in slices[::-1]])
    dealt = assemble(replace(unrounded, warps=marlin.warps), PROBLEM)
    sums = []
    for s in slices:
        first, second, third, last = (chain(step, s[32 * w : 32 * w + 32]) for w in range(4))
        sums.append(join([first, join([second, join([last, third])])]))
    assert tree(dealt) == join(sums[::-1])


def test_marlins_stripes_added_as_pytorch_adds() -> None:
    awq, marlin = scheme("awq_gemm"), scheme("marlin.awq")
    hybrid = assemble(replace(marlin, order="torch.sum", partial=awq.partial), PROBLEM)
    assert {n.type for r in hybrid.regions for n in nodes(r.tree) if isinstance(n, Round)} == {"fp16"}
    assert {r.columns for r in hybrid.regions} == {r.columns for r in assemble(marlin, PROBLEM).regions}
    assert len({assemble(s, PROBLEM).hash for s in (awq, marlin, replace(marlin, order="torch.sum"))}) == 3


def test_f_and_l_apart() -> None:
    here, there = scheme("marlin.awq", key="a100"), scheme("marlin.awq")
    half = assemble(replace(here, terms=there.terms), PROBLEM)
    assert {n.step for r in half.regions for n in nodes(r.tree) if isinstance(n, Chain)} == {TensorCore(24, 16, -132)}


def test_sms_move_stripes_and_tiles_alone() -> None:
    here, there = scheme("marlin.awq", key="a100"), scheme("marlin.awq")
    assert assemble(replace(here, sms=132), PROBLEM).hash == recipe("vllm.marlin.awq", PROBLEM, replace(A100, sms=132)).hash
    assert assemble(replace(there, sms=108), PROBLEM).hash == recipe("vllm.marlin.awq", PROBLEM, replace(H100, sms=108)).hash
    awq = scheme("awq_gemm")
    assert assemble(replace(awq, sms=1), PROBLEM).hash == assemble(awq, PROBLEM).hash


def test_bands_of_warps_cut_another_kernels_areas() -> None:
    """300 rows are two launches of Marlin: here with 64 x 256 tiles and 2 warp rows, then with 128 x 64 and 4."""
    p = replace(PROBLEM, M=300, K=4096, N=4096)
    hybrid = assemble(replace(scheme("awq_gemm", p), warps=WarpRows(300, 4096, 4096)), p)
    assert [r.rows for r in hybrid.regions] == [(0, 256), (256, 300)]
    for region, warps in zip(hybrid.regions, (2, 4), strict=True):
        assert sum(isinstance(n, Chain) and n.walk != () for n in nodes(region.tree)) == 8 * warps


def test_atomics() -> None:
    """ExLlama adds even one block by an atomic; Marlin several pieces of a narrow launch, others in fp32."""
    marlin, exllama = scheme("marlin.awq.atomic"), scheme("gptq_gemm")
    one = replace(marlin, cut=Ranges.whole(16, 1024, 256), warps=OneChain())
    assert isinstance(tree(assemble(one, PROBLEM)), Chain)
    assert isinstance(tree(assemble(replace(one, order=exllama.order), PROBLEM)), Unordered)
    wide = replace(PROBLEM, N=4096)
    refused = assemble(scheme("marlin.awq.atomic", wide), wide)
    assert refused.hash == assemble(scheme("marlin.awq", wide), wide).hash
    asked = replace(scheme("marlin.awq.atomic", wide), order=exllama.order)
    assert all(isinstance(r.tree, Unordered) for r in assemble(asked, wide).regions)


def test_whole_columns_in_atomics_scale_each_part() -> None:
    p = replace(PROBLEM, group_size=1024)
    hybrid = replace(scheme("awq_gemm", p), weights="integer", scale="output", order="atomics", type="fp16")
    parts = [rounded(chain(TensorCore.of(H100.step), unfold(w)), "fp16") for w in next(hybrid.cut.areas(0)).pieces]
    (region,) = assemble(hybrid, p).regions
    assert (region.tree, region.output.scale) == (unordered(parts, "fp16", scaled=True), False)


def test_a_fused_bias_needs_a_scaled_output() -> None:
    """With the scale in the weight Marlin's fused bias is an added one; on another kernel's areas it covers every output."""
    p = replace(PROBLEM, M=20, N=200, group_size=1024, bias=True)
    base = replace(scheme("awq_gemm", p), bias=FusedBias())
    assert {r.output.bias for r in assemble(base, p).regions} == {"added"}
    fused = assemble(replace(base, weights="integer", scale="output"), p)
    rules = np.full((20, 200), "", dtype="U5")
    for r in fused.regions:
        for left, right in r.columns:
            rules[slice(*r.rows), left:right] = r.output.bias
    added = np.zeros((20, 200), bool)
    added[:8] = np.arange(200) % 64 < 8
    assert np.array_equal(rules, np.where(added, "added", "fused"))


MISFITS = [
    ({"weights": "integer"}, "nothing would multiply by the scale: the weight is q-z"),
    ({"scale": "output"}, r"holds its scale, and a scale on the sum would multiply by it once more"),
    ({"scale": "step"}, "holds its scale, and a scale behind each dot"),
    ({"weights": "integer", "scale": "output"}, "scaled where a column has one scale, and this weight has groups of 128"),
    (
        {"weights": "integer", "scale": "step"},
        "a scale behind each fp16 dot needs the fp16 dot and the other way round: here tensor core",
    ),
    ({"unit": "half dot"}, "needs the fp16 dot and the other way round: here half dot, scale in the weight"),
    ({"type": "fp16"}, "takes parts that are rounded to fp16, and here it gets: not rounded"),
    ({"type": "fp16", "partial": Partial("total", "fp16")}, "gets: the running total rounded to fp16"),
    ({"order": "atomics", "partial": Partial("total", "fp16")}, "no running total to round"),
    ({"order": "atomics", "bias": PlainBias("added")}, "a bias that one of several atomic additions carries is not modelled"),
    ({"unit": "opaque: cuBLAS"}, "cuBLAS is not modelled, so that its sum cannot be cut into other pieces"),
    ({"unit": "abacus"}, "no unit 'abacus' multiplies; known: tensor core, fma, half dot"),
]


@pytest.mark.parametrize(("changed", "why"), MISFITS)
def test_what_does_not_fit_is_refused(changed: dict[str, str], why: str) -> None:
    hybrid = replace(scheme("marlin.awq"), **changed)  # type: ignore[arg-type]
    with pytest.raises(QlabError, match=why):
        assemble(hybrid, PROBLEM)


def test_what_does_not_fit_the_problem_is_refused() -> None:
    exllama = scheme("gptq_gemm")
    assert misfit(exllama, PROBLEM) == ""
    for p, why in (
        (replace(PROBLEM, act_order=True), "rows of a group lie together only when sorted"),
        (replace(PROBLEM, group_size=8), "groups of 8 are no multiple of 32"),
    ):
        assert why in misfit(exllama, p)
    assert misfit(replace(exllama, rows="sorted"), replace(PROBLEM, act_order=True)) == ""
    assert misfit(exllama, replace(PROBLEM, act_order=True, group_size=1024)) == ""
    for changed, k, why in (
        ({}, 1000, "K=1000 ends inside a fused sum of 16 terms"),
        ({"k_width": 4}, 1008, "K=1008 ends inside a dot of 32 rows, whose k kWidth 4 would permute"),
        ({"terms": 8}, 1000, ""),
    ):
        p = replace(PROBLEM, K=k, group_size=k)
        hybrid = replace(scheme("machete.gptq"), cut=Ranges.whole(16, k, 256), **changed)  # type: ignore[arg-type]
        assert why in misfit(hybrid, p)
        assert bool(why) == bool(misfit(hybrid, p))
    bf16 = replace(PROBLEM, dtype=BF16)
    assert (
        misfit(replace(scheme("machete.gptq"), accumulator="fp16"), bf16)
        == "no tensor core adds products of bf16 numbers in fp16"
    )


def test_a_join_keeps_its_parts() -> None:
    """Machete's pieces ascend: a join of them has the first two in front."""
    found = tree(assemble(replace(scheme("machete.gptq"), cut=Ranges(16, 256, ((0, 512), (512, 768), (768, 1024)))), PROBLEM))
    assert isinstance(found, Join)
    assert found == join([chain(TensorCore.of(H100.step), range(a, b)) for a, b in ((0, 512), (512, 768), (768, 1024))])
