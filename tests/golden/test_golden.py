"""Every recorded output of a real kernel is replayed bit for bit on the CPU: 0 differing bits."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.record_golden import Bits, Golden, load, save
from qlab.backends.registry import kernels
from qlab.compare import digest
from qlab.errors import QlabError
from qlab.recipes import builders
from qlab.replay import missing
from tests.golden.truth import GOLDEN, MOST_ADDENDS, SILICON, Evidence, golden, silicon

RECORDING = GOLDEN / "golden.json"
RECORDINGS = sorted(p.parent for p in SILICON.glob("*/silicon.json"))
SMALL = 300_000
"""Weights of at most so many elements of the large recordings, so that the test stays quick."""
NOT_RECORDED = {
    "vllm.awq_dequantize",
    "triton.awq_dequantize",
    "triton.w4a16.dequantize",
    "triton.w4a16",
    "cuda.marlin",
    "cuda.split",
    "cuda.batch_invariant",
    "cuda.hardware_invariant",
}
"""cuBLAS's bits, which are opaque, and our own kernels, whose replay bench/prove_kernels.py compares with the GPU's output."""

pytestmark = pytest.mark.skipif(bool(missing("native")), reason=f"the native engine cannot run: {missing('native')}")
needs_golden = pytest.mark.skipif(
    not RECORDING.exists(), reason="tests/golden/golden.json is not recorded yet: python -m bench.record_golden on a GPU"
)


@pytest.fixture(scope="module")
def recorded() -> tuple[Golden, Bits]:
    return load(GOLDEN)


def faults(evidence: Iterable[Evidence]) -> tuple[list[str], dict[str, int]]:
    """What differs, and how many records of each kernel were compared. A replay stands for every record that it answers."""
    found: list[str] = []
    counts: dict[str, int] = {}
    known: set[tuple[str, str, str]] = set()
    for e in evidence:
        counts[e.kernel] = counts.get(e.kernel, 0) + 1
        if not e.recipe.ordered:
            parts = max(len(getattr(r.tree, "parts", ())) for r in e.recipe.regions)
            found += [e.unreachable()] if e.kernel == "vllm.gptq_gemm" and parts <= MOST_ADDENDS else []
            continue
        replayed = (e.name, e.recipe.hash, e.digest)
        if replayed not in known:
            known.add(replayed)
            found.append(e.fault())
    return [f for f in found if f], counts


@needs_golden
def test_every_record_is_replayed_bit_for_bit(recorded: tuple[Golden, Bits]) -> None:
    found, counts = faults(golden(*recorded))
    assert not found, f"{len(found)} of {sum(counts.values())} records:\n" + "\n".join(found)
    assert sum(counts.values()) == sum(len(p.records) for p in recorded[0].problems)


@needs_golden
def test_inputs_are_those_that_the_kernels_had(recorded: tuple[Golden, Bits]) -> None:
    from bench.problems import inputs

    for p in recorded[0].problems:
        made = inputs(p.trial)
        bias = "" if made.bias is None else digest(made.bias)
        assert (made.weight.digest(), digest(made.x), bias) == (p.weight_digest, p.input_digest, p.bias_digest), str(p.trial)


@needs_golden
def test_the_recording_holds_every_kernel_whose_bits_a_recipe_claims(recorded: tuple[Golden, Bits]) -> None:
    claimed = {k.name for k in kernels() if k.name in builders()} - NOT_RECORDED
    counts = dict.fromkeys(claimed, 0)
    for p in recorded[0].problems:
        for r in p.records:
            counts[r.kernel] += 1
    assert recorded[0].failed == ()
    assert not [name for name, count in counts.items() if count < 20], counts


@needs_golden
def test_kernels_with_a_fixed_order_gave_the_same_bits_in_every_run(recorded: tuple[Golden, Bits]) -> None:
    for p in recorded[0].problems:
        for r in p.records:
            assert r.repeatable or r.kernel == "vllm.gptq_gemm", f"{r.kernel} on {p.trial}"


@pytest.mark.skipif(not RECORDINGS, reason="results/*/silicon.json is missing; record one with bench/record_silicon.py")
def test_samples_of_the_large_recordings_are_replayed_bit_for_bit() -> None:
    """Two GPUs that gave the same bits are answered by one replay."""
    found, counts = faults(e for folder in RECORDINGS for e in silicon(folder, SMALL))
    assert not found, f"{len(found)} of {sum(counts.values())} records:\n" + "\n".join(found)
    assert sum(counts.values()) > 500 * len(RECORDINGS)


def copied(folder: Path, recording: Golden, stored: Bits, problems: int = 1) -> Path:
    """A recording of the first problems alone."""
    save(folder, replace(recording, problems=recording.problems[:problems]), stored)
    return folder


def flip(folder: Path, place: int) -> bytes:
    """The npz with one bit of one output changed."""
    stored = np.load(folder / "golden.npz")["bits"]
    stored[place] ^= 1
    buffer = io.BytesIO()
    np.savez_compressed(buffer, bits=stored)
    return buffer.getvalue()


@needs_golden
def test_a_changed_bit_is_refused_and_a_forged_one_fails(recorded: tuple[Golden, Bits], tmp_path: Path) -> None:
    folder = copied(tmp_path, *recorded)
    assert faults(golden(*load(folder)))[0] == []
    first = recorded[0].problems[0].records[0]
    changed = flip(folder, first.offset)
    (folder / "golden.npz").write_bytes(changed)
    with pytest.raises(QlabError, match="sha256"):
        load(folder)
    text = (folder / "golden.json").read_text()
    whole = load(copied(tmp_path, *recorded))[0].npz_sha256
    (folder / "golden.npz").write_bytes(changed)
    (folder / "golden.json").write_text(text.replace(whole, hashlib.sha256(changed).hexdigest()))
    found, _ = faults(golden(*load(folder)))
    assert len(found) >= 1
    assert "1 of" in found[0]
    assert str(recorded[0].problems[0].trial) in found[0]


@needs_golden
def test_a_record_beyond_the_file_is_refused(recorded: tuple[Golden, Bits], tmp_path: Path) -> None:
    recording, stored = recorded
    save(tmp_path, recording, stored[: len(stored) // 2])
    with pytest.raises(QlabError, match="lacks the outputs"):
        load(tmp_path)
