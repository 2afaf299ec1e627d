"""Plans executed piece by piece give the bits of their recipes' replay; pieces cover every output and every k once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from qlab.backends.registry import Problem
from qlab.errors import UnsupportedError
from qlab.gemm.balance import dealt, equal_shares, runs
from qlab.gemm.plan import Join, Launch, Plan, make_plan
from qlab.gemm.planner import Planner
from qlab.hardware import Gpu, gpu
from qlab.inputs import random_activations, random_weight
from qlab.recipes import DEFAULT, assemble, marlin, tuned
from qlab.recipes.cuda_int4 import Striped
from qlab.recipes.rules import Ranges, Warps
from qlab.recipes.scheme import Partial, Scheme
from qlab.replay import missing, replay
from qlab.weights import Int4Weight
from tests.gemm.interpreter import VARIANTS, interpret

needs_native = pytest.mark.skipif(bool(missing("native")), reason=f"the native engine cannot run: {missing('native')}")
H100, A100 = gpu("h100"), gpu("a100")
OURS = ("cuda.split", "cuda.batch_invariant")


@dataclass(frozen=True)
class Fixed(Warps):
    """So many chains in every row."""

    m: int
    count: int

    def bands(self, sms: int) -> tuple[tuple[int, int, int], ...]:
        return ((0, self.m, self.count),)

    def text(self, sms: int) -> str:
        return f"{self.count} warps"


def made(k: int, n: int, group: int, *, symmetric: bool = False, act_order: bool = False, dtype=torch.float16) -> Int4Weight:
    """Row k of the weight equals row K - 1 - k, so that with :func:`cancelling` sums nearly vanish."""
    w = random_weight(k, n, group, symmetric=symmetric, dtype=dtype, seed=3)
    codes, zeros, scales = (torch.cat([t[: -(-len(t) // 2)], t[: len(t) // 2].flip(0)]) for t in (w.codes, w.zeros, w.scales))
    order = shuffled(k) if act_order else torch.arange(k)
    return replace(w, codes=codes[order], zeros=zeros, scales=scales, group_index=w.group_index[order].contiguous())


def shuffled(k: int) -> torch.Tensor:
    return torch.randperm(k, generator=torch.Generator().manual_seed(4))


def cancelling(m: int, weight: Int4Weight) -> torch.Tensor:
    """x [m, K] whose products cancel but for a few last places: most outputs then show in which order they were added."""
    k = weight.K
    x = random_activations(m, k, dtype=weight.dtype, seed=m)
    x[:, k // 2 :] = -x[:, : -(-k // 2)].flip(1)[:, -(k - k // 2) :]
    bits = x.view(torch.int16)
    bits[:, ::37] ^= 1
    return x[:, shuffled(k)] if weight.act_order else x


def agree(scheme: Scheme, weight: Int4Weight, m: int, on: Gpu, **wish) -> Plan:
    """The plan of a scheme, after it gave the replay's bits."""
    problem = Problem.of(weight, m)
    plan = make_plan(scheme, problem, on, VARIANTS, wish)
    covered(plan, m, weight.K, weight.N)
    x = cancelling(m, weight)
    order = torch.argsort(weight.group_index, stable=True)
    q, z = weight.codes[order].float(), weight.zeros.float()[weight.group_index[order].long()]
    w = (q - z).to(weight.dtype) if plan.integer else weight.dequantize(weight.dtype)[order]
    ours = interpret(plan, x[:, order], w, weight.scales[0], on)
    theirs = replay(assemble(scheme, problem), x, weight)
    assert int((ours.view(torch.int16) != theirs.view(torch.int16)).sum()) == 0
    return plan


