"""The recorder on layers and a runner like vLLM's: names, M, rows and their places; nothing unless it is switched on."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from qlab.backends import registry
from qlab.engine import vllm_plugin
from qlab.engine.run import Tap, row_digest
from qlab.engine.vllm_names import kernel_name
from qlab.engine.vllm_recorder import Recorder
from qlab.errors import QlabError
from tests.engine import vllm_like

A, B = "model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj"


@pytest.fixture
def world():
    """Fresh classes, wrapped, with their recorder."""
    base = type("LinearBase", (vllm_like.LinearBase,), {})
    row = type("RowParallelLinear", (base,), {"forward": vllm_like.RowParallelLinear.forward})
    runner = type("GPUModelRunner", (vllm_like.GPUModelRunner,), {})
    recorder = Recorder()
    vllm_plugin.wrap_layers(base, recorder)
    vllm_plugin.wrap_steps(runner, recorder)
    return SimpleNamespace(row=row, runner=runner, recorder=recorder)


def make(world, name, method):
    return world.row(4, quant_config=object(), prefix=name, method=method)


def test_kernels_have_their_registry_names():
    known = {k.name for k in registry.kernels()}
    cases = {
        ("AWQLinearMethod", "", 255): "vllm.awq_gemm",
        ("AWQLinearMethod", "", 256): "vllm.awq_dequantize",
        ("GPTQLinearMethod", "", 50): "vllm.gptq_gemm",
        ("AWQMarlinLinearMethod", "MarlinLinearKernel", 1): "vllm.marlin.awq",
        ("AWQMarlinLinearMethod", "MacheteLinearKernel", 1): "vllm.machete.awq",
        ("GPTQMarlinLinearMethod", "MarlinLinearKernel", 1): "vllm.marlin.gptq",
        ("GPTQMarlinLinearMethod", "MacheteLinearKernel", 1): "vllm.machete.gptq",
        ("GPTQMarlinLinearMethod", "ExllamaLinearKernel", 1): "vllm.gptq_gemm",
    }
    for asked, name in cases.items():
        assert kernel_name(*asked) == name
        assert name in known
    assert kernel_name("GPTQMarlinLinearMethod", "ConchLinearKernel", 1) == "ConchLinearKernel"
    assert kernel_name("Fp8LinearMethod", "", 1) == "Fp8LinearMethod"


def test_rows_carry_their_sequence_and_position_through_a_mixed_batch(world):
    layers = [make(world, A, vllm_like.AWQLinearMethod()), make(world, B, vllm_like.GPTQMarlinLinearMethod())]
    # The persistent batch: a request that decodes its token 9, one that prefills tokens 2 to 4, one that is not qlab's.
    runner = world.runner(
        [("7-aa", 9), ("5-bb", 2), ("x", 0)], {"7-aa": {"qlab_sequence": 3}, "5-bb": {"qlab_sequence": 0}, "x": None}
    )
    taps = [Tap(A, 3, 9), Tap(A, 0, 4), Tap(B, 0, 2), Tap(B, 0, 5)]
    world.recorder.begin(taps, digests=True)
    assert runner._prepare_inputs("step", np.array([1, 3, 2], dtype=np.int32)) == "prepared step"
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).half()
    y = layers[1](layers[0](x))
    assert torch.equal(y, torch.cat((x, 2 * x, 2 * x, 4 * x), -1))
    assert [layer.quant_method.calls for layer in layers] == [1, 1]
    runner.input_batch.num_computed_tokens_cpu[:3] = [10, 5, 2]
    runner._prepare_inputs("step", np.array([1, 1, 1], dtype=np.int32))
    layers[1](layers[0](x[:3]))
    record = world.recorder.end()
    assert record.linears == [A, B]
    assert record.steps == [[(3, 9, 10), (0, 2, 5), (-1, 0, 2)], [(3, 10, 11), (0, 5, 6), (-1, 2, 3)]]
    assert sorted(record.calls) == [
        (B, 3, "vllm.marlin.gptq", 1),
        (B, 6, "vllm.marlin.gptq", 1),
        (A, 3, "vllm.awq_gemm", 1),
        (A, 6, "vllm.awq_gemm", 1),
    ]
    found = {tap: (row, m, kernel, a, b) for tap, row, m, kernel, a, b in record.rows}
    assert {tap: place[:3] for tap, place in found.items()} == {
        taps[0]: (0, 6, "vllm.awq_gemm"),
        taps[1]: (3, 6, "vllm.awq_gemm"),
        taps[2]: (1, 6, "vllm.marlin.gptq"),
        taps[3]: (1, 3, "vllm.marlin.gptq"),
    }
    assert torch.equal(found[taps[1]][3], x[3])
    assert torch.equal(found[taps[1]][4], torch.cat((x[3], 2 * x[3])))
    digests = {(linear, s, p): d for linear, s, p, d in record.digests}
    assert len(record.digests) == 2 * 9
    assert digests[B, 0, 3] == int(row_digest(y[2:3]))


def test_a_tapped_row_survives_what_the_model_does_to_its_tensors(world):
    layer = make(world, A, vllm_like.AWQLinearMethod())
    world.recorder.begin([Tap(A, 0, 0)])
    world.runner([("1", 0)], {"1": {"qlab_sequence": 0}})._prepare_inputs("step", np.array([1]))
    x = torch.ones(1, 4).half()
    layer(x).zero_()
    x.zero_()
    ((_, _, _, _, a, b),) = world.recorder.end().rows
    assert a.tolist() == [1.0] * 4
    assert b.tolist() == [1.0] * 4 + [2.0] * 4


def test_padding_is_in_m_and_in_nothing_else(world):
    layer = make(world, A, vllm_like.AWQLinearMethod())
    world.recorder.begin([], digests=True)
    world.runner([("1", 0)], {"1": {"qlab_sequence": 0}})._prepare_inputs("step", np.array([3]))
    layer(torch.ones(8, 4).half())
    record = world.recorder.end()
    assert record.calls == [(A, 8, "vllm.awq_gemm", 1)]
    assert [d[1:3] for d in record.digests] == [(0, 0), (0, 1), (0, 2)]


def test_fewer_rows_than_tokens_are_refused(world):
    layer = make(world, A, vllm_like.AWQLinearMethod())
    world.recorder.begin([])
    world.runner([("1", 0)], {"1": None})._prepare_inputs("step", np.array([3]))
    with pytest.raises(QlabError, match="2 rows in a step of 3 tokens"):
        layer(torch.ones(2, 4).half())


def test_nothing_is_recorded_outside_of_a_request(world):
    """vLLM's profile and warm-up runs call the layers before any request, and other requests may come after."""
    layer = make(world, A, vllm_like.AWQLinearMethod())
    plain = world.row(4, quant_config=None, prefix="lm_head")
    assert "apply" not in vars(plain.quant_method)
    layer(torch.ones(2, 4).half())
    world.recorder.begin([])
    world.runner([("1", 0)], {"1": None})._prepare_inputs("step", np.array([1]))
    layer(torch.ones(1, 4).half())
    assert world.recorder.end().calls == [(A, 1, "vllm.awq_gemm", 1)]
    layer(torch.ones(2, 4).half())
    world.runner([("1", 0)], {"1": None})._prepare_inputs("step", np.array([1]))
    again = world.recorder.end()
    assert (again.calls, again.steps) == ([], [])


