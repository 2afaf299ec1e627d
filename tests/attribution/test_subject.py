"""Both ends are the kernels themselves, bit for bit; inputs and outputs of two checkpoints are in one unit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlab import checkpoint, hardware
from qlab.attribution.hybrids import Hybrids
from qlab.attribution.input_scales import consumer, moved_input, moved_output
from qlab.data import model_directory
from qlab.errors import CheckpointError, UnsupportedError
from qlab.inputs import random_weight
from qlab.lab.model_files import ModelFiles
from qlab.replay import native
from tests.attribution.subjects import PROMPT, ends, layer, model, paths

pytestmark = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "-")
SHIPPED = (
    ("awq@a100", "awq_marlin@h100:vllm"),
    ("awq@h100", "awq_marlin@a100"),
    ("gptq@a100", "gptq_marlin@h100"),
    ("gptq_marlin@h100:vllm", "gptq@h100"),
    ("gptq_marlin@a100", "awq_marlin@h100"),
)


@pytest.mark.parametrize(("a", "b"), SHIPPED)
def test_both_ends_are_the_paths_own_runs(a, b):
    subject, weights = model(a, b)
    found = ends(subject, a, b, weights.full)
    assert [(e.path, e.origin, e.differing_bits) for e in found] == [(a, "replay", 0), (b, "replay", 0)]
    outputs = sum(linear.N for linear in subject._engine(0).model.linears.values())
    assert {e.compared for e in found} == {subject.tokens * outputs + sum(subject.rows) * 5}
    assert (subject.tokens, subject.rows) == (5, (5,))
    assert {c.M for c in subject.calls} == {4, 1}  # the prompt in one step, then a token by itself


def test_planted_a_part_of_the_other_end_shows():
    """The check at the ends is of bits: one part from the wrong side, and they differ."""
    subject, _ = model(*SHIPPED[1])
    hybrids = Hybrids(subject, *paths(*SHIPPED[1]), 0)
    for part in hybrids.parts:
        others = [p for p in hybrids.parts if p is not part]
        if hybrids.admissible(sum(1 << i for i, p in enumerate(hybrids.parts) if p is not part)):
            assert subject.end(1, hybrids.choice(0, others)).differing_bits > 0, part.name
    assert subject.end(0, hybrids.choice(0, hybrids.parts)).differing_bits > 1000


def test_planted_a_changed_log_probability_shows(monkeypatch):
    subject, _ = model(*SHIPPED[1])
    real = type(subject)._logprobs
    moved = []

    def once(self, run):
        found = real(self, run).clone()
        if not moved:
            moved.append(found.view(torch.int32)[2, 1].bitwise_xor_(0b101))
        return found

    monkeypatch.setattr(type(subject), "_logprobs", once)
    hybrids = Hybrids(subject, *paths(*SHIPPED[1]), 0)
    assert subject.end(0, hybrids.choice(0, ())).differing_bits == 2


@pytest.mark.parametrize(("a", "b"), [("awq@a100", "vllm.marlin.awq.fp16@h100"), ("vllm.awq_triton@h100", "awq@h100")])
def test_a_layer_s_ends(a, b):
    subject = layer(a, b, m=2, rows=7)
    assert [(c.M, c.prompt) for c in subject.calls] == [(2, 0), (2, 1), (2, 2), (1, 3)]
    found = ends(subject, a, b)
    assert [(e.path, e.differing_bits, e.compared) for e in found] == [(a, 0, 7 * 256), (b, 0, 7 * 256)]
    wrong = Hybrids(subject, *paths(a, b), 0)
    assert subject.end(0, wrong.choice(0, wrong.parts)).differing_bits > 0


def test_atomics_are_replayed_in_one_order_at_an_end():
    a, b = "gptq@h100", "vllm.marlin.gptq.atomic@h100"
    subject = layer(a, b, k=1024, symmetric=True)
    assert [e.differing_bits for e in ends(subject, a, b)] == [0, 0]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_ends_of_a_model_with_biases(relative, family):
    """Qwen2 adds a bias to qkv, which Marlin adds inside and awq_gemm's caller behind."""
    a, b = "awq@a100", "awq_marlin@h100"
    subject, _ = model(a, b, relative(family))
    assert [e.differing_bits for e in ends(subject, a, b)] == [0, 0]
    qkv = next(c for c in subject.calls if "qkv" in c.linear)
    assert subject.problem(0, qkv).bias == (family == "qwen2")
    assert subject.problem(0, qkv).M == 4