def covered(plan: Plan, m: int, k: int, n: int) -> None:
    """Every output and every k once; places in the workspace and ranks apart; counters within bounds."""
    products = np.zeros((m, n), np.int64)
    for launch in plan.launches:
        p = launch.pieces
        assert p.dtype == launch.starts.dtype == np.int32
        assert launch.starts[0] == 0
        assert launch.starts[-1] == len(p)
        assert (np.diff(launch.starts) > 0).all()
        assert (p[:, 2] % 64 == 0).all()
        rank, count = p[:, 7] >> 16, p[:, 7] & 0xFFFF
        assert (rank < count).all()
        joined = count > 1 if launch.cluster == 1 else np.zeros(len(p), bool)
        assert sorted((p[:, 6] + rank)[joined].tolist()) == list(range(launch.partials))
        assert ((p[:, 5] < launch.counters) == joined).all()
        assert (count == launch.cluster).all() or launch.cluster == 1
        if launch.slice_rows:  # as piece_of in csrc/int4_fragments.cuh computes them
            for block, (row, rows, column, start, stop, tile, first, place) in enumerate(p.tolist()):
                at, turn = divmod(block, launch.slices)
                assert (row, rows, column, tile, place) == (0, m, at * launch.variant.columns, at, turn << 16 | launch.slices)
                assert (start, stop) == (turn * launch.slice_rows, min((turn + 1) * launch.slice_rows, k))
                assert first == (at * launch.slices if launch.partials else 0)
        for row, rows, column, start, stop, *_ in p.tolist():
            products[row : row + rows, column : column + launch.variant.columns] += stop - start
    assert (products == k).all()


def loads(launch: Launch) -> np.ndarray:
    """Rows of K that each thread block takes."""
    lengths = launch.pieces[:, 4] - launch.pieces[:, 3]
    return np.add.reduceat(lengths, launch.starts[:-1])


MARLIN = [
    (512, 256, 128, False, False, torch.float16),
    (512, 384, 64, True, False, torch.bfloat16),
    (1024, 256, 32, False, True, torch.float16),
    (640, 192, 640, False, False, torch.float16),
    (256, 640, 256, True, False, torch.bfloat16),
    (384, 128, 128, False, False, torch.float16),
]
"""K, N, group, symmetric, act-order, dtype."""


@needs_native
@pytest.mark.parametrize("sms", [132, 108, 5, 3])
@pytest.mark.parametrize("form", MARLIN, ids=str)
def test_marlin_is_its_replay(form, sms) -> None:
    k, n, group, symmetric, act_order, dtype = form
    weight = made(k, n, group, symmetric=symmetric, act_order=act_order, dtype=dtype)
    on = replace(H100, sms=sms)
    for m in (1, 9, 16, 40, 100, 300) if k * n <= 140_000 else (1, 16, 40, 100):
        plan = agree(marlin.scheme(Problem.of(weight, m), on, DEFAULT), weight, m, on)
        assert plan.integer == (group == k)


@needs_native
@pytest.mark.parametrize("sms", [108, 4])
def test_marlin_before_hopper_runs_on_mma_alone(sms) -> None:
    weight, on = made(512, 256, 64), replace(A100, sms=sms)
    for m in (1, 40, 100):
        plan = agree(marlin.scheme(Problem.of(weight, m), on, DEFAULT), weight, m, on)
        assert {x.variant.kernel for x in plan.launches} == {"mma"}


@needs_native
def test_another_gpus_stripes_run_here() -> None:
    """An H100 executes the stripes of 108 multiprocessors; only the tensor cores must be its own."""
    weight = made(1024, 320, 128)
    for m in (1, 70):
        elsewhere = marlin.scheme(Problem.of(weight, m), A100, DEFAULT)
        step = Scheme.on(H100, elsewhere.cut)
        hybrid = replace(elsewhere, fraction_bits=step.fraction_bits, zero_exponents=step.zero_exponents, terms=step.terms)
        plan = agree(hybrid, weight, m, H100)
        assert sum(x.blocks for x in plan.launches) <= 2 * 108
        with pytest.raises(
            UnsupportedError, match=r"fused sums have F, L = \(24, 8\), and h100's tensor cores have \(25, 16\)"
        ):
            make_plan(elsewhere, Problem.of(weight, m), H100, VARIANTS)


SLICED = [
    (512, 264, 128, False, False, torch.float16),
    (416, 72, 32, False, True, torch.bfloat16),
    (320, 136, 64, True, False, torch.float16),
    (160, 64, 160, False, False, torch.float16),
    (1024, 8, 256, False, False, torch.bfloat16),
]


@needs_native
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("form", SLICED, ids=str)
def test_slices_are_their_replay(form, name) -> None:
    k, n, group, symmetric, act_order, dtype = form
    weight = made(k, n, group, symmetric=symmetric, act_order=act_order, dtype=dtype)
    planner = Planner(name)
    for m in (1, 9, 16, 17, 40, 100, 150):
        plan = agree(planner.scheme(Problem.of(weight, m), H100), weight, m, H100)
        assert not plan.integer
        assert {x.variant.kernel for x in plan.launches} == {"mma" if m <= 16 else "wgmma"}


