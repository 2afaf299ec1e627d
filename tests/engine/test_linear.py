"""Which kernel a linear runs, that its bits are the replay's, and what a run keeps of them, on the shipped model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlab import hardware
from qlab.backends import registry
from qlab.backends.registry import YES, Problem, Support
from qlab.data import model_directory
from qlab.engine.builtin import Builtin
from qlab.engine.linear import Linear
from qlab.engine.path import Path
from qlab.engine.run import Request, Tap, row_digest
from qlab.engine.schedule import Batching
from qlab.errors import UnsupportedError
from qlab.inputs import random_activations, random_weight
from qlab.lab.model_files import ModelFiles
from qlab.recipes import recipe
from qlab.replay import native, prepared, replay
from qlab.weights import round_once

CPU = torch.device("cpu")
PROMPT = tuple(range(300, 320))
pytestmark = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "-")


def engine(path):
    p = Path.parse(path)
    return Builtin(model_directory(p.source or "awq"), p, CPU)


def bits(t):
    return t.view(torch.int16)


@pytest.mark.parametrize(
    ("path", "kernel"),
    [
        ("awq@h100", "vllm.awq_gemm"),
        ("awq_marlin@a100", "vllm.marlin.awq"),
        ("awq_marlin@h100:vllm", "vllm.machete.awq"),
        ("gptq_marlin@h100", "vllm.marlin.gptq"),
        ("vllm.marlin.awq.fp16@h100", "vllm.marlin.awq.fp16"),
    ],
)
def test_every_linear_gives_the_bits_of_its_replay(path, kernel):
    e = engine(path)
    names = tuple(e.model.linears)
    taps = frozenset(Tap(name, 0, position) for name in names for position in range(len(PROMPT)))
    run = e.run(Request((PROMPT,), 1, taps=taps, digests=True, batching=Batching(12)))
    files = ModelFiles(model_directory(e.path.source), torch.float16)
    place = {(r.tap.linear, r.tap.position): r for r in run.rows}
    assert len(place) == len(names) * len(PROMPT)
    for i, name in enumerate(names):
        weight = files.weight(name)
        for start, stop in ((0, 12), (12, 20)):
            rows = [place[name, position] for position in range(start, stop)]
            assert [(r.row, r.M, r.kernel) for r in rows] == [(j, stop - start, kernel) for j in range(stop - start)]
            made = recipe(kernel, Problem.of(weight, stop - start), hardware.gpu(e.path.gpu))
            y = replay(made, torch.stack([r.x for r in rows]), weight)
            assert torch.equal(bits(y), bits(torch.stack([r.y for r in rows])))
            assert torch.equal(run.sequences[0].digests[i, start:stop], row_digest(y))
            call = next(c for c in run.calls if (c.linear, c.M) == (name, stop - start))
            assert (call.kernel, call.origin, call.recipe, call.count) == (kernel, "replay", made.hash, 1)


def test_h100_and_h200_are_one_class_and_a100_is_not():
    request = Request((tuple(range(100, 150)),), 2, digests=True)
    runs = {gpu: engine(f"awq_marlin@{gpu}").run(request) for gpu in ("h100", "h200", "a100")}
    digests = {gpu: run.sequences[0].digests for gpu, run in runs.items()}
    assert torch.equal(digests["h100"], digests["h200"])
    assert torch.equal(runs["h100"].sequences[0].logprobs, runs["h200"].sequences[0].logprobs)
    assert not torch.equal(digests["h100"], digests["a100"])


def test_atomics_repeat_with_their_seed(monkeypatch):
    prepared._programs.cache_clear()
    compiled = []
    compile_recipe = prepared.compile_recipe
    monkeypatch.setattr(prepared, "compile_recipe", lambda r, s: compiled.append(s) or compile_recipe(r, s))
    e = engine("gptq@h100")
    request = Request((PROMPT,), 6, digests=True, batching=Batching(20))
    first, again, other = (e.run(replace(request, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first.sequences[0].digests, again.sequences[0].digests)
    assert not torch.equal(first.sequences[0].digests[0], other.sequences[0].digests[0])
    assert len(compiled) == len(set(compiled)) == 2 * len(first.linears) * 2  # two seeds, two M; none for a step
    weight = ModelFiles(model_directory("gptq"), torch.float16).weight(first.linears[0])
    linears = [Linear(replace(weight, name=name), e.path, CPU, native=False) for name in "abcdefghijk"]
    x = random_activations(4, weight.K, seed=1)
    assert len({str(row_digest(linear.run(x, 5)).tolist()) for linear in linears}) > 2  # each has an order of its own, of 12


def test_a_bias_goes_inside_of_marlin_and_behind_the_others():
    bias = torch.randn(256, generator=torch.Generator().manual_seed(1)).half()
    weight, x = random_weight(512, 256, 512, symmetric=True, seed=1, name="q"), random_activations(9, 512, seed=1)
    gpu = hardware.gpu("h100")
    problem = Problem.of(weight, 9)
    marlin = Linear(weight, Path("vllm.marlin.gptq", "h100"), CPU, native=False, bias=bias)
    made = recipe("vllm.marlin.gptq", replace(problem, bias=True), gpu)
    assert torch.equal(bits(marlin.run(x)), bits(replay(made, x, weight, bias)))
    assert marlin.form(9).recipe == made.hash
    machete = Linear(weight, Path("vllm.machete.gptq", "h100"), CPU, native=False, bias=bias)
    plain = replay(recipe("vllm.machete.gptq", problem, gpu), x, weight)
    want = round_once(plain.double() + bias.double(), torch.float16)
    for _ in range(2):
        assert torch.equal(bits(machete.run(x)), bits(want))
    assert not torch.equal(marlin.run(x), machete.run(x))


def test_one_decoded_weight_serves_every_m_that_it_can(monkeypatch):
    made = []
    operands = prepared.operands
    monkeypatch.setattr(prepared, "operands", lambda *a: made.append(1) or operands(*a))
    weight = random_weight(512, 256, 128, seed=2, name="o")
    linear = Linear(weight, Path("awq_marlin", "h100"), CPU, native=False)
    for m in (1, 16, 33, 1):
        linear.run(random_activations(m, 512, seed=m))
    assert len(made) == 1
    assert linear.form(1) is linear.form(1)


def test_native_kernels_where_they_run(monkeypatch):
    kernel = registry.kernel("vllm.marlin.awq")
    weight, x = random_weight(512, 256, 128, seed=3, name="o"), random_activations(3, 512, seed=3)
    bias = torch.ones(256).half()
    called = []
    monkeypatch.setattr(kernel, "supports", lambda problem, device: YES)
    monkeypatch.setattr(kernel, "pack", lambda w: called.append("pack") or w)
    monkeypatch.setattr(kernel, "gemm", lambda x, packed, bias: called.append(bias) or torch.ones((3, 256)).half())
    linear = Linear(weight, Path("awq_marlin", "h100"), CPU, native=None, bias=bias)
    assert linear.run(x).eq(1).all()
    linear.run(x)
    assert linear.form(3).origin == "native"
    assert called[0] == "pack"
    assert len(called) == 3
    assert all(b is bias for b in called[1:])
    assert Linear(weight, linear.path, CPU, native=False).form(3).origin == "replay"
    monkeypatch.setattr(kernel, "supports", lambda problem, device: Support(False, "it is not built here"))
    assert Linear(weight, linear.path, CPU, native=None).form(3).origin == "replay"
    with pytest.raises(UnsupportedError, match=r"o: vllm.marlin.awq does not run natively here: it is not built here"):
        Linear(weight, linear.path, CPU, native=True).form(3)


def test_no_recipe_and_no_gpu():
    weight = random_weight(512, 256, 128, seed=4, name="o")
    linear = Linear(weight, Path("vllm.machete.awq", "a100"), CPU, native=False)
    with pytest.raises(UnsupportedError, match=r"o: vllm.machete.awq cannot be replayed: Machete needs a Hopper GPU"):
        linear.form(1)
    with pytest.raises(UnsupportedError, match="awq@v100: no kernel for K=512, N=256: vLLM's AWQ needs"):
        Linear(weight, Path("awq", "v100"), CPU, native=False).form(1)
