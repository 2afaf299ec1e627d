"""Machete's partition: its invariants on random shapes, cases worked out by hand, and CUTLASS's own scheduler."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from qlab.backends.registry import Problem
from qlab.hardware import Gpu, gpu
from qlab.recipe import Chain, Join, Recipe, TensorCore
from qlab.recipes import assemble
from qlab.recipes.build import DEFAULT
from qlab.recipes.machete import KERNELS, Schedule, partition, schedule, tile_pieces, unit_groups

PROBLEM = Problem(M=1, K=4096, N=4096, group_size=128, dtype=torch.float16, symmetric=False, act_order=False)


def machete(problem: Problem, g: Gpu, kind: str = "gptq") -> Recipe:
    """On any GPU."""
    return assemble(KERNELS[f"vllm.machete.{kind}"](problem, g, DEFAULT), problem)


def test_every_output_once_and_every_k_once() -> None:
    rng = random.Random(7)
    cut = 0
    for _ in range(400):
        m, n = rng.choice([rng.randint(1, 64), rng.randint(1, 600)]), 128 * rng.randint(1, 60)
        k, sms = 64 * rng.randint(1, 240), rng.choice([132, 114, 78, 16, rng.randint(18, 150)])
        covered = np.zeros((m, n // 128), np.int8)
        for tile in partition(m, n, k, sms):
            (top, bottom), (left, right) = tile.rows, tile.columns
            assert top < bottom
            assert left < right
            assert (left % 128, right % 128) == (0, 0)
            covered[top:bottom, left // 128 : right // 128] += 1
            starts, ends = zip(*tile.pieces, strict=True)
            assert starts == (0, *ends[:-1])
            assert ends[-1] == k
            if len(tile.pieces) > 1:
                cut += 1
                assert min(b - a for a, b in tile.pieces) >= 8 * 64
        assert (covered == 1).all(), (m, n, k, sms)
    assert cut > 1000


@pytest.mark.parametrize(
    ("m", "n", "k", "columns", "tokens", "cluster"),
    [
        (1, 4096, 4096, 128, 16, 1),
        (16, 26624, 4096, 256, 16, 1),
        (17, 8192, 12288, 128, 32, 2),
        (32, 8320, 64, 256, 32, 2),
        (33, 6144, 6144, 128, 16, 1),
        (64, 12288, 16384, 256, 64, 2),
        (64, 6272, 4096, 128, 64, 2),
        (65, 3968, 4032, 128, 32, 2),
        (65, 4096, 4032, 128, 64, 2),
        (128, 12288, 8192, 256, 128, 2),
        (128, 4096, 4096, 128, 128, 2),  # 4096 is beyond the 4069 in vLLM's table
        (129, 4096, 4096, 128, 64, 2),
        (256, 4224, 8192, 128, 128, 2),
        (256, 4096, 14336, 128, 256, 2),
        (257, 4096, 16384, 128, 128, 2),
        (257, 4224, 64, 128, 256, 2),
    ],
)
def test_schedules(m: int, n: int, k: int, columns: int, tokens: int, cluster: int) -> None:
    assert schedule(m, n, k) == Schedule(columns, tokens, cluster)


def test_short_k_is_never_cut() -> None:
    assert all(t.pieces == ((0, 512),) for t in partition(1, 128, 512, 132))


def test_plain_split_k() -> None:
    """8 tiles of 32 iterations: 32 units of 8 iterations, 4 to a tile. 35 iterations: 4 units, the first take the rest."""
    assert {t.pieces for t in partition(1, 1024, 2048, 132)} == {((0, 512), (512, 1024), (1024, 1536), (1536, 2048))}
    assert tile_pieces(1, 1, 35, 132) == [((0, 9), (9, 18), (18, 27), (27, 35))]


def test_stream_k_over_tile_borders() -> None:
    """32 tiles of 64 iterations, 132 units: 68 of 16 iterations (17 tiles), 64 of 15 (15 tiles)."""
    found = tile_pieces(32, 1, 64, 132)
    assert found[:17] == [((0, 16), (16, 32), (32, 48), (48, 64))] * 17
    # Cuts at 15, 30, 45 and 60; the last is fewer than 8 from the end and moves there.
    assert found[17] == ((0, 15), (15, 30), (30, 45), (45, 64))
    # The next unit begins at 60 + 15 - 64 = 11; 56 is exactly 8 from the end and stays.
    assert found[18] == ((0, 11), (11, 26), (26, 41), (41, 56), (56, 64))
    # Begins at 7: moves to 0.
    assert found[19] == ((0, 22), (22, 37), (37, 52), (52, 64))


def test_which_tiles_are_cut() -> None:
    """Half a wave or more is left whole; with two full waves and more only the last full one and the rest are cut."""
    assert Counter(len(p) for p in tile_pieces(66, 1, 64, 132)) == {1: 66}
    assert min(len(p) for p in tile_pieces(65, 1, 64, 132)) > 1
    assert Counter(len(p) for p in tile_pieces(132, 1, 64, 132)) == {1: 132}
    found = tile_pieces(272, 1, 64, 132)
    assert found[140:] == [((0, 64),)] * 132
    # 140 tiles for 132 units, the first ones of 68 iterations. The cut at 68 = 64 + 4 is too near a border, 128 + 8 is not.
    assert found[:2] == [((0, 64),)] * 2
    assert found[2] == ((0, 8), (8, 64))
    assert found[3] == ((0, 12), (12, 64))


def test_groups() -> None:
    assert unit_groups(16, 132, 64, most=4) == 1  # any more leave a unit 7 iterations
    assert unit_groups(32, 132, 64, most=4) == 4
    assert unit_groups(30, 132, 64, most=4) == 3  # 4 divides the units, not the tiles
    assert unit_groups(31, 132, 64, most=4) == 4  # nothing divides 31: the largest that divides the units
    assert unit_groups(32, 132, 64, most=1) == 1


def test_groups_take_every_so_many_th_tile() -> None:
    """30 tiles in 3 groups: 10 tiles of 64 iterations over 44 units, 14 of them of 15. Three tiles in a row are cut alike."""
    found = tile_pieces(10, 3, 64, 132)
    assert found[0::3] == found[1::3] == found[2::3]
    assert found[0] == ((0, 15), (15, 30), (30, 45), (45, 64))


def test_tiles_run_along_the_shorter_side() -> None:
    """M=64, N=6144: 4 tiles down, 48 across; the first 4 are one column. M=531, N=384: 5 down, 2 clusters of 256 across."""
    tiles = list(partition(64, 6144, 4096, 132))
    assert [t.rows[0] for t in tiles[:5]] == [0, 16, 32, 48, 0]
    tall = list(partition(531, 384, 11456, 132))
    assert [(t.rows, t.columns) for t in tall[:3]] == [((0, 128), (0, 256)), ((0, 128), (256, 384)), ((128, 256), (0, 256))]
    assert tall[-1].rows == (512, 531)


@pytest.mark.parametrize(
    ("m", "n", "k", "sms", "digest"),
    [
        (15, 128, 8768, 78, "b69e3ef8782804d3"),
        (1, 4096, 4096, 132, "1ff6a37612ecdde7"),
        (29, 128, 960, 132, "1801385dd66405bf"),
        (45, 128, 2240, 78, "e924291ca9823a8f"),
        (68, 128, 1280, 78, "652f62aa658d39c5"),
        (64, 6144, 4096, 132, "29d86fc541e34d28"),
        (64, 6144, 4096, 114, "07e78ba94003a35c"),
        (531, 384, 11456, 132, "b67c6c53f25d1a6f"),
        (97, 384, 3648, 78, "bc427901186141ba"),
        (225, 512, 3904, 78, "6ead1f9e853b2be6"),
        (64, 5120, 1664, 78, "eeacfde4bb385f03"),
        (652, 768, 10368, 132, "45a90a9744e2ba3c"),
        (778, 2816, 11840, 132, "6e29a98979e0662b"),
        (1942, 1152, 2816, 78, "5e15086beedcc2bc"),
        (256, 4096, 14336, 132, "716bf8b87812b82d"),
        (256, 4096, 14336, 114, "ba41f44b23960f84"),
    ],
)
def test_as_cutlass_deals_them(m: int, n: int, k: int, sms: int, digest: str) -> None:
    """sha256 over (row tile, column tile, pieces in iterations), as CUTLASS 4.4.2's scheduler gave them, compiled for a CPU.

    Groups of 1 to 6, even and uneven, plain split-K, tiles in both orders, clusters beyond the last column.
    """
    s = schedule(m, n, k)
    blocks = sorted(
        (t.rows[0] // s.tokens, t.columns[0] // s.columns + block, *((a // 64, b // 64) for a, b in t.pieces))
        for t in partition(m, n, k, sms)
        for block in range(s.cluster)
    )
    assert hashlib.sha256(str(blocks).encode()).hexdigest()[:16] == digest


def test_recipe() -> None:
    found = machete(PROBLEM, gpu("h100"), "awq")
    assert (found.weights, found.rows, found.dtype, found.ordered, found.opaque) == ("fused", "natural", "fp16", True, "")
    tree = found.regions[0].tree
    assert isinstance(tree, Join)
    assert (len(tree.parts), tree.type) == (4, "fp32")
    assert all(isinstance(p, Chain) and p.step == TensorCore(25, 16, -133) for p in tree.parts)
    assert all(r.output.bias == "none" and not r.output.scale for r in found.regions)


def test_recipe_depends_on_the_sms_and_the_weights() -> None:
    found = machete(PROBLEM, gpu("h100"))
    assert found.hash == machete(PROBLEM, gpu("h200")).hash
    assert found.hash != machete(PROBLEM, gpu("h100-pcie")).hash
    assert found.hash != machete(PROBLEM, gpu("h100"), "awq").hash
    assert found.weights == "rounded"
    whole = machete(replace(PROBLEM, group_size=4096), gpu("h100"))
    assert whole.hash == found.hash  # the scale goes into the weights whatever the group

    ordered = machete(replace(PROBLEM, act_order=True, bias=True), gpu("h100"))
    assert ordered.rows == "sorted"
    assert {r.output.bias for r in ordered.regions} == {"added"}