def fake_vllm(monkeypatch):
    base, runner = type("LinearBase", (vllm_like.LinearBase,), {}), type("GPUModelRunner", (vllm_like.GPUModelRunner,), {})
    modules = {
        "vllm.model_executor.layers.linear": {"LinearBase": base},
        "vllm.v1.worker.gpu_model_runner": {"GPUModelRunner": runner},
    }
    for name, content in modules.items():
        for i in range(1, name.count(".") + 2):
            part = ".".join(name.split(".")[:i])
            monkeypatch.setitem(sys.modules, part, sys.modules.get(part) or ModuleType(part))
        vars(sys.modules[name]).update(content)
    monkeypatch.setattr(vllm_plugin, "_recorder", None)
    return base, runner


def test_the_entry_point_does_nothing_unless_it_is_switched_on(monkeypatch):
    base, runner = fake_vllm(monkeypatch)
    before = (base.__init__, runner._prepare_inputs)
    for value in (None, "", "0", "true"):
        if value is None:
            monkeypatch.delenv(vllm_plugin.SWITCH, raising=False)
        else:
            monkeypatch.setenv(vllm_plugin.SWITCH, value)
        vllm_plugin.register()
        assert (base.__init__, runner._prepare_inputs) == before
    monkeypatch.setenv(vllm_plugin.SWITCH, "1")
    vllm_plugin.register()
    once = (base.__init__, runner._prepare_inputs)
    assert once[0] is not before[0]
    assert once[1] is not before[1]
    vllm_plugin.register()
    assert (base.__init__, runner._prepare_inputs) == once


