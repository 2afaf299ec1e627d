"""Factors between two checkpoints: none, packing, settings of the quantisation, or the weights as a whole."""

import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

import qlab.attribution.weights as module
from qlab import checkpoint
from qlab.attribution.requantize import requantize
from qlab.attribution.settings import SHIPPED, Settings
from qlab.attribution.weight_difference import difference
from qlab.attribution.weights import AGAIN, STORED, weight_factors
from qlab.data import model_directory
from qlab.errors import CheckpointError, QlabError

AWQ = Settings("awq", symmetric=False, group_size=32, clip=True)
GPTQ = Settings("gptq", symmetric=True, group_size=32)


def names(found):
    return [f.name for f in found.factors]


def alike(a, b):
    return difference(checkpoint.read(a), checkpoint.read(b)).served_alike


@pytest.fixture
def ends(unquantised, few, tmp_path):
    """AWQ's and GPTQ's checkpoint of the tiny model, outside the cache."""
    made = []
    for settings in (AWQ, GPTQ):
        shutil.copytree(requantize(unquantised, settings, few), tmp_path / settings.algorithm)
        made.append(tmp_path / settings.algorithm)
    return made


def by_settings(ends, unquantised, few, **changes):
    known = {"original": unquantised, "settings": (AWQ, GPTQ), "calibration": few} | changes
    return weight_factors(*ends, **known)


def test_equal_checkpoints_have_no_factor(awq, tmp_path):
    shutil.copytree(awq, tmp_path / "copy")
    found = weight_factors(awq, tmp_path / "copy")
    assert (found.factors, found.full, found.notes, found.to_make()) == ((), 0, (), 0)
    assert found.directory(0) == awq
    with pytest.raises(QlabError, match="mask 1 does not fit 0 factors"):
        found.admissible(1)


def test_equal_tensors_of_another_configuration_are_no_equal_checkpoints(awq, changed):
    """What a model computes is not in its tensors alone: such a pair once came out as equal, bit for bit."""
    assert weight_factors(awq, changed(awq, config=lambda c: c.update(max_position_embeddings=64))).factors == ()
    for field, value in {"num_hidden_layers": 1, "rms_norm_eps": 1e-3, "num_attention_heads": 8}.items():
        other = changed(awq, config=lambda c, field=field, value=value: c.update({field: value}))
        with pytest.raises(CheckpointError, match=f"are not checkpoints of one model: {field} is "):
            weight_factors(awq, other)


def test_one_weight_in_two_layouts_has_no_factor(gptq, tmp_path):
    read = checkpoint.read(gptq)
    others = {n: read.tensor(n) for n in read.others()}
    config = {k: v for k, v in read.hf_config.items() if k != "quantization_config"}
    for method in ("awq", "compressed-tensors"):
        checkpoint.write(tmp_path / method, method, read.weights, others, config)
        assert weight_factors(gptq, tmp_path / method).factors == ()


def test_nibbles_flipped_by_another_process_are_packing_with_their_places(tmp_path, flip):
    """Column 600 of a shipped linear is int32 75, nibble 0 of its row in AWQ's order; 601 is nibble 4."""
    shipped, copy = model_directory("awq"), tmp_path / "copy"
    shutil.copytree(shipped, copy)
    gate, down = "model.layers.1.mlp.gate_proj", "model.layers.2.mlp.down_proj"
    flip(copy, f"{gate}.qweight", 17 * 128 + 75, 4, 9)
    flip(copy, f"{down}.qweight", 1000 * 64 + 2, 0, 2)
    before = checkpoint.read(shipped)
    one, other = int(before.weight(gate).codes[17, 601]), int(before.weight(down).codes[1000, 16])
    found = weight_factors(shipped, copy)
    assert names(found) == ["packing"]
    assert found.factors[0].category == "packing"
    assert found.factors[0].b == (
        f"{gate}: k=17, n=601 holds code {one ^ 9} instead of {one}; "
        f"{down}: k=1000, n=16 holds code {other ^ 2} instead of {other}"
    )
    assert [(d.name, d.codes) for d in found.size.linears] == [(gate, 1 / (512 * 1024)), (down, 1 / (512 * 1024))]
    assert (found.directory(0), found.directory(1), found.to_make()) == (shipped, copy, 0)


def test_a_zero_point_in_the_file_is_packing_too(gptq, tmp_path, flip):
    shutil.copytree(gptq, tmp_path / "copy")
    linear = "model.layers.0.self_attn.o_proj"
    flip(tmp_path / "copy", f"{linear}.qzeros", 2 * 16, 3, 1)  # group 2, column 3: stored 7 becomes 6
    found = weight_factors(gptq, tmp_path / "copy")
    assert found.factors[0].b == f"{linear}: zero points: group 2, n=3 has 7 instead of 8"


