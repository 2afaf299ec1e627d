"""Parts of two recipes: both ends are the kernels themselves, what cannot be separated is one part, and what shows is found."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import product

import pytest
import torch

from qlab.attribution import parts as module
from qlab.attribution.parts import CANDIDATES, Pair, Part, Unions, admissible, mixed, parts, selected, text, unions
from qlab.backends.registry import Problem
from qlab.errors import QlabError
from qlab.hardware import gpu
from qlab.recipe import Chain, nodes
from qlab.recipes import Scheme, assemble, scheme_of

F16 = torch.float16
SHIPPED = ((512, 1024), (512, 512), (512, 2048), (1024, 512))
KERNELS = (
    "vllm.awq_gemm",
    "vllm.marlin.awq",
    "vllm.marlin.awq.fp16",
    "vllm.marlin.gptq",
    "vllm.marlin.gptq.fp16",
    "vllm.machete.awq",
    "vllm.machete.gptq",
    "vllm.gptq_gemm",
    "triton.awq_gemm",
    "triton.awq_gemm.splitk",
    "vllm.awq_triton",
    "cuda.hardware_invariant",
)
PATHS = tuple(product(KERNELS, ("a100", "h100")))
Path = tuple[str, str]
F, L, SMS = "tensor core: F, fraction bits", "tensor core: L, terms per sum", "SM count (stripes and tile choice)"
CUT, WARPS, ROUNDING = "cut of K (split-K, stripes)", "warp-level slices of K", "rounding of partial sums"
ORDER, TYPE = "order of joins", "type of joins"


def problems(m: int = 16, group_size: int = 128, shapes: Sequence[tuple[int, int]] = SHIPPED, **changed: bool) -> list[Problem]:
    return [replace(Problem(m, k, n, group_size or k, F16, True, False), **changed) for k, n in shapes]  # type: ignore[arg-type]


def scheme(path: Path, problem: Problem) -> Scheme:
    return scheme_of(path[0], problem, gpu(path[1]), check=False)


def pairs(a: Path, b: Path, given: Sequence[Problem] = ()) -> list[Pair]:
    return [(scheme(a, p), scheme(b, p), p) for p in given or problems()]


def names(found: Sequence[Part]) -> list[str]:
    return [p.name for p in found]


def unions_of(a: Path, b: Path, given: Sequence[Problem] = ()) -> Unions:
    found = pairs(a, b, given)
    moved = [(here, scheme((a[0], b[1]), p)) for here, _, p in found]
    return unions(parts(found), (a[0], b[0]), (a[1], b[1]), moved)


def leads(bits: Sequence[int], start: int, fits: Callable[[int], bool]) -> bool:
    """Whether some order of the bits passes through admissible coalitions only."""
    reached = {start}
    for _ in bits:
        reached = {m | 1 << b for m in reached for b in bits if not m >> b & 1 and fits(m | 1 << b)}
    return bool(reached)


def owen_order(members: Sequence[Sequence[int]], fits: Callable[[int], bool]) -> bool:
    """Whether unions can follow one another, each as a whole, through admissible coalitions."""
    reached = {0}
    for _ in members:
        after = set()
        for mask, union in product(reached, members):
            if not mask >> union[0] & 1 and leads(union, mask, fits):
                after.add(mask | sum(1 << i for i in union))
        reached = after
    return bool(reached)


def test_candidates_are_the_fields_of_a_scheme() -> None:
    assert sorted(x for p in CANDIDATES for x in p.attributes) == sorted(f.name for f in fields(Scheme))
    assert len({p.name for p in CANDIDATES}) == len(CANDIDATES)


@pytest.mark.parametrize(("group_size", "shape"), [(128, SHIPPED[2]), (0, SHIPPED[3])])
@pytest.mark.parametrize("a", PATHS, ids="@".join)
def test_both_ends_are_the_kernels(a: Path, group_size: int, shape: tuple[int, int]) -> None:
    """To and from every other path; and orders with each union in one stretch lead from the one to the other."""
    given = problems(16, group_size, [shape])
    hashes = {b: [assemble(scheme(b, p), p).hash for p in given] for b in PATHS}
    for b in PATHS:
        layers = pairs(a, b, given)
        found = parts(layers)
        assert [assemble(mixed(x, y, found), p).hash for x, y, p in layers] == hashes[b]
        assert [assemble(mixed(x, y, ()), p).hash for x, y, p in layers] == hashes[a]
        assert bool(found) == (hashes[a] != hashes[b])
        fits = admissible(found, layers)
        assert owen_order(unions_of(a, b, given).members, fits), (a, b)


@pytest.mark.parametrize("attribute", ["zero_exponents", "terms", "sms", "cut", "warps", "partial", "order"])
def test_a_field_that_no_part_moves_shows(attribute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full coalition is then no longer B: what these tests rest on."""
    without = [replace(p, attributes=tuple(x for x in p.attributes if x != attribute)) for p in CANDIDATES]
    monkeypatch.setattr(module, "CANDIDATES", tuple(p for p in without if p.attributes))
    layers = pairs(("vllm.awq_gemm", "a100"), ("vllm.marlin.awq", "h100"))
    found = parts(layers)
    assert any(assemble(mixed(x, y, found), p).hash != assemble(y, p).hash for x, y, p in layers)


