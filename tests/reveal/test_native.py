"""A kernel that runs here, played by replays of each region of its recipe."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlab import hardware
from qlab.backends import registry
from qlab.backends.registry import YES, Packed, Problem
from qlab.reveal import Asked, Model, Replayed, reveal
from qlab.reveal.text import revealed_text
from qlab.weights import Int4Weight
from tests.reveal.conftest import region

K, N = 640, 4096


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marlin as an H100 runs it: output tiles of three kinds, each with other cuts along K."""
    recipe, _ = region("vllm.marlin.gptq", 1, K, N)
    assert len(recipe.regions) == 3

    class Played:
        def __init__(self, weight: Int4Weight) -> None:
            self.parts = [(r.columns, Replayed(Model(r.tree), weight, r.columns[0][0])) for r in recipe.regions]

        def __call__(self, x: Tensor) -> Tensor:
            y = torch.empty((1, N), dtype=x.dtype)
            for columns, target in self.parts:
                value = target.answer(x)[0]
                for a, b in columns:
                    y[0, a:b] = value
            return y

    played: dict[int, Played] = {}

    def pack(weight: Int4Weight) -> Packed:
        packed = Packed({}, Problem.of(weight, 0))
        played[id(packed)] = Played(weight)
        return packed

    kernel = registry.kernel("vllm.marlin.gptq")
    monkeypatch.setattr(hardware, "detect", lambda: hardware.gpu("h100"))
    monkeypatch.setattr(kernel, "supports", lambda problem, device: YES)
    monkeypatch.setattr(kernel, "pack", pack)
    monkeypatch.setattr(kernel, "run", lambda x, packed: played[id(packed)](x))
    monkeypatch.setattr(kernel, "version", lambda: "vLLM 0.20.2, sha256 0123456789abcdef")


@pytest.mark.usefixtures("native")
def test_the_kernel_itself_is_asked() -> None:
    found = reveal(Asked("marlin_gptq", 1, K, N, 128, torch.float16, column=130))
    assert found.native
    assert found.source == "the native kernel on NVIDIA H100 80GB HBM3 (vLLM 0.20.2, sha256 0123456789abcdef)"
    assert found.comparison is not None
    assert found.comparison.identical
    assert found.comparison.region == "exactly the 1344 elements of the recipe's region answered alike"
    assert found.alike[:2] == ((0, 1, 128, 192), (0, 1, 320, 384))
    assert "revealed from the native kernel on" in revealed_text(found).replace("\n", " ")


@pytest.mark.usefixtures("native")
def test_another_gpu_s_kernel_is_replayed() -> None:
    found = reveal(Asked("marlin_gptq", 1, 128, 256, 128, torch.float16, hw="a100"))
    assert not found.native
    assert found.source == "a replay of its recipe for NVIDIA A100-SXM4-80GB (the GPU here is NVIDIA H100 80GB HBM3)"
