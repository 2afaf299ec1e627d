"""The lab's figures: whom a difference touches, what repeats, who refuses, how totals follow from layers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from qlab import compare, hardware
from qlab.backends import dispatch, failure
from qlab.backends.reference import oracle
from qlab.backends.registry import Problem, Support
from qlab.errors import PackingError, QlabError
from qlab.inputs import random_activations, random_weight
from qlab.lab import run as lab
from qlab.lab.results import SCHEMA, TOTAL, LabResult
from qlab.lab.run import Layer
from qlab.recipes import recipe
from qlab.replay import replay
from qlab.serial import write_json

KERNELS = ("reference.float64", "reference.float32", "triton.gptq_gemm")


def one_ulp(y, call):
    """The next value above in one element."""
    y.view(torch.int16)[2, 7] += 1
    return y


def cells(result, key):
    return [c for c in result.cells if c.key == key]


def entries(pairs, *, without):
    """Every figure of a matrix that does not concern ``without``."""
    keep = [i for i, key in enumerate(pairs.keys) if key != without]
    return [[(pairs.relative_l2[i][j], pairs.differing[i][j]) for j in keep] for i in keep]


def test_one_unit_in_one_element_touches_its_own_row_and_column_only(result, planted, make_layers):
    before = result(*KERNELS, planted("planted"))
    after = result(*KERNELS, planted("planted", one_ulp))
    for key in KERNELS:
        assert cells(after, key) == cells(before, key)
    assert before.digest == after.digest
    assert before.inputs == after.inputs
    for a, b in zip(cells(after, "planted"), cells(before, "planted"), strict=True):
        assert a.digest != b.digest
        assert a.error != b.error
        assert a.repeatable is b.repeatable is True
        assert a.noise_floor == b.noise_floor == 0
    for layer, a, b in zip((*make_layers(), None), after.pairs, before.pairs, strict=True):
        assert entries(a, without="planted") == entries(b, without="planted")
        i, j = a.keys.index("planted"), a.keys.index("reference.float64")
        assert b.relative_l2[i][j] == b.differing[i][j] == 0
        assert a.relative_l2[i][j] > 0
        assert ("planted",) in a.classes
        assert any({"reference.float64", "planted"} <= set(c) for c in b.classes)
        rest = [tuple(k for k in c if k != "planted") for c in b.classes]
        assert [c for c in a.classes if c != ("planted",)] == [c for c in rest if c]
        if layer is not None:
            assert a.differing[i][j] == 1 / (5 * layer.weights["same"].N)
            exact = oracle(layer.inputs["same"], layer.weights["same"])
            assert a.relative_l2[i][j] < 2.0**-9 * float(exact.abs().max()) / float(exact.norm())


def test_a_kernel_that_does_not_repeat_is_found(result, planted):
    def noisy(y, call):
        return one_ulp(y, call) if call % 3 == 0 else y

    r = result("reference.float64", planted("noisy", noisy), runs=3)
    for cell in cells(r, "noisy"):
        assert cell.repeatable is False
        assert 0 < cell.noise_floor < 1e-2
        assert cell.runs == 3
    for cell in cells(r, "reference.float64"):
        assert (cell.repeatable, cell.noise_floor) == (True, 0)


def test_noise_in_one_layer_makes_the_total_noisy(result, planted):
    r = result(planted("noisy", lambda y, call: one_ulp(y, call) if call == 4 else y))
    assert [c.repeatable for c in cells(r, "noisy")] == [True, False, False]
    assert r.cell(TOTAL, "noisy").noise_floor > 0


def test_a_flipped_sign_of_zero_is_noise_without_distance(result, planted):
    def flip(y, call):
        y[0, 0] = -0.0 if call % 2 else 0.0
        return y

    for cell in cells(result(planted("signed", flip)), "signed"):
        assert (cell.repeatable, cell.noise_floor) == (False, 0)


def test_infinities_and_nan_that_repeat_are_no_noise(result, planted):
    def broken(y, call):
        y[0, 0], y[0, 1] = math.inf, math.nan
        return y

    r = result("reference.float64", planted("a", broken), planted("b", broken))
    for cell in cells(r, "a"):
        assert (cell.repeatable, cell.noise_floor) == (True, 0)
        assert cell.error.ulp_max == cell.error.backward == math.inf
        assert not math.isfinite(cell.error.relative_l2)
    for pairs in r.pairs:
        assert pairs.relative_l2[1][2] == pairs.differing[1][2] == 0
        assert not math.isfinite(pairs.relative_l2[0][1])
        assert pairs.classes == (("reference.float64",), ("a", "b"))


def test_single_runs_say_nothing_of_noise(result):
    for cell in result("reference.float64", runs=1).cells:
        assert (cell.repeatable, cell.noise_floor, cell.runs) == (None, None, 1)


def test_a_kernel_that_refuses_shows_its_reason_and_spoils_nothing(result, planted):
    refuses = planted("refuses", support=Support(False, "needs the moon"))
    raises = planted("raises", pack_error=PackingError("group 3, column 5 has zero point 0"))
    r = result("reference.float64", refuses, raises, probe=True)
    assert {c.reason for c in cells(r, "refuses")} == {"needs the moon"}
    assert {c.reason for c in cells(r, "raises")} == {"group 3, column 5 has zero point 0"}
    for cell in (*cells(r, "refuses"), *cells(r, "raises")):
        assert (cell.digest, cell.error, cell.repeatable, cell.noise_floor, cell.runs) == ("", None, None, None, 0)
    assert r.ran() == ("reference.float64",)
    assert {p.reason for p in r.probes if p.key == "refuses"} == {"needs the moon"}
    assert {p.reason for p in r.probes if p.key == "raises"} == {"group 3, column 5 has zero point 0"}
    assert cells(r, "reference.float64") == cells(result("reference.float64"), "reference.float64")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("CUDA error: invalid configuration argument\nmore"),
            "RuntimeError: CUDA error: invalid configuration argument",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), "OutOfMemoryError: CUDA out of memory."),
        (AssertionError(), "AssertionError: no message"),
    ],
)
def test_a_kernel_that_breaks_costs_its_own_cells_only(result, planted, error, reason):
    def breaks(y, call):
        raise error

    packs, runs = planted("packs", pack_error=error), planted("runs", breaks)
    r = result("reference.float64", packs, runs, "reference.float32")
    assert {c.reason for key in ("packs", "runs") for c in cells(r, key)} == {reason}
    assert r.ran() == ("reference.float64", "reference.float32")
    for key in r.ran():
        assert cells(r, key) == cells(result(key), key)


def test_a_kernel_that_breaks_in_the_probe_costs_its_own_probe_only(result, planted):
    def breaks(y, call):
        if y.shape[0] != 5:  # the layer's own input has five rows
            raise RuntimeError("CUDA error: too many resources requested for launch")
        return y

    r = result("reference.float64", planted("planted", breaks), probe=True)
    assert r.ran() == ("reference.float64", "planted")
    reasons = {p.key: p.reason for p in r.probes}
    assert reasons == {"reference.float64": "", "planted": "RuntimeError: CUDA error: too many resources requested for launch"}


def test_a_gpu_that_no_longer_answers_ends_the_run_and_names_the_kernel(result, planted, monkeypatch):
    """An illegal access shows when the lab waits for the kernel, and from then on at every call."""

    def touches_what_it_should_not(y, call):
        monkeypatch.setattr(failure, "wait", dead)
        return y

    def dead(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(failure, "wait", failure.wait)  # put back after the test
    with pytest.raises(QlabError, match=r"^bad stopped the GPU \(RuntimeError: CUDA error: an illegal .*\); run again without"):
        result("reference.float64", planted("bad", touches_what_it_should_not), planted("innocent"))


def test_a_layer_without_room_for_its_exact_result_is_one_sentence(result, monkeypatch):
    def full(x, weight):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(lab.reference, "oracle", full)
    with pytest.raises(QlabError, match=r"down_proj': K=512, N=64 in float64 does not fit"):
        result("reference.float32")


def test_a_kernel_that_ran_on_some_layers_is_not_in_the_total(result, planted, make_layers):
    class Picky(planted):
        def supports(self, problem, device):
            return Support(problem.N == 64, "" if problem.N == 64 else f"N={problem.N}")

    r = result("reference.float64", Picky("picky"))
    assert [c.reason for c in cells(r, "picky")] == ["", "N=128", "N=128"]
    assert [p.keys for p in r.pairs] == [("reference.float64", "picky"), ("reference.float64",), ("reference.float64",)]


def test_totals_follow_from_the_layers(result, planted, make_layers):
    r = result(*KERNELS, planted("planted", one_ulp), runs=2)
    norms = [float(oracle(x.inputs["same"], x.weights["same"]).square().sum()) for x in make_layers()]
    counts = [5 * x.weights["same"].N for x in make_layers()]
    for key in (*KERNELS, "planted"):
        *layers, total = cells(r, key)
        squared = sum(c.error.relative_l2**2 * norm for c, norm in zip(layers, norms, strict=True))
        assert total.error.relative_l2 == pytest.approx(math.sqrt(squared / sum(norms)), rel=1e-12)
        assert total.error.ulp_max == max(c.error.ulp_max for c in layers)
        assert total.error.backward == max(c.error.backward for c in layers)
        medians = [c.error.ulp_median for c in layers]
        assert min(medians) * (1 - 1e-6) <= total.error.ulp_median <= max(medians) * (1 + 1e-6)
    *layers, total = r.pairs
    for i in range(len(total.keys)):
        for j in range(len(total.keys)):
            squared = sum(p.relative_l2[i][j] ** 2 * norm for p, norm in zip(layers, norms, strict=True))
            assert total.relative_l2[i][j] == pytest.approx(math.sqrt(squared / sum(norms)), rel=1e-12)
            share = sum(p.differing[i][j] * count for p, count in zip(layers, counts, strict=True)) / sum(counts)
            assert total.differing[i][j] == pytest.approx(share, rel=1e-12)
    assert total.spread == compare.off_diagonal(total.relative_l2)
    assert r.layers() == (*(x.name for x in make_layers()), TOTAL)


def test_the_worst_layer_gives_the_totals_worst(result, planted):
    def first_layer_is_far_off(y, call):
        if call <= 2:
            y[0, 0] += 100
        return y

    *layers, total = cells(result(planted("planted", first_layer_is_far_off)), "planted")
    assert layers[0].error.ulp_max > 100 * layers[1].error.ulp_max
    assert total.error.ulp_max == layers[0].error.ulp_max
    assert total.error.backward == layers[0].error.backward > layers[1].error.backward


def test_two_sources_are_compared_by_the_mean_of_their_norms(result):
    x = random_activations(5, 128)
    weights = {"awq": random_weight(128, 64, 32, seed=1), "gptq": random_weight(128, 64, 32, symmetric=True, seed=2)}
    inputs = {"awq": 3 * x, "gptq": x}
    r = result("reference.float64", layers=[Layer("one", weights, inputs)], mode="own")
    assert r.ran() == ("reference.float64@awq", "reference.float64@gptq")
    a, b = (oracle(inputs[s], weights[s]) for s in ("awq", "gptq"))
    norm = math.sqrt(float(a.square().sum() + b.square().sum()) / 2)
    for pairs in r.pairs:
        assert pairs.relative_l2[0][1] == pytest.approx(float((a - b).norm()) / norm, rel=1e-3)  # outputs are rounded to fp16
    assert [(i.source, i.symmetric) for i in r.inputs] == [("awq", False), ("gptq", True)]
    assert all(c.error.ulp_max <= 0.5 + 1e-9 for c in r.cells)  # each against its own exact output


def test_cells_agree_with_the_kernels_run_by_hand(result, make_layers):
    from qlab.backends.registry import kernel

    r = result(*KERNELS)
    for layer in make_layers():
        x, w = layer.inputs["same"], layer.weights["same"]
        for key in KERNELS:
            k = kernel(key)
            y = k.run(x, k.pack(w)) if k.portable else replay(recipe(key, Problem.of(w, len(x)), hardware.gpu("h100")), x, w)
            cell = r.cell(layer.name, key)
            assert cell.digest == compare.digest(y)
            assert cell.origin == ("native" if k.portable else "replay")


def test_native_outputs_are_compared_with_the_replay_bit_by_bit(cuda_machine, monkeypatch, result, planted):
    """A kernel of a known recipe that runs "natively": its own replay, then the same with two bits of one output flipped."""
    cuda_machine("h100")
    hw = lab.resolve_hardware(hardware.gpu("h100"), torch.device("cuda"), "a CPU")
    monkeypatch.setattr(lab, "resolve_hardware", lambda *_: hw)
    for flipped in (0, 2):
        own = planted("vllm.marlin.gptq")
        own.portable = False

        def run(x, packed, flipped=flipped, own=own):
            y = replay(recipe("vllm.marlin.gptq", Problem.of(own.weight, len(x)), hardware.gpu("h100")), x, own.weight)
            y.view(torch.int16)[0, 1] ^= (1 << flipped) - 1
            return y

        def pack(weight, own=own):
            own.weight = weight
            return None

        monkeypatch.setattr(own, "run", run)
        monkeypatch.setattr(own, "pack", pack)
        r = result("reference.float64", own)
        layers = [c for c in cells(r, "vllm.marlin.gptq") if c.layer != TOTAL]
        assert [c.replay_bits for c in layers] == [flipped] * len(layers)
        assert r.cell(TOTAL, "vllm.marlin.gptq").replay_bits == flipped * len(layers)
        assert {c.origin for c in layers} == {"native"}


def test_another_gpu_is_set_beside_the_asked_one(plan, make_layers, here):
    chosen = replace(plan("reference.float64", "vllm.marlin.gptq", "vllm.machete.gptq"), against=hardware.gpu("a100"))
    r = lab.run(chosen, make_layers(), here)
    rows = {row.key: row for row in r.against.rows}
    assert not r.against.proved
    assert set(rows) == {"vllm.marlin.gptq", "vllm.machete.gptq", *dispatch.LABELS}
    y = {}
    for gpu in ("h100", "a100"):
        y[gpu] = [
            replay(recipe("vllm.marlin.gptq", Problem.of(x.weights["same"], len(x.inputs["same"])), hardware.gpu(gpu)),
                   x.inputs["same"], x.weights["same"])
            for x in make_layers()
        ]  # fmt: skip
    pairs = list(zip(y["h100"], y["a100"], strict=True))
    marlin = rows["vllm.marlin.gptq"]
    assert marlin.bits == sum(compare.differing_bits(a, b) for a, b in pairs)
    assert marlin.differing == sum(compare.differing(a, b) for a, b in pairs)
    assert marlin.outputs == sum(a.numel() for a, _ in pairs)
    assert "Hopper" in rows["vllm.machete.gptq"].reason


def test_zero_inputs_give_no_nan(result, make_layers):
    silent = [replace(x, inputs={"same": torch.zeros_like(x.inputs["same"])}) for x in make_layers()]
    r = result("reference.float64", "reference.float32", layers=silent)
    for cell in r.cells:
        assert (cell.error.relative_l2, cell.error.ulp_max, cell.error.backward) == (0, 0, 0)
    for pairs in r.pairs:
        assert pairs.relative_l2 == ((0, 0), (0, 0))


def test_the_digest_tells_inputs_and_weights_apart(result, make_layers):
    def digest(change=lambda layer: layer):
        return result("reference.float64", layers=[change(x) for x in make_layers()], runs=1).digest

    def bit_of(part):
        def change(layer):
            w = layer.weights["same"]
            t = getattr(w, part).clone()
            flat = t.view(torch.int16) if part == "scales" else t
            flat[3, 5] ^= 1
            return replace(layer, weights={"same": replace(w, **{part: t})})

        return change

    def input_bit(layer):
        x = layer.inputs["same"].clone()
        x.view(torch.int16)[0, 0] ^= 1
        return replace(layer, inputs={"same": x})

    found = [digest(), digest(bit_of("codes")), digest(bit_of("zeros")), digest(bit_of("scales")), digest(input_bit)]
    assert len(set(found)) == 5
    assert digest() == found[0]


def test_the_whole_result_survives_its_file(result, planted, tmp_path):
    noisy = planted("noisy", lambda y, call: y.fill_(math.nan) if call == 2 else y)
    r = result(*KERNELS, noisy, planted("refuses", support=Support(False, "no")), probe=True)
    assert r.schema == SCHEMA
    write_json(tmp_path / "r.json", r)
    assert repr(LabResult.read(tmp_path / "r.json")) == repr(r)


def test_no_layer_is_one_sentence(result):
    with pytest.raises(QlabError, match="nothing to run"):
        result("reference.float64", layers=[])


@pytest.fixture
def cuda_machine(monkeypatch):
    """A machine whose one GPU is the table's ``key``, as far as the lab asks."""

    def be(key):
        gpu = hardware.gpu(key)
        properties = type("Properties", (), {"name": gpu.name})
        monkeypatch.setattr(hardware, "detect", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return be


@pytest.mark.parametrize(
    ("running", "asked", "native"),
    [
        ("h200", "h100", True),
        ("h100", "h100", True),
        ("h100", "h200", True),
        ("a100", "h100", False),
        ("h100", "a100", False),
        ("h100-pcie", "h100", False),
        ("b200", "h100", False),
        ("rtx4090", "l40s", False),
    ],
)
def test_what_hw_means_on_a_gpu(cuda_machine, running, asked, native):
    cuda_machine(running)
    hw = lab.resolve_hardware(hardware.gpu(asked), torch.device("cuda"), "a CPU")
    assert (hw.asked, hw.device, hw.native) == (asked, "cuda", native)
    assert hw.running == hardware.gpu(running).name
    assert hw.note.startswith("native" if native else f"another GPU: {asked}'s kernels are replayed bit for bit")
    assert native or ("a prediction" in hw.note) != hardware.gpu(asked).proved
    assert (asked in hw.note) == (not native or running != asked)


def test_what_hw_means_without_a_gpu():
    hw = lab.resolve_hardware(hardware.gpu("a100"), torch.device("cpu"), "a CPU")
    assert (hw.asked, hw.running, hw.device, hw.native) == ("a100", "a CPU", "cpu", False)
    assert "replayed bit for bit, a prediction" in hw.note
    assert "prediction" not in lab.resolve_hardware(hardware.gpu("h100"), torch.device("cpu"), "a CPU").note


@pytest.mark.parametrize(("running", "native"), [("h200", True), ("a100", False)])
def test_gpu_kernels_run_where_native_and_references_everywhere(cuda_machine, monkeypatch, result, planted, running, native):
    cuda_machine(running)
    hw = lab.resolve_hardware(hardware.gpu("h100"), torch.device("cuda"), "a CPU")
    monkeypatch.setattr(lab, "resolve_hardware", lambda *_: hw)  # the tensors themselves stay on the CPU
    own = planted("gpu kernel")
    own.portable = False
    r = result("reference.float64", own, probe=True)
    assert r.hardware == hw
    assert r.ran() == (("reference.float64", "gpu kernel") if native else ("reference.float64",))
    for c in cells(r, "gpu kernel"):
        assert c.reason == ("" if native else "gpu kernel has no recipe, so it runs on its own GPU only")
    probes = {p.key: (p.reason != "", p.elements) for p in r.probes}
    assert probes["gpu kernel"][0] is not native
    assert probes["reference.float64"][0] is False
    assert own.calls > 0 if native else own.calls == 0


def test_progress_is_told_once_per_layer_and_column(plan, make_layers, here):
    told = []
    lab.run(plan("reference.float64", "reference.float32"), make_layers(), here, told.append)
    assert len(told) == 4
    assert told[0] == "model.layers.0.mlp.down_proj  reference.float64"
