"""The INT4 GEMMs' own device code on the CPU: not one bit from the replay, and faults planted in it are seen."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlab.backends.registry import Problem
from qlab.compare import differing_bits
from qlab.gemm.plan import Join, Plan, make_plan
from qlab.gemm.tiles import Variant
from qlab.hardware import Gpu, gpu
from qlab.packing import fragments
from qlab.recipes import DEFAULT, assemble, marlin, tuned
from qlab.recipes.cuda_int4 import Striped
from qlab.recipes.rules import Ranges
from qlab.recipes.scheme import Scheme
from qlab.replay import missing, replay
from qlab.weights import Int4Weight
from tests.gemm.emulated import CSRC
from tests.gemm.emulated_int4 import MMA, ONE, WGMMA, Library
from tests.gemm.test_plan import Fixed, cancelling, made

pytestmark = pytest.mark.skipif(bool(missing("native")), reason=f"the native engine cannot run: {missing('native')}")
H100, A100 = gpu("h100"), gpu("a100")


@pytest.fixture(scope="session")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("hopper"), True)


@pytest.fixture(scope="session")
def ampere(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("ampere"), False)


def agree(library: Library, scheme: Scheme, plan: Plan, weight: Int4Weight, m: int, on: Gpu, teams: int = 1) -> None:
    x = cancelling(m, weight)
    y = library.run(plan, x, fragments.pack(weight), on, teams, seed=m)
    assert differing_bits(y, replay(assemble(scheme, Problem.of(weight, m)), x, weight)) == 0


def planned(variant: Variant, weight: Int4Weight, m: int, on: Gpu, slices: int, **wish: int) -> tuple[Scheme, Plan]:
    """Slices of K, in each as many chains as the variant has."""
    problem = Problem.of(weight, m)
    cut = Ranges(m, weight.N, tuned.ranges(weight.K, slices))
    rows = "sorted" if weight.act_order else "natural"
    scheme = replace(Scheme.on(on, cut), warps=Fixed(m, variant.chains), rows=rows)
    plan = make_plan(scheme, problem, on, (variant,), {"total": int(variant.total), "cluster": 0, **wish})
    assert [x.variant for x in plan.launches] == [variant]
    return scheme, plan


FORMS = [(128, True, False, torch.float16), (64, False, True, torch.bfloat16), (32, True, False, torch.float16)]
"""Group, symmetric, act-order, dtype."""


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("rows", "chains", "teams"), MMA)
@pytest.mark.parametrize("generation", ["hopper", "ampere"])
def test_few_rows(generation, rows, chains, teams, form, request: pytest.FixtureRequest) -> None:
    """K of whole steps and of parts of them; joined by a workspace and, on Hopper, by a cluster."""
    group, symmetric, act_order, dtype = form
    library, on = request.getfixturevalue(generation), H100 if generation == "hopper" else A100
    variant = Variant("mma", rows, 64, chains, False, 0)
    for k, n, m, slices, cluster in ((1344, 72, rows - 1, 2, 2), (768, 136, rows + 1, 1, 0), (640, 64, 1, 5, 0)):
        if k % group or (act_order and n == 64):
            k, n = 1280, 64
        weight = made(k, n, group, symmetric=symmetric, act_order=act_order, dtype=dtype)
        scheme, plan = planned(variant, weight, m, on, slices, cluster=cluster)
        agree(library, scheme, plan, weight, m, on, teams)


@pytest.mark.parametrize(("rows", "columns", "chains", "total"), WGMMA)
def test_many_rows(rows, columns, chains, total, hopper: Library) -> None:
    variant = Variant("wgmma", rows, columns, chains, total, 0)
    for group, symmetric, dtype, cluster in ((128, True, torch.float16, 0), (32, False, torch.bfloat16, 2)):
        k, n = 640 if total else 384 * chains, columns + 72
        weight = made(k, n, group, symmetric=symmetric, dtype=dtype)
        m = min(rows + 3, 131) if rows < 256 else rows + 3
        scheme, plan = planned(variant, weight, m, H100, 2 if k // 2 % (128 * chains) == 0 else 3, cluster=cluster)
        agree(hopper, scheme, plan, weight, m, H100)


@pytest.mark.parametrize("generation", ["hopper", "ampere"])
@pytest.mark.parametrize("group", [128, 1024])
def test_marlins_stripes(generation, group, request: pytest.FixtureRequest) -> None:
    """Pieces that end anywhere, several to a thread block; a whole column is multiplied as integers."""
    library, on = request.getfixturevalue(generation), replace(H100 if generation == "hopper" else A100, sms=3)
    weight = made(1024, 256, group, symmetric=True)
    for m in (1, 16):
        problem = Problem.of(weight, m)
        scheme = marlin.scheme(problem, on, DEFAULT)
        variants = tuple(Variant("mma", rows, 64, chains, False, 0) for rows, chains, _ in MMA)
        plan = make_plan(scheme, problem, on, variants)
        (launch,) = plan.launches
        agree(library, scheme, plan, weight, m, on, next(t for r, c, t in MMA if (r, c) == launch.variant[1:4:2]))


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize(("rows", "columns", "chains", "total"), [v for v in WGMMA if not v[3]])
def test_stripes_of_many_rows(rows, columns, chains, total, order, hopper: Library) -> None:
    """Thread blocks that run at once end with a tile's first rows of K and add the others' sums to their own."""
    variant, joins = Variant("wgmma", rows, columns, chains, total, 0), []
    for m, n, k, sms in ((rows + 3, columns + 8, 1024, 3), (rows - 1, columns + 64, 1536, 5), (rows - 1, columns, 1536, 3)):
        on, weight = replace(H100, sms=sms), made(k, n, 64)
        scheme = replace(Scheme.on(on, Striped(m, k, n, rows, columns)), warps=Fixed(m, chains), order=order)
        plan = make_plan(scheme, Problem.of(weight, m), on, (variant,))
        joins += [x.join for x in plan.launches]
        agree(hopper, scheme, plan, weight, m, on)
    assert joins == [Join.FIRST, Join.FIRST if order == "ascending" else Join.LAST, Join.SHARED]


FAULTS = {
    "a stage is filled too early": ("        __syncthreads();  // everyone is done with the last stage\n", ""),
    "nobody waits for x": ("        barrier_wait(full + 8 * stage, phase);\n", ""),
    "chunks of another chain": ("acc[i % S::kOwnChains][j], w, x[j][0]", "acc[(i + 1) % S::kOwnChains][j], w, x[j][0]"),
    "the next columns' scales": ("(from + scales_behind)", "(from + scales_behind + 4)"),
    "a slice is left out": ("for (int r = 1; r < p.count(); ++r)", "for (int r = 2; r < p.count(); ++r)"),
    "the first piece's row": ("p.row + 8 * j, p.row + p.rows", "8 * j, p.row + p.rows"),
}
"""What is replaced in int4_mma.cuh, and by what, in turn."""
WGMMA_FAULTS = {
    "nobody waits for the other sums": (
        "if (thread == 0) wait_for(p.count() - 1), *counter = 0;",
        "if (thread == 0) *counter = 0;",
    ),
    "the other sums are not waited for in shared memory": ("                barrier_wait(joining, phase);\n", ""),
    "a stage is filled too early": (
        *(
            "            set_groups();\n",
            "            if (lane == 0) barrier_arrive(ring.empty_barrier());\n            set_groups();\n",
        ),
        *("            behind = ring.empty_barrier();\n", ""),
    ),
    "nobody waits for a stage": ("            ring.wait_full();\n", ""),
    "the second half has the codes of the first": ("load_codes(1);", "load_codes(1), codes[1][0][0] = codes[0][0][0];"),
    "scales of another 16 columns": ("- warp * 224 - lane", "- warp * 256 - lane"),
    "the other warpgroup's columns": ("group * S::kOwnTiles * kBlockColumns)", "(group ^ 1) * S::kOwnTiles * kBlockColumns)"),
}
"""The same for int4_wgmma.cuh."""


@pytest.mark.parametrize(("kernel", "fault"), [*(("mma", f) for f in FAULTS), *(("wgmma", f) for f in WGMMA_FAULTS)])
def test_a_planted_fault_is_seen(kernel, fault, tmp_path: Path) -> None:
    replaced = (FAULTS if kernel == "mma" else WGMMA_FAULTS)[fault]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    file = csrc / f"int4_{kernel}.cuh"
    text = file.read_text()
    for right, wrong in pairs(replaced):
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    file.write_text(text)
    library = Library(tmp_path / "faulty", True, csrc, one=kernel)
    assert any(differing(library, kernel, seed) for seed in range(4))


def pairs(texts: tuple[str, ...]) -> list[tuple[str, str]]:
    return list(zip(texts[::2], texts[1::2], strict=True))


def differing(library: Library, kernel: str, seed: int) -> int:
    """Bits, between what the library's only variant computes and the replay; 1 where it does not even end well."""
    if kernel == "mma":
        rows, chains, _ = ONE
        weight = made(2560, 64, 128)
        problems = [
            (m, H100, *planned(Variant("mma", rows, 64, chains, False, 0), weight, m, H100, s)) for m, s in ((16, 5), (21, 1))
        ]
    else:
        rows, columns, *rest = WGMMA[0]
        on, m = replace(H100, sms=5), rows
        weight = made(4096, columns + 8, 128)
        scheme = Scheme.on(on, Striped(m, weight.K, weight.N, rows, columns))
        plan = make_plan(scheme, Problem.of(weight, m), on, (Variant("wgmma", rows, columns, *rest, 0),))
        assert [x.join for x in plan.launches] == [Join.FIRST]
        problems = [(m, on, scheme, plan)]
    seen = 0
    for m, on, scheme, plan in problems:
        x = cancelling(m, weight)
        try:
            y = library.run(plan, x, fragments.pack(weight), on, ONE[2], seed)
        except AssertionError:  # somebody waits for ever, or a counter is not zero
            return 1
        seen += differing_bits(y, replay(assemble(scheme, Problem.of(weight, m)), x, weight))
    return seen
