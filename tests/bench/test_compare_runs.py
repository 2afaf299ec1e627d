"""Runs of equal names are compared bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.compare_runs import compare
from qlab.engine.run import Call, Scored
from qlab.errors import QlabError
from qlab.logprobs.cells import Kept, Store


def kept(folder: Path, key: str, logprobs: torch.Tensor, origin: str) -> None:
    folder.mkdir(exist_ok=True)
    rows = len(logprobs)
    scored = Scored(torch.arange(rows + 1), 1, torch.arange(logprobs.shape[1]).repeat(rows, 1), logprobs)
    calls = (Call("layer", 1, "vllm.marlin.awq", origin, "", 1),)
    Store(folder)._keep(key, Kept("awq_marlin@h100", scored, calls))


def test_one_changed_bit_is_counted(tmp_path: Path) -> None:
    values = -torch.rand(4, 5)
    for folder, origin in (("a", "native"), ("b", "replay")):
        kept(tmp_path / folder, "1", values, origin)
    changed = values.clone()
    changed.view(torch.int32)[2, 3] ^= 1
    kept(tmp_path / "a", "2", values, "native")
    kept(tmp_path / "b", "2", changed, "replay")
    kept(tmp_path / "a", "3", values, "native")
    found = compare(tmp_path / "a", tmp_path / "b")
    (p,) = found.paths
    assert (p.runs, p.logprobs, p.differing) == (2, 40, 1)
    assert 0 < p.largest < 1e-6
    assert p.kernels == ("vllm.marlin.awq (native)", "vllm.marlin.awq (replay)")
    assert found.alone == (1, 0)


def test_folders_without_a_common_run_are_refused(tmp_path: Path) -> None:
    kept(tmp_path / "a", "1", -torch.rand(4, 5), "native")
    kept(tmp_path / "b", "2", -torch.rand(4, 5), "replay")
    with pytest.raises(QlabError, match="no run in common"):
        compare(tmp_path / "a", tmp_path / "b")
