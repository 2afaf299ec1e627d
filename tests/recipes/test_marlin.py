"""Marlin: its partition against a simulation of the kernel's blocks, cases worked out by hand, and what the recipe says."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from qlab.backends.registry import Problem
from qlab.errors import UnsupportedError
from qlab.hardware import Gpu, gpu
from qlab.recipe import Chain, Join, Node, Output, Recipe, Round, TensorCore, Unordered, join, nodes, unfold
from qlab.recipes import recipe, scheme_of
from qlab.recipes.build import DEFAULT
from qlab.recipes.marlin import KERNELS, LARGE, SMALL, Config, Launch, Piece, launches, pieces
from qlab.recipes.rules import span
from qlab.recipes.scheme import piece_sum

A100, H100, H200, T4 = gpu("a100"), gpu("h100"), gpu("h200"), gpu("t4")
F16, BF16 = torch.float16, torch.bfloat16
PROBLEM = Problem(M=1, K=4096, N=4096, group_size=128, dtype=F16, symmetric=False, act_order=False)


def marlin(problem: Problem, g: Gpu = H100, name: str = "vllm.marlin.awq") -> Recipe:
    """GPTQ's type has the zero point 8 alone; the recipe does not show it."""
    return recipe(name, replace(problem, symmetric=problem.symmetric or ".gptq" in name), g)


def random_problem(rng: random.Random) -> tuple[Problem, int]:
    """A shape that Marlin takes, and a number of SMs."""
    k = 128 * rng.randint(1, 90)
    group = rng.choice([k, *(g for g in (32, 64, 128) if k % g == 0)])
    m = rng.choice([rng.randint(1, 16), rng.randint(1, 70), rng.randint(1, 700)])
    return Problem(m, k, 64 * rng.randint(1, 120), group, F16, False, False), rng.choice([40, 72, 108, 114, 132, 142, 148])


# The partition


class Slice(NamedTuple):
    """What one block does for one output tile, as marlin_template.h numbers it."""

    start: int
    stop: int
    slices: int
    number: int
    """From the last k to the first."""


