"""qlab's CUDA kernels: Marlin's recipe is Marlin's, one recipe serves every M, and the table decides slices alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qlab.backends.registry import Problem, kernel
from qlab.errors import QlabError, UnsupportedError
from qlab.hardware import gpu
from qlab.recipe import Chain, TensorCore, join, nodes, unfold
from qlab.recipes import builders, recipe, tuned
from qlab.recipes.tuned import SCHEMA, Choice, Entry, Table

H100, H200, A100 = gpu("h100"), gpu("h200"), gpu("a100")
PROBLEM = Problem(16, 1024, 256, 128, torch.float16, True, False)
OURS = ("cuda.split", "cuda.batch_invariant")
SHAPES = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (3584, 4608), (18944, 3584), (8192, 57344), (416, 72)]


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No tables but those that a test writes."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.read.cache_clear()
    yield
    tuned.read.cache_clear()


@pytest.mark.parametrize("key", ["h100", "h200", "a100"])
@pytest.mark.parametrize("group", [32, 64, 128, 1024])
def test_cuda_marlin_is_in_marlins_class(key: str, group: int) -> None:
    for m in (1, 9, 16, 40, 100, 300):
        for dtype in (torch.float16, torch.bfloat16):
            p = replace(PROBLEM, M=m, group_size=group, dtype=dtype)
            ours = recipe("cuda.marlin", p, gpu(key))
            assert ours.hash == recipe("vllm.marlin.awq", p, gpu(key)).hash == recipe("vllm.marlin.gptq", p, gpu(key)).hash
            if group < 1024:
                sorted_rows = replace(p, act_order=True)
                assert (
                    recipe("cuda.marlin", sorted_rows, gpu(key)).hash == recipe("vllm.marlin.gptq", sorted_rows, gpu(key)).hash
                )
                assert recipe("cuda.marlin", sorted_rows, gpu(key)).rows == "sorted"


def test_cuda_marlin_refuses_what_marlin_refuses() -> None:
    for change, said in (
        ({"N": 72}, "N to be a multiple of 64, not 72"),
        ({"K": 1056, "group_size": 32}, "K to be a multiple of 128"),
        ({"group_size": 256}, "groups of 32, 64, 128 or the whole column, not 256"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            recipe("cuda.marlin", replace(PROBLEM, **change), H100)
        if "K" not in change:
            assert recipe("cuda.split", replace(PROBLEM, **change), H100)


@pytest.mark.parametrize("name", OURS)
def test_slices_are_chains_joined_in_order(name: str) -> None:
    for p in (
        PROBLEM,
        replace(PROBLEM, act_order=True, M=100),
        replace(PROBLEM, group_size=1024),
        replace(PROBLEM, K=416, group_size=32),
    ):
        for g in (H100, A100):
            r = recipe(name, p, g)
            parts = [n for n in nodes(r.regions[0].tree) if isinstance(n, Chain)]
            assert (r.weights, r.rows, len(r.regions)) == ("rounded", "sorted" if p.act_order else "natural", 1)
            assert r.regions[0].tree == join(parts)
            assert {c.step for c in parts} == {TensorCore.of(g.step)}
            assert np.array_equal(np.concatenate([unfold(c.walk) for c in parts]), np.arange(p.K))
            assert all(len(unfold(c.walk)) % 128 == 0 for c in parts[:-1])
            assert not r.regions[0].output.scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_invariant_has_one_tree_for_every_m(shape: tuple[int, int]) -> None:
    k, n = shape
    trees = {
        recipe("cuda.batch_invariant", replace(PROBLEM, M=m, K=k, N=n, group_size=32), H100).regions[0].tree
        for m in (1, 2, 8, 16, 17, 64, 100, 1024, 4096)
    }
    assert len(trees) == 1


def test_what_is_refused_says_why() -> None:
    for name in OURS:
        for change, said in (
            ({"N": 12}, "N=12 is not a multiple of 8"),
            ({"K": 1000, "group_size": 1000}, "K=1000 is not a multiple of 32"),
            ({"group_size": 16}, "groups of 16 rows are neither"),
        ):
            with pytest.raises(UnsupportedError, match=said):
                recipe(name, replace(PROBLEM, **change), H100)
        with pytest.raises(UnsupportedError, match=r"compute capability 8\.0 or later"):
            recipe(name, PROBLEM, gpu("t4"))
    cpu = kernel("cuda.split").supports(PROBLEM, torch.device("cpu"))
    assert (cpu.ok, cpu.reason) == (False, "needs a CUDA GPU")


# The table


def table(*entries: Entry, kernel: str = "cuda.split", on: str = "h200") -> Table:
    return Table(SCHEMA, on, kernel, "a test", entries)


def test_ranges_are_multiples_of_128_and_none_is_empty() -> None:
    from qlab.triton_kernels import launch

    for k in (*range(32, 1500, 32), 4096, 14336, 18944):
        for count in (1, 2, 3, 4, 8):
            found = tuned.ranges(k, count)
            number, rows = launch.slices(k, count, 128)
            assert found == tuple((i * rows, min((i + 1) * rows, k)) for i in range(number))
            assert found[0][0] == 0
            assert found[-1][1] == k
            assert all(a < b for a, b in found)


def test_without_a_table_a_rule_decides() -> None:
    for (k, n), m, name in ((s, m, name) for s in SHAPES for m in (1, 16, 17, 64, 256, 4096) for name in OURS):
        found = tuned.choice(name, "h100", m, k, n)
        assert found == tuned.choice(name, "a-gpu-that-nobody-knows", m, k, n)
        assert 1 <= found.slices <= min(8, -(-k // 128))
        assert found.config == ()
    blocks = [tuned.choice("cuda.split", "h100", 1, k, n).slices * -(-n // 128) for k, n in SHAPES[:-1]]
    assert all(128 <= b <= 448 for b in blocks[:-2]), blocks


def test_an_entry_is_found_by_shape_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    one, many = Entry(4096, 4096, 16, 2, {"kernel": "mma", "columns": 64}), Entry(4096, 4096, 256, 3)
    tuned.write(table(one, many, Entry(8192, 8192, 64, 5)))
    assert tuned.choice("cuda.split", "h200", 1, 4096, 4096) == Choice(2, (("columns", 64), ("kernel", "mma")))
    assert tuned.choice("cuda.split", "h100", 16, 4096, 4096).get("columns", 128) == 64, "the two share a table"
    assert tuned.choice("cuda.split", "h100", 17, 4096, 4096).slices == 3
    assert tuned.choice("cuda.split", "h100", 9999, 4096, 4096).slices == 3, "the entry with the most rows"
    assert tuned.choice("cuda.split", "h100", 9, 4096, 5000).slices == 2, "the nearest shape"
    assert tuned.choice("cuda.split", "h100", 9, 8192, 7168).slices == 5
    assert tuned.choice("cuda.split", "h100", 9, 256, 4096).slices == tuned.heuristic(9, 256, 4096).slices, "none is near"
    assert tuned.choice("cuda.split", "a100", 1, 4096, 4096).slices == tuned.heuristic(1, 4096, 4096).slices
    assert tuned.choice("cuda.split", "h100", 9, 1024, 4096).slices == 2
    monkeypatch.setattr(tuned, "NEAR", 100)
    assert tuned.choice("cuda.split", "h100", 9, 128, 4096).slices == 1, "no slice is empty"


def test_slices_of_the_table_are_the_recipes() -> None:
    before = recipe("cuda.split", PROBLEM, H200)
    tuned.write(table(Entry(1024, 256, 16, 8), Entry(1024, 256, 32, 2)))
    eight, two = recipe("cuda.split", PROBLEM, H200), recipe("cuda.split", replace(PROBLEM, M=32), H100)
    counts = [sum(isinstance(n, Chain) for n in nodes(r.regions[0].tree)) for r in (eight, two)]
    assert counts == [8, 2]
    assert recipe("cuda.split", PROBLEM, A100) != before


def test_one_recipe_must_have_one_number_of_slices() -> None:
    name = "cuda.batch_invariant"
    with pytest.raises(QlabError, match="k=1024, n=256 has two numbers of slices"):
        tuned.write(table(Entry(1024, 256, 16, 4), Entry(1024, 256, 64, 2), kernel=name))
    tuned.write(table(Entry(1024, 256, 16, 4), Entry(1024, 256, 64, 4, {"total": 1}), kernel=name))
    assert tuned.choice(name, "h100", 50, 1024, 256) == Choice(4, (("total", 1),))


def test_damaged_tables_are_refused() -> None:
    with pytest.raises(QlabError, match="two entries have the same k, n and rows"):
        tuned.write(table(Entry(1024, 256, 16, 4), Entry(1024, 256, 16, 2)))
    with pytest.raises(QlabError, match="slices=0 must be positive"):
        tuned.write(table(Entry(1024, 256, 16, 0)))
    with pytest.raises(QlabError, match="rows=16: tile is neither a number nor a word"):
        tuned.write(table(Entry(1024, 256, 16, 2, {"tile": [16, 64]})))
    file = tuned.write(table(Entry(1024, 256, 16, 4)))
    file.write_text(file.read_text().replace('"slices": 4', '"slices": "4"'))
    tuned.read.cache_clear()
    with pytest.raises(QlabError, match="slices: expected int, not '4'"):
        tuned.choice("cuda.split", "h100", 1, 1024, 256)


def test_the_shipped_tables_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    tuned.read.cache_clear()
    for file in sorted(tuned.FOLDER.glob("*.json")):
        key, name = file.stem.split("-", 1)
        found = tuned.read(name, key)
        assert found is not None
        assert (found.gpu in (key, *(g for g, of in tuned.SHARED.items() if of == key)), found.kernel) == (True, name)
        assert name in builders()
