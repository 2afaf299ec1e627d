"""Detecting the zero-point convention: right labels confirmed, wrong ones overruled, silence where nothing tells."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from qlab.checkpoint import read, write
from qlab.checkpoint.zeros import AS_IS, IMPLIED, MINUS_ONE
from qlab.inputs import random_weight


def relabel(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("version", "convention"), [(1, MINUS_ONE), (2, AS_IS)])
def test_gptq_convention_is_found_whatever_the_label(make_model, tmp_path, version, convention, symmetric, act_order):
    model = make_model(real=True, symmetric=symmetric, act_order=act_order)
    directory = model.write(tmp_path / "m", "gptq", version=version)
    right = read(directory)
    assert (right.zero_points.declared, right.zero_points.detected) == (convention, convention)
    assert not right.zero_points.contradiction
    wrong = read(relabel(directory, checkpoint_format="gptq_v2" if version == 1 else "gptq"))
    assert wrong.zero_points.contradiction
    assert wrong.zero_points.used == convention
    assert f"zero points {convention}, but declared" in str(wrong.zero_points)
    for c in (right, wrong):
        assert all(w.equals(model.weights[n]) for n, w in c.weights.items())


@pytest.mark.parametrize("version", [1, 2])
def test_codes_that_tell_nothing_leave_the_label_in_force(make_model, tmp_path, version):
    model = make_model()  # codes drawn without regard to the zero points
    c = read(model.write(tmp_path / "m", "gptq", version=version))
    assert c.zero_points.detected == ""
    assert c.zero_points.version == version
    assert "unconfirmed" in str(c.zero_points)


def test_zero_point_sixteen_is_not_taken_for_a_wrong_label(tmp_path):
    """Zero points 1 to 16 average 8.5 and are stored as 0 to 15, on which random codes centre, too, but without a link."""
    weights = {}
    for i in range(8):
        w = random_weight(256, 256, 32, seed=i)
        zeros = torch.randint(1, 17, (8, 256), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        weights[f"model.layers.{i}.mlp.up_proj"] = replace(w, zeros=zeros)
    c = read(write(tmp_path / "m", "gptq", weights, {}, {}))
    assert c.zero_points.detected == ""
    assert c.zero_points.used == MINUS_ONE


def test_act_order_hides_no_evidence(make_model, tmp_path):
    """Rows in another order are the same groups, so the same is seen."""
    plain, ordered = (
        read(make_model(real=True, act_order=order).write(tmp_path / str(order), "gptq")).zero_points for order in (False, True)
    )
    assert plain == ordered


def test_symmetric_label_on_asymmetric_tensors_is_a_warning(make_model, tmp_path):
    model = make_model(real=True)
    c = read(relabel(model.write(tmp_path / "m", "gptq"), sym=True))
    assert "Marlin and Machete ignore the stored values" in c.zero_points.warning
    assert all(w.equals(model.weights[n]) for n, w in c.weights.items())


def test_stored_fifteen_is_reported(make_model, tmp_path, edit):
    directory = make_model(real=True).write(tmp_path / "m", "gptq")
    edit(directory / "model.safetensors", lambda t: t["model.layers.1.mlp.up_proj.qzeros"].__setitem__((0, 0), -1))
    c = read(directory)
    assert "8 values of 15 mean 16" in c.zero_points.warning
    assert bool((c.weight("model.layers.1.mlp.up_proj").zeros[0, :8] == 16).all())


def test_awq_stored_minus_one_is_a_warning(make_model, tmp_path, edit):
    model = make_model(real=True)
    directory = model.write(tmp_path / "m", "awq")
    assert read(directory).zero_points.warning == ""

    def less_one(tensors):
        for name, t in tensors.items():
            if name.endswith(".qzeros"):
                t.sub_(0x11111111)  # no zero point is 0 here, so no nibble borrows

    assert all(int(w.zeros.min()) > 0 for w in model.weights.values())
    edit(directory / "model.safetensors", less_one)
    assert "stored them minus one" in read(directory).zero_points.warning


def test_compressed_tensors_without_zero_points(make_model, tmp_path):
    c = read(make_model(symmetric=True).write(tmp_path / "m", "compressed-tensors"))
    assert c.zero_points.used == IMPLIED
    assert all(bool((w.zeros == 8).all()) for w in c.weights.values())
    c = read(make_model(dtype=torch.bfloat16).write(tmp_path / "n", "compressed-tensors"))
    assert c.zero_points.used == AS_IS
