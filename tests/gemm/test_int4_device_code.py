"""The INT4 GEMMs' own device code on the CPU: not one bit from the replay, and faults planted in it are seen."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlab.backends.registry import Problem
from qlab.compare import differing_bits
from qlab.gemm.plan import Plan, make_plan
from qlab.gemm.tiles import Variant
from qlab.hardware import Gpu, gpu
from qlab.packing import fragments
from qlab.recipes import DEFAULT, assemble, marlin, tuned
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
        k, n = 384 * chains, columns + 72
        weight = made(k, n, group, symmetric=symmetric, dtype=dtype)
        m = min(rows + 3, 131)
        scheme, plan = planned(variant, weight, m, H100, 2 if k // 2 % (128 * chains) == 0 or total else 3, cluster=cluster)
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


FAULTS = {
    "a stage is filled too early": ("        __syncthreads();  // everyone is done with the last stage\n", ""),
    "nobody waits for x": ("        barrier_wait(full + 8 * stage, phase);\n", ""),
    "chunks of another chain": ("acc[i % S::kOwnChains][j], w, x[j][0]", "acc[(i + 1) % S::kOwnChains][j], w, x[j][0]"),
    "the next columns' scales": ("(from + scales_behind)", "(from + scales_behind + 4)"),
    "a slice is left out": ("for (int r = 1; r < p.count(); ++r)", "for (int r = 2; r < p.count(); ++r)"),
    "the first piece's row": ("p.row + 8 * j, p.row + p.rows", "8 * j, p.row + p.rows"),
}
"""What is replaced in int4_mma.cuh, and by what."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, tmp_path: Path) -> None:
    right, wrong = FAULTS[fault]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    text = (csrc / "int4_mma.cuh").read_text()
    assert text.count(right) == 1
    (csrc / "int4_mma.cuh").write_text(text.replace(right, wrong))
    library = Library(tmp_path / "faulty", True, csrc, one=True)
    rows, chains, teams = ONE
    weight, seen = made(2560, 64, 128), 0
    for m, slices in ((16, 5), (21, 1)):
        scheme, plan = planned(Variant("mma", rows, 64, chains, False, 0), weight, m, H100, slices)
        x = cancelling(m, weight)
        for seed in range(4):
            y = library.run(plan, x, fragments.pack(weight), H100, teams, seed)
            seen += differing_bits(y, replay(assemble(scheme, Problem.of(weight, m)), x, weight))
    assert seen