def simulate(launch: Launch, n: int, k: int, group_size: int, sms: int) -> dict[int, list[Slice]]:
    """The slices of every output tile, by running init_part1_slice and init_part2_slice for each block."""
    parallel = max(1, launch.rows // launch.tile_rows)
    k_tiles, n_tiles = k // launch.config.thread_k, n // launch.config.thread_n
    tiles = parallel * n_tiles
    part2, part1_iters = tiles, 0
    if tiles > sms:
        part2 = tiles % sms
        if part2 * 3 <= sms:
            part2 += sms
        part1_iters = (tiles - part2) // sms
    iters = -(-k_tiles * part2 // sms)
    group_blocks, thread_k_blocks = group_size // 16, launch.config.thread_k // 16
    if group_size and group_blocks >= thread_k_blocks:
        iters = (group_blocks // thread_k_blocks) * -(-iters // (group_blocks // thread_k_blocks))
    found: dict[int, list[Slice]] = {}
    for block in range(sms):
        for i in range(part1_iters):
            found.setdefault(block + i * sms, []).append(Slice(0, k_tiles, 1, 0))
        tile, row = divmod(iters * block, k_tiles)
        while tile < part2:
            left = iters * (block + 1) - (k_tiles * tile + row)
            if left <= 0:
                break
            left = min(left, k_tiles - row)
            count, index = 1, 0
            first = iters * -(-k_tiles * tile // iters)
            if first <= k_tiles * (tile + 1):
                offset = first - k_tiles * tile
                count = -(-(k_tiles - offset) // iters) + (offset > 0)
                delta = iters * block - first
                if delta < 0 or (offset == 0 and delta == 0):
                    index = count - 1
                else:
                    index = count - 1 - delta // iters - (offset > 0)
            found.setdefault(tile + tiles - part2, []).append(Slice(row, row + left, count, index))
            tile, row = tile + 1, 0
    return found


def test_pieces_are_those_of_the_simulated_blocks() -> None:
    rng = random.Random(1)
    cut = 0
    # A third of the SMs left over, and one tile more: where the stripes take a whole round of tiles back in.
    thirds = [(replace(PROBLEM, N=128 * tiles), 132) for tiles in (132 + 44, 132 + 45, 132, 264)]
    for p, sms in (*thirds, *(random_problem(rng) for _ in range(150))):
        group_size = 0 if p.group_size == p.K else p.group_size
        for launch in launches(p.M, p.N, p.K, sms):
            column_tiles = p.N // launch.config.thread_n
            want = simulate(launch, p.N, p.K, group_size, sms)
            got = {row * column_tiles + column: cut for row, column, cut in pieces(launch, p.N, p.K, group_size, sms)}
            assert set(got) == set(want), p
            for tile, cuts in got.items():
                slices = sorted(want[tile])
                assert [(s.start, s.stop) for s in slices] == list(cuts), p
                # The last piece along k begins the sum, the first one ends it and writes.
                assert [s.number for s in slices] == list(range(len(slices)))[::-1]
                assert {s.slices for s in slices} == {len(slices)}
                cut += len(cuts) > 1
    assert cut > 1000


def test_every_output_once_and_every_k_once() -> None:
    rng = random.Random(2)
    for _ in range(40):
        p, sms = random_problem(rng)
        r = marlin(p, replace(H100, sms=sms))
        covered = np.zeros((p.M, p.N // 8), np.int8)
        for region in r.regions:
            for left, right in region.columns:
                assert (left % 64, right % 64) == (0, 0)
                covered[slice(*region.rows), left // 8 : right // 8] += 1
            chains = [n for n in nodes(region.tree) if isinstance(n, Chain)]
            assert np.array_equal(np.sort(np.concatenate([unfold(c.walk) for c in chains])), np.arange(p.K))
            assert all((np.diff(unfold(c.walk)) > 0).all() for c in chains)  # ascending in each accumulator
        assert (covered == 1).all()


def test_no_more_stripes_than_blocks() -> None:
    """Each piece that does not start a tile, and each whole tile, is a block's own."""
    rng = random.Random(3)
    for _ in range(100):
        p, sms = random_problem(rng)
        for launch in launches(p.M, p.N, p.K, sms):
            group_size = 0 if p.group_size == p.K else p.group_size
            cuts = [c for *_, c in pieces(launch, p.N, p.K, group_size, sms)]
            assert sum(len(c) - 1 for c in cuts) < sms
            if group_size >= launch.config.thread_k:  # and no stripe starts inside a group
                assert all(piece.start * launch.config.thread_k % group_size == 0 for c in cuts for piece in c)


def counts(problem: Problem, g: Gpu) -> tuple[Config, int]:
    """Tile, and the most pieces of one output tile."""
    (launch,) = launches(problem.M, problem.N, problem.K, g.sms)
    return launch.config, max(len(c) for *_, c in pieces(launch, problem.N, problem.K, problem.group_size, g.sms))


@pytest.mark.parametrize(
    ("m", "n", "k", "a100", "h100"),
    [
        (1, 4096, 4096, (Config(128, 128), 4), (Config(128, 64), 2)),  # 32 tiles of 128: 4 * 32 <= 132, but not 108
        (1, 4096, 11008, (Config(128, 128), 5), (Config(128, 64), 3)),
        (256, 4096, 4096, (Config(64, 256), 3), (Config(64, 256), 2)),
    ],
)
def test_cases_worked_out_by_hand(m: int, n: int, k: int, a100: tuple[Config, int], h100: tuple[Config, int]) -> None:
    p = replace(PROBLEM, M=m, N=n, K=k)
    assert (counts(p, A100), counts(p, H100)) == (a100, h100)


def test_one_case_in_full() -> None:
    """M=1, N=K=4096, g=128. H100: 64 tiles x 32 k tiles over 132 SMs, stripes of 16: each tile in halves.

    A100: 32 tiles x 32 k tiles over 108 SMs, stripes of 10: cuts at 10, 20, 30, 40, ...; the pattern repeats after 5 tiles.
    """
    (launch,) = launches(1, 4096, 4096, 132)
    assert {c for *_, c in pieces(launch, 4096, 4096, 128, 132)} == {(Piece(0, 16), Piece(16, 32))}
    (launch,) = launches(1, 4096, 4096, 108)
    cuts = [c for *_, c in pieces(launch, 4096, 4096, 128, 108)]
    assert cuts[0] == (Piece(0, 10), Piece(10, 20), Piece(20, 30), Piece(30, 32))
    assert cuts[1] == (Piece(0, 8), Piece(8, 18), Piece(18, 28), Piece(28, 32))
    assert cuts[4] == (Piece(0, 2), Piece(2, 12), Piece(12, 22), Piece(22, 32))
    assert cuts == cuts[:5] * 6 + cuts[:2]


def test_launches_of_300_rows() -> None:
    """Four blocks of 64 rows, then 44 rows, as one block of 48 with a tile of its own."""
    first, rest = launches(300, 4096, 4096, 132)
    assert first == Launch(0, 256, 64, LARGE[0])
    assert rest == Launch(256, 300, 48, Config(128, 64))  # 16 tiles of 256 columns: 4 * 16 <= 132
    assert list(launches(300, 4096, 4096, 63))[1] == Launch(256, 300, 48, Config(64, 256))
    assert [x.rows for x in launches(64 * 40 + 5, 8192, 4096, 132)] == [1024, 1024, 512, 5]  # 16 blocks at most for N > 4096
    assert [x.rows for x in launches(64 * 40 + 5, 4096, 4096, 132)] == [2560, 5]
    assert [x.tile_rows for x in launches(64 + 8, 4096, 4096, 132)] == [64, 8]
    r = marlin(replace(PROBLEM, M=300))
    assert {region.rows for region in r.regions if region.rows[1] > 256} == {(256, 300)}
    row_256, row_0 = (next(x.tree for x in r.regions if x.rows[0] <= m < x.rows[1]) for m in (256, 0))
    assert row_256 != row_0


def test_tiles_follow_what_divides() -> None:
    assert next(launches(1, 4096, 4096 + 64, 108)).config == Config(64, 128)
    assert next(launches(1, 64, 4096, 108)).config == Config(128, 64)
    assert next(launches(1, 33 * 128, 4096, 132)).config == Config(128, 64)  # 4 * 33 tiles of 128 columns: not more than 132
    assert next(launches(1, 34 * 128, 4096, 132)).config == Config(128, 128)
    assert next(launches(64, 128, 4096 + 64, 108)).config == Config(64, 128)
    with pytest.raises(ValueError, match="Marlin has no tile for K=96, N=64"):
        list(launches(1, 64, 96, 108))
    assert {c for c in (*SMALL, *LARGE) if c.thread_k == 64} == {Config(64, 128), Config(64, 256)}


# Trees


def block_sum(piece: Piece, config: Config, step: TensorCore) -> Node:
    walk = span(piece.start * config.thread_k, piece.stop * config.thread_k)
    return piece_sum(step, walk, config.thread_k // 32)


def test_warp_rows_join_from_the_last() -> None:
    """acc0 + (acc1 + (acc3 + acc2)): the sum of the last two leads, and each earlier one is added."""
    step = TensorCore.of(H100.step)
    tree = block_sum(Piece(1, 3), Config(128, 64), step)
    assert isinstance(tree, Join)
    walks = [unfold(p.walk).tolist() for p in tree.parts if isinstance(p, Chain)]
    rows = [[*range(128 + 32 * r, 160 + 32 * r), *range(256 + 32 * r, 288 + 32 * r)] for r in range(4)]
    assert sorted(walks[:2]) == rows[2:]
    assert walks[2:] == [rows[1], rows[0]]
    assert tree.type == "fp32"
    two = block_sum(Piece(0, 1), Config(64, 128), step)
    assert isinstance(two, Join)
    assert len(two.parts) == 2


def products(tree: Node) -> set[int]:
    """The k that a sum takes in."""
    return {k for n in nodes(tree) if isinstance(n, Chain) for k in unfold(n.walk).tolist()}


def test_pieces_join_from_the_last_k_in_fp32() -> None:
    """One column of 64 x 64 in 3 pieces: (piece 2 + piece 1) + piece 0, whichever of two equal forms it is written in."""
    p = replace(PROBLEM, N=64, K=384)
    (region,) = marlin(p).regions
    first, second, third = (block_sum(Piece(i, i + 1), Config(128, 64), TensorCore.of(H100.step)) for i in range(3))
    assert region.tree == join([join([third, second]), first]) == join([first, join([second, third])])
    assert region.tree != join([first, second, third])
    assert not any(isinstance(n, Round | Unordered) for n in nodes(region.tree))


def test_fp16_reduction_rounds_what_is_handed_on() -> None:
    p = replace(PROBLEM, N=64, K=384)
    (region,) = marlin(p, name="vllm.marlin.gptq.fp16").regions
    handed = [n for n in nodes(region.tree) if isinstance(n, Round)]
    assert [(n.type, {k // 128 for k in products(n)}) for n in handed] == [("fp16", {1, 2}), ("fp16", {2})]
    (bf16,) = marlin(replace(p, dtype=BF16), name="vllm.marlin.awq.fp16").regions
    assert {n.type for n in nodes(bf16.tree) if isinstance(n, Round)} == {"bf16"}
    assert marlin(p).hash != marlin(p, name="vllm.marlin.awq.fp16").hash
    whole = replace(p, K=128)  # one piece: nothing is handed on
    assert len({marlin(whole, name=f"vllm.marlin.awq{r}").hash for r in ("", ".fp16", ".atomic")}) == 1


def test_atomics_are_decided_for_each_launch() -> None:
    """N * ceil(rows / 64) <= 2048: of 192 rows at N=1024 the launch of 128 may, that of 192 may not."""
    name = "vllm.marlin.awq.atomic"

    def atomic_rows(p: Problem) -> list[tuple[int, int]]:
        return [r.rows for r in marlin(p, name=name).regions if any(isinstance(n, Unordered) for n in nodes(r.tree))]

    p = replace(PROBLEM, N=1024)
    assert atomic_rows(replace(p, M=128))
    assert not atomic_rows(replace(p, M=192))
    assert set(atomic_rows(replace(p, M=200))) == {(192, 200)}
    assert not atomic_rows(replace(PROBLEM, N=2112))
    r = marlin(replace(p, M=8), name=name)
    tree = r.regions[0].tree
    assert isinstance(tree, Unordered)
    assert not tree.scaled
    assert all(isinstance(n, Round) and n.type == "fp16" for n in tree.parts)
    with pytest.raises(UnsupportedError, match="a bias that one of several atomic additions carries"):
        marlin(replace(p, bias=True), name=name)


def test_whole_columns_scale_the_output() -> None:
    p = replace(PROBLEM, group_size=4096)
    r = marlin(p)
    assert (r.weights, {x.output for x in r.regions}) == ("integer", {Output(True)})
    assert marlin(PROBLEM).weights == "rounded"
    assert {x.output for x in marlin(PROBLEM).regions} == {Output()}
    atomic = marlin(replace(p, N=1024), name="vllm.marlin.gptq.atomic")
    for region in atomic.regions:  # each addend is scaled, or the one sum is
        assert region.output == Output(scale=not isinstance(region.tree, Unordered))
        assert not isinstance(region.tree, Unordered) or region.tree.scaled


def test_act_order_sorts_the_rows_and_changes_nothing_else() -> None:
    plain, sorted_rows = marlin(PROBLEM), marlin(replace(PROBLEM, act_order=True, symmetric=True), name="vllm.marlin.gptq")
    assert (plain.rows, sorted_rows.rows) == ("natural", "sorted")
    assert replace(sorted_rows, rows="natural") == plain


# Hardware


def test_gate_up_of_the_shipped_model_tells_a100_from_h100() -> None:
    """Same step or not: the partition alone differs, 108 SMs against 132."""
    p = Problem(M=16, K=512, N=2048, group_size=128, dtype=F16, symmetric=False, act_order=False)
    assert marlin(p, A100).hash != marlin(p, H100).hash
    assert marlin(p, A100).hash != marlin(p, replace(A100, sms=132)).hash
    assert marlin(p, H100).hash == marlin(p, H200).hash
    assert marlin(p, H100).hash != marlin(p, gpu("h100-pcie")).hash


def test_same_arithmetic_same_recipe() -> None:
    rng = random.Random(4)
    for _ in range(6):
        p, _ = random_problem(rng)
        assert marlin(p, H100).hash == marlin(p, H200).hash
        assert marlin(p, H100, "vllm.marlin.gptq").hash == marlin(p, H100).hash
        assert marlin(p, replace(H100, sms=108)).hash != marlin(p, A100).hash  # the step alone


def test_names() -> None:
    assert set(KERNELS) == {f"vllm.marlin.{k}{r}" for k in ("awq", "gptq") for r in ("", ".fp16", ".atomic")}


def steps(r: Recipe) -> Counter[TensorCore]:
    return Counter(n.step for x in r.regions for n in nodes(x.tree) if isinstance(n, Chain) and isinstance(n.step, TensorCore))


def test_turing_accumulates_in_fp16_where_weights_are_grouped() -> None:
    assert set(steps(marlin(PROBLEM, T4))) == {TensorCore(24, 8, -20, "fp16")}
    assert set(steps(marlin(replace(PROBLEM, group_size=4096), T4))) == {TensorCore(24, 8, -132, "fp32")}
    assert set(steps(marlin(PROBLEM, A100))) == {TensorCore(24, 8, -132, "fp32")}
    # fp16 accumulators are converted, and joined in fp32.
    (one, *_) = marlin(PROBLEM, T4).regions
    assert {n.type for n in nodes(one.tree) if isinstance(n, Join)} == {"fp32"}


# Bias


def unfused(r: Recipe) -> np.ndarray:
    """bool [M, N]: outputs whose bias is added after the scale was rounded."""
    out = np.zeros((r.M, r.N), bool)
    for region in r.regions:
        for columns in region.columns:
            out[slice(*region.rows), slice(*columns)] = region.output.bias == "added"
    return out


def test_bias_is_fused_with_the_scale_but_in_the_first_store() -> None:
    """Rows 0 to 7 of each row tile, columns 0 to 7 of each 64."""
    for m, tops in (1, [0]), (16, [0]), (40, [0]), (100, [0, 64]), (300, [0, 64, 128, 192, 256]):
        p = replace(PROBLEM, M=m, N=512, group_size=4096, bias=True)
        want = np.zeros((m, 512), bool)
        for top in tops:
            want[top : top + 8] = np.arange(512) % 64 < 8
        r = marlin(p)
        assert np.array_equal(unfused(r), want), m
        assert {x.output for x in r.regions} == ({Output(True, "added"), Output(True, "fused")})


def test_bias_elsewhere() -> None:
    whole = replace(PROBLEM, M=16, group_size=4096, bias=True)
    for p, g, want in (
        (replace(PROBLEM, bias=True), H100, Output(False, "added")),  # grouped: nothing to fuse with
        (replace(whole, dtype=BF16), A100, Output(True, "added")),  # no fused bf16 before sm_90
        (replace(whole, dtype=BF16), gpu("l40s"), Output(True, "added")),
    ):
        assert {x.output for x in marlin(p, g).regions} == {want}
    assert unfused(marlin(replace(whole, dtype=BF16), H100)).sum() == unfused(marlin(whole, A100)).sum() == 8 * 8 * 64


def test_default_build() -> None:
    assert KERNELS["vllm.marlin.awq"](PROBLEM, H100, DEFAULT) == scheme_of("vllm.marlin.awq", PROBLEM, H100)
