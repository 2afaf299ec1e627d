"""The built-in engine against transformers' own forward pass, and its cache, batches and choice of tokens."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qlab.engine.builtin import Builtin
from qlab.engine.path import Path
from qlab.engine.run import Request, Sampling
from qlab.engine.schedule import Batching, size
from qlab.errors import CheckpointError, QlabError, UnsupportedError
from qlab.lab.model_files import ModelFiles
from qlab.weights import round_once
from tests.tiny_llama import HIDDEN, LAYERS, VOCAB

CPU = torch.device("cpu")
PROMPT = tuple(range(40, 61))
OTHER = (7, 2000, 5, 5, 900, 31, 77)


def engine(folder, path="reference.float64@h100", **options):
    return Builtin(folder, Path.parse(path), CPU, **options)


@pytest.fixture(scope="module")
def exact(awq):
    return engine(awq)


@pytest.fixture
def relative(awq, tmp_path):
    """The tiny model under another family's name, with the tensors that family has besides."""

    def make(family):
        folder = tmp_path / family
        shutil.copytree(awq, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"], "head_dim": 32}
        (folder / "config.json").write_text(json.dumps(config))
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        g = torch.Generator().manual_seed(3)
        for i in range(LAYERS):
            for shard, width in {"q": HIDDEN, "k": HIDDEN // 2, "v": HIDDEN // 2}.items() if family == "qwen2" else ():
                tensors[f"model.layers.{i}.self_attn.{shard}_proj.bias"] = torch.randn(width, generator=g).half()
            for norm in ("q_norm", "k_norm") if family == "qwen3" else ():
                tensors[f"model.layers.{i}.self_attn.{norm}.weight"] = (1 + 0.1 * torch.randn(32, generator=g)).half()
        save_file(tensors, file, metadata={"format": "pt"})
        return folder

    return make


def transformers_logprobs(folder, tokens):
    """transformers' whole model in float64, its linears' inputs, outputs and biased outputs rounded as the engine's are."""
    files = ModelFiles(folder, torch.float16)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa").eval()
    for name, p in model.named_parameters():
        module = name.removesuffix(".weight")
        quantised = module.endswith("_proj")
        p.data = (
            files._checkpoint.weight(module).dequantize(torch.float16).t().double() if quantised else files.dense(name).double()
        )

    def half(t):
        return round_once(t, torch.float16).double()

    for name, module in model.named_modules():
        if name.endswith("_proj"):

            def forward(x, m=module):
                y = half(half(x) @ m.weight.t())
                return y if m.bias is None else half(y + m.bias)

            module.forward = forward
        elif name.endswith("norm"):
            eps = module.variance_epsilon
            module.forward = lambda x, m=module, e=eps: x / (x.square().mean(-1, keepdim=True) + e).sqrt() * m.weight
    width = config.head_dim
    angles = torch.arange(len(tokens)).double()[:, None] * 10000.0 ** (-torch.arange(width // 2).double() / (width // 2))
    both = torch.cat((angles, angles), -1)[None]
    model.model.rotary_emb.forward = lambda *a, **k: (both.cos(), both.sin())
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_own_forward(relative, family):
    folder = relative(family)
    want = transformers_logprobs(folder, PROMPT)
    run = engine(folder).run(Request((PROMPT,), 1, top_k=0, batching=Batching(8)))
    got = run.sequences[0].logprobs
    assert got.dtype == torch.float32
    assert float(want.std()) > 0.5
    assert torch.equal(run.sequences[0].ids, torch.arange(VOCAB).repeat(len(PROMPT), 1))
    torch.testing.assert_close(got.double(), want, rtol=1e-7, atol=1e-9)  # one rounding to float32


def test_prefill_and_decode_give_the_same_rows(exact):
    """A kernel whose bits do not depend on M: each linear's, and everything behind it but for float32's border."""
    whole, single = (exact.run(Request((PROMPT,), 1, digests=True, batching=Batching(b))) for b in (50, 1))
    assert torch.equal(whole.sequences[0].digests, single.sequences[0].digests)
    torch.testing.assert_close(whole.sequences[0].logprobs, single.sequences[0].logprobs, rtol=1e-6, atol=0)
    assert torch.equal(whole.sequences[0].ids, single.sequences[0].ids)


def test_cache_to_1e_12(exact):
    """Float64 log-probabilities of one step for all tokens, and of a step for each."""
    from qlab.engine.attention import Placed

    cache = exact.model.cache(len(PROMPT))
    whole = exact.model.step(PROMPT, [Placed(0, 0, len(PROMPT), cache)])
    cache = exact.model.cache(len(PROMPT))
    single = torch.cat([exact.model.step([t], [Placed(0, i, i + 1, cache)]) for i, t in enumerate(PROMPT)])
    torch.testing.assert_close(single, whole, rtol=0, atol=1e-12)


def test_blocks_of_attention_change_nothing(exact, monkeypatch):
    whole = exact.run(Request((PROMPT,), 1, digests=True))
    monkeypatch.setattr("qlab.engine.attention.SCORES", 4 * 3 * len(PROMPT))
    assert torch.equal(exact.run(Request((PROMPT,), 1, digests=True)).sequences[0].digests, whole.sequences[0].digests)


def test_a_wide_head_goes_in_parts(awq, exact, monkeypatch):
    whole = exact.run(Request((PROMPT,), 1, top_k=0))
    monkeypatch.setattr("qlab.engine.blocks.WIDE", 300 * HIDDEN)
    parts = engine(awq)
    assert parts.model.blocks.head.dtype == torch.float16
    torch.testing.assert_close(parts.run(Request((PROMPT,), 1, top_k=0)).sequences[0].logprobs, whole.sequences[0].logprobs)


def test_company_changes_no_row_and_every_m_is_told(awq):
    e = engine(awq, "awq@h100")
    alone = [e.run(Request((p,), 4, digests=True)) for p in (PROMPT, OTHER)]
    steps = []
    both = e.run(Request((PROMPT, OTHER), 4, digests=True, batching=Batching(16, 2)), steps.append)
    for one, with_other in zip(alone, both.sequences, strict=True):
        assert torch.equal(one.sequences[0].digests, with_other.digests)
        assert torch.equal(one.sequences[0].tokens, with_other.tokens)
        torch.testing.assert_close(one.sequences[0].logprobs, with_other.logprobs, rtol=1e-6, atol=0)
    sizes = [size(step) for step in both.steps]
    assert steps == sizes
    assert sum(sizes) == len(PROMPT) + len(OTHER) + 6
    for name in both.linears:
        assert {c.M: c.count for c in both.calls if c.linear == name} == {m: sizes.count(m) for m in set(sizes)}
    assert {(c.kernel, c.origin, len(c.recipe)) for c in both.calls} == {("vllm.awq_gemm", "replay", 64)}
    assert both.linears[:2] == ("model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj")


def test_forced_tokens_that_are_the_free_ones(exact):
    free = exact.run(Request((PROMPT, OTHER), 5))
    tails = tuple(tuple(s.tokens[s.prompt :].tolist()) for s in free.sequences)
    forced = exact.run(Request((PROMPT, OTHER), 5, forced=tails))
    for a, b in zip(free.sequences, forced.sequences, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.logprobs, b.logprobs)
    elsewhere = exact.run(Request((PROMPT,), 5, forced=((1, 2, 3, 4, 5),)))
    assert elsewhere.sequences[0].tokens[-5:].tolist() == [1, 2, 3, 4, 5]
    assert not torch.equal(elsewhere.sequences[0].ids[-1], free.sequences[0].ids[-1])


def test_greedy_takes_the_first_and_the_smallest_id_of_equals(awq, tmp_path):
    folder = tmp_path / "twins"
    shutil.copytree(awq, folder)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    head = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = torch.cat((head[1024:], head[1024:]))  # ids i and i + 1024 are equals
    save_file(tensors, file, metadata={"format": "pt"})
    s = engine(folder).run(Request((PROMPT,), 6, top_k=4)).sequences[0]
    assert int(s.tokens[s.prompt :].max()) < 1024
    assert torch.equal(s.tokens[s.prompt :], s.ids[s.prompt - 1 :, 0])
    assert torch.equal(s.ids[:, 1::2], s.ids[:, ::2] + 1024)
    assert torch.equal(s.logprobs[:, 1::2], s.logprobs[:, ::2])


def test_wanted_ids_stand_behind_the_largest(exact):
    wanted = torch.arange(2 * 23).reshape(23, 2) % VOCAB
    s = exact.run(Request((PROMPT,), 3, top_k=3, wanted=(wanted,), batching=Batching(8))).sequences[0]
    every = exact.run(Request((PROMPT,), 3, top_k=0, batching=Batching(8))).sequences[0].logprobs
    assert s.ids.shape == (23, 5)
    assert torch.equal(s.ids[:, 3:], wanted)
    assert torch.equal(s.logprobs, every.gather(1, s.ids))
    assert torch.equal(s.logprobs[:, :3], every.topk(3).values)


def test_sampling_repeats_and_follows_its_seed(exact):
    drawn = [exact.run(Request((OTHER, OTHER), 8, sampling=Sampling(2.0, seed))).sequences for seed in (1, 1, 2)]
    assert torch.equal(drawn[0][0].tokens, drawn[1][0].tokens)
    assert not torch.equal(drawn[0][0].tokens, drawn[2][0].tokens)
    assert not torch.equal(drawn[0][0].tokens, drawn[0][1].tokens)


@pytest.mark.parametrize(("path", "most"), [("awq@h100", 255), ("gptq@a100", 50)])
def test_what_cublas_sums_is_refused_before_any_work(request, path, most):
    e = engine(request.getfixturevalue(path.split("@")[0]), path)
    prompt = (5,) * (most + 1)
    with pytest.raises(UnsupportedError, match=r"^opaque: cuBLAS .* is not modelled, so only \w100 itself can run it"):
        e.run(Request(((5,), prompt), 1, batching=Batching(most + 1)), lambda tokens: pytest.fail("a step ran"))
    assert Path.parse(path).chunk == most


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": ()}, "there is no prompt"),
        ({"prompts": ((),)}, "prompt 0 is empty"),
        ({"prompts": ((1, 2048),)}, "prompt 0: token 2048 is not in the vocabulary of 2048 ids"),
        ({"prompts": ((-1,),)}, "token -1 is not in the vocabulary"),
        ({"prompts": ((1,) * 511,)}, "511 tokens, 513 with those to generate, and the model takes 512"),
        ({"new_tokens": 0}, "new_tokens must be 1 or more"),
        ({"forced": ((1, 2),)}, r"forced must name 3 tokens for each of 1 prompts, not \[2\]"),
        ({"forced": ((1, 2, 9999),)}, "forced after prompt 0: token 9999"),
        ({"wanted": (torch.zeros((2, 1), dtype=torch.int64),)}, r"must be int64 \[23, w\]"),
        ({"wanted": (torch.full((23, 1), 2048),)}, "the wanted ids of sequence 0: token 2048"),
        ({"wanted": ()}, "wanted has ids for 0 sequences"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"sampling": Sampling(-1.0)}, "the temperature must be 0"),
        ({"sampling": Sampling(float("nan"))}, "the temperature must be 0"),
        ({"seed": -1}, "the seed of an order of atomics must be 0 or more"),
        ({"taps": frozenset({("nowhere", 0, 0)})}, "there is no linear 'nowhere' to tap"),
        ({"taps": frozenset({("model.layers.0.mlp.down_proj", 0, 23)})}, "cannot be tapped at position 23"),
        ({"batching": Batching(1, 2)}, "cannot serve 2 sequences"),
    ],
)
def test_bad_requests(exact, changes, said):
    from qlab.engine.run import Tap

    if "taps" in changes:
        changes = {"taps": frozenset(Tap(*t) for t in changes["taps"])}
    with pytest.raises(QlabError, match=said) as e:
        exact.run(replace(Request((PROMPT,), 3), **changes))
    assert "\n" not in str(e.value)


def test_a_sliding_window_is_not_exceeded(relative):
    folder = relative("mistral")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sliding_window": 20}))
    with pytest.raises(QlabError, match="prompt 0 has 21 tokens, 21 with those to generate, and the model takes 20"):
        engine(folder).run(Request((PROMPT,), 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 64}, "config.json asks for"),
        ({"vocab_size": 99}, r"'model.embed_tokens.weight' is \[2048, 128\], config.json asks for \[99, 128\]"),
        (
            {"intermediate_size": 512},
            r"linear 'model.layers.0.mlp.gate_up_proj' is \[128, 512\], config.json asks for \[128, 1024\]",
        ),
        ({"num_hidden_layers": 3}, r"'model.layers.2.self_attn.q_proj', a part of .*, is not quantised here"),
        ({"attention_bias": True}, "'model.layers.0.self_attn.q_proj.bias' is missing"),
        ({"model_type": "gpt2"}, "is not built like Llama"),
    ],
)
def test_a_configuration_of_another_model(awq, tmp_path, changes, said):
    folder = tmp_path / "model"
    shutil.copytree(awq, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=said):
        engine(folder)