@needs_native
@pytest.mark.parametrize("chains", [1, 2, 4])
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_chains_and_both_orders_of_joining(chains, order) -> None:
    weight = made(640, 128, 64)
    for m, slices in ((5, 1), (16, 3), (40, 2), (70, 5)):
        cut = Ranges(m, 128, tuned.ranges(640, slices))
        scheme = replace(Scheme.on(H100, cut), order=order, warps=Fixed(m, chains))
        (cluster,) = agree(scheme, weight, m, H100, cluster=slices).launches
        (default,) = agree(scheme, weight, m, H100).launches
        (memory,) = agree(scheme, weight, m, H100, cluster=0).launches
        assert (cluster.cluster, memory.cluster) == (slices, 1)
        assert (cluster.workspace, bool(memory.workspace)) == (0, slices > 1)
        assert default.cluster == (2 if slices == 2 else 1)
        # Thread blocks of mma.sync's kernel do not wait for each other.
        assert [x.join for x in (cluster, memory)] == [Join.LAST, Join.SHARED if slices > 1 and m > 16 else Join.LAST]


@needs_native
def test_a_running_total_is_the_join_of_pieces() -> None:
    weight, on = made(640, 520, 64), replace(H100, sms=4)
    scheme = Scheme.on(on, Ranges(100, 520, tuned.ranges(640, 3)))
    together = agree(scheme, weight, 100, on)
    apart = agree(scheme, weight, 100, on, total=0)
    assert [(x.variant.total, x.cut, x.partials) for x in together.launches] == [(True, 256, 0)]
    assert [(x.variant.total, x.cut, x.cluster, x.join) for x in apart.launches] == [(False, 0, 1, Join.SHARED)]
    assert agree(scheme, weight, 100, H100).launches[0].cut == 0, "the tiles alone would leave multiprocessors idle"
    assert agree(scheme, weight, 100, H100, total=1).launches[0].cut == 256
    assert agree(replace(scheme, order="descending"), weight, 100, on).launches[0].cut == 0


@needs_native
def test_one_recipe_for_every_row() -> None:
    """A row's bits do not depend on how many others there are."""
    weight = made(1024, 200, 128)
    x = cancelling(130, weight)
    planner = Planner("cuda.batch_invariant")
    want = None
    for m in (1, 2, 8, 9, 16, 17, 33, 65, 130):
        problem = Problem.of(weight, m)
        y = interpret(planner(problem, H100, VARIANTS), x[:m], weight.dequantize(torch.float16), weight.scales[0], H100)
        assert torch.equal(y, replay(assemble(planner.scheme(problem, H100), problem), x[:m], weight))
        want = y[:1] if want is None else want
        assert torch.equal(y[:1], want)


# Wishes


@pytest.mark.parametrize(
    "wish", [{"kernel": "wgmma", "rows": 16}, {"columns": 64}, {"rows": 16}, {"kernel": "mma"}, {"rows": 4096}]
)
@needs_native
def test_wishes_change_no_bit(wish) -> None:
    weight = made(256, 384, 128)
    for m in (3, 16, 40):
        scheme = Scheme.on(H100, Ranges(m, 384, tuned.ranges(256, 2)))
        (launch,) = agree(scheme, weight, m, H100, **wish).launches
        for name, value in wish.items():
            assert getattr(launch.variant, name) == value or value == 4096 or (m > 16 and name != "kernel")


def test_equal_slices_of_one_row_tile_follow_from_the_block() -> None:
    found = {}
    for m, slices in ((1, 4), (16, 1), (16, 7), (17, 3), (64, 5), (300, 2)):
        problem = Problem(m, 4096, 6144, 128, torch.float16, True, False)
        scheme = Scheme.on(H100, Ranges(m, 6144, tuned.ranges(4096, slices)))
        for order in ("ascending", "descending"):
            (launch,) = make_plan(replace(scheme, order=order), problem, H100, VARIANTS).launches
            found[m, slices, order] = launch.slice_rows
    assert found.pop((300, 2, "ascending")) == 0
    assert {key for key, rows in found.items() if not rows} == {k for k in found if k[2] == "descending" and k[1] > 1}
    assert found[16, 7, "ascending"] == 640


