"""Maps of recipes: classes hold what replay says bit for bit, and what vLLM and the recorded experiment say."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlab import environment
from qlab.attribution import maps
from qlab.attribution.forms import form
from qlab.attribution.map_result import SCHEMA, Map, Strip
from qlab.attribution.maps import map_recipes, parse_values
from qlab.backends.registry import Problem
from qlab.errors import QlabError
from qlab.hardware import Gpu, gpu
from qlab.inputs import random_activations, random_weight
from qlab.recipe import chain, nodes
from qlab.recipes import recipe
from qlab.replay import replay
from qlab.replay.rows import at_rows
from qlab.serial import read_json, write_json
from qlab.weights import Int4Weight

HERE = environment.collect(details=False)
H100, A100 = gpu("h100"), gpu("a100")
FEW_SMS = replace(H100, sms=10)
"""So few that a small problem is cut into stripes."""
K, N = 1024, 512
VALUES = (1, 16, 17, 64, 65, 128, 129, 200, 257)


def problem(m: int = 1, k: int = 4096, n: int = 4096, **changes: Any) -> Problem:
    return replace(Problem(m, k, n, 128, torch.float16, symmetric=True, act_order=False), **changes)


def strip(kernel: str, axis: Any, values: Any, p: Problem | None = None, on: Gpu = H100) -> Strip:
    found = map_recipes([kernel], axis, values, p or problem(), on, environment=HERE)
    return found.strips[0]


def mirrored() -> tuple[Int4Weight, torch.Tensor]:
    """A weight whose rows k and K-1-k are equal and a row of x that is almost opposite there: every output is a small rest
    of large sums, so that another order of summation changes its bits."""
    w = random_weight(K, N, 128, symmetric=True, seed=3)
    half, groups = K // 2, w.groups // 2
    w = replace(
        w,
        codes=torch.cat([w.codes[:half], w.codes[:half].flip(0)]),
        scales=torch.cat([w.scales[:groups], w.scales[:groups].flip(0)]),
    )
    x = random_activations(1, K, seed=4)[0] * 64
    x[half:] = -x[:half].flip(0)
    return w, x + random_activations(1, K, seed=5)[0]


def disagreements(kernel: str, on: Gpu) -> int:
    """Pairs of places (M, row) whose classes and whose replayed bits do not say the same."""
    w, row = mirrored()
    p = problem(k=K, n=N)
    found = strip(kernel, "M", VALUES, p, on)
    bits: dict[tuple[int, int], bytes] = {}
    classes: dict[tuple[int, int], int] = {}
    for point in found.points:
        r = recipe(kernel, replace(p, M=point.value), on)
        start = 0
        for count, function in point.rows:
            for at in {start, start + count // 2, start + count - 1}:
                alone = replay(at_rows(r, [at]), row[None], w)
                bits[point.value, at], classes[point.value, at] = alone.numpy().tobytes(), function
            start += count
        assert start == point.value
    places = list(bits)
    return sum((classes[a] == classes[b]) != (bits[a] == bits[b]) for a in places for b in places)


@pytest.mark.parametrize("kernel", ["vllm.marlin.awq", "vllm.marlin.awq.fp16", "vllm.machete.awq", "vllm.awq_gemm"])
@pytest.mark.parametrize("on", [FEW_SMS, H100], ids=["10 SMs", "h100"])
def test_rows_of_one_class_have_equal_bits_and_rows_of_two_have_not(kernel: str, on: Gpu) -> None:
    assert disagreements(kernel, on) == 0
    few = strip(kernel, "M", VALUES, problem(k=K, n=N), FEW_SMS)
    assert (len(few.functions) > 1) == (kernel != "vllm.awq_gemm")


def test_a_row_of_a_whole_call_keeps_the_bits_that_it_has_alone() -> None:
    w, row = mirrored()
    p = problem(k=K, n=N)
    found = strip("vllm.marlin.awq", "M", VALUES, p, FEW_SMS)
    alone = replay(recipe("vllm.marlin.awq", p, FEW_SMS), row[None], w)[0]
    said = set()
    for point in found.points:
        x = random_activations(point.value, K, seed=point.value)
        x[0] = row
        y = replay(recipe("vllm.marlin.awq", replace(p, M=point.value), FEW_SMS), x, w)[0]
        assert bool((y.view(torch.int16) == alone.view(torch.int16)).all()) == point.same
        assert bool(point.changed) != point.same
        said.add(point.same)
    assert said == {True, False}


def test_a_class_that_ignores_the_trees_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "key", lambda tree: "a sum")
    assert disagreements("vllm.marlin.awq", FEW_SMS) > 0
    assert classes_by_rows("vllm.marlin.awq") > 0


def test_a_class_of_the_first_column_alone_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = maps._Mapper._function
    monkeypatch.setattr(maps._Mapper, "_function", lambda self, call, row: whole(self, call, (replace(row[0], stop=1),)))
    assert classes_by_rows("vllm.machete.awq", problem(), H100) > 0


def classes_by_rows(kernel: str, p: Problem | None = None, on: Gpu = FEW_SMS) -> int:
    """Classes that the recipes of single rows, made by qlab.replay.rows, tell apart and the map does not, or the other way."""
    p = p or problem(k=K, n=N)
    found = strip(kernel, "M", (1, 8, 9, 30, 70, 130, 200), p, on)
    hashes: dict[int, set[str]] = defaultdict(set)
    for point in found.points:
        r = recipe(kernel, replace(p, M=point.value), on)
        functions = [f for count, f in point.rows for _ in range(count)]
        for at in range(0, point.value, 3):
            hashes[functions[at]].add(at_rows(r, [at]).hash)
    every = [h for of in hashes.values() for h in of]
    return sum(len(of) - 1 for of in hashes.values()) + len(every) - len(set(every))


@pytest.mark.parametrize(
    "changes", [{}, {"bias": True, "group_size": K}, {"act_order": True}], ids=["plain", "bias", "act-order"]
)
@pytest.mark.parametrize("kernel", ["vllm.marlin.gptq", "vllm.machete.gptq"])
def test_classes_are_those_of_single_rows_recipes(kernel: str, changes: dict[str, Any]) -> None:
    assert classes_by_rows(kernel, problem(k=K, n=N, **changes)) == 0


def test_kernels_that_no_batch_changes_have_one_class() -> None:
    for kernel in ("vllm.awq_gemm", "vllm.awq_triton", "triton.awq_gemm", "triton.awq_gemm.splitk", "triton.gptq_gemm.v2"):
        found = strip(kernel, "M", parse_values("1:512:7"))
        assert (found.classes, len(found.functions)) == (1, 1)
        assert all(p.same and p.changed == 0 for p in found.points)
        assert found.rows_as_at(1) == 1


def test_marlin_is_not_batch_invariant_as_vllm_says() -> None:
    found = strip("vllm.marlin.awq", "M", parse_values("1:512:3"), on=A100)
    assert found.classes > 4
    assert found.ranges[0].last == 16  # one block of 16 rows
    assert found.at(1).same
    assert not found.at(19).same
    assert found.at(19).changed
    assert 0 < found.rows_as_at(1) < 0.1


def test_the_shipped_models_tokens_in_another_batch_are_as_the_experiment_recorded() -> None:
    """docs/log-probabilities.md: up to 50 tokens at once change nothing, 131 in one piece are another function for Marlin."""
    kept = {50: [], 131: []}  # type: ignore[var-annotated]
    for k, n in ((512, 1024), (512, 512), (512, 2048), (1024, 512)):
        for kernel in ("vllm.marlin.awq", "vllm.marlin.gptq", "vllm.awq_gemm"):
            found = strip(kernel, "M", (1, 4, 50, 131), problem(k=k, n=n))
            assert found.at(4).same
            for m in kept:
                kept[m].append((kernel.split(".")[1], bool(found.at(m).same)))
    assert all(same for _, same in kept[50])
    assert {kernel for kernel, same in kept[131] if not same} == {"marlin"}


def test_a_label_changes_its_kernel() -> None:
    found = strip("awq", "M", (1, 255, 256, 300))
    assert [(r.first, r.last, r.function) for r in found.ranges] == [(1, 255, 0), (256, 300, 1)]
    assert [p.kernel for p in found.points] == ["vllm.awq_gemm"] * 2 + ["vllm.awq_dequantize"] * 2
    assert [p.same for p in found.points] == [True, True, None, None]
    assert found.functions[1].state == "opaque"
    assert "cuBLAS" in found.functions[1].note
    found = strip("gptq", "M", (1, 50, 51))
    assert [p.function for p in found.points] == [0, 0, 1]
    assert [f.state for f in found.functions] == ["atomics", "opaque"]
    assert [p.same for p in found.points] == [None] * 3


def test_dispatch_of_a_label() -> None:
    def kernels(name: str) -> set[str]:
        return {p.kernel for p in strip(name, "M", (1, 64)).points}

    assert kernels("awq_marlin") == kernels("awq_marlin:pinned") == {"vllm.marlin.awq"}
    assert kernels("awq_marlin:vllm") == {"vllm.machete.awq"}


def test_the_number_of_sms() -> None:
    found = strip("vllm.marlin.awq", "sms", (108, 132))
    assert [p.same for p in found.points] == [False, True]
    assert found.at(132).function == 0
    gpus = {g.gpu: g for g in found.gpus}
    assert gpus["h100"].recipe == gpus["h200"].recipe != gpus["h100-pcie"].recipe
    assert gpus["rtx4090"].function == gpus["h100"].function  # 128 and 132 SMs cut alike
    assert gpus["rtx4090"].recipe != gpus["h100"].recipe  # and multiply otherwise
    assert "7.5" in gpus["v100"].reason
    same = strip("vllm.awq_gemm", "sms", (40, 132))
    assert (same.classes, len({g.recipe for g in same.gpus if g.recipe})) == (1, 2)  # Ampere's and Hopper's


def test_the_problems_own_value_is_added() -> None:
    assert [p.value for p in strip("vllm.awq_gemm", "sms", (108,)).points] == [108, 132]
    assert [p.value for p in strip("vllm.awq_gemm", "N", (512,)).points] == [512, 4096]


def test_along_n_the_common_columns_are_compared() -> None:
    found = strip("vllm.marlin.awq", "N", (512, 4096, 8192))
    assert found.columns == 512
    assert [p.same for p in found.points] == [False, True, True]
    assert [p.chains for p in found.points] == [((64, 512),), ((8, 512),), ((8, 512),)]
    assert strip("vllm.awq_gemm", "N", (512, 4096)).classes == 1


def test_along_k_forms_are_compared() -> None:
    found = strip("vllm.awq_gemm", "K", (128, 200, 1024, 4096))
    assert [p.function for p in found.points] == [1, -1, 0, 0]
    assert [p.changed for p in found.points] == [1, None, 0, 0]
    assert [p.same for p in found.points] == [None] * 4
    assert found.points[1].reason == "K=200 is no multiple of the group size 128"
    assert found.points[0].chains == ((4, 4096),)  # slices without rows sum nothing
    whole = strip("vllm.awq_gemm", "K", (1024, 4096), problem(group_size=4096))
    assert [p.function for p in whole.points] == [0, 0]
    atomics = strip("vllm.gptq_gemm", "K", (1024, 4096))
    assert [p.function for p in atomics.points] == [1, 0]


def test_a_form_forgets_the_lengths_of_chains_alone() -> None:
    def text(kernel: str, k: int, m: int = 1) -> str:
        return str(form(recipe(kernel, problem(m=m, k=k), H100).regions[0].tree))

    assert text("vllm.marlin.awq", 1024) == text("vllm.marlin.awq", 8192)
    assert text("vllm.marlin.awq", 1024) != text("vllm.marlin.awq.fp16", 1024)
    assert text("vllm.awq_gemm", 4096) != text("vllm.awq_triton", 4096)
    assert text("vllm.gptq_gemm", 256) != text("vllm.gptq_gemm", 384)


def test_a_kernel_that_does_not_run_is_a_range_with_its_reason(tmp_path: Path) -> None:
    found = map_recipes(["vllm.machete.awq", "vllm.marlin.awq"], "M", (1, 2), problem(), A100, environment=HERE)
    (machete,) = found.strips[0].ranges
    assert (machete.first, machete.last, machete.function) == (1, 2, -1)
    assert "Hopper" in machete.reason
    assert found.strips[1].classes == 1
    write_json(tmp_path / "map.json", found)
    assert Map.read(tmp_path / "map.json") == found == read_json(Map, tmp_path / "map.json", SCHEMA)


def test_another_map_gives_the_same_hash_to_the_same_function() -> None:
    one, two = strip("vllm.marlin.awq", "M", (1, 128)), strip("vllm.marlin.gptq", "sms", (132,), problem(m=128))
    assert two.functions[0].hash == one.functions[1].hash != one.functions[0].hash


def test_progress_is_told() -> None:
    told: list[int] = []
    map_recipes(["vllm.awq_gemm", "awq"], "M", (1, 2, 3), problem(), H100, environment=HERE, advance=lambda: told.append(1))
    assert len(told) == 6


def test_values() -> None:
    assert parse_values("1:5") == (1, 2, 3, 4, 5)
    assert parse_values("1024:4096:1024, 7,7") == (7, 1024, 2048, 3072, 4096)
    for bad, why in (
        ("1:", "no list"),
        ("x", "no list"),
        ("1:2:3:4", "no list"),
        ("0:4", "positive"),
        ("8:4", "smaller one first"),
        ("1:9:0", "positive"),
        ("1:99999999", "larger step, 1:99999999:STEP"),
    ):
        with pytest.raises(QlabError, match=f"--map-values.*{why}"):
            parse_values(bad, "--map-values")


def test_refusals() -> None:
    def refused(why: str, kernels: tuple[str, ...] = ("awq",), axis: Any = "M", values: tuple[int, ...] = (1,)) -> None:
        with pytest.raises(QlabError, match=why):
            map_recipes(kernels, axis, values, problem(), H100, environment=HERE)

    refused("no map along 'L'; along M, N, K, sms there is", axis="L")
    refused("each at least 1", values=())
    refused("each at least 1", values=(0, 1))
    refused("ends at 65536, before 70000", values=(70_000,))
    refused("at least one kernel", kernels=())
    refused("each kernel once", kernels=("awq", "awq"))
    refused("unknown kernel 'marlin'", kernels=("marlin",))
    refused("only a label", kernels=("vllm.awq_gemm:vllm",))
    refused("neither pinned nor vllm", kernels=("awq:machete",))


def test_forms_of_nothing_and_of_chains() -> None:
    r = recipe("vllm.awq_gemm", problem(), H100)
    step = next(n.step for n in nodes(r.regions[0].tree) if hasattr(n, "step"))
    assert form(chain(step, range(16))) == form(chain(step, range(64))) != form(chain(step, ()))