# Which parts


def test_awq_gemm_against_marlin() -> None:
    a, b = ("vllm.awq_gemm", "h100"), ("vllm.marlin.awq", "h100")
    assert names(parts(pairs(a, b))) == [CUT, WARPS, ROUNDING, ORDER]
    assert names(parts(pairs(a, ("vllm.marlin.awq", "a100")))) == [F, L, SMS, CUT, WARPS, ROUNDING, ORDER]
    assert names(parts(pairs(b, ("vllm.marlin.awq.fp16", "h100")))) == [ROUNDING]


def test_what_does_not_show_is_no_part() -> None:
    """SMs that nothing depends on, or that cut alike; steps that no tensor core takes; joins of one piece."""
    awq, marlin, exllama = "vllm.awq_gemm", "vllm.marlin.awq", "vllm.gptq_gemm"
    assert names(parts(pairs((awq, "a100"), (awq, "h100")))) == [F, L]
    assert names(parts(pairs((marlin, "a100"), (marlin, "h100")))) == [F, L, SMS]
    assert names(parts(pairs((marlin, "a100"), (marlin, "h100"), problems(shapes=[(512, 512)])))) == [F, L]
    assert parts(pairs((exllama, "a100"), (exllama, "h100"))) == ()
    one = problems(group_size=64, shapes=[(128, 64)])
    assert parts(pairs((marlin, "h100"), (f"{marlin}.fp16", "h100"), one)) == ()
    assert names(parts(pairs((awq, "h100"), (f"{marlin}.fp16", "h100"), one))) == [CUT, WARPS, ROUNDING, ORDER]
    assert parts(pairs(("triton.gptq_gemm", "h100"), ("triton.gptq_gemm.splitk", "h100"), one)) == ()
    # ExLlama's blocks of 128 rows are the slices of split-K here.
    assert CUT not in names(parts(pairs((exllama, "h100"), ("triton.gptq_gemm.splitk", "h100"))))
    assert parts([]) == ()
    x, y, p = pairs((exllama, "h100"), (exllama, "h100"))[0]
    assert parts([(x, replace(y, accumulator="fp16"), p)]) == ()  # the fp16 dot's accumulator is fp32


def test_one_piece_is_added_to_zero_by_atomics() -> None:
    """Which tells -0 from +0, so that order and rounding show although nothing is joined."""
    given = problems(group_size=64, shapes=[(128, 64)])
    for other in ("vllm.marlin.gptq", "vllm.marlin.gptq.fp16"):
        layers = pairs(("vllm.gptq_gemm", "h100"), (other, "h100"), given)
        found = parts(layers)
        assert {ORDER, TYPE, ROUNDING} <= set(names(found))
        assert [assemble(mixed(x, y, found), p) for x, y, p in layers] == [assemble(y, p) for _, y, p in layers]