def test_prompts_are_prefilled_one_after_the_other_and_decoded_token_by_token(awq):
    prompts = (PROMPT, tuple(reversed(PROMPT)))
    subject, _ = model("awq@a100", "awq@h100", awq, prompts=prompts, forced=3, top_k=7)
    of_one = [c.M for c in subject.calls if c.linear == "model.layers.1.mlp.down_proj"]
    assert of_one == [3, 1, 1, 3, 1, 1]
    assert (subject.tokens, subject.rows) == (10, (5, 5))
    assert [c.prompt for c in subject.calls if c.linear == "model.layers.1.mlp.down_proj"] == [0, 0, 0, 1, 1, 1]
    hybrids = Hybrids(subject, *paths("awq@a100", "awq@h100"), 0)
    assert subject.logprobs(0, hybrids.choice(0, ())).shape == (10, 7)
    whole, _ = model("awq@a100", "awq@h100", awq, top_k=0)
    hybrids = Hybrids(whole, *paths("awq@a100", "awq@h100"), 0)
    assert whole.logprobs(0, hybrids.choice(0, ())).shape == (5, 2048)
    assert [e.differing_bits for e in ends(whole, "awq@a100", "awq@h100")] == [0, 0]


def test_outputs_are_taken_on_the_inputs_of_a_s_run(awq):
    """Whatever is swapped upstream, a linear of a hybrid gets the rows that it has in A's run."""
    subject, _ = model("awq@a100", "awq_marlin@h100", awq)
    hybrids = Hybrids(subject, *paths("awq@a100", "awq_marlin@h100"), 0)
    mine = subject.outputs(0, hybrids.choice(0, ()))
    last = next(i for i, c in enumerate(subject.calls) if c.linear == "model.layers.1.mlp.down_proj")
    whole = hybrids.choice(0, hybrids.parts)

    def only_the_last(name, m):
        return hybrids.choice(0, ())(name, m) if name == "model.layers.1.mlp.down_proj" else whole(name, m)

    assert torch.equal(subject.outputs(0, only_the_last)[last], mine[last])
    assert not torch.equal(subject.outputs(0, whole)[last], mine[last])


def scaled(weight, *scales):
    return replace(weight, input_scale=torch.tensor(scales, dtype=torch.float32))


def test_a_value_passes_between_two_units():
    w = random_weight(4, 8, 4, seed=1, name="w")
    two, four = scaled(w, 2, 2, 0.5, 1), scaled(w, 4, 1, 1, 3)
    x = torch.tensor([[1.0, 3.0, 5.0, 1.0]]).half()
    assert moved_input(x, two, w).tolist() == [[2.0, 6.0, 2.5, 1.0]]
    assert moved_input(x, two, four).tolist() == [[0.5, 6.0, 2.5, float(torch.tensor(1 / 3).half())]]
    assert moved_input(x, w, w) is x
    assert torch.equal(moved_input(x, two, scaled(w, 2, 2, 0.5, 1)), x)
    y = torch.arange(1.0, 7.0)[None].half()  # its last four columns are the channels of w's input
    assert moved_output(y, two, w).tolist() == [[1.0, 2.0, 1.5, 2.0, 10.0, 6.0]]
    assert moved_output(y, w, two).tolist() == [[1.0, 2.0, 6.0, 8.0, 2.5, 6.0]]
    assert moved_output(y, w, w) is y
    assert consumer("model.layers.3.mlp.gate_up_proj", own_values=False) == "model.layers.3.mlp.down_proj"
    assert consumer("model.layers.3.self_attn.qkv_proj", own_values=True) == "model.layers.3.self_attn.o_proj"
    assert consumer("model.layers.3.self_attn.qkv_proj", own_values=False) == ""
    assert consumer("model.layers.3.mlp.down_proj", own_values=True) == ""


