"""Which rows of which linears a recording keeps whole."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Sequence
from pathlib import Path

from qlab.checkpoint.files import read_json
from qlab.engine.run import Tap
from qlab.errors import CheckpointError, QlabError
from qlab.lab.activations import TAPS


def linear_names(directory: Path) -> tuple[str, ...]:
    """Linears of a Llama-like model as vLLM fuses them, in the order of the model. Raises CheckpointError."""
    depth = read_json(directory, "config.json").get("num_hidden_layers")
    if type(depth) is not int or depth < 1:
        raise CheckpointError(f"{directory / 'config.json'}: num_hidden_layers is {depth!r}; is this a Llama-like model?")
    return tuple(f"model.layers.{i}.{tap}" for i in range(depth) for tap in TAPS)


def choose(asked: str, linears: Sequence[str], fed: Sequence[int], seed: int) -> frozenset[Tap]:
    """``--rows``: so many (linear, position) pairs drawn per sequence of ``fed`` tokens, or all rows of a glob's linears.

    The same seed draws the same pairs. Raises QlabError naming the option.
    """
    if asked.isdecimal():
        drawn = random.Random(seed)
        taps = []
        for sequence, n in enumerate(fed):
            everywhere = len(linears) * n
            if not 1 <= int(asked) <= everywhere:
                raise QlabError(f"--rows {asked}: sequence {sequence} has {everywhere} rows; ask for 1 to {everywhere}")
            for place in drawn.sample(range(everywhere), int(asked)):
                taps.append(Tap(linears[place // n], sequence, place % n))
        return frozenset(taps)
    names = fnmatch.filter(linears, asked)
    if not names:
        raise QlabError(f"--rows {asked!r} is no number and matches no linear; names are like {linears[0]}")
    return frozenset(Tap(name, sequence, t) for name in names for sequence, n in enumerate(fed) for t in range(n))
