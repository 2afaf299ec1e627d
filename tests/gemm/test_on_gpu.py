"""qlab's CUDA kernels on a GPU: every rung of the ladder, and not one bit away from the replay of their recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from qlab.backends.registry import Problem, kernel
from qlab.compare import differing_bits
from qlab.errors import UnsupportedError
from qlab.gemm import launch
from qlab.gemm.plan import Join, Plan, make_plan
from qlab.gemm.tiles import Variant
from qlab.hardware import Gpu, detect
from qlab.inputs import random_activations
from qlab.packing import fragments
from qlab.recipes import assemble, recipe, tuned
from qlab.recipes.cuda_int4 import Striped
from qlab.recipes.rules import Ranges
from qlab.recipes.scheme import Scheme
from qlab.replay import replay
from tests.gemm.test_plan import Fixed, cancelling, made
from tests.ladder import RUNGS, Case, climb

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(launch.reason()), reason=f"the INT4 kernels cannot run: {launch.reason()}"),
]
NAMES = ("cuda.marlin", "cuda.split", "cuda.batch_invariant")
CUDA = torch.device("cuda")
DTYPES = (torch.float16, torch.bfloat16)
ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 130, 300)
CASES = [
    Case(16, 256, 256, 128),
    Case(8, 2048, 128, 64),
    Case(64, 1024, 1024, 32),
    Case(33, 256, 384, 64, act_order=True),
    Case(100, 1024, 256, 128),
]
"""As the peers' (tests.expected_rungs), but for the whole column, whose sum Marlin rounds before it is scaled."""
RAGGED = [Case(16, 416, 72, 32), Case(40, 320, 264, 320), Case(3, 160, 8, 32, act_order=True), Case(70, 768, 136, 256)]
FORMS = [
    (1024, 512, 128, False, False),
    (512, 384, 64, True, False),
    (1024, 256, 32, False, True),
    (640, 192, 640, False, False),
    (4096, 1024, 128, False, False),
    (2048, 11008, 128, True, False),
]
"""K, N, group, symmetric, act-order."""


def asked(name: str, weight, m: int):
    """The recipe of a kernel on this GPU, or a skip with the reason where it refuses the weight."""
    problem = Problem.of(weight, m)
    support = kernel(name).supports(problem, CUDA)
    if not support.ok:
        pytest.skip(support.reason)
    gpu = detect()
    assert gpu is not None
    return recipe(name, problem, gpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=("fp16", "bf16"))
@pytest.mark.parametrize("case", [*CASES, *RAGGED], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_rung(name: str, case: Case, dtype: torch.dtype) -> None:
    results = list(climb(kernel(name), case, dtype, CUDA))
    assert len(results) == len(RUNGS)
    if name == "cuda.marlin" and case in RAGGED:
        assert {r.status for r in results} <= {"refused"} or case.n % 64 == 0, results
    else:
        assert [r for r in results if r.status != "passed"] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=("fp16", "bf16"))
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_not_one_bit_from_the_replay(name: str, form: tuple[int, int, int, bool, bool], dtype: torch.dtype) -> None:
    k, n, group, symmetric, act_order = form
    weight = made(k, n, group, symmetric=symmetric, act_order=act_order, dtype=dtype).to("cuda")
    packed = kernel(name).pack(weight)
    for m in ROWS:
        for x in (cancelling(m, weight.to("cpu")).cuda(), random_activations(m, k, dtype=dtype, seed=m).cuda()):
            y = kernel(name).run(x, packed)
            assert differing_bits(y, replay(asked(name, weight, m), x, weight)) == 0, f"M={m}"


