"""The size of a difference of weights: exact on made cases, in the original's coordinates."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlab import checkpoint
from qlab.attribution.weight_difference import WeightsDifference, difference, stored_alike, weight_difference
from qlab.errors import CheckpointError, WeightError
from qlab.inputs import random_weight
from qlab.serial import read_json, write_json
from qlab.weights import sequential_groups


@pytest.fixture
def weight():
    return random_weight(64, 16, 32, seed=3, name="w")


def between(a, b):
    return difference(checkpoint.read(a), checkpoint.read(b))


def test_equal_weights_differ_in_nothing(weight):
    d = weight_difference(weight, weight)
    assert (d.name, d.codes, d.zeros, d.scales, d.relative_l2, d.elements) == ("w", 0, 0, 0, 0, 64 * 16)


def test_one_code_one_zero_point_and_one_scale(weight):
    codes, zeros, scales = weight.codes.clone(), weight.zeros.clone(), weight.scales.clone()
    codes[5, 3] = (codes[5, 3] + 4) % 16
    d = weight_difference(weight, replace(weight, codes=codes))
    moved = abs(int(codes[5, 3]) - int(weight.codes[5, 3])) * float(weight.scales[0, 3])
    assert d.codes == 1 / (64 * 16)
    assert d.relative_l2 == pytest.approx(moved / float(weight.dequantize(torch.float64).norm()), rel=1e-12)
    zeros[1, 2] ^= 1
    scales[0, 9] *= 2
    d = weight_difference(weight, replace(weight, zeros=zeros, scales=scales))
    assert (d.codes, d.zeros, d.scales) == (0, 32 / (64 * 16), 32 / (64 * 16))


def test_groups_of_another_size_are_compared_row_by_row(weight):
    doubled = replace(
        weight,
        zeros=weight.zeros.repeat_interleave(2, 0),
        scales=weight.scales.repeat_interleave(2, 0),
        group_index=sequential_groups(64, 16),
    )
    d = weight_difference(weight, doubled)
    assert (d.codes, d.zeros, d.scales, d.relative_l2) == (0, 0, 0, 0)


def test_awq_scales_are_taken_out_of_rows_and_put_back_into_columns(weight):
    """A power of two moves from scales into the input scale, or into the next linear's: the same function."""
    rows = replace(weight, scales=weight.scales * 2, input_scale=torch.full((64,), 2.0))
    d = weight_difference(weight, rows)
    assert (d.relative_l2, d.scales) == (0, 1)
    columns = torch.where(torch.arange(16) % 2 == 0, 4.0, 0.5)
    divided = replace(weight, scales=(weight.scales / columns).half())
    assert weight_difference(weight, divided, None, columns).relative_l2 == 0
    assert weight_difference(divided, weight, columns).relative_l2 == 0
    assert weight_difference(weight, divided).relative_l2 > 0.5
    assert weight_difference(weight, rows, known=False).relative_l2 is None


def test_another_shape_is_refused(weight):
    with pytest.raises(WeightError, match=r"'w' is \[64, 16\] in A and \[64, 8\] in B"):
        weight_difference(weight, weight.columns(0, 8))


def test_alike_means_bit_for_bit_but_for_the_input_scale(weight):
    assert stored_alike(weight, replace(weight, input_scale=torch.ones(64)))
    minus = torch.where(weight.scales == weight.scales[0, 0], -weight.scales, weight.scales)
    assert not stored_alike(weight, replace(weight, scales=minus))
    assert not stored_alike(weight, replace(weight, group_index=1 - weight.group_index))


def test_checkpoints_of_the_tiny_model(awq, gptq, tmp_path):
    same = between(awq, awq)
    assert (same.served_alike, same.linears, same.relative_l2, same.count) == (True, (), 0, 14)
    assert str(same) == "equal weights"
    other = between(awq, gptq)
    assert len(other.linears) == 14
    assert other.dense == other.input_scales == ()
    assert 0.05 < other.relative_l2 < 0.3
    a, b = (
        torch.cat([w.dequantize(torch.float64).flatten() for w in checkpoint.read(d).weights.values()]) for d in (awq, gptq)
    )
    assert other.relative_l2 == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-12)
    write_json(tmp_path / "size.json", other)
    assert read_json(WeightsDifference, tmp_path / "size.json", other.schema) == other


def test_input_scales_alone_are_no_difference_to_an_engine(write_checkpoint, tmp_path):
    a = write_checkpoint(tmp_path / "a", "awq", scaled=True)
    shutil.copytree(a, tmp_path / "b")
    path = tmp_path / "b" / "qlab" / "input_scales.safetensors"
    scales = load_file(path)
    name = "model.layers.0.mlp.down_proj"
    save_file(scales | {f"{name}.input_scale": scales[f"{name}.input_scale"] * 2}, path, metadata={"format": "pt"})
    d = between(a, tmp_path / "b")
    assert (d.served_alike, d.input_scales) == (True, (name,))
    assert d.relative_l2 > 0  # down's own rows, and the columns of up


def test_lost_input_scales_leave_the_size_open_only_where_norms_differ(write_checkpoint, tmp_path):
    a = write_checkpoint(tmp_path / "a", "awq", scaled=True)
    b = tmp_path / "b"
    shutil.copytree(a, b)
    shutil.rmtree(b / "qlab")
    d = between(a, b)
    assert d.served_alike
    assert d.relative_l2 == 0
    tensors = load_file(b / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    save_file(tensors | {norm: tensors[norm] * 2}, b / "model.safetensors", metadata={"format": "pt"})
    d = between(a, b)
    assert (d.dense, d.relative_l2, d.served_alike) == ((norm,), None, False)
    assert str(d) == f"1 other tensors differ ({norm})"


def test_an_empty_bias_is_none(gptq, tmp_path):
    shutil.copytree(gptq, tmp_path / "b")
    path, name = tmp_path / "b" / "model.safetensors", "model.layers.0.mlp.up_proj.bias"
    save_file(load_file(path) | {name: torch.zeros(256, dtype=torch.float16)}, path, metadata={"format": "pt"})
    assert between(gptq, tmp_path / "b").served_alike
    save_file(load_file(path) | {name: torch.ones(256, dtype=torch.float16)}, path, metadata={"format": "pt"})
    assert between(gptq, tmp_path / "b").dense == (name,)


def test_checkpoints_of_two_models_are_refused(gptq, tmp_path):
    shutil.copytree(gptq, tmp_path / "b")
    path = tmp_path / "b" / "model.safetensors"
    lost = "model.layers.1.mlp.up_proj."
    save_file({n: t for n, t in load_file(path).items() if not n.startswith(lost)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"only one of .* quantises 'model\.layers\.1\.mlp\.up_proj'"):
        between(gptq, tmp_path / "b")


def test_infinite_where_nothing_was(weight):
    nothing = replace(weight, codes=weight.zeros[weight.group_index.long()].clamp(max=15))
    assert weight_difference(nothing, weight).relative_l2 == math.inf
    assert weight_difference(nothing, nothing).relative_l2 == 0
