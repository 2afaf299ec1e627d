"""Round trips of every format, one file and many, and what other libraries make of the directories."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from qlab.checkpoint import read
from qlab.errors import CheckpointError, PackingError, QlabError
from qlab.inputs import random_weight

FORMATS = [
    ("awq", {}, {}),
    ("awq", {"scaled": True, "dtype": torch.bfloat16}, {}),
    ("awq", {"symmetric": True, "group": -1}, {}),
    ("gptq", {}, {"version": 1}),
    ("gptq", {}, {"version": 2}),
    ("gptq", {"symmetric": True, "act_order": True}, {"version": 1}),
    ("gptq", {"act_order": True, "dtype": torch.bfloat16}, {"version": 2}),
    ("gptq", {"symmetric": True, "group": -1}, {"version": 2}),
    ("compressed-tensors", {}, {}),
    ("compressed-tensors", {"symmetric": True, "act_order": True}, {}),
    ("compressed-tensors", {"symmetric": True, "group": -1, "dtype": torch.bfloat16}, {}),
    ("compressed-tensors", {"act_order": True}, {}),
]
CASES = [pytest.param(*f, id="-".join([f[0], *f[1], *(f"v{v}" for v in f[2].values())])) for f in FORMATS]


@pytest.mark.parametrize("shard_bytes", [2**30, 20_000], ids=["one", "sharded"])
@pytest.mark.parametrize(("method", "kind", "options"), CASES)
def test_round_trip(make_model, tmp_path, method, kind, options, shard_bytes):
    model = make_model(**kind)
    directory = model.write(tmp_path / "m", method, shard_bytes=shard_bytes, **options)
    c = read(directory)
    assert c.method == method
    assert list(c.names()) == list(model.weights)
    for name, w in c.weights.items():
        assert w.name == name
        assert w.equals(model.weights[name]), name
    assert set(c.others()) == set(model.others)
    for name, t in model.others.items():
        assert torch.equal(c.tensor(name), t)
    shards = sorted(p.name for p in directory.glob("*.safetensors"))
    assert (len(shards) > 1) == (shard_bytes < 2**30)
    assert all((directory / s).stat().st_size < 20_000 + 4_000 for s in shards if len(shards) > 1)


def test_declares_what_the_weights_are(make_model, tmp_path):
    def declared(model, method, **options):
        directory = model.write(tmp_path / f"{len(list(tmp_path.iterdir()))}", method, **options)
        return json.loads((directory / "config.json").read_text())["quantization_config"]

    q = declared(make_model(symmetric=True, act_order=True), "gptq")
    assert (q["sym"], q["desc_act"], q["group_size"], q["checkpoint_format"]) == (True, True, 32, "gptq")
    q = declared(make_model(), "gptq", version=2)
    assert (q["sym"], q["desc_act"], q["checkpoint_format"]) == (False, False, "gptq_v2")
    q = declared(make_model(group=-1), "awq")
    assert (q["group_size"], q["zero_point"], q["version"]) == (-1, True, "gemm")
    q = declared(make_model(), "compressed-tensors")["config_groups"]["group_0"]["weights"]
    assert (q["symmetric"], q["strategy"], q["group_size"], q["actorder"]) == (False, "group", 32, None)


@pytest.mark.parametrize("quantised", [False, True])
def test_declares_whether_lm_head_is_quantised(make_model, tmp_path, quantised):
    model = make_model()
    del model.others["lm_head.weight"]  # tied, or quantised
    if quantised:
        model.weights["lm_head"] = random_weight(64, 24, 32)

    def declared(method):
        directory = model.write(tmp_path / method, method)
        assert all(w.equals(model.weights[name]) for name, w in read(directory).weights.items())
        return json.loads((directory / "config.json").read_text())["quantization_config"]

    assert declared("gptq")["lm_head"] is quantised
    assert declared("awq").get("lm_head", False) is quantised
    assert ("lm_head" in declared("compressed-tensors")["ignore"]) is not quantised


def test_one_asymmetric_layer_gives_every_layer_its_zero_points(make_model, tmp_path):
    model = make_model(symmetric=True)
    odd = "model.layers.1.mlp.up_proj"
    model.weights[odd] = replace(make_model().weights[odd])
    c = read(model.write(tmp_path / "m", "compressed-tensors"))
    assert all(w.equals(model.weights[n]) for n, w in c.weights.items())
    assert "model.layers.0.mlp.up_proj.weight_zero_point" in c._files


def test_unquantised_linears_are_declared(make_model, tmp_path):
    model = make_model()
    for shard in ("q", "k", "v"):
        name = f"model.layers.0.self_attn.{shard}_proj"
        model.others[f"{name}.weight"] = model.weights.pop(name).dequantize(torch.float16).t().contiguous()
    config = json.loads((model.write(tmp_path / "g", "gptq") / "config.json").read_text())["quantization_config"]
    assert any("q_proj" in rule for rule in config["dynamic"])
    assert "-:^model\\.layers\\.0\\.self_attn\\.qkv_proj$" in config["dynamic"]
    assert not any("lm_head" in rule for rule in config["dynamic"])
    config = json.loads((model.write(tmp_path / "a", "awq") / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.v_proj" in config["modules_to_not_convert"]
    assert len(read(tmp_path / "g").names()) == len(model.weights)


def test_input_scales_stay_out_of_sight_of_loaders(make_model, tmp_path):
    directory = make_model(scaled=True).write(tmp_path / "m", "awq")
    assert [p.name for p in directory.glob("*.safetensors")] == ["model.safetensors"]
    with safe_open(directory / "model.safetensors", "pt") as f:
        assert not [k for k in f.keys() if "input_scale" in k]  # noqa: SIM118
        assert f.metadata() == {"format": "pt"}


def test_tied_and_strided_tensors_are_written(make_model, tmp_path):
    model = make_model()
    model.others["lm_head.weight"] = model.others["model.embed_tokens.weight"]
    model.others["model.strided.weight"] = torch.arange(12.0).reshape(3, 4).t()
    c = read(model.write(tmp_path / "m", "awq"))
    assert torch.equal(c.tensor("lm_head.weight"), model.others["model.embed_tokens.weight"])
    assert torch.equal(c.tensor("model.strided.weight"), model.others["model.strided.weight"])


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_follow_the_umask(make_model, tmp_path, umask):
    before = os.umask(umask)
    try:
        directory = make_model(scaled=True).write(tmp_path / "m", "awq", shard_bytes=20_000, extra_files={"docs/LICENSE": b"x"})
    finally:
        os.umask(before)
    for path in (directory, *directory.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_extra_files_travel(make_model, tmp_path):
    source = tmp_path / "tokenizer.json"
    source.write_text("{}")
    directory = make_model().write(tmp_path / "m", "awq", extra_files={"tokenizer.json": source, "docs/LICENSE": b"text"})
    assert (directory / "tokenizer.json").read_text() == "{}"
    assert (directory / "docs" / "LICENSE").read_bytes() == b"text"


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "config.json", "more.safetensors"])
def test_extra_files_cannot_leave_or_replace(make_model, tmp_path, name):
    with pytest.raises(CheckpointError, match=r"leaves the checkpoint|writes itself"):
        make_model().write(tmp_path / "m", "awq", extra_files={name: b"x"})
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_nothing_behind(make_model, tmp_path):
    model = make_model()
    bad = "model.layers.1.mlp.down_proj"
    zeros = model.weights[bad].zeros.clone()
    zeros[1, 3] = 0
    model.weights[bad] = replace(model.weights[bad], zeros=zeros)
    with pytest.raises(PackingError, match=r"layers\.1\.mlp\.down_proj.*group 1, column 3"):
        model.write(tmp_path / "m", "gptq")
    assert list(tmp_path.iterdir()) == []


def test_existing_directory_is_replaced_only_on_demand(make_model, tmp_path):
    target = make_model().write(tmp_path / "m", "awq", shard_bytes=20_000)
    with pytest.raises(CheckpointError, match="exists already"):
        make_model().write(target, "gptq")
    make_model(symmetric=True).write(target, "gptq", overwrite=True)
    assert read(target).method == "gptq"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert [p.name for p in target.glob("*.safetensors*")] == ["model.safetensors"]
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="no checkpoint to overwrite"):
        make_model().write(papers, "awq", overwrite=True)
    assert (papers / "thesis.tex").exists()


def test_refuses_what_one_configuration_cannot_say(make_model, tmp_path):
    model, mixed = make_model(), make_model()
    last = next(reversed(mixed.weights))
    mixed.weights[last] = make_model(group=64).weights[last]
    with pytest.raises(QlabError, match=r"down_proj.*group size 64"):
        mixed.write(tmp_path / "m", "awq")
    mixed.weights[last] = make_model(dtype=torch.bfloat16).weights[last]
    with pytest.raises(QlabError, match="both fp16 and bf16"):
        mixed.write(tmp_path / "m", "awq")
    with pytest.raises(QlabError, match="method 'squeeze'"):
        model.write(tmp_path / "m", "squeeze")
    with pytest.raises(QlabError, match="version 3"):
        model.write(tmp_path / "m", "gptq", version=3)
    with pytest.raises(QlabError, match="act-order"):
        make_model(act_order=True).write(tmp_path / "m", "awq")
    model.others[f"{last}.weight"] = torch.zeros(2, 2)
    with pytest.raises(QlabError, match="would clash"):
        model.write(tmp_path / "m", "awq")
    assert list(tmp_path.iterdir()) == []


def test_writes_from_a_checkpoint_lazily(make_model, tmp_path):
    """A converted checkpoint holds the same weights: no step in between needs the whole model."""
    model = make_model()
    first = read(model.write(tmp_path / "awq", "awq"))
    others = {n: first.tensor(n) for n in first.others()}
    config = {k: v for k, v in first.hf_config.items() if k != "quantization_config"}
    from qlab.checkpoint import write

    second = read(write(tmp_path / "gptq", "gptq", first.weights, others, config, shard_bytes=30_000))
    assert all(w.equals(model.weights[n]) for n, w in second.weights.items())


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors"])
def test_transformers_accepts_the_declaration(make_model, tmp_path, method):
    from transformers import AutoConfig
    from transformers.utils.quantization_config import AwqConfig, GPTQConfig

    config = AutoConfig.from_pretrained(make_model(symmetric=True, act_order=method != "awq").write(tmp_path / "m", method))
    declared = config.quantization_config
    assert declared["quant_method"] == method
    if method != "compressed-tensors":  # that one needs the library; see test_compressed_tensors.py
        parsed = {"awq": AwqConfig, "gptq": GPTQConfig}[method].from_dict(dict(declared))
        assert (parsed.bits, parsed.group_size) == (4, 32)