def test_a_label_takes_its_own_checkpoints(awq, gptq, unquantised):
    with pytest.raises(CheckpointError, match="a checkpoint of gptq, which vLLM does not run as awq_marlin; name one of awq"):
        engine(gptq, "awq_marlin@h100")
    with pytest.raises(CheckpointError, match="a checkpoint of awq, which vLLM does not run as gptq"):
        engine(awq, "gptq@h100")
    assert engine(unquantised, "awq_marlin@h100").run(Request(((1,),), 1)).calls[0].kernel == "vllm.marlin.awq"


def test_native_kernels_are_not_promised_without_their_gpu(awq):
    assert not engine(awq, "awq@h100").native
    with pytest.raises(UnsupportedError, match="awq@h100: its kernels do not run natively on the CPU"):
        engine(awq, "awq@h100", native=True)


def test_overflow_has_its_sentence(awq, tmp_path):
    folder = tmp_path / "loud"
    shutil.copytree(awq, folder)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.0.input_layernorm.weight"] = torch.full((HIDDEN,), 3e4).half()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QlabError, match="a linear left the range of float16; run the model in another dtype"):
        engine(folder).run(Request((PROMPT,), 1))
    assert engine(folder, dtype=torch.bfloat16).run(Request((PROMPT,), 1)).sequences[0].logprobs.isfinite().all()