@dataclass(frozen=True)
class Only:
    """Plans with one variant: slices of K, in each as many chains as the variant has."""

    variant: Variant
    slices: int
    cluster: int = 0

    def scheme(self, problem: Problem, gpu: Gpu) -> Scheme:
        cut = Ranges(problem.M, problem.N, tuned.ranges(problem.K, self.slices))
        return replace(
            Scheme.on(gpu, cut), warps=Fixed(problem.M, self.variant.chains), rows="sorted" if problem.act_order else "natural"
        )

    def __call__(self, problem: Problem, gpu: Gpu, variants: tuple[Variant, ...]) -> Plan:
        wish = {"total": int(self.variant.total), "cluster": self.cluster}
        plan = make_plan(self.scheme(problem, gpu), problem, gpu, (self.variant,), wish)
        assert [x.variant for x in plan.launches] == [self.variant]
        return plan


@pytest.mark.parametrize("dtype", DTYPES, ids=("fp16", "bf16"))
@pytest.mark.parametrize("variant", [] if launch.reason() else launch.variants(), ids=str)
def test_every_variant_computes_its_recipe(variant: Variant, dtype: torch.dtype) -> None:
    # Few tiles, more than multiprocessors, more than two for each: teams of warps differ. Groups of 32 and zero points as well.
    for n, slices, group, symmetric in ((600, 3, 128, True), (4104, 3, 64, False), (9608, 2, 128, False), (72, 2, 32, True)):
        weight = made(1280, n, group, symmetric=symmetric, act_order=n == 600, dtype=dtype).to("cuda")
        t = fragments.pack(weight)
        tensors = {"blocks": launch.written(t.blocks), "column_scales": t.column_scales, "perm": t.perm}
        for cluster in (0, slices) if variant.kernel == "mma" else (0, 2):
            planner = Only(variant, slices, cluster)
            for m in (1, variant.rows - 1, variant.rows + 5):
                x = cancelling(m, weight.to("cpu")).cuda()
                y = launch.run(x, tensors, Problem.of(weight, 0), planner)
                problem = Problem.of(weight, m)
                said = assemble(planner.scheme(problem, launch.gpu(0)), problem)
                assert differing_bits(y, replay(said, x, weight)) == 0, f"M={m}, N={n}, cluster {cluster}"