def test_two_checkpoints_meet_in_one_unit():
    """AWQ divides up's columns by down's input scale: against GPTQ's they must be multiplied again."""
    a, b = "awq_marlin@h100", "gptq_marlin@h100"
    subject, weights = model(a, b)
    hybrids = Hybrids(subject, *paths(a, b), weights.full)
    mine, other = (subject.outputs(s, hybrids.choice(s, ())) for s in (0, weights.full))
    files = [ModelFiles(model_directory(kind), torch.float16) for kind in ("awq", "gptq")]
    kept = checkpoint.read(model_directory("awq"))
    for layer_index in range(2):
        name = f"model.layers.{layer_index}.mlp.gate_up_proj"
        at = next(i for i, c in enumerate(subject.calls) if c.linear == name)
        one, two = (f.weight(name) for f in files)
        x = subject.calls[at].x.double()
        exact = (x * one.input_scale.double()) @ two.dequantize(torch.float64)
        down = kept.weight(f"model.layers.{layer_index}.mlp.down_proj").input_scale.double()
        exact[:, -len(down) :] /= down
        assert other[at].dtype == torch.float64
        assert float((other[at] - exact).norm() / exact.norm()) < 1e-3
        apart = float((other[at] - mine[at].double()).norm() / mine[at].double().norm())
        assert apart < 0.13  # 0.18 and more where down's input scales are left in


def test_refusals(awq, gptq):
    with pytest.raises(CheckpointError, match="which vLLM does not run as awq"):
        model("awq@a100", "awq@h100", gptq)
    with pytest.raises(UnsupportedError, match="opaque: cuBLAS"):
        model("awq@a100", "awq_marlin@a100", awq, prompts=(tuple(range(300)),))
    with pytest.raises(UnsupportedError, match="awq takes fp16 only"):
        model("awq@a100", "awq_marlin@a100", awq, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="do not run natively on the CPU"):
        model("awq@a100", "awq_marlin@a100", awq, native=True)
    with pytest.raises(UnsupportedError, match="do not run natively on the CPU"):
        layer("awq@a100", "awq@h100", native=True)


@pytest.fixture
def here():
    """This machine's GPU, by its key."""
    found = hardware.detect()
    if found is None or found.key not in {g.key for g in hardware.GPUS}:
        pytest.skip("this GPU is none of the table's")
    return found


def native_paths(gpu):
    """A native path for every kernel of the labels, with one that is replayed."""
    found = [(f"awq@{gpu.key}", f"awq_marlin@{gpu.key}"), (f"gptq_marlin@{gpu.key}", "gptq_marlin@a100")]
    return found + [
        (f"{m}_marlin@{gpu.key}:vllm", f"{m}_marlin@{gpu.key}") for m in ("awq", "gptq") if gpu.capability == (9, 0)
    ]


@pytest.mark.gpu
@pytest.mark.vllm
def test_native_kernels_give_the_bits_of_a_layer_s_ends(here):
    for a, b in native_paths(here):
        for m in (1, 16):
            subject = layer(a, b, m=m, k=1024, n=512, symmetric="gptq" in a, device=torch.device("cuda"))
            for end, path in zip(ends(subject, a, b), paths(a, b), strict=True):
                assert (end.origin, end.differing_bits) == ("native" if path.gpu == here.key else "replay", 0), (a, b, m)


@pytest.mark.gpu
@pytest.mark.vllm
def test_native_kernels_give_the_bits_of_the_shipped_model_s_ends(here):
    for a, b in native_paths(here):
        subject, weights = model(a, b, device=torch.device("cuda"))
        for end, path in zip(ends(subject, a, b, weights.full), paths(a, b), strict=True):
            assert (end.origin, end.differing_bits) == ("native" if path.gpu == here.key else "replay", 0), (a, b)
