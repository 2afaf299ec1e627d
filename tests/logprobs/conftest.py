"""A small trace of an engine without a model."""

from __future__ import annotations

import pytest

from qlab import data
from qlab.engine.path import Path
from qlab.engine.run import Request, Tap
from qlab.logprobs.record import record
from qlab.logprobs.trace import Trace
from tests.logprobs.fake_engine import LINEARS, FakeEngine
from tests.tiny_llama import awq, gptq, parameters, tokenizer_files, write_checkpoint

__all__ = ["awq", "gptq", "parameters", "tokenizer_files", "write_checkpoint"]

PROMPTS = ((5, 6, 7), (900, 1, 2047, 3))
TAPS = frozenset({Tap(LINEARS[0], 1, 3), Tap(LINEARS[1], 0, 0), Tap(LINEARS[0], 0, 4)})


@pytest.fixture(scope="session")
def fake() -> FakeEngine:
    return FakeEngine(Path.parse("awq_marlin@h100"), data.model_directory("awq"))


@pytest.fixture(scope="session")
def made(fake: FakeEngine) -> Trace:
    return record(fake, Request(PROMPTS, 3, taps=TAPS, digests=True))
