"""The random model: both checkpoints can be read, differ as said, and keep the size of activations."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bench import random_model
from bench.random_model import Shape
from qlab import checkpoint
from qlab.checkpoint.files import TensorFiles
from qlab.engine.builtin import Builtin
from qlab.engine.path import Path
from qlab.engine.run import Request
from qlab.logprobs import prompts

SHAPE = Shape(hidden=256, intermediate=512, heads=4, kv_heads=2, vocabulary=600, layers=2, positions=64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("random")
    sizes = [part for name, value in vars(SHAPE).items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["random_model", "--out", str(out), "--prompts", "3", "--tokens", "12", *sizes])
        random_model.main()
    return out


def test_awq_and_gptq_share_codes_and_scales_and_differ_by_some_zero_points(made):
    awq, gptq = (checkpoint.read(made / method) for method in ("awq", "gptq"))
    assert awq.names() == gptq.names()
    assert len(awq.names()) == 7 * SHAPE.layers
    apart = []
    for name in awq.names():
        a, b = awq.weight(name), gptq.weight(name)
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scales, b.scales)
        assert b.symmetric
        assert not a.symmetric
        assert set(a.zeros.unique().tolist()) == {7, 8, 9}
        assert set(a.codes.unique().tolist()) == set(range(1, 16))
        assert len(a.scales.unique()) > 50
        dense = b.dequantize(torch.float64)
        assert float(dense.square().sum(0).mean()) == pytest.approx(1, abs=0.1)
        assert abs(float(dense.mean())) * b.K**0.5 < 0.1
        apart.append(float((a.dequantize(torch.float64) - dense).norm() / dense.norm()))
    assert all(0.06 < d < 0.1 for d in apart)
    assert awq.hf_config["quantization_config"]["modules_to_not_convert"] == ["model.embed_tokens", "lm_head"]
    assert gptq.hf_config["quantization_config"]["sym"] is True
    assert "lm_head.weight" in TensorFiles(made / "awq")


def test_logits_are_of_the_size_that_was_meant(made):
    given = prompts.from_file(made / "prompts.json", made / "gptq")
    assert [len(p) for p in given] == [12] * 3
    assert json.loads((made / "prompts.json").read_text())[0] == list(given[0])
    engine = Builtin(made / "gptq", Path("reference.float32", "h100"), torch.device("cpu"))
    (row, *_) = engine.run(Request(given[:1], 1, top_k=0)).sequences[0].logprobs
    assert 1.5 < float(row.std()) < 3.5
