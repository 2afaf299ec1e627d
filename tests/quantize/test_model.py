import pytest
import torch

from qlab.checkpoint import fused, read, write
from qlab.errors import QlabError
from qlab.quantize.fold import PROJECTIONS, UNITS
from qlab.quantize.llama import first_inputs, forward, gather, layers, tensors
from qlab.quantize.model import Options, quantize_model, steps
from qlab.quantize.perplexity import dequantized

NAMES = {f"model.layers.{i}.{path}" for i in range(2) for path in PROJECTIONS}
CASES = [
    Options("rtn", 32),
    Options("gptq", 32),
    Options("gptq", 32, symmetric=False, act_order=True),
    Options("gptq", 32, act_order=True, static_groups=True),
    Options("awq", 32, symmetric=False),
]
LAYOUT = {"rtn": "compressed-tensors", "gptq": "gptq", "awq": "awq"}


def label(options):
    return f"{options.method}{'-act-order' * options.act_order}{'-static' * options.static_groups}"


@pytest.fixture(params=CASES, ids=label)
def case(request, tiny, token_batches):
    options, model, heard = request.param, tiny(), []
    total = steps(model)
    result = quantize_model(model, token_batches, options, heard.append)
    assert len(heard) == total == 8
    return options, model, result


def test_every_projection_and_every_other_tensor_is_there(case, tiny):
    options, _, result = case
    assert set(result.weights) == NAMES
    assert set(result.others) == {n for n, _ in tiny().named_parameters() if n.removesuffix(".weight") not in NAMES}
    assert {t.dtype for t in result.others.values()} == {torch.float16}
    for name, w in result.weights.items():
        assert (w.name, w.group_size, w.dtype) == (name, 32, torch.float16)
        assert w.symmetric == options.symmetric


def test_projections_that_run_fused_share_group_index_and_input_scale(case):
    options, _, result = case
    for i in range(2):
        for unit in UNITS:
            first, *rest = (result.weights[f"model.layers.{i}.{path}"] for path in unit.members)
            scaled = options.method == "awq" and unit.name != "o"  # two value heads for four query heads
            assert (first.input_scale is not None) == scaled
            for other in rest:
                assert torch.equal(first.group_index, other.group_index)
                assert not scaled or torch.equal(first.input_scale, other.input_scale)
            assert first.act_order == (options.act_order and not options.static_groups)


def test_the_changed_model_the_checkpoint_and_its_reading_agree(case, tiny, tmp_path):
    options, model, result = case
    write(tmp_path / "out", LAYOUT[options.method], result.weights, result.others, tiny().config.to_dict())
    checkpoint = read(tmp_path / "out")
    assert all(checkpoint.weight(name).equals(w) for name, w in result.weights.items())
    assert len(list(fused(checkpoint))) == 8
    again = dequantized(tmp_path / "out", torch.float64)
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        ours = model.to(torch.float64)
        for name, t in result.others.items():  # the changed model keeps its own precision in embeddings and last norm
            ours.get_parameter(name).copy_(t)
        assert torch.equal(ours(input_ids=tokens).logits, again(input_ids=tokens).logits)


def test_quantised_stays_near_full_precision_and_gptq_and_awq_nearer_than_rtn(tiny, token_batches):
    """Relative error of the whole model's logits on the tokens it was calibrated with."""
    tokens = torch.cat(token_batches)
    with torch.no_grad():
        exact = tiny()(input_ids=tokens).logits

    def distance(options):
        model = tiny()
        quantize_model(model, token_batches, options)
        with torch.no_grad():
            return float((model(input_ids=tokens).logits - exact).norm() / exact.norm())

    found = {m: distance(Options(m, 32, symmetric=False)) for m in ("rtn", "gptq", "awq")}
    assert found["rtn"] < 0.4  # measured: 0.305
    assert found["gptq"] < 0.85 * found["rtn"]  # measured: 0.78
    assert found["awq"] < 0.97 * found["rtn"]  # measured: 0.94


def test_runs_repeat(tiny, token_batches):
    for options in (CASES[2], CASES[4]):
        digests = [[w.digest() for w in quantize_model(tiny(), token_batches, options).weights.values()] for _ in range(2)]
        assert digests[0] == digests[1]


def test_gptq_fits_every_unit_to_what_the_quantised_ones_before_it_feed_it(tiny, token_batches, monkeypatch):
    """Each unit's statistics must be those of the finished model, and from the second unit on not the first model's."""
    import qlab.quantize.model as driver

    seen = {}

    def spy(layer, inputs, units, where=""):
        found = gather(layer, inputs, units, where)
        seen.update({(where, name): statistics.gram for name, statistics in found.items()})
        return found

    def grams(model):
        inputs, found = first_inputs(model, token_batches), {}
        for i, layer in enumerate(layers(model)):
            found |= {(f"model.layers.{i}.", n): s.gram for n, s in gather(layer, inputs, UNITS).items()}
            inputs = forward(layer, inputs)
        return found

    monkeypatch.setattr(driver, "gather", spy)
    model = tiny()
    quantize_model(model, token_batches, Options("gptq", 32))
    with torch.no_grad():
        finished, first = grams(model), grams(tiny())
    assert seen.keys() == finished.keys()
    for key, gram in seen.items():
        assert torch.equal(gram, finished[key]), key
        assert torch.equal(gram, first[key]) == (key == ("model.layers.0.", "qkv")), key


def test_awq_clips_every_projection_but_q_and_k(tiny, token_batches):
    clipped, plain = (
        quantize_model(tiny(), token_batches[:2], Options("awq", 32, symmetric=False, clip=clip)).weights
        for clip in (True, False)
    )
    same = {path for path in PROJECTIONS if clipped[f"model.layers.0.{path}"].equals(plain[f"model.layers.0.{path}"])}
    assert same == {"self_attn.q_proj", "self_attn.k_proj"}


def test_awq_folds_norms_into_fp16_and_the_weights_follow_the_folded_value(tiny, token_batches):
    before = tensors(layers(tiny())[0])
    result = quantize_model(tiny(), token_batches, Options("awq", 32, symmetric=False))
    stored = result.others["model.layers.0.input_layernorm.weight"].double()
    s = result.weights["model.layers.0.self_attn.q_proj"].input_scale.double()
    norm = before["input_layernorm"]
    assert float((norm / stored / s - 1).abs().max()) <= 2**-24
    assert not torch.equal(stored, norm.half().double())


def test_refusals(tiny, token_batches):
    with pytest.raises(QlabError, match="unknown method 'gguf'; known: awq, gptq, rtn"):
        Options("gguf")
    with pytest.raises(QlabError, match="act-order and static groups belong to gptq, not to awq"):
        Options("awq", act_order=True)
    with pytest.raises(QlabError, match="gptq needs calibration text"):
        quantize_model(tiny(), (), Options("gptq", 32))
    with pytest.raises(QlabError, match="K=64 is not a multiple of the group size 48"):
        quantize_model(tiny(), token_batches, Options("awq", 48))
    with pytest.raises(QlabError, match="only LlamaForCausalLM can be quantised, not Linear"):
        quantize_model(torch.nn.Linear(2, 2), token_batches, Options("rtn"))
    model = tiny()
    model.get_parameter("model.norm.weight").data[0] = 1e6
    with pytest.raises(QlabError, match=r"model\.norm\.weight has values that torch\.float16 cannot hold"):
        quantize_model(model, (), Options("rtn", 32))
