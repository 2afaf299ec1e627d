"""Fuzz: a cut or flipped safetensors file gives CheckpointError or a right reading, never anything else."""

from __future__ import annotations

import json
import random
import struct

import pytest

from qlab.checkpoint import read
from qlab.errors import CheckpointError

FLIPS = 400


def outcome(directory, whole):
    """``refused``, or ``read`` when every layer is what it was; anything else fails the test."""
    try:
        c = read(directory)
        weights = dict(c.weights)
    except CheckpointError:
        return "refused"
    for name, w in weights.items():
        assert w.equals(whole[name]), name
    assert weights.keys() == whole.keys()
    return "read"


@pytest.fixture
def small(make_model, tmp_path):
    model = make_model(symmetric=True)
    for name in list(model.weights)[2:]:
        del model.weights[name]
    return model.write(tmp_path / "m", "gptq"), dict(model.weights)


def test_truncated_at_many_places(small):
    directory, whole = small
    path = directory / "model.safetensors"
    content = path.read_bytes()
    header = struct.unpack("<Q", content[:8])[0]
    near = {0, 1, 7, 8, 9, 8 + header - 1, 8 + header, 8 + header + 1, len(content) - 1}
    rng = random.Random(0)
    for size in sorted(near | {rng.randrange(len(content)) for _ in range(100)}):
        path.write_bytes(content[:size])
        assert outcome(directory, whole) == "refused", size
    path.write_bytes(content + b"\0")
    assert outcome(directory, whole) == "refused"
    path.write_bytes(content)
    assert outcome(directory, whole) == "read"


def test_flipped_bits_in_the_header(small):
    directory, whole = small
    path = directory / "model.safetensors"
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    rng = random.Random(1)
    seen = {"refused": 0, "read": 0}
    for _ in range(FLIPS):
        damaged = bytearray(content)
        damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        seen[outcome(directory, whole)] += 1
    assert seen["refused"] > FLIPS // 2  # the rest hit names of other tensors and the metadata


def test_flipped_bits_in_the_configuration(small):
    directory, whole = small
    path = directory / "config.json"
    content = path.read_bytes()
    rng = random.Random(2)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        outcome(directory, whole)


@pytest.mark.parametrize(
    "header", ['{"a":1}', "[]", '{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}', '{"a":{"dtype":"I32"}}', ""]
)
def test_headers_of_another_shape(small, header):
    directory, whole = small
    raw = header.encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0")
    assert outcome(directory, whole) == "refused"


def test_shard_damage_names_the_shard(make_model, tmp_path):
    directory = make_model().write(tmp_path / "m", "awq", shard_bytes=20_000)
    shard = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]["lm_head.weight"]
    (directory / shard).write_bytes((directory / shard).read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=shard):
        read(directory)
