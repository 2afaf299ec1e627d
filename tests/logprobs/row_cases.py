"""Rows of the shipped model, recorded by the built-in engine, and every linear's weight."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from qlab import data
from qlab.engine.builtin import Builtin
from qlab.engine.path import Path
from qlab.engine.run import Request, Run, Tap
from qlab.engine.schedule import Batching
from qlab.lab.sources import Request as Activations
from qlab.lab.sources import own_weights, same_weights
from qlab.logprobs.prompts import heldout
from qlab.logprobs.row_bench import Checkpoints
from qlab.logprobs.row_record import Recorded
from qlab.logprobs.row_sampling import choose_taps
from qlab.logprobs.taps import linear_names

NAMES = linear_names(data.model_directory("awq"))
NEW = 3
LAYERS = Checkpoints({s: data.model_directory(s) for s in ("awq", "gptq")}, torch.float16)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def prompts() -> tuple[tuple[int, ...], ...]:
    return heldout(data.model_directory("awq"), 2, 24)


def fed() -> list[int]:
    return [len(p) + NEW - 1 for p in prompts()]


@lru_cache(maxsize=8)
def run(generator: str, count: int = 24, seed: str = "s") -> Run:
    """A generator's run with ``count`` sampled rows; 0 keeps every row."""
    path = Path.parse(generator)
    taps = choose_taps(seed, NAMES, fed(), count or len(NAMES) * sum(fed()))
    engine = Builtin(data.model_directory("awq" if path.source == "awq" else "gptq"), path, torch.device("cpu"))
    return engine.run(Request(prompts(), NEW, batching=Batching(16), taps=frozenset(taps)))


def recorded(generator: str, count: int = 24, seed: str = "s", *, whole: bool = True) -> list[Recorded]:
    return [Recorded.of(r, whole=whole) for r in run(generator, count, seed).rows]


def by_tap(rows: list[Recorded]) -> dict[Tap, Recorded]:
    return {r.tap: r for r in rows}


def flipped(row: Recorded, element: int) -> Recorded:
    """The row with the last bit of one output turned."""
    assert row.y is not None
    y = row.y.clone()
    y.view(torch.int16)[element] ^= 1
    return replace(row, y=y)


def paths(text: str) -> list[Path]:
    return [Path.parse(t) for t in text.split()]


def activations(tokens: int, family: str = "awq"):
    """Layers of one checkpoint, or of both with their own inputs, on text that the prompts are not from."""
    request = Activations(torch.float16, tokens, data.calibration_text())
    if family == "both":
        return own_weights(data.model_directory("awq"), data.model_directory("gptq"), request)
    return same_weights(data.model_directory(family), request)  # type: ignore[arg-type]