def test_one_layer_is_enough() -> None:
    """gate_up alone is cut otherwise by 108 SMs than by 132."""
    layers = pairs(("vllm.marlin.awq", "a100"), ("vllm.marlin.awq", "h100"))
    cut = [SMS in names(parts([layer])) for layer in layers]
    assert cut == [False, False, True, False]


def test_what_fits_only_together_is_one_part() -> None:
    exllama, marlin = ("vllm.gptq_gemm", "h100"), ("vllm.marlin.gptq", "h100")
    found = parts(pairs(exllama, marlin))
    assert found[0] == Part(
        "dequantisation rule + place of the scale + unit of multiplication", "dequantisation", ("weights", "scale", "unit")
    )
    assert names(found)[1:] == [WARPS, ROUNDING, ORDER, TYPE]  # the stripes are ExLlama's blocks of 128 rows here
    whole = problems(group_size=0)
    assert names(parts(pairs(exllama, marlin, whole)))[0] == "place of the scale + unit of multiplication"
    assert names(parts(pairs(marlin, ("vllm.machete.gptq", "h100"), whole)))[0] == "dequantisation rule + place of the scale"


def test_lanes_follow_the_unit() -> None:
    """A tensor core's k are not dealt to lanes, so that fma comes first, and leaves last."""
    ours, marlin = ("cuda.hardware_invariant", "h100"), ("vllm.marlin.gptq", "h100")
    layers = pairs(marlin, ours)
    found = parts(layers)
    # Marlin's stripes are slices of 128 rows here, too.
    assert {"unit of multiplication", "lane-level slices of K", WARPS, ORDER} == set(names(found)) - {F, L}
    lanes, unit = (1 << names(found).index(name) for name in ("lane-level slices of K", "unit of multiplication"))
    fits = admissible(found, layers)
    assert (fits(unit), fits(lanes), fits(unit | lanes)) == (True, False, True)
    assert parts(pairs(("cuda.hardware_invariant", "a100"), ours)) == ()
    part = next(p for p in found if p.attributes == ("lanes",))
    assert [text(part, s) for s in layers[0][:2]] == ["k not dealt to lanes", "pairs of k dealt to 4 lanes"]


def test_inadmissible_coalitions() -> None:
    """From ExLlama the joins must leave fp16 before the rounding of their parts may go; the other way round, the other."""
    layers = pairs(("vllm.gptq_gemm", "h100"), ("vllm.marlin.gptq", "h100"))
    found = parts(layers)
    fits = admissible(found, layers)
    bit = {name: 1 << i for i, name in enumerate(names(found))}
    assert fits(0)
    assert fits(bit[TYPE])
    assert fits(bit[TYPE] | bit[ROUNDING])
    assert not fits(bit[ROUNDING])
    a, b, p = layers[0]
    with pytest.raises(QlabError, match="a join in fp16 takes parts that are rounded to fp16, and here it gets: not rounded"):
        assemble(mixed(a, b, selected(found, bit[ROUNDING])), p)


@pytest.mark.parametrize(
    ("a", "b", "changed"),
    [
        (("vllm.gptq_gemm", "a100"), ("vllm.marlin.gptq.fp16", "h100"), {}),
        (("vllm.gptq_gemm", "a100"), ("triton.gptq_gemm", "h100"), {"act_order": True}),
        (("vllm.awq_gemm", "a100"), ("vllm.marlin.awq.atomic", "h100"), {}),
        (("vllm.awq_triton", "t4"), ("vllm.marlin.awq", "h100"), {}),
        (("vllm.marlin.gptq", "a100"), ("vllm.machete.gptq", "h100"), {"bias": True}),
        (("vllm.awq_dequantize", "a100"), ("vllm.marlin.awq", "h100"), {}),
    ],
)
def test_admissible_is_what_can_be_built(a: Path, b: Path, changed: dict[str, bool]) -> None:
    layers = pairs(a, b, problems(9, 0 if "bias" in changed else 128, [(384, 128)], **changed))
    found = parts(layers)
    fits = admissible(found, layers)
    (x, y, p) = layers[0]
    built = 0
    for mask in range(1 << len(found)):
        hybrid = mixed(x, y, selected(found, mask))
        if not fits(mask):
            with pytest.raises(QlabError):
                assemble(hybrid, p)
            continue
        r = assemble(hybrid, p)
        built += 1
        for region in r.regions:  # every product once, whatever the hybrid
            lengths = [sum(s.length * s.count for s in n.walk) for n in nodes(region.tree) if isinstance(n, Chain)]
            assert sum(lengths) == (p.K if lengths else 0)
    assert built > len(found)


