"""Folding moves a scale from one tensor into another; the model must not notice."""

import pytest
import torch

from qlab.quantize.fold import NORMS, UNITS, fold, foldable
from qlab.quantize.llama import layers, tensors

TOKENS = torch.arange(64).reshape(2, 32)


def scales_for(parts):
    """A different, uneven scale for every unit that can have one."""
    return {
        unit.name: torch.logspace(-1 - i / 8, 1, parts[unit.members[0]].shape[0], dtype=torch.float64)
        for i, unit in enumerate(UNITS)
        if foldable(unit, parts)
    }


def put(layer, parts):
    for path, t in parts.items():
        layer.get_parameter(f"{path}.weight").data.copy_(t if path in NORMS else t.T)


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_float_model_computes_what_it_did_before(tiny, kv_heads):
    model = tiny(kv_heads)
    before = logits(model)
    for layer in layers(model):
        parts = tensors(layer)
        folded = fold(parts, scales_for(parts))
        assert not torch.equal(folded["mlp.down_proj"], parts["mlp.down_proj"])
        put(layer, folded)
    assert float((logits(model) - before).abs().max() / before.abs().max()) < 1e-12


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_each_half_of_a_fold_alone_is_noticed(tiny, unit):
    """The check above can fail: the weight without the previous operation changes the logits."""
    model = tiny(4)
    before = logits(model)
    layer = layers(model)[0]
    parts = tensors(layer)
    folded = fold(parts, {unit.name: scales_for(parts)[unit.name]})
    put(layer, folded | {unit.previous: parts[unit.previous]})
    assert float((logits(model) - before).abs().max() / before.abs().max()) > 1e-6


def test_o_is_scaled_only_where_every_query_head_has_its_own_value_head(tiny):
    o = next(unit for unit in UNITS if unit.name == "o")
    assert foldable(o, tensors(layers(tiny(4))[0]))
    assert not foldable(o, tensors(layers(tiny(2))[0]))