def test_one_fault_of_many_modules_is_said_once(gptq, tmp_path):
    """Every scale from the next column, as a wrong permutation leaves it."""
    shutil.copytree(gptq, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    moved = {n: t.roll(-1, 1).contiguous() if n.endswith(".scales") else t for n, t in load_file(path).items()}
    save_file(moved, path, metadata={"format": "pt"})
    found = weight_factors(gptq, tmp_path / "copy")
    assert names(found) == ["packing"]
    assert found.factors[0].b == "model.layers.0.self_attn.q_proj and 13 more: scales: from the next column"


def test_a_dense_tensor_or_an_unexplained_linear_makes_it_weights(gptq, tmp_path, flip):
    shutil.copytree(gptq, tmp_path / "copy")
    flip(tmp_path / "copy", "model.layers.0.mlp.up_proj.qweight", 9, 0, 1)
    assert names(weight_factors(gptq, tmp_path / "copy")) == ["packing"]
    flip(tmp_path / "copy", "model.norm.weight", 3, 0, 1)
    assert names(weight_factors(gptq, tmp_path / "copy")) == ["weights"]
    for word in range(20):
        flip(tmp_path / "copy", "model.layers.0.mlp.down_proj.qweight", 7 * word, word % 8, 5)
    flip(tmp_path / "copy", "model.norm.weight", 3, 0, 1)
    found = weight_factors(gptq, tmp_path / "copy")
    assert found.size.dense == ()
    assert names(found) == ["weights"]


def test_weights_are_one_factor_with_the_reason(awq, gptq, unquantised, few):
    for known, why in (
        ({}, "the original they were quantised from is not at hand"),
        ({"original": unquantised}, "does not say how its codes were chosen"),
        ({"original": unquantised, "requantize": False}, "was not asked for"),
        ({"original": unquantised, "settings": (GPTQ, GPTQ)}, "the same settings"),
        ({"original": unquantised, "settings": (AWQ, replace(GPTQ, dtype="bfloat16"))}, "within one dtype"),
    ):
        found = weight_factors(awq, gptq, calibration=few, **known)
        assert names(found) == ["weights"]
        assert (found.factors[0].a, found.factors[0].b) == ("awq", "gptq")
        assert len(found.notes) == 1
        assert why in found.notes[0]
        assert [found.directory(0), found.directory(1)] == [awq, gptq]
        assert found.settings(1) is None
        assert found.size.relative_l2 > 0


def test_settings_are_factors_where_both_ends_come_out_again(ends, unquantised, few, monkeypatch, tmp_path):
    monkeypatch.setenv("QLAB_CACHE", str(tmp_path / "cache"))
    found = by_settings(ends, unquantised, few)
    assert names(found) == ["algorithm", "zero points", "clipping"]
    assert found.notes == ()
    assert [m for m in range(8) if found.admissible(m)] == [0, 2, 4, 5, 6, 7]
    assert [found.directory(0), found.directory(7)] == ends
    assert found.to_make() == 4
    symmetric = found.directory(2)
    assert found.to_make() == 3
    assert found.settings(2) == replace(AWQ, symmetric=True)
    assert all(w.symmetric for w in checkpoint.read(symmetric).weights.values())
    assert checkpoint.read(symmetric).weight("model.layers.0.mlp.down_proj").input_scale is not None
    assert checkpoint.read(found.directory(5)).method == "gptq"
    assert not all(w.symmetric for w in checkpoint.read(found.directory(5)).weights.values())
    with pytest.raises(QlabError, match="no quantizer makes the weights of coalition 1"):
        found.directory(1)


def test_an_end_that_does_not_come_out_again_is_a_factor_beside_it(ends, unquantised, few, tmp_path):
    """Quantised on other text, and said to be on this one: what another machine's sums do to GPTQ."""
    other = requantize(unquantised, GPTQ, replace(few, samples=3))
    found = by_settings((ends[0], other), unquantised, few)
    assert names(found) == ["algorithm", "zero points", "clipping", "quantising B again"]
    assert (found.factors[3].a, found.factors[3].b) == (AGAIN, STORED)
    assert len(found.notes) == 1
    assert "B's checkpoint is not what its settings give on this machine (relative L2 0." in found.notes[0]
    assert [m for m in range(16) if found.admissible(m)] == [0, 2, 4, 5, 6, 7, 15]
    assert alike(found.directory(7), ends[1])
    assert found.directory(15) == other
    back = by_settings((other, ends[0]), unquantised, few, settings=(GPTQ, AWQ))
    assert names(back) == ["quantising A again", "algorithm", "zero points", "clipping"]
    assert [m for m in range(16) if back.admissible(m)] == [0, 1, 3, 5, 7, 11, 15]
    assert back.directory(0) == other
    assert alike(back.directory(1), ends[1])
    third = requantize(unquantised, AWQ, replace(few, samples=3))
    both = by_settings((other, third), unquantised, few, settings=(GPTQ, AWQ))
    assert names(both) == ["quantising A again", "algorithm", "zero points", "clipping", "quantising B again"]
    assert [m for m in range(32) if both.admissible(m)] == [0, 1, 3, 5, 7, 11, 15, 31]
    assert alike(both.directory(15), ends[0])
    assert both.settings(15) == AWQ


def test_every_admissible_coalition_is_reached_and_left_by_one_factor(ends, unquantised, few):
    """Otherwise no order goes through it, and the game could not use it."""
    other = requantize(unquantised, GPTQ, replace(few, samples=3))
    found = by_settings((ends[0], other), unquantised, few)
    inside = [m for m in range(found.full + 1) if found.admissible(m)]
    for mask in inside:
        bits = [1 << i for i in range(len(found.factors))]
        assert mask == 0 or any(mask & bit and mask ^ bit in inside for bit in bits)
        assert mask == found.full or any(not mask & bit and mask | bit in inside for bit in bits)


def test_shipped_checkpoints_need_neither_original_nor_settings(monkeypatch):
    asked = []

    def stop(original, settings, *_):
        asked.append((original, settings))
        raise CheckpointError("stop")

    monkeypatch.setattr(module, "requantize", stop)
    with pytest.raises(CheckpointError, match="stop"):
        weight_factors(model_directory("awq"), model_directory("gptq"))
    assert asked == [(model_directory("fp16"), SHIPPED["awq"])]
