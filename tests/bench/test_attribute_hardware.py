"""Two GPUs, pair by pair on a small shape: the tensor core, the number of SMs and the dispatch are told apart."""

from __future__ import annotations

import sys

import pytest
import torch

from bench import attribute_hardware
from bench.attribute_hardware import PAIRS, SHAPES, Hardware, run
from qlab.attribution.result import OUTPUT
from qlab.engine.path import Path
from qlab.replay import native

pytestmark = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "-")


@pytest.fixture(scope="module")
def found():
    return run(((1, 1024, 256),), PAIRS, torch.device("cpu"))


def test_every_pair_is_explained_on_every_shape(found):
    assert [(e.a, e.b) for e in found.found] == list(PAIRS)
    for e in found.found:
        assert "M,K,N = 1,1024,256" in e.where
        assert e.tokens == 64  # one row would say little
        assert [end.differing_bits for end in e.ends] == [0, 0]
        (x,) = e.layers
        assert (x.M, x.elements) == (64, 64 * 256)
        assert x.differing > 0


def test_what_differs_between_the_gpus(found):
    of = {(e.a, e.b): {f.name for f in e.factors if not f.same} for e in found.found}
    core = {"tensor core: F, fraction bits", "tensor core: L, terms per sum"}
    assert of["awq@a100", "awq@h100"] == core
    assert of["triton.awq_gemm@a100", "triton.awq_gemm@h100"] == core
    assert of["awq_marlin@a100", "awq_marlin@h100"] - core <= {"SM count (stripes and tile choice)"}
    assert "dequantisation rule" in of["awq_marlin@a100:vllm", "awq_marlin@h100:vllm"]
    assert not core & of["awq@h100", "awq_marlin@h100"]
    m = next(e for e in found.found if e.a == "awq@h100").measure(OUTPUT)
    assert m.part("rounding of partial sums").share > 0.05


def test_pairs_and_shapes_are_paths_that_run():
    for texts in PAIRS:
        assert [str(Path.parse(t)) for t in texts] == list(texts)
    assert all(k % attribute_hardware.GROUP == 0 for _, k, _ in SHAPES)


def test_the_command_writes_a_file_that_reads_back(found, monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(attribute_hardware, "run", lambda *arguments: asked.append(arguments) or found)
    monkeypatch.setattr(sys, "argv", ["attribute_hardware", "--json", str(tmp_path / "h.json"), "--shapes", "2"])
    attribute_hardware.main()
    assert asked[0][:2] == (SHAPES[:2], PAIRS)
    assert Hardware.read(tmp_path / "h.json") == found