def test_a_marlin_tile_may_be_cut_into_narrow_ones() -> None:
    problem = Problem(64, 4096, 28672, 128, torch.float16, True, False)
    scheme = marlin.scheme(problem, H100, DEFAULT)
    (wide,), (narrow,) = (make_plan(scheme, problem, H100, VARIANTS, w).launches for w in ({}, {"columns": 128}))
    assert (wide.variant.columns, narrow.variant.columns) == (256, 128)
    assert narrow.blocks == 2 * wide.blocks
    assert sorted(loads(narrow)) == sorted([*loads(wide)] * 2)


# Balance


@pytest.mark.parametrize("shape", [(4096, 6144), (4096, 28672), (14336, 4096), (8192, 10240), (3584, 37888)], ids=str)
@pytest.mark.parametrize("m", [1, 16, 40, 256, 1000])
@pytest.mark.parametrize("sms", [132, 108])
def test_marlin_is_balanced_as_its_own_stripes(shape, m, sms) -> None:
    k, n = shape
    problem = Problem(m, k, n, 128, torch.float16, True, False)
    on = replace(H100, sms=sms)
    plan = make_plan(marlin.scheme(problem, on, DEFAULT), problem, on, VARIANTS)
    own = sum(busiest(launch, n, k, sms) for launch in marlin.launches(m, n, k, sms))
    widest = max(launch.config.thread_n for launch in marlin.launches(m, n, k, sms))
    for launch in plan.launches:
        assert launch.blocks <= sms * max(1, widest // launch.variant.columns)
        assert int(loads(launch).max()) <= 1.05 * own, "stripes of two launches in a row may not pack as tightly"


@pytest.mark.parametrize("m", [1, 16, 64, 256, 1024])
def test_marlins_tiles_of_one_size_are_one_launch(m) -> None:
    for k, n in ((4096, 4096), (4096, 6144), (18944, 3584), (4096, 28672)):
        problem = Problem(m, k, n, 128, torch.float16, True, False)
        assert len(make_plan(marlin.scheme(problem, H100, DEFAULT), problem, H100, VARIANTS).launches) == 1


def busiest(launch: marlin.Launch, n: int, k: int, sms: int) -> int:
    """Rows of K that Marlin's busiest thread block takes in a launch: whole tiles, then one stripe (marlin_template.h)."""
    tiles = n // launch.config.thread_n * max(1, launch.rows // launch.tile_rows)
    striped = tiles if tiles <= sms else tiles % sms
    if striped * 3 <= sms < tiles:
        striped += sms
    stripe = -(-k * striped // sms)
    return (tiles - striped) // sms * k + -(-stripe // 128) * 128


def test_runs_find_stripes() -> None:
    assert runs([3, 4, 1, 5, 2, 2], 3) == [(0, 2), (2, 4), (4, 6)]
    assert runs([7], 5) == [(0, 1)]
    assert runs([], 3) == []
    assert runs([1] * 10, 1) == [(0, 10)]
    generator = np.random.default_rng(0)
    for _ in range(200):
        lengths = generator.integers(1, 9, generator.integers(1, 30)).tolist()
        blocks = int(generator.integers(1, 8))
        found = runs(lengths, blocks)
        assert [i for a, b in found for i in range(a, b)] == list(range(len(lengths)))
        assert len(found) <= blocks
        longest = max(sum(lengths[a:b]) for a, b in found)
        assert longest <= -(-sum(lengths) // blocks) + max(lengths)


def test_whole_tiles_are_dealt_round() -> None:
    assert equal_shares([True] * 7 + [False] * 2 + [True] * 3, 3) == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    assert equal_shares([False, True], 2) == []
    assert dealt(4, [5, 5, 5], 2) == [[0, 2, 4, 5], [1, 3, 6]]
    assert dealt(0, [1, 1], 2) == [[0], [1]]
    assert dealt(4, [], 2) == [[0, 2], [1, 3]]


# Refusals


def test_schemes_that_cannot_be_planned_say_why() -> None:
    problem = Problem(4, 512, 128, 128, torch.float16, True, False)
    scheme = Scheme.on(H100, Ranges(4, 128, tuned.ranges(512, 2)))
    cases = [
        (replace(scheme, unit="fma"), problem, "only tensor cores with fp32 accumulators are planned, not fma with fp32"),
        (replace(scheme, accumulator="fp16"), problem, "only tensor cores with fp32"),
        (replace(scheme, weights="fused"), problem, "not fused with it on the weight"),
        (replace(scheme, weights="integer", scale="output"), problem, "integers need one scale a column"),
        (replace(scheme, k_width=4), problem, "kWidth 4 permutes"),
        (replace(scheme, order="torch.sum"), problem, "not torch.sum in fp32"),
        (replace(scheme, partial=Partial("total", "fp16")), problem, "joined in fp32 up or down without a rounding"),
        (scheme, replace(problem, act_order=True), "rows are stored sorted by group"),
        (scheme, replace(problem, N=12), "N=12 is not a multiple of 8"),
        (
            scheme,
            replace(problem, group_size=96),
            "groups of 96 rows are neither 32, 64, a multiple of 128 nor the whole column",
        ),
        (replace(scheme, cut=Ranges(4, 128, ((0, 40), (40, 512)))), problem, "pieces of whole turns of 32 rows"),
        (replace(scheme, warps=Fixed(4, 4), cut=Ranges(4, 128, ((0, 64), (64, 512)))), problem, "whole turns of 128 rows"),
        (replace(scheme, warps=Fixed(4, 8)), problem, "no variant has tiles for columns 0 to 128 with 8 accumulators"),
    ]
    for wrong, asked, said in cases:
        with pytest.raises(UnsupportedError, match=said) as raised:
            make_plan(wrong, asked, H100, VARIANTS)
        assert "\n" not in str(raised.value)


# Planted faults


@needs_native
@pytest.mark.parametrize("fault", ["rank", "first", "k", "chain", "column", "cut"])
def test_a_planted_fault_shows(fault) -> None:
    weight, m, on = made(1024, 128, 128), 40, H100
    problem = Problem.of(weight, m)
    scheme = marlin.scheme(problem, on, DEFAULT)
    if fault == "cut":
        scheme = Scheme.on(on, Ranges(m, 128, tuned.ranges(1024, 4)))
    (launch,) = make_plan(scheme, problem, on, VARIANTS, {"total": 1} if fault == "cut" else {"cluster": 0}).launches
    pieces = launch.pieces.copy()
    count = pieces[:, 7] & 0xFFFF
    several = np.flatnonzero(count > 2)
    if fault == "rank":
        pieces[several, 7] = (count[several] - 1 - (pieces[several, 7] >> 16)) << 16 | count[several]
    elif fault == "first":
        pieces[several, 6] = pieces[several[0], 6]
    elif fault == "k":
        inner = several[pieces[several, 3] > 0][0]
        pieces[inner, 3] -= 64
    elif fault == "column":
        pieces[several[0], 2] = 64 - pieces[several[0], 2]
    wrong = replace(launch, pieces=pieces)
    if fault == "chain":
        wrong = replace(launch, variant=launch.variant._replace(chains=1 if launch.variant.chains > 1 else 2))
    if fault == "cut":
        wrong = replace(launch, cut=512)
    x = cancelling(m, weight)
    want = replay(assemble(scheme, problem), x, weight)
    w, s = weight.dequantize(torch.float16), weight.scales[0]
    assert torch.equal(interpret(Plan((launch,), False), x, w, s, on), want)
    try:
        found = interpret(Plan((wrong,), False), x, w, s, on)
    except AssertionError:
        return
    assert not torch.equal(found, want)


@needs_native
@pytest.mark.parametrize(
    ("m", "n", "sms", "tile", "per_sm"),
    [
        *((m, n, sms, ("wgmma", 64, 256), 1) for m, n, sms in ((40, 600, 4), (300, 520, 4), (150, 264, 16), (64, 256, 132))),
        *((m, n, sms, ("mma", 16, 64), 4) for m, n, sms in ((5, 600, 4), (16, 264, 16), (40, 520, 2))),
    ],
)
def test_stripes_of_our_own_are_their_replay(m, n, sms, tile, per_sm) -> None:
    weight, on = made(1152, n, 128), replace(H100, sms=sms)
    kernel, rows, columns = tile
    scheme = Scheme.on(on, Striped(m, 1152, n, rows, columns, per_sm))
    (launch,) = agree(scheme, weight, m, on, kernel=kernel, rows=rows, columns=columns).launches
    assert launch.variant[:3] == tile
    work = [(launch.pieces[a:b, 4] - launch.pieces[a:b, 3]).sum() for a, b in pairwise(launch.starts)]
    assert launch.blocks <= sms * per_sm
    assert max(work) <= -(-9 * -(-m // rows) * -(-n // columns) // (sms * per_sm)) * 128