def test_the_plugin_imports_neither_torch_nor_vllm():
    code = (
        "import sys; import qlab.engine.vllm_plugin as p; p.register(); print(sorted({'torch', 'vllm'} & sys.modules.keys()))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert made.stdout.strip() == "[]"


def test_a_worker_records_in_eager_mode_alone(monkeypatch):
    fake_vllm(monkeypatch)

    class Worker(vllm_plugin.Recording):
        def __init__(self, eager):
            self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(enforce_eager=eager))
            backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
            self.model_runner = SimpleNamespace(attn_groups=[[SimpleNamespace(backend=backend)]])

    assert Worker(True).qlab_end() is None
    with pytest.raises(QlabError, match=vllm_plugin.SWITCH):
        Worker(True).qlab_begin([], False)
    recorder = vllm_plugin.install()
    with pytest.raises(QlabError, match="enforce_eager"):
        Worker(False).qlab_begin([], False)
    assert not recorder.active
    Worker(True).qlab_begin([(A, 0, 1)], True)
    assert recorder.active
    assert Worker(True).qlab_attention() == ["FLASH_ATTN"]
    assert Worker(True).qlab_end().linears == []
    assert not recorder.active


def test_forced_tokens_follow_their_request_through_the_batch(monkeypatch):
    fake_vllm(monkeypatch)
    names = ("vllm.v1.sample", "vllm.v1.sample.logits_processor", "vllm.v1.sample.logits_processor.builtin")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[1]].LogitsProcessor, sys.modules[names[1]].BatchUpdate = object, object
    sys.modules[names[2]].process_dict_updates = vllm_like.process_dict_updates
    monkeypatch.delitem(sys.modules, "qlab.engine.vllm_forced", raising=False)
    from qlab.engine.vllm_forced import Forced

    def asked(extra):
        return SimpleNamespace(extra_args=extra)

    made = Forced(None, None, False)
    assert not made.is_argmax_invariant()
    first, third = [], []
    added = [
        (0, asked({"qlab_forced": [5, 6, 7]}), [1], first),
        (1, asked(None), [1], []),
        (2, asked({"qlab_forced": [9, 8]}), [1], third),
    ]
    made.update_state(SimpleNamespace(added=added, removed=[], moved=[]))
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    kept = logits[1].clone()
    assert made.apply(logits).argmax(1).tolist()[::2] == [5, 9]
    assert torch.equal(logits[1], kept)
    assert logits[0].exp().sum() == 1.0
    first.append(5)  # vLLM appends to the very list that it gave
    third += [9, 8]
    assert made.apply(torch.zeros(3, 12)).argmax(1).tolist() == [6, 0, 8]
    made.update_state(SimpleNamespace(added=[], removed=[0], moved=[(2, 0, False)]))
    assert made.apply(torch.zeros(1, 12)).argmax(1).tolist() == [8]
    made.update_state(None)
    made.update_state(SimpleNamespace(added=[(0, asked({}), [1], [])], removed=[], moved=[]))
    assert made.apply(torch.zeros(1, 12)).tolist() == [[0.0] * 12]
    sys.modules.pop("qlab.engine.vllm_forced", None)