@dataclass(frozen=True)
class Stripes:
    """Plans with one variant and equal stripes over all SMs."""

    variant: Variant
    order: str

    def scheme(self, problem: Problem, gpu: Gpu) -> Scheme:
        v = self.variant
        cut = Striped(problem.M, problem.K, problem.N, v.rows, v.columns, v.per_sm)
        return replace(Scheme.on(gpu, cut), warps=Fixed(problem.M, v.chains), order=self.order)

    def __call__(self, problem: Problem, gpu: Gpu, variants: tuple[Variant, ...]) -> Plan:
        return make_plan(self.scheme(problem, gpu), problem, gpu, (self.variant,))


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize(
    "variant", [] if launch.reason() else [v for v in launch.variants() if v.kernel == "wgmma" and not v.total], ids=str
)
def test_stripes_are_their_replay_also_on_streams_side_by_side(variant: Variant, order: str) -> None:
    planner, m = Stripes(variant, order), variant.rows + 5
    weight = made(4096, 150 * variant.columns // 2 + 8, 64).to("cuda")
    t = fragments.pack(weight)
    tensors = {"blocks": launch.written(t.blocks), "column_scales": t.column_scales, "perm": t.perm}
    x = cancelling(m, weight.to("cpu")).cuda()
    want = launch.run(x, tensors, Problem.of(weight, 0), planner)
    (made_launch,) = planner(Problem.of(weight, m), launch.gpu(0), ()).launches
    if order == "ascending":
        assert made_launch.join == Join.FIRST
    said = assemble(planner.scheme(Problem.of(weight, m), launch.gpu(0)), Problem.of(weight, m))
    assert differing_bits(want, replay(said, x, weight)) == 0
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    for _ in range(20):
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found += [launch.run(x, tensors, Problem.of(weight, 0), planner) for _ in range(2)]
        torch.cuda.synchronize()
        assert all(torch.equal(y, want) for y in found)


@pytest.mark.parametrize("name", NAMES)
def test_calls_in_a_row_leave_the_counters_zero(name: str) -> None:
    weight = made(4096, 512, 128).to("cuda")
    packed = kernel(name).pack(weight)
    xs = [random_activations(m, 4096, seed=m).cuda() for m in (1, 16, 40, 130)]
    first = [kernel(name).run(x, packed) for x in xs]
    for _ in range(50):
        for x, y in zip(xs, first, strict=True):
            assert torch.equal(kernel(name).run(x, packed), y)


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_gives_the_same_bits_again_and_again(name: str) -> None:
    weight = made(2048, 512, 64).to("cuda")
    packed = kernel(name).pack(weight)
    for m in (1, 16, 40, 130):
        x = random_activations(m, 2048, seed=m).cuda()
        want = kernel(name).run(x, packed)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ys = [kernel(name).run(x, packed) for _ in range(3)]
        for _ in range(5):
            graph.replay()
            assert all(torch.equal(y, want) for y in ys)
        x.copy_(random_activations(m, 2048, seed=m + 1))
        graph.replay()
        assert torch.equal(ys[2], kernel(name).run(x, packed))


def test_a_first_call_inside_a_capture_is_refused() -> None:
    weight = made(512, 128, 64).to("cuda")
    packed = kernel("cuda.split").pack(weight)
    x = random_activations(11, 512).cuda()
    kernel("cuda.split").run(x[:1], packed)
    graph = torch.cuda.CUDAGraph()
    said = []
    with torch.cuda.graph(graph):
        try:
            kernel("cuda.split").run(x, packed)
        except UnsupportedError as e:
            said.append(str(e))
        x + 1
    assert said == ["a call with M=11 was captured in a CUDA graph before it was made once: make it first"]


@pytest.mark.parametrize("name", NAMES)
def test_two_streams_at_once(name: str) -> None:
    weight = made(4096, 256, 128).to("cuda")
    packed = kernel(name).pack(weight)
    xs = [random_activations(m, 4096, seed=m).cuda() for m in (1, 9, 40, 64)]
    want = [kernel(name).run(x, packed) for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    for _ in range(20):
        found = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found += [(j, kernel(name).run(xs[j], packed)) for j in (i, (i + 1) % 4)]
        torch.cuda.synchronize()
        assert all(torch.equal(y, want[j]) for j, y in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=("fp16", "bf16"))
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    for k, n in ((4096, 1024), (1024, 4608)):
        weight = made(k, n, 128, dtype=dtype).to("cuda")
        run, packed = kernel("cuda.batch_invariant").run, kernel("cuda.batch_invariant").pack(weight)
        x = random_activations(1024, k, dtype=dtype, seed=3).cuda()
        alone = torch.cat([run(x[i : i + 1], packed) for i in range(0, 1024, 93)])
        for m in (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 200, 256, 512, 1024):
            order = torch.randperm(m, generator=torch.Generator().manual_seed(m)).cuda()
            whole = run(x[:m], packed)
            assert torch.equal(run(x[:m][order], packed), whole[order]), m
            assert torch.equal(whole[::93], alone[: len(whole[::93])]), m
            poisoned = x[:m].clone()
            poisoned[1::2] = float("nan")
            assert torch.equal(run(poisoned, packed)[::2], whole[::2]), m


def test_rows_at_odd_addresses_are_copied() -> None:
    weight = made(512, 128, 64).to("cuda")
    run, packed = kernel("cuda.split").run, kernel("cuda.split").pack(weight)
    x = random_activations(20, 512, seed=1).cuda()
    want = run(x, packed)
    for offset, stride in ((1, 513), (8, 520), (3, 600), (0, 512), (4, 528)):
        wide = torch.full((20 * stride + 16,), float("nan"), dtype=x.dtype, device="cuda")
        view = wide[offset:].as_strided((20, 512), (stride, 1))
        view.copy_(x)
        assert torch.equal(run(view, packed), want), (offset, stride)
    assert torch.equal(run(x[:1].expand(20, 512), packed), run(x[:1].repeat(20, 1), packed))
    assert tuple(run(x[:0], packed).shape) == (0, 128)
