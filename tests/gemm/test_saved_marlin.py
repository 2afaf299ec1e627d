"""Outputs of vLLM's Marlin that ``bench.prove_kernels`` saved on a GPU: cuda.marlin gives their bits without vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.kernel_proof.inputs import activations, fingerprint, weight
from bench.kernel_proof.saved import Record, Saved, decoded, load
from qlab.backends.registry import Problem, kernel
from qlab.compare import differing_bits, digest
from qlab.gemm import launch
from qlab.hardware import detect, gpu
from qlab.recipes import recipe
from qlab.replay import missing, replay

FILES = sorted((Path(__file__).parents[2] / "results").glob("*/kernels-marlin-small.json"))
ON_CPU = 24
"""Problems that are replayed on the CPU, the cheapest."""

pytestmark = pytest.mark.skipif(
    not FILES, reason="results/*/kernels-marlin-small.json is missing: python -m bench.prove_kernels"
)
needs_native = pytest.mark.skipif(bool(missing("native")), reason=f"the native engine cannot run: {missing('native')}")
needs_kernels = pytest.mark.skipif(bool(launch.reason()), reason=f"the INT4 kernels cannot run: {launch.reason()}")


@pytest.fixture(params=FILES, ids=lambda p: p.parent.name)
def saved(request: pytest.FixtureRequest) -> Saved:
    return load(request.param)


def wrong(r: Record, y: torch.Tensor) -> str:
    """What is wrong with an output; empty where nothing is."""
    bits = f", {differing_bits(y.cpu(), decoded(r.bits, r.trial))} bits" if r.bits else ""
    return "" if digest(y) == r.digest else f"{r.trial}: another output{bits}"


def test_every_kind_is_there(saved: Saved) -> None:
    assert len(saved.records) >= 60
    kinds = {(r.trial.dtype, r.trial.form) for r in saved.records}
    assert kinds == {(d, f) for d in ("fp16", "bf16") for f in ("awq", "gptq", "act_order")}
    assert sum(bool(r.bits) for r in saved.records) >= 3


@needs_native
def test_the_recipe_gives_them_on_the_cpu(saved: Saved) -> None:
    on, cpu = gpu(saved.gpu), torch.device("cpu")
    for r in sorted(saved.records, key=lambda r: r.trial.products)[:ON_CPU]:
        w, x = weight(r.trial, cpu), activations(r.trial, cpu)
        assert fingerprint(x, w) == r.inputs, str(r.trial)
        assert wrong(r, replay(recipe("cuda.marlin", Problem.of(w, r.trial.M), on), x, w, engine="native")) == ""


@pytest.mark.gpu
@needs_kernels
def test_the_kernel_gives_them(saved: Saved) -> None:
    here = detect()
    if here is None or not here.same_arithmetic(gpu(saved.gpu)):
        pytest.skip(f"they were saved on an {saved.gpu}, whose stripes and tensor cores are not this GPU's")
    cuda, ours = torch.device("cuda"), kernel("cuda.marlin")
    for r in saved.records:
        w, x = weight(r.trial, cuda), activations(r.trial, cuda)
        assert fingerprint(x, w) == r.inputs, str(r.trial)
        assert wrong(r, ours.run(x, ours.pack(w))) == ""
