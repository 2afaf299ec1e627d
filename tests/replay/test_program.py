"""Compiled programs: a small interpreter of their flat arrays gives the reference engine's bits, on a stack of eight."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from qlab.backends.registry import Problem
from qlab.errors import UnsupportedError
from qlab.hardware import AMPERE, HOPPER, VOLTA, Step, gpu
from qlab.inputs import random_activations, random_weight
from qlab.recipe import (
    Chain,
    Fma,
    HalfDot,
    Join,
    Node,
    Opaque,
    Output,
    Recipe,
    TensorCore,
    Tile,
    chain,
    join,
    nodes,
    rounded,
    unfold,
)
from qlab.recipe import unordered as atomics
from qlab.recipes import builders, recipe
from qlab.replay import reference
from qlab.replay.operands import Operands, bits, operands, values
from qlab.replay.program import MAX_DEPTH, Kind, Op, Program, compile_recipe, depth
from qlab.replay.step import fused_dot_add, half_dot_add
from qlab.weights import Int4Weight, round_once

TORCH = (torch.float32, torch.float16, torch.bfloat16)
Values = torch.Tensor


def execute(program: Program, x: np.ndarray, o: Operands, dtype: torch.dtype) -> tuple[np.ndarray, int]:
    """y and the deepest stack; regions that the program lacks keep 0xABCD."""
    y, deepest = np.full((len(x), o.w.shape[1]), 0xABCD, np.uint16), 0
    scale = o.scales[0].double() if len(o.scales) else torch.zeros(0)
    for m0, m1, n0, n1, start, stop in program.regions.tolist():
        for m in range(m0, m1):
            n, stack = slice(n0, n1), []
            for code, *args in program.ops[start:stop].tolist():
                match Op(code):
                    case Op.CHAIN:
                        k = program.order[args[1] : args[2]]
                        stack.append(run_chain(program.steps[args[0]].tolist(), k, x[m], o, n, dtype))
                    case Op.ADD:
                        b, a = stack.pop(), stack.pop()
                        stack.append(to(a.double() + b.double(), args[0]))
                    case Op.ROUND:
                        stack.append(to(stack.pop().double(), args[0]))
                    case Op.SCALE:
                        stack.append(to(stack.pop().double() * scale[n], args[0]))
                    case Op.BIAS:
                        stack.append(to(stack.pop().double() + o.bias[n].double(), args[0]))
                    case Op.SCALE_BIAS:
                        stack.append(to(stack.pop().double() * scale[n] + o.bias[n].double(), args[0]))
                deepest = max(deepest, len(stack))
            (result,) = stack
            found = bits(result.to(dtype))
            y[m, n] = np.where(result.isnan().numpy(), 0x7FFF, found)
    return y, deepest


def to(exact: Values, type: int) -> Values:
    return round_once(exact, TORCH[type]).float()


def run_chain(step: list[int], k: np.ndarray, x: np.ndarray, o: Operands, n: slice, dtype: torch.dtype) -> Values:
    kind, fraction_bits, terms, zero_exponent, accumulator, _ = step
    w = o.w[torch.from_numpy(k).long(), n]  # [k, E]
    if kind == Kind.TENSOR_CORE:
        a, b, rule = np.broadcast_to(x[k], w.t().shape), bits(w.t()), Step(fraction_bits, terms, zero_exponent, zero_exponent)
        if accumulator:
            return values(half_dot_add(a, b, np.zeros(len(b), np.uint16), rule), torch.float16).float()
        return torch.from_numpy(fused_dot_add(a, b, np.zeros(len(b), np.uint32), rule, dtype).view(np.float32))
    p, total = values(x[k], dtype).double()[:, None] * w.double(), torch.zeros(w.shape[1])
    if kind == Kind.FMA:  # exact in float64 for numbers as near each other as these
        for row in p:
            total = to(row + total.double(), accumulator)
        return total
    for i in range(0, len(k), terms):
        halves = [torch.zeros_like(total), torch.zeros_like(total)]
        for j in range(terms):
            halves[j % 2] = to(p[i + j] + halves[j % 2].double(), 1)
        dot = to(halves[0].double() + halves[1].double(), 0).double()
        total = to(dot * o.scales[int(o.group[k[i]]), n].double() + total.double(), 0)
    return total


def inputs(r: Recipe, seed: int = 0, group_size: int = 32) -> tuple[np.ndarray, Operands, torch.dtype]:
    dtype = torch.float16 if r.dtype == "fp16" else torch.bfloat16
    w = random_weight(r.K, r.N, group_size, dtype=dtype, seed=seed)
    x = random_activations(r.M, r.K, dtype=dtype, seed=seed + 1)
    bias = random_activations(1, r.N, dtype=dtype, seed=seed + 2)[0]
    return bits(x), operands(r, w, bias=bias), dtype


def random_recipe(rng: random.Random, dtype: str) -> Recipe:
    """Rectangles, each with a tree of its own."""
    rows, columns = ([0, *sorted(rng.sample(range(1, size), 2)), size] for size in (5, 12))
    steps = [TensorCore.of(VOLTA), TensorCore.of(AMPERE), TensorCore.of(HOPPER), Fma()]
    if dtype == "fp16":
        steps += [TensorCore.of(HOPPER, "fp16"), Fma("fp16"), HalfDot()]
    rules = [Output(), Output(True), Output(False, "added"), Output(True, "added"), Output(True, "fused")]
    tiles = []
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            order = np.random.default_rng(rng.randrange(1000)).permutation(64).reshape(4, 16)
            parts: list[Node] = [chain(rng.choice(steps), o) for o in order]
            while len(parts) > 1:
                kind = rng.choice(["fp32", "fp32", dtype, "atomics"])
                pair = [rounded(p, dtype) if kind != "fp32" else p for p in parts[:2]]
                scaled = rng.random() < 0.3
                parts[:2] = [join(pair, kind) if kind != "atomics" else atomics(pair, dtype, scaled=scaled)]
                rng.shuffle(parts)
            tiles.append(Tile((top, bottom), (left, right), parts[0], rng.choice(rules)))
    return Recipe.of(5, 64, 12, dtype, tiles)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_programs_compute_what_recipes_say(dtype: str) -> None:
    rng = random.Random(1)
    for seed in range(12):
        r = random_recipe(rng, dtype)
        x, o, kind = inputs(r, seed)
        y, deepest = execute(compile_recipe(r), x, o, kind)
        assert np.array_equal(y, reference.run(r, x, o))
        assert deepest == max(depth(t.tree) for t in r.regions)


@pytest.mark.parametrize("name", sorted(builders()))
@pytest.mark.parametrize("key", ["t4", "a100", "h100"])
def test_programs_of_kernels(name: str, key: str) -> None:
    try:
        r = recipe(name, Problem(3, 256, 128, 32, torch.float16, "gptq" in name, False), gpu(key))
        program = compile_recipe(r)
    except UnsupportedError as reason:
        pytest.skip(str(reason))
    x, o, kind = inputs(r)
    assert np.array_equal(execute(program, x, o, kind)[0], reference.run(r, x, o))


def test_structure() -> None:
    """Chains that regions share are written once, and so are steps; every array is what the compiled engines take."""
    r = recipe("vllm.marlin.awq", Problem(200, 1024, 512, 128, torch.float16, False, False), gpu("h100"))
    p = compile_recipe(r)
    for array, width in (p.order, 0), (p.steps, 6), (p.ops, 4), (p.regions, 6):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous
        assert array.ndim == 1 + (width > 0)
        assert width in (0, array.shape[-1])
    assert p.steps.tolist() == [[0, 25, 16, -133, 0, 16]]
    chains = {n for x in r.regions for n in nodes(x.tree) if isinstance(n, Chain)}
    assert len(p.order) == sum(len(unfold(c.walk)) for c in chains)
    assert len(p.regions) == sum(len(x.columns) for x in r.regions)
    every = compile_recipe(random_recipe(random.Random(0), "fp16"))
    assert len(np.unique(every.steps, axis=0)) == len(every.steps)


def test_columns_are_the_program_of_those_columns() -> None:
    rng = random.Random(2)
    for _ in range(4):
        r = random_recipe(rng, "fp16")
        x, o, kind = inputs(r)
        program, want = compile_recipe(r), reference.run(r, x, o)
        for start, stop in (0, 12), (0, 5), (5, 6), (3, 11), (11, 12):
            part = program.columns(start, stop)
            assert part.ops is program.ops
            assert part.regions.flags.c_contiguous
            assert (part.regions[:, 3] > part.regions[:, 2]).all()
            s = slice(start, stop)
            cut = Operands(o.w[:, s], o.scales[:, s], o.group, o.bias[s])
            assert np.array_equal(execute(part, x, cut, kind)[0], want[:, s])
    assert len(program.columns(12, 20).regions) == 0


# Depth


def shipped() -> Iterator[tuple[int, int]]:
    """(K, N) of the shipped model's fused linears, and of Llama's."""
    yield from ((512, 1024), (512, 512), (512, 2048), (1024, 512))
    yield from ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (8192, 10240), (28672, 8192))


@pytest.mark.parametrize("key", ["a100", "h100"])
def test_stacks_are_never_deep(key: str) -> None:
    for k, n in (*shipped(), (28672, 64), (28672, 128), (11008, 64)):
        for m, name in product((1, 300) if n < 20000 else (1,), builders()):
            if name.startswith(("vllm.marlin.gptq", "vllm.machete.gptq")):  # as for AWQ
                continue
            try:
                r = recipe(name, Problem(m, k, n, 128, torch.float16, "gptq" in name, False), gpu(key))
            except UnsupportedError:
                continue
            assert max(depth(x.tree) for x in r.regions) <= 4 <= MAX_DEPTH, (name, m, k, n)


def test_many_pieces_need_no_deep_stack() -> None:
    """112 pieces of four warp rows, each piece added to the next: joins nest as deep, and the stack does not grow."""
    for name in "vllm.marlin.awq", "vllm.marlin.awq.fp16":
        r = recipe(name, Problem(1, 28672, 64, 128, torch.float16, False, False), gpu("h100"))
        assert sum(isinstance(n, Chain) for n in nodes(r.regions[0].tree)) == 4 * 112
        x, o, kind = inputs(r)
        program = compile_recipe(r).columns(0, 2)
        o = Operands(o.w[:, :2], o.scales[:, :2], o.group, o.bias[:2])
        y, deepest = execute(program, x, o, kind)
        assert deepest == 3
        (region,) = r.regions
        narrow = Recipe.of(1, 28672, 2, "fp16", [Tile((0, 1), (0, 2), region.tree)])
        assert np.array_equal(y, reference.run(narrow, x, o))


def naive(parts: list[Node]) -> Node:
    """A balanced tree of additions: its stack must grow."""
    return parts[0] if len(parts) == 1 else join([naive(parts[: len(parts) // 2]), naive(parts[len(parts) // 2 :])])


def test_depth_is_the_least_possible() -> None:
    """A balanced tree of 2^d chains needs d + 1 values (Sethi and Ullman 1970); a fold of any length needs two."""
    leaves: list[Node] = [chain(Fma(), [k]) for k in range(64)]
    assert [depth(naive(leaves[: 1 << d])) for d in range(7)] == [1, 2, 3, 4, 5, 6, 7]
    assert depth(join(leaves)) == 2
    right = leaves[0]
    for leaf in leaves[1:]:
        right = join([leaf, rounded(right, "fp16")])
    assert depth(right) == 2
    r = Recipe.of(1, 64, 4, "fp16", [Tile((0, 1), (0, 4), naive(leaves))])
    x, o, kind = inputs(r)
    y, deepest = execute(compile_recipe(r), x, o, kind)
    assert deepest == 7
    assert np.array_equal(y, reference.run(r, x, o))
    assert isinstance(r.regions[0].tree, Join)


# Refusals and seeds


def exllama(k: int = 1024) -> Recipe:
    return recipe("vllm.gptq_gemm", Problem(2, k, 32, 128, torch.float16, True, False), gpu("h100"))


def test_refusals() -> None:
    r = recipe("vllm.awq_dequantize", Problem(2, 256, 64, 128, torch.float16, False, False), gpu("h100"))
    with pytest.raises(UnsupportedError, match=r"opaque: cuBLAS GEMM of torch\.matmul; its order of summation is not known"):
        compile_recipe(r)
    with pytest.raises(UnsupportedError, match="opaque: b"):
        compile_recipe(Recipe.of(1, 8, 1, "fp16", [Tile((0, 1), (0, 1), join([chain(Fma(), range(8)), Opaque("b")]))]), 0)
    with pytest.raises(UnsupportedError, match="the order of atomics is not fixed: name a seed"):
        compile_recipe(exllama())
    assert len(compile_recipe(exllama(256)).ops) > 0  # two addends have one order


def chains_in_order(p: Program) -> list[int]:
    return [int(p.order[start]) for code, _, start, stop in p.ops.tolist() if code == Op.CHAIN and stop > start]


def test_a_seed_is_an_order() -> None:
    one, again, other = (compile_recipe(exllama(), seed) for seed in (1, 1, 2))
    assert all(np.array_equal(getattr(one, f), getattr(again, f)) for f in ("order", "steps", "ops", "regions"))
    assert chains_in_order(one) != chains_in_order(other)
    assert sorted(chains_in_order(one)) == list(range(0, 1024, 128))
    assert len({tuple(chains_in_order(compile_recipe(exllama(), s))) for s in range(30)}) == 30


def test_an_order_of_atomics_is_a_join_onto_zero() -> None:
    r = exllama()
    tree = r.regions[0].tree
    by_start = {min(unfold(n.walk)): part for part in tree.parts for n in nodes(part) if isinstance(n, Chain)}  # type: ignore[union-attr]
    x, o, kind = inputs(r)
    for seed in range(3):
        program = compile_recipe(r, seed)
        parts = [by_start[start] for start in chains_in_order(program)]
        fixed = replace(r, regions=(replace(r.regions[0], tree=Join(tuple(parts), "fp16")),))
        y, _ = execute(program, x, o, kind)
        assert np.array_equal(y + (y == 0x8000) * np.uint16(0x8000), reference.run(fixed, x, o))


def test_atomics_never_give_minus_zero() -> None:
    """Every part is -0 in fp16; the sum onto zero is +0."""
    parts = [rounded(chain(Fma(), [i]), "fp16") for i in range(4)]
    r = Recipe.of(1, 4, 1, "fp16", [Tile((0, 1), (0, 1), atomics(parts, "fp16"))])
    x = bits(torch.full((1, 4), 2.0**-15).half())
    none = torch.zeros(0)
    o = Operands(torch.full((4, 1), -(2.0**-15)).half(), torch.ones(1, 1).half(), torch.zeros(4, dtype=torch.int32), none)
    assert execute(compile_recipe(r, 0), x, o, torch.float16)[0].tolist() == [[0]]


def test_whole_weights_may_be_replayed_in_panels() -> None:
    """Columns of operands and of a program fit together for a kernel with scales, groups and a bias."""
    problem = Problem(9, 512, 256, 512, torch.float16, True, False, bias=True)
    r = recipe("vllm.marlin.gptq", problem, gpu("h100"))
    w: Int4Weight = random_weight(512, 256, 512, dtype=torch.float16, symmetric=True, seed=3)
    x = random_activations(9, 512, dtype=torch.float16, seed=4)
    bias = random_activations(1, 256, dtype=torch.float16, seed=5)[0]
    program, want = compile_recipe(r), reference.run(r, bits(x), operands(r, w, bias=bias))
    panels = []
    for n in range(0, 256, 64):
        o = operands(r, w, slice(n, n + 64), None, bias)
        panels.append(execute(program.columns(n, n + 64), bits(x), o, torch.float16)[0])
    assert np.array_equal(np.concatenate(panels, axis=1), want)