def test_act_order_moves_rows_first_and_last() -> None:
    """An fp16 dot has one scale for 8 rows, so ExLlama's rows stay sorted as long as it multiplies."""
    given = problems(act_order=True)
    layers = pairs(("vllm.gptq_gemm", "h100"), ("triton.gptq_gemm", "h100"), given)
    found = parts(layers)
    assert "order of rows under act-order" in names(found)
    fits = admissible(found, layers)
    unit, rows = (1 << i for i, p in enumerate(found) if {"unit", "rows"} & set(p.attributes))
    assert (fits(unit), fits(rows), fits(unit | rows)) == (True, False, True)


def test_an_end_that_cannot_be_built_is_refused() -> None:
    a, b, p = pairs(("vllm.awq_gemm", "h100"), ("vllm.marlin.awq", "h100"))[0]
    with pytest.raises(QlabError, match="path B has a layer whose recipe cannot be built: nothing would multiply by the scale"):
        parts([(a, b, p), (a, replace(b, weights="integer"), p)])
    with pytest.raises(QlabError, match="path A has a layer"):
        parts([(replace(a, weights="integer"), b, p)])


def toy(allowed: set[int]) -> Callable[[int], bool]:
    return lambda mask: mask in allowed


def test_merging_goes_on_until_some_order_leads_through() -> None:
    """Parts 0, 1, 2, any two of which can be built, but none alone: separable in pairs, and yet no order leads anywhere."""
    fits = toy({0b000, 0b011, 0b110, 0b101, 0b111})
    groups = module._inseparable(3, fits)
    assert groups == [(0,), (1,), (2,)]
    assert not module._leads(groups, fits)
    one = module._union(groups, (0, 1))
    assert one == [(0, 1), (2,)]
    assert module._leads(one, fits)
    assert module._union(groups, (0, 2)) == [(0, 2), (1,)]
    assert module._inseparable(2, toy({0b00, 0b11})) == [(0, 1)]


def test_time() -> None:
    layers = pairs(("vllm.gptq_gemm", "a100"), ("vllm.marlin.gptq", "h100"), problems(shapes=[(4096, 6144), *SHIPPED[1:]]))
    start = time.perf_counter()
    found = parts(layers)
    fits = admissible(found, layers)
    assert sum(fits(m) for m in range(1 << len(found))) > 100
    assert len(found) == 9
    assert time.perf_counter() - start < 1


def test_names_of_merged_parts() -> None:
    by_field = {p.attributes[0]: p for p in CANDIDATES}
    merged = module._merged([by_field["sms"], by_field["cut"]])
    assert merged == Part("SM count + cut of K", "hardware", ("sms", "cut"))


# Unions


def test_unions_below_kernel_and_tensor_core() -> None:
    found = unions_of(("vllm.awq_gemm", "a100"), ("vllm.marlin.awq", "h100"))
    assert found.names == ("tensor core (a100 or h100)", SMS, "kernel (vllm.awq_gemm or vllm.marlin.awq)")
    assert found.members == ((0, 1), (2,), (3, 4, 5, 6))
    same_gpu = unions_of(("vllm.awq_gemm", "h100"), ("vllm.marlin.awq", "h100"))
    assert same_gpu.members == ((0, 1, 2, 3),)
    same_kernel = unions_of(("vllm.marlin.awq", "a100"), ("vllm.marlin.awq", "h100"))
    assert (same_kernel.names, same_kernel.members) == (("tensor core (a100 or h100)", SMS), ((0, 1), (2,)))
    assert unions_of(("vllm.marlin.awq", "h100"), ("vllm.marlin.gptq", "h100")) == Unions((), ())


