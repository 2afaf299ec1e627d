"""A nibble flipped in a checkpoint's file by another process is found by the probe, with its place."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from qlab import checkpoint
from qlab.kernels.__main__ import app
from qlab.lab.results import LabResult

FLIP = """
import json, struct, sys
path, tensor, word, nibble, mask = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
with open(path, "r+b") as f:
    size = struct.unpack("<Q", f.read(8))[0]
    start = json.loads(f.read(size))[tensor]["data_offsets"][0]
    at = 8 + size + start + 4 * word + nibble // 2
    f.seek(at)
    byte = f.read(1)[0] ^ (mask << 4 * (nibble % 2))
    f.seek(at)
    f.write(bytes([byte]))
"""


@pytest.fixture
def flip(tmp_path):
    """Copy a checkpoint and let another process flip bits of one nibble in the copy; both folders."""

    def go(good, tensor, word, nibble, mask):
        suspect = tmp_path / "suspect"
        shutil.copytree(good, suspect)
        place = [suspect / "model.safetensors", tensor, word, nibble, mask]
        subprocess.run([sys.executable, "-c", FLIP, *map(str, place)], check=True, timeout=60)
        return suspect

    return go


def probe(suspect, good, kernels, tmp_path):
    where = ["--model", suspect, "--trusted", good, "--kernels", kernels, "--layers", "*.1.*", "--tokens", 4]
    call = ["--probe", *where, "--json", tmp_path / "r.json"]
    result = CliRunner().invoke(app, [str(a) for a in call], env={"COLUMNS": "240"})
    assert result.exit_code == 0, result.output
    return result.stdout, LabResult.read(tmp_path / "r.json")


def check(stdout, r, layer, said, mismatches=1):
    found = [p for p in r.probes if p.mismatches]
    assert [p.key for p in found] == [c.key for c in r.columns]  # every kernel decodes the file, so every one sees it
    assert {(p.layer, p.mismatches, p.diagnosis) for p in found} == {(layer, mismatches, said)}
    assert said in stdout


def test_awq(awq, flip, tmp_path):
    """Column 21 of v_proj is column 128 + 64 + 21 of the fused qkv; AWQ keeps it in int32 2, nibble 6 of its row."""
    k, n, module = 77, 21, "model.layers.1.self_attn.v_proj"
    suspect = flip(awq, f"{module}.qweight", k * (64 // 8) + n // 8, [0, 4, 1, 5, 2, 6, 3, 7][n % 8], 9)
    code = int(checkpoint.read(awq).weight(module).codes[k, n])
    said = f"codes: k=77, n=213 (column 21 of {module}) holds code {code ^ 9} instead of {code}"
    check(*probe(suspect, awq, "reference.float64,triton.awq*", tmp_path), "model.layers.1.self_attn.qkv_proj", said)


def test_gptq(gptq, flip, tmp_path):
    """Row 30 of up_proj is nibble 6 of int32 row 3; its column 2 is column 256 + 2 of the fused gate_up."""
    k, n, module = 30, 2, "model.layers.1.mlp.up_proj"
    suspect = flip(gptq, f"{module}.qweight", k // 8 * 256 + n, k % 8, 1)
    code = int(checkpoint.read(gptq).weight(module).codes[k, n])
    said = f"codes: k=30, n=258 (column 2 of {module}) holds code {code ^ 1} instead of {code}"
    check(*probe(suspect, gptq, "triton.awq_gemm,triton.gptq_gemm*", tmp_path), "model.layers.1.mlp.gate_up_proj", said)


def test_a_scale_by_one_unit(gptq, flip, tmp_path):
    """Half 2 n of the int32s that hold fp16 scales [4, 128]: group 2, column 6 is the low half of word (2 * 128 + 6) / 2."""
    module = "model.layers.1.self_attn.o_proj"
    suspect = flip(gptq, f"{module}.scales", (2 * 128 + 6) // 2, 0, 1)
    before, after = (float(checkpoint.read(folder).weight(module).scales[2, 6]) for folder in (gptq, suspect))
    w = checkpoint.read(gptq).weight(module)
    moved = int((w.codes[64:96, 6] != 8).sum())
    said = f"scales: group 2, n=6 has {after:.9g} instead of {before:.9g}"
    check(*probe(suspect, gptq, "reference.float32,triton.gptq_gemm", tmp_path), module, said, moved)


def test_the_whole_file_and_another_digest(gptq, flip, tmp_path):
    suspect = flip(gptq, "model.layers.1.mlp.down_proj.qweight", 5, 0, 4)
    _, same = probe(gptq, gptq, "reference.float64", tmp_path)
    assert not any(p.mismatches for p in same.probes)
    _, other = probe(suspect, gptq, "reference.float64", tmp_path)
    changed = [a.layer for a, b in zip(same.inputs, other.inputs, strict=True) if a.weight_digest != b.weight_digest]
    assert changed == ["model.layers.1.mlp.down_proj"]
    assert same.digest != other.digest
