"""Every kind of bad input gives one CheckpointError whose sentence names the file, the tensor or key, and the mend."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from qlab.checkpoint import read
from qlab.errors import CheckpointError

MODULE = "model.layers.1.mlp.down_proj"
FILE = "model.safetensors"
METHODS = ("awq", "gptq", "compressed-tensors")
SCALES = {"awq": "scales", "gptq": "scales", "compressed-tensors": "weight_scale"}


def refusal(directory, *parts, values=False):
    """The error of reading ``directory``: one line that has every one of ``parts``. ``values`` reads the layers too."""
    with pytest.raises(CheckpointError) as caught:
        dict(read(directory).weights) if values else read(directory)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text
    return text


@pytest.fixture
def checkpoint(make_model, tmp_path):
    def build(method="gptq", **options):
        kind = {k: options.pop(k) for k in ("act_order", "scaled", "symmetric") if k in options}
        return make_model(**kind).write(tmp_path / "m", method, **options)

    return build


def mend(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {k: v for k, v in (config["quantization_config"] | changes).items() if v != "gone"}
    path.write_text(json.dumps(config))


def test_not_a_directory(checkpoint, tmp_path):
    refusal(tmp_path / "nowhere", "nowhere", "no such directory")
    refusal(checkpoint() / FILE, FILE, "not a directory")


@pytest.mark.parametrize(
    ("content", "says"), [(None, "missing"), (b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[]", "object")]
)
def test_config_missing_or_damaged(checkpoint, content, says):
    directory = checkpoint()
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_bytes(content)
    refusal(directory, "config.json", says)


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        ("gptq", {"bits": 8}, ["bits is 8", "4-bit"]),
        ("gptq", {"bits": "four"}, ["bits is 'four'", "whole number"]),
        ("gptq", {"bits": "gone"}, ["bits is None"]),
        ("gptq", {"quant_method": "hqq"}, ["quant_method 'hqq'", "awq, gptq, compressed-tensors"]),
        ("gptq", {"quant_method": "gone"}, ["quant_method is None"]),
        ("gptq", {"checkpoint_format": "marlin"}, ["checkpoint_format is 'marlin'", "gptq_v2"]),
        ("gptq", {"group_size": 0}, ["group_size is 0"]),
        ("gptq", {"group_size": 48}, ["qweight", "no multiple of group size 48"]),
        ("gptq", {"group_size": 64}, ["qzeros", "group size 64"]),
        ("gptq", {"sym": 1}, ["sym is 1", "true or false"]),
        ("gptq", {"dynamic": {"+:.*down.*": {"bits": 8}}}, ["dynamic"]),
        ("awq", {"version": "gemv"}, ["version is 'gemv'", "gemm"]),
        ("awq", {"zero_point": False}, ["zero_point is False", "gptq"]),
        ("compressed-tensors", {"format": "int-quantized"}, ["format is 'int-quantized'", "pack-quantized"]),
        ("compressed-tensors", {"config_groups": {}}, ["config_groups"]),
        ("compressed-tensors", {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, ["group_0.weights.bits is 8"]),
    ],
)
def test_unsupported_declaration(checkpoint, method, changes, says):
    directory = checkpoint(method)
    mend(directory, **changes)
    refusal(directory, str(directory), *says)


def test_config_groups_that_differ(checkpoint):
    directory = checkpoint("compressed-tensors")
    group = json.loads((directory / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    same = {"group_0": group, "group_1": {**group, "targets": ["re:.*down_proj"]}}
    mend(directory, config_groups=same)
    assert read(directory).config.group_size == 32
    mend(directory, config_groups=same | {"group_1": {**group, "weights": {**group["weights"], "group_size": 64}}})
    refusal(directory, "config.json", "config_groups", "differing schemes")
    mend(directory, config_groups={"group_0": {**group, "input_activations": {"num_bits": 8}}})
    refusal(directory, "config.json", "input_activations", "weight-only")


def test_not_quantised(checkpoint):
    directory = checkpoint()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    refusal(directory, "config.json", "no quantization_config")


def test_declaration_in_a_file_of_its_own(checkpoint):
    directory = checkpoint()
    config = json.loads((directory / "config.json").read_text())
    declared = config.pop("quantization_config")
    del declared["quant_method"]
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "quantize_config.json").write_text(json.dumps(declared))
    assert read(directory).config.source.name == "quantize_config.json"
    (directory / "quantize_config.json").write_text(json.dumps(declared | {"bits": 3}))
    refusal(directory, "quantize_config.json", "bits is 3")


def parts_of(method):
    act = {"awq": ["qweight", "qzeros", "scales"], "gptq": ["qweight", "qzeros", "scales", "g_idx"]}
    return act.get(method, ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"])


EVERY_PART = [(m, p) for m in METHODS for p in parts_of(m)]


@pytest.mark.parametrize(("method", "part"), EVERY_PART)
def test_missing_tensor(checkpoint, edit, method, part):
    directory = checkpoint(method, act_order=method != "awq")
    edit(directory / FILE, lambda t: t.pop(f"{MODULE}.{part}"))
    refusal(directory, FILE, f"'{MODULE}.{part}' is missing")


@pytest.mark.parametrize(("method", "part"), EVERY_PART)
def test_wrong_dtype(checkpoint, edit, method, part):
    directory = checkpoint(method, act_order=method != "awq")
    name = f"{MODULE}.{part}"
    edit(directory / FILE, lambda t: t.__setitem__(name, t[name].to(torch.int16)))
    refusal(directory, FILE, name, "not I16")


@pytest.mark.parametrize(("method", "part"), EVERY_PART)
def test_wrong_shape(checkpoint, edit, method, part):
    directory = checkpoint(method, act_order=method != "awq")
    name = f"{MODULE}.{part}"
    edit(directory / FILE, lambda t: t.__setitem__(name, t[name][:-1].contiguous()))
    text = refusal(directory, FILE, MODULE)
    if part not in ("qweight", "weight_packed"):  # a cut code tensor changes K or N, so that a companion is named
        assert name in text


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("value", "says"), [(float("nan"), "is not finite"), (float("inf"), "is not finite"), (0.0, "is zero")]
)
def test_bad_scales(checkpoint, edit, method, value, says):
    directory = checkpoint(method)
    name = f"{MODULE}.{SCALES[method]}"
    edit(directory / FILE, lambda t: t[name].__setitem__((2, 3), value))
    refusal(directory, FILE, f"{name!r}: element [2, 3] {says}", values=True)


@pytest.mark.parametrize(("method", "part"), [("gptq", "g_idx"), ("compressed-tensors", "weight_g_idx")])
@pytest.mark.parametrize(("value", "says"), [(-1, "is not in 0 to 3"), (4, "is not in 0 to 3"), (None, "has not 32 rows")])
def test_bad_group_index(checkpoint, edit, method, part, value, says):
    directory = checkpoint(method, act_order=True)
    name = f"{MODULE}.{part}"

    def damage(tensors):
        tensors[name][17] = (tensors[name][17] + 1) % 4 if value is None else value

    edit(directory / FILE, damage)
    refusal(directory, FILE, name, "element [17]" if value is not None else "element", says, values=True)


@pytest.mark.parametrize(("method", "part"), [("gptq", "g_idx"), ("compressed-tensors", "weight_g_idx")])
def test_a_group_index_may_be_int64(checkpoint, edit, method, part):
    directory = checkpoint(method, act_order=True)
    wanted = read(directory).weight(MODULE)
    edit(directory / FILE, lambda t: t.__setitem__(f"{MODULE}.{part}", t[f"{MODULE}.{part}"].long()))
    assert read(directory).weight(MODULE).equals(wanted)


def test_one_group_needs_no_group_index(make_model, tmp_path, edit):
    """desc_act with group size -1 says nothing: there is one order of one group."""
    model = make_model(group=-1, symmetric=True)
    directory = model.write(tmp_path / "m", "gptq")
    mend(directory, desc_act=True)
    edit(directory / FILE, lambda t: [t.pop(name) for name in list(t) if name.endswith("g_idx")])
    assert read(directory).weight(MODULE).equals(model.weights[MODULE])


@pytest.mark.parametrize(("order", "index"), [("dynamic", True), ("group", True), ("weight", False), ("static", False)])
def test_names_of_act_order(checkpoint, order, index):
    directory = checkpoint("compressed-tensors", act_order=True)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = order
    (directory / "config.json").write_text(json.dumps(config))
    assert read(directory).config.desc_act is index


def test_float32_scales_need_a_dtype(checkpoint, edit):
    directory = checkpoint()
    name = f"{MODULE}.scales"
    edit(directory / FILE, lambda t: t.__setitem__(name, t[name].float() * (1 + 2**-20)))
    refusal(directory, FILE, name, "pass dtype", values=True)
    assert read(directory, dtype=torch.float16).weight(MODULE).dtype == torch.float16
    edit(directory / FILE, lambda t: t[name].mul_(2.0**-30))
    with pytest.raises(CheckpointError, match=r"scales.*leaves the range of torch\.float16"):
        read(directory, dtype=torch.float16).weight(MODULE)


def test_weight_shape_that_contradicts(checkpoint, edit):
    directory = checkpoint("compressed-tensors")
    name = f"{MODULE}.weight_shape"
    edit(directory / FILE, lambda t: t[name].copy_(t[name].flip(0)))
    refusal(directory, FILE, name, "[128, 64]", "[64, 128]")


def test_input_scales(checkpoint, edit):
    directory = checkpoint("awq", scaled=True)
    path, name = directory / "qlab" / "input_scales.safetensors", f"{MODULE}.input_scale"
    edit(path, lambda t: t[name].__setitem__(5, 0.0))
    refusal(directory, "input_scales.safetensors", name, "positive", values=True)
    edit(path, lambda t: t.__setitem__(name, t[name][:-1].clone()))
    refusal(directory, "input_scales.safetensors", name, "F32 [128]", "F32 [127]")
    edit(path, lambda t: t.__setitem__("model.mystery.input_scale", t.pop(name)))
    refusal(directory, "input_scales.safetensors", "model.mystery.input_scale", "no quantised module")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickles_are_refused_by_name(checkpoint, name):
    directory = checkpoint()
    (directory / FILE).rename(directory / name)
    refusal(directory, name, "pickle", "convert")


def test_no_tensors_at_all(checkpoint, edit):
    directory = checkpoint()
    mend(directory, quant_method="awq")
    refusal(directory, "qweight")  # GPTQ's shapes read as AWQ's
    edit(directory / FILE, lambda t: [t.pop(n) for n in list(t) if "proj" in n])
    refusal(directory, "no tensor '*.qweight'")
    (directory / FILE).unlink()
    refusal(directory, "no *.safetensors file")


@pytest.fixture
def sharded(checkpoint):
    directory = checkpoint(shard_bytes=20_000)
    index = directory / "model.safetensors.index.json"
    table = json.loads(index.read_text())

    def point(name, file):
        table["weight_map"][name] = file
        index.write_text(json.dumps(table))
        return directory

    return directory, table["weight_map"], point


@pytest.mark.parametrize(
    "path", ["../other/model.safetensors", "/etc/passwd", "a/../../b.safetensors", "", "C:\\x.safetensors", "..\\x"]
)
def test_index_cannot_leave_the_directory(sharded, path):
    _, _, point = sharded
    refusal(point(f"{MODULE}.scales", path), "index.json", repr(path), "leaves the checkpoint directory")


def test_links_cannot_leave_the_directory(sharded, tmp_path):
    directory, table, _ = sharded
    shard = directory / table[f"{MODULE}.scales"]
    shutil.move(shard, tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    refusal(directory, "index.json", shard.name, "leaves the checkpoint directory by a link")


def test_loop_of_links(sharded):
    directory, table, _ = sharded
    shard = directory / table[f"{MODULE}.scales"]
    shard.unlink()
    shard.symlink_to(shard.name)
    refusal(directory, shard.name)


def test_a_snapshot_of_the_hub_cache_is_read(checkpoint, tmp_path):
    """Its files are links to a sibling folder: the one way out that is not an attack."""
    source = checkpoint()
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, blobs / f"{i}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"{i}", snapshot))
    assert read(snapshot).weight(MODULE).equals(read(source).weight(MODULE))


def test_index_that_does_not_fit_its_shards(sharded):
    directory, table, point = sharded
    name = f"{MODULE}.scales"
    right = table[name]
    refusal(point(name, "model-00099-of-00099.safetensors"), "index.json", name, "model-00099-of-00099", "missing")
    wrong = next(f for f in table.values() if f != right)
    refusal(point(name, wrong), wrong, name, "missing")
    refusal(point(name, "pytorch_model-00001.bin"), "pytorch_model-00001.bin", "pickle")
    point(name, right)
    (directory / right).unlink()
    refusal(directory, "index.json", right, "missing")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[", '{"weight_map": {}}'])
def test_damaged_index(sharded, content):
    directory, _, _ = sharded
    (directory / "model.safetensors.index.json").write_text(content)
    refusal(directory, "" if content == '{"weight_map": {}}' else "model.safetensors.index.json")


def test_one_tensor_in_two_files(checkpoint):
    directory = checkpoint()
    shutil.copy(directory / FILE, directory / "other.safetensors")
    refusal(directory, "other.safetensors", "is also in model.safetensors")


def test_unknown_names(checkpoint):
    c = read(checkpoint())
    with pytest.raises(CheckpointError, match=r"'model\.nothing' is not quantised"):
        c.weight("model.nothing")
    with pytest.raises(CheckpointError, match=r"'model.nothing.weight' is in no file"):
        c.tensor("model.nothing.weight")
    assert "model.nothing" not in c.weights
