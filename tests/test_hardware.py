"""The GPU table: its facts against each other, the message for an unknown key, and what the driver reports."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from qlab.errors import QlabError
from qlab.hardware import AMPERE, GPUS, HOPPER, VOLTA, Gpu, detect, gpu


def test_keys_are_unique_and_lower_case() -> None:
    keys = [g.key for g in GPUS]
    assert len(set(keys)) == len(keys)
    assert all(k == k.lower() for k in keys)


@pytest.mark.parametrize("g", GPUS, ids=lambda g: g.key)
def test_row_is_plausible(g: Gpu) -> None:
    assert 20 <= g.sms <= 200
    assert 0.2e12 <= g.bandwidth <= 10e12
    expected = VOLTA if g.capability == (7, 0) else AMPERE if g.capability < (9, 0) else HOPPER
    assert g.step == expected


def test_known_sm_counts_and_steps() -> None:
    assert [gpu(k).sms for k in ("a100", "h100", "h100-pcie", "h200", "b200")] == [108, 132, 114, 132, 148]
    assert (AMPERE.fraction_bits, AMPERE.terms, AMPERE.zero_exponent) == (24, 8, -132)
    assert (HOPPER.fraction_bits, HOPPER.terms, HOPPER.zero_exponent) == (25, 16, -133)


def test_key_in_any_case() -> None:
    assert gpu("H100") is gpu("h100")


def test_unknown_key_names_the_known_ones() -> None:
    with pytest.raises(QlabError, match=r"unknown GPU 'h1000'; known: v100, .*h100, h100-pcie, h200, b200$"):
        gpu("h1000")


def test_h200_computes_what_h100_computes_and_the_pcie_card_does_not() -> None:
    h100 = gpu("h100")
    assert gpu("h200").same_arithmetic(h100)
    assert not gpu("h100-pcie").same_arithmetic(h100)
    assert not gpu("a100").same_arithmetic(h100)


def _driver(monkeypatch: pytest.MonkeyPatch, name: str, sms: int, capability: tuple[int, int]) -> None:
    properties = SimpleNamespace(name=name, multi_processor_count=sms, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.parametrize("g", GPUS, ids=lambda g: g.key)
def test_detect_finds_every_row(monkeypatch: pytest.MonkeyPatch, g: Gpu) -> None:
    _driver(monkeypatch, g.name, g.sms, g.capability)
    assert detect() is g


def test_detect_keeps_a_variants_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(monkeypatch, "NVIDIA GH200 480GB", 132, (9, 0))
    found = detect()
    assert found is not None
    assert (found.key, found.name, math.isnan(found.bandwidth)) == ("h100", "NVIDIA GH200 480GB", True)
    assert found.same_arithmetic(gpu("h200"))


@pytest.mark.parametrize(
    ("name", "sms", "capability", "step"),
    [
        ("Quadro RTX 6000", 72, (7, 5), AMPERE),
        ("NVIDIA RTX A2000", 26, (8, 6), AMPERE),
        ("TITAN V", 80, (7, 0), VOLTA),
        ("NVIDIA H100 reduced", 66, (9, 0), HOPPER),
        ("NVIDIA GeForce RTX 5090", 170, (12, 0), HOPPER),
    ],
)
def test_detect_takes_the_step_from_the_capability(
    monkeypatch: pytest.MonkeyPatch, name: str, sms: int, capability: tuple[int, int], step: object
) -> None:
    _driver(monkeypatch, name, sms, capability)
    found = detect()
    assert found is not None
    assert (found.name, found.sms, found.capability, found.step) == (name, sms, capability, step)


def test_detect_without_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(monkeypatch, "NVIDIA GeForce GTX 1080", 20, (6, 1))
    assert detect() is None


def test_detect_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect() is None