def test_what_the_gpu_decides_is_not_the_kernels() -> None:
    """Marlin's accumulator is fp16 on a T4 because of the T4; vLLM's Triton kernel has fp16 accumulators anywhere."""
    marlin = unions_of(("vllm.marlin.gptq", "t4"), ("vllm.machete.gptq", "h100"))
    assert "accumulator type" in marlin.names
    triton = unions_of(("vllm.awq_triton", "a100"), ("vllm.marlin.awq", "h100"))
    assert "accumulator type" not in triton.names
    layers = pairs(("vllm.awq_triton", "a100"), ("vllm.marlin.awq", "h100"))
    kernel = triton.members[triton.names.index("kernel (vllm.awq_triton or vllm.marlin.awq)")]
    assert names(parts(layers))[kernel[0]] == "accumulator type"
    assert {"unit of multiplication", "order of k inside a dot"} <= set(
        unions_of(("vllm.awq_triton", "t4"), ("vllm.awq_triton", "h100")).names
    )


def test_one_of_f_and_l_is_no_union_of_two() -> None:
    """Volta and Ampere differ in both; a core of Ampere's F with Hopper's L in one."""
    layers = [
        (a, replace(b, fraction_bits=a.fraction_bits, zero_exponents=a.zero_exponents), p)
        for a, b, p in pairs(("vllm.awq_gemm", "a100"), ("vllm.awq_gemm", "h100"))
    ]
    found = parts(layers)
    assert unions(found, ("x", "x"), ("a100", "h100")) == Unions((L,), ((0,),))


# Words


def test_texts() -> None:
    def both(name: str, a: Path, b: Path, given: Sequence[Problem] = ()) -> tuple[str, str]:
        layers = pairs(a, b, given)
        part = next(p for p in parts(layers) if p.name == name)
        return text(part, layers[0][0]), text(part, layers[0][1])

    awq, marlin, exllama = ("vllm.awq_gemm", "a100"), ("vllm.marlin.awq", "h100"), ("vllm.gptq_gemm", "h100")
    assert both(F, awq, marlin) == ("F=24", "F=25")
    assert both(L, awq, marlin) == ("L=8", "L=16")
    assert both(SMS, awq, marlin) == ("108 SMs", "132 SMs")
    assert both(CUT, awq, marlin) == ("8 interleaved slices", "stripes over 132 SMs: 4 pieces")
    assert both(WARPS, awq, marlin) == ("one accumulator", "4 warp rows")
    assert both(ROUNDING, awq, marlin) == ("each piece rounded to fp16", "not rounded")
    assert both(ORDER, awq, marlin) == ("torch.sum", "descending")
    assert both(TYPE, exllama, marlin) == ("fp16", "fp32")
    assert both("dequantisation rule + place of the scale + unit of multiplication", exllama, marlin) == (
        "q-z, scale behind each dot, fp16 dot",
        "RN((q-z)*s), scale in the weight, tensor core",
    )
    assert both("dequantisation rule", awq, ("vllm.machete.awq", "h100")) == ("RN((q-z)*s)", "RN(q*s + RN(-s*z))")
    triton = ("vllm.awq_triton", "h100")
    assert both("accumulator type", triton, marlin) == ("fp16 accumulator", "fp32 accumulator")
    assert both("order of k inside a dot", triton, marlin) == ("k permuted, kWidth 4", "k in order")
    biased = problems(group_size=0, bias=True)
    assert both("output rule", ("vllm.marlin.gptq", "h100"), ("vllm.machete.gptq", "h100"), biased) == (
        "RN(y*s + bias) fused, but for each thread's first store",
        "RN(y + bias)",
    )
    rows = both(
        "order of rows under act-order", ("vllm.marlin.gptq", "h100"), ("triton.gptq_gemm", "h100"), problems(act_order=True)
    )
    assert rows == ("rows sorted by group", "rows as they are")
