"""The whole of VllmEngine around an LLM that is not there: what it is told, and what is made of its answers."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from qlab import data, hardware
from qlab.engine import vllm, vllm_plugin
from qlab.engine.builtin import Builtin
from qlab.engine.path import Path
from qlab.engine.run import Request, Sampling, Tap, row_digest
from qlab.engine.schedule import Batching
from qlab.errors import QlabError, UnsupportedError
from tests.engine import vllm_like

AWQ, PATH = data.model_directory("awq"), Path("awq_marlin", "h100")
V = 2048
BATCHING = Batching(4, 2)
KINDS = {
    "self_attn.qkv_proj": (512, 1024),
    "self_attn.o_proj": (512, 512),
    "mlp.gate_up_proj": (512, 2048),
    "mlp.down_proj": (1024, 512),
}
SHAPES = {f"model.layers.{i}.{kind}": shape for i in range(3) for kind, shape in KINDS.items()}
LINEARS = list(SHAPES)


class AWQMarlinLinearMethod:
    """y repeats x's first number, so that a row tells its token."""

    def __init__(self, n):
        self.n, self.kernel = n, vllm_like.MarlinLinearKernel()

    def apply(self, layer, x, bias=None):
        return x[:, :1].repeat(1, self.n)


def logprobs(tokens):
    """float32 [V] after some tokens: any function of them."""
    g = torch.Generator().manual_seed(sum((i + 1) * t for i, t in enumerate(tokens)))
    return torch.randn(V, generator=g).log_softmax(0)


class FakeLLM(vllm_plugin.Recording):
    """Steps tokens as the schedule says through layers that report to the plugin; slot 0 of the batch is the second request."""

    linear, runner = None, None

    def __init__(self, **options):
        self.options = options
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(enforce_eager=options["enforce_eager"]))
        backend = SimpleNamespace(get_name=lambda: options.get("attention_backend", "FLASH_ATTN"))
        self.model_runner = SimpleNamespace(attn_groups=[[SimpleNamespace(backend=backend)]])
        self.layers = [
            self.linear(SHAPES[name][0], quant_config=1, prefix=name, method=AWQMarlinLinearMethod(SHAPES[name][1]))
            for name in LINEARS
        ]
        self.forward(8, None)  # a profile run

    def collective_rpc(self, method, args=()):
        return [getattr(self, method)(*args)]

    def forward(self, rows, positions):
        x = torch.arange(rows) if positions is None else torch.tensor(positions)
        for layer in self.layers:
            layer(x[:, None].half().repeat(1, SHAPES[layer.prefix][0]))

    def generate(self, prompts, parameters, use_tqdm):
        self.asked = parameters
        lengths = [len(p["prompt_token_ids"]) for p in prompts]
        new = parameters[0].max_tokens
        for step in BATCHING.steps(lengths, [n + new - 1 for n in lengths]):
            spans = list(reversed(step))
            batch = [(f"{s.sequence}-ab", s.start) for s in spans]
            runner = self.runner(batch, {f"{s.sequence}-ab": parameters[s.sequence].extra_args for s in spans})
            runner._prepare_inputs("step", np.array([s.stop - s.start for s in spans]))
            self.forward(0, [p for s in spans for p in range(s.start, s.stop)])
        return [self.output(list(p["prompt_token_ids"]), q) for p, q in zip(prompts, parameters, strict=True)]

    def output(self, tokens, parameters):
        prompt, sampled = vllm_like.FlatLogprobs(), vllm_like.FlatLogprobs()
        prompt.add([], [])
        for i in range(1, len(tokens)):
            prompt.add(*vllm_like.listed(logprobs(tokens[:i]), tokens[i], parameters.prompt_logprobs))
        forced, made = parameters.extra_args.get("qlab_forced"), []
        for i in range(parameters.max_tokens):
            p = logprobs(tokens + made)
            token = forced[i] if forced else int(p.argmax())
            sampled.add(*vllm_like.listed(p, token, parameters.logprobs))
            made.append(token)
        return SimpleNamespace(prompt_logprobs=prompt, outputs=[SimpleNamespace(token_ids=made, logprobs=sampled)])


@pytest.fixture
def engine(monkeypatch):
    base, runner = type("LinearBase", (vllm_like.LinearBase,), {}), type("Runner", (vllm_like.GPUModelRunner,), {})
    row = type("Row", (base,), {"forward": vllm_like.RowParallelLinear.forward})
    content = {
        "vllm": {
            "LLM": type("LLM", (FakeLLM,), {"linear": row, "runner": runner}),
            "SamplingParams": SimpleNamespace,
            "envs": SimpleNamespace(VLLM_DISABLED_KERNELS=["MacheteLinearKernel"]),
        },
        "vllm.inputs": {"TokensPrompt": dict},
        "vllm.model_executor.layers.linear": {"LinearBase": base},
        "vllm.v1.worker.gpu_model_runner": {"GPUModelRunner": runner},
    }
    for name in content:
        for i in range(1, name.count(".") + 2):
            part = ".".join(name.split(".")[:i])
            monkeypatch.setitem(sys.modules, part, ModuleType(part))
    for name, values in content.items():
        vars(sys.modules[name]).update(values)
    monkeypatch.setattr(vllm_plugin, "_recorder", None)
    monkeypatch.setattr(hardware, "detect", lambda: hardware.gpu("h100"))
    monkeypatch.setattr(vllm.importlib.metadata, "version", lambda name: "0.20.2")
    for variable in vllm.environment(PATH):
        monkeypatch.setenv(variable, "before")  # put back at the end
    return vllm.VllmEngine(AWQ, PATH, BATCHING, attention_backend="TRITON_ATTN")


