"""What happens to x and to counters before a kernel starts, where there is no GPU to start it on."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from qlab.backends.registry import Problem, kernel
from qlab.errors import PackingError, UnsupportedError
from qlab.gemm import launch
from qlab.gemm.planner import Planner
from qlab.inputs import random_weight
from qlab.recipes.tuned import Choice

CPU = torch.device("cpu")
PROBLEM = Problem(0, 64, 8, 32, torch.float16, True, False)


def test_x_that_does_not_fit_is_refused_in_one_sentence() -> None:
    x = torch.zeros(4, 64, dtype=torch.float16)
    launch.check_x(x, PROBLEM, CPU)
    wrong = {
        r"x must be \[M, 64\], not \[4, 56\]": x[:, :56],
        r"x must be \[M, 64\], not \[64\]": x[0],
        "x is torch.bfloat16 and the weight was packed for torch.float16: cast x": x.bfloat16(),
        "x is on meta and the weight on cpu: move x": x.to("meta"),
        "last stride of 4": x.t().contiguous().t(),
    }
    for said, bad in wrong.items():
        with pytest.raises(UnsupportedError, match=said):
            launch.check_x(bad, PROBLEM, CPU)


@pytest.mark.parametrize(
    ("rows", "offset", "stride", "copied"),
    [
        (4, 0, 64, False),
        (4, 0, 72, False),
        (4, 8, 64, False),
        (4, 1, 64, True),
        (4, 0, 68, True),
        (4, 0, 0, True),
        (1, 0, 68, False),
    ],
)
def test_only_rows_that_16_byte_loads_cannot_read_are_copied(rows: int, offset: int, stride: int, copied: bool) -> None:
    memory = torch.arange(512, dtype=torch.float16)
    assert memory.data_ptr() % 16 == 0
    x = memory[offset:].as_strided((rows, 64), (stride, 1))
    found = launch.readable(x)
    assert torch.equal(found, x)
    assert (found.data_ptr() != x.data_ptr()) == copied
    assert found.data_ptr() % 16 == 0
    assert not copied or found.is_contiguous()


def test_counters_are_apart_where_calls_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = False
    monkeypatch.setattr(launch, "COUNTERS", 10000)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: torch.Stream(device="cpu"))
    pool = launch._Pool.__new__(launch._Pool)
    pool.device, pool.none, pool.streams, pool.kept, pool.free = CPU, torch.empty(0, dtype=torch.int32), {}, [], 0
    monkeypatch.setattr(launch, "_pool", lambda device: pool)

    def ends(t: torch.Tensor) -> tuple[int, int]:
        return t.data_ptr(), t.data_ptr() + t.numel() * 4

    first = launch._counters(10, 0, stream=1)
    assert launch._counters(20, 0, stream=1).data_ptr() == first.data_ptr(), "calls on one stream follow each other"
    taken = [ends(first), ends(launch._counters(10, 0, stream=2))]
    capturing = True
    taken += [ends(launch._counters(n, 0, stream=1)) for n in (10, 33, 10)]
    assert launch._counters(0, 0, stream=1).numel() == 0
    assert len(pool.kept) == 1
    beyond = launch._counters(9000, 0, stream=1)
    assert beyond.numel() >= 9000
    assert all(beyond.data_ptr() not in range(*ends(k)) for k in pool.kept), "of the graph's own memory"
    taken.sort()
    assert all(a[1] <= b[0] for a, b in pairwise(taken))


def test_planners_that_choose_alike_share_their_plans() -> None:
    assert Planner("cuda.split") == Planner("cuda.split")
    assert hash(Planner("cuda.split", Choice(2, (("columns", 64),)))) == hash(
        Planner("cuda.split", Choice(2, (("columns", 64),)))
    )
    assert Planner("cuda.split", Choice(2)) != Planner("cuda.split", Choice(4))


@pytest.mark.parametrize("name", ["cuda.marlin", "cuda.split", "cuda.batch_invariant"])
def test_the_adapters_pack_and_refuse(name: str) -> None:
    packed = kernel(name).pack(random_weight(256, 128, 64, seed=1))
    assert set(packed.tensors) == {"blocks", "column_scales", "perm"}
    assert packed.problem.M == 0
    with pytest.raises(PackingError, match=r"N=12|multiple of 64, not 12"):
        kernel(name).pack(random_weight(256, 12, 64, seed=1))
