"""vLLM's own engine: what needs no GPU is refused in a sentence; the rest runs where vLLM and its GPU are."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from qlab import data, hardware
from qlab.checkpoint.files import read_json
from qlab.engine import vllm
from qlab.engine.path import Path
from qlab.engine.run import Request, Tap, row_digest
from qlab.engine.schedule import Batching
from qlab.errors import CheckpointError, QlabError, UnsupportedError

GPTQ = data.model_directory("gptq")
H100, MACHETE = Path("gptq_marlin", "h100"), Path("gptq_marlin", "h100", "vllm")


def test_the_path_decides_the_environment():
    assert vllm.environment(H100)["VLLM_DISABLED_KERNELS"] == "MacheteLinearKernel"
    assert vllm.environment(MACHETE)["VLLM_DISABLED_KERNELS"] == ""
    same = {k: v for k, v in vllm.environment(H100).items() if v != "MacheteLinearKernel"}
    assert same.items() <= vllm.environment(MACHETE).items()


def test_what_vllm_cannot_run_is_refused_before_it_is_imported(monkeypatch):
    with pytest.raises(UnsupportedError, match="single kernels"):
        vllm.VllmEngine(GPTQ, Path("vllm.awq_triton", "h100"))
    with pytest.raises(UnsupportedError, match="float16 only"):
        vllm.VllmEngine(GPTQ, Path("gptq", "h100"), dtype=torch.bfloat16)
    with pytest.raises(QlabError, match="cannot serve 8 sequences"):
        vllm.VllmEngine(GPTQ, H100, Batching(4, 8))
    monkeypatch.setattr(hardware, "detect", lambda: None)
    with pytest.raises(UnsupportedError, match="needs a CUDA GPU"):
        vllm.VllmEngine(GPTQ, H100)
    monkeypatch.setattr(hardware, "detect", lambda: hardware.gpu("h200"))
    with pytest.raises(UnsupportedError, match="h200"):
        vllm.VllmEngine(GPTQ, H100)
    monkeypatch.setattr(hardware, "detect", lambda: hardware.gpu("h100"))
    with pytest.raises(CheckpointError, match="does not run as gptq_marlin"):
        vllm.VllmEngine(data.model_directory("awq"), H100)


def test_a_missing_vllm_is_named_before_a_process_starts(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    with pytest.raises(UnsupportedError, match=r"pip install 'qlab\[vllm\]'"):
        vllm.remote(GPTQ, H100)


def test_the_cache_holds_the_sequences():
    config = read_json(GPTQ, "config.json")
    a_token = 2 * 2 * 3 * 4 * 64  # keys and values of two bytes, layers, heads, width
    assert vllm._cache_bytes(config, 1024, 4) >= 4 * 1024 * a_token
    assert vllm._cache_bytes(config, 1024, 1) <= 4 * 1024 * a_token


@pytest.fixture(scope="module")
def engine():
    """vLLM's engine on this machine's GPU, in a process of its own."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM itself, not its extension alone")
    here = hardware.detect()
    with vllm.remote(GPTQ, Path("gptq_marlin", here.key), Batching(20, 3)) as made:
        yield made.wait()


def ask(engine, **changes):
    prompts = tuple(tuple(range(7 * i + 1, 7 * i + n)) for i, n in enumerate((34, 12, 21, 2)))
    return replace(Request(prompts, 6, batching=Batching(20, 3), top_k=5), **changes)


@pytest.mark.gpu
@pytest.mark.vllm
def test_vllm_steps_tokens_as_the_schedule_says_and_its_rows_have_their_places(engine):
    linear = "model.layers.1.mlp.gate_up_proj"
    taps = frozenset(Tap(linear, s, p) for s in range(3) for p in (0, 5, 11))
    request = ask(engine, taps=taps, digests=True)
    run = engine.run(request)
    lengths = [len(p) for p in request.prompts]
    planned = request.batching.steps(lengths, [n + 5 for n in lengths])
    assert [sorted(step) for step in run.steps] == [sorted(step) for step in planned]
    assert {r.tap for r in run.rows} == taps
    assert {c.kernel for c in run.calls} == {"vllm.marlin.gptq"}
    assert all(c.recipe for c in run.calls)
    place = run.linears.index(linear)
    for r in run.rows:
        digests = run.sequences[r.tap.sequence].digests
        assert int(row_digest(r.y[None])) == int(digests[place, r.tap.position])


@pytest.mark.gpu
@pytest.mark.vllm
def test_vllm_takes_forced_tokens_and_its_logprobs_stay_its_own(engine):
    free = engine.run(ask(engine, top_k=0))
    own = tuple(tuple(s.tokens[s.prompt :].tolist()) for s in free.sequences)
    forced = engine.run(ask(engine, top_k=0, forced=own))
    other = engine.run(ask(engine, top_k=0, forced=tuple(tuple((t + 1) % 2048 for t in f) for f in own)))
    for a, b, c in zip(free.sequences, forced.sequences, other.sequences, strict=True):
        assert torch.equal(a.logprobs, b.logprobs)
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.logprobs[: a.prompt], c.logprobs[: a.prompt])
        assert c.tokens[c.prompt :].tolist() == [(t + 1) % 2048 for t in a.tokens[a.prompt :].tolist()]
        assert a.logprobs.exp().sum(1).sub(1).abs().max() < 1e-4
    with pytest.raises(UnsupportedError, match="make another for it"):
        engine.run(ask(engine, batching=Batching(50, 1)))