def test_vllm_is_told_what_the_path_and_batching_say(engine):
    told = engine._llm.options
    assert os.environ["VLLM_DISABLED_KERNELS"] == "MacheteLinearKernel"
    assert "VLLM_MARLIN_INPUT_DTYPE" not in os.environ
    assert (told["quantization"], told["dtype"], told["max_model_len"]) == ("awq_marlin", "float16", 1024)
    assert (told["max_num_batched_tokens"], told["max_num_seqs"]) == (4, 2)
    assert told["enforce_eager"] is True
    assert told["enable_chunked_prefill"] is True
    assert told["enable_prefix_caching"] is False
    assert told["async_scheduling"] is False
    assert told["logprobs_mode"] == "raw_logprobs"
    assert told["attention_backend"] == "TRITON_ATTN"


def test_a_run_has_rows_calls_and_recipes_at_their_places(engine):
    taps = frozenset({Tap(LINEARS[3], 0, 4), Tap(LINEARS[3], 1, 2), Tap(LINEARS[0], 1, 3)})
    request = Request(((5, 6, 7, 8, 9, 10), (1, 2, 3)), 2, batching=BATCHING, top_k=3, taps=taps, digests=True)
    told = []
    run = engine.run(request, told.append)
    assert told == [7 + 4]
    assert run.linears == tuple(LINEARS)
    assert [sorted(step) for step in run.steps] == [sorted(s) for s in BATCHING.steps([6, 3], [7, 4])]
    assert [r.tap for r in run.rows] == sorted(taps, key=lambda t: (t.sequence, t.position))
    for r in run.rows:  # a row's number is its position
        assert float(r.x[0]) == r.tap.position
        assert int(row_digest(r.y[None])) == int(
            run.sequences[r.tap.sequence].digests[LINEARS.index(r.tap.linear), r.tap.position]
        )
    for s, prompt in zip(run.sequences, request.prompts, strict=True):
        assert s.digests.shape == (12, len(prompt) + 1)
        tokens = s.tokens.tolist()
        for r in range(len(tokens) - 1):
            expected = logprobs(tokens[: r + 1]).sort(descending=True, stable=True)
            assert s.ids[r].tolist() == expected.indices[:3].tolist()
            assert torch.equal(s.logprobs[r], expected.values[:3])
    assert run.notes["attention"] == "TRITON_ATTN"
    builtin = Builtin(AWQ, PATH, torch.device("cpu"))
    for c in run.calls:
        form = builtin.model.linears[c.linear].form(c.M)
        assert (c.kernel, c.origin, c.recipe) == (form.kernel, "native", form.recipe)
    assert sum(c.count for c in run.calls) == 12 * len(run.steps)


def test_forced_sampled_and_refused_requests(engine):
    request = Request(((5, 6, 7), (1, 2)), 2, batching=BATCHING, top_k=3)
    forced = Request(
        request.prompts,
        2,
        ((9, 8), (7, 6)),
        BATCHING,
        Sampling(1.0, 3),
        wanted=(torch.tensor([[11]] * 4), torch.tensor([[12]] * 3)),
    )
    run = engine.run(forced)
    assert [s.tokens.tolist()[s.prompt :] for s in run.sequences] == [[9, 8], [7, 6]]
    assert float(run.sequences[0].logprobs[2, 5]) == float(logprobs([5, 6, 7])[11])
    assert [p.temperature for p in engine._llm.asked] == [0.0, 0.0]
    assert {p.logprobs for p in engine._llm.asked} == {V}
    drawn = Request(request.prompts, 2, batching=BATCHING, sampling=Sampling(0.5, 3), first=4)
    engine.run(drawn)
    assert [(p.temperature, p.seed, p.ignore_eos) for p in engine._llm.asked] == [(0.5, 7, True), (0.5, 8, True)]
    with pytest.raises(UnsupportedError, match="make another for it"):
        engine.run(Request(request.prompts, 2))
    with pytest.raises(QlabError, match="set max_len"):
        engine.run(Request((tuple(range(1024)),), 1, batching=BATCHING))
    engine.tensor_parallel = 2
    with pytest.raises(UnsupportedError, match="cut between 2 GPUs"):
        engine.run(Request(request.prompts, 2, batching=BATCHING, digests=True))
    assert all(c.recipe == "" for c in engine.run(request).calls)
