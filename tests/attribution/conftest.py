"""A tiny Llama, its checkpoints, and what quantising it again needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qlab.attribution.requantize import Calibration
from qlab.data import calibration_text
from tests.kernels.test_damaged_file import FLIP
from tests.tiny_llama import awq, changed, gptq, parameters, relative, tokenizer_files, unquantised, write_checkpoint

__all__ = ["awq", "changed", "gptq", "parameters", "relative", "tokenizer_files", "unquantised", "write_checkpoint"]


@pytest.fixture(scope="session")
def few():
    """Little text: 4 rows of 32 tokens."""
    return Calibration(calibration_text(), samples=4, length=32)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Made checkpoints go into the tests' own folder, and never into the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLAB_CACHE", str(folder))
        yield folder / "requantized"


@pytest.fixture
def flip():
    """Let another process flip bits (``mask``) of one nibble of a tensor in a checkpoint's file."""

    def go(folder, tensor, word, nibble, mask):
        place = [folder / "model.safetensors", tensor, word, nibble, mask]
        subprocess.run([sys.executable, "-c", FLIP, *map(str, place)], check=True, timeout=60)

    return go
